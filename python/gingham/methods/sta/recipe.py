"""How STA is trained and evaluated: https://arxiv.org/abs/1811.04129.

for each step:
    clips of P persons, K tracklets each, T random frames a tracklet       see TrackletData
    features, logits, scores, attention = network(clips)
    loss = cross_entropy(logits) + triplet(features), batch-hard + weight * distance of two frames' attention
    Adam; the learning rate is divided by 10 after 1/4, 1/2 and 3/4 of the training

evaluation: the mean over a tracklet's clips, retrieval by distance, see ReidRecipe

The joint loss and random frames are confirmed. There is no official code: weights, optimiser and schedule are options,
whose defaults come from other public code of re-identification in video.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gingham.errors import DataError
from gingham.methods.reid_recipe import ReidRecipe
from gingham.methods.sta.network import STA, FrameRegions
from gingham.methods.sta.objective import clip_losses, occluded_attention, score_entropy


class STARecipe(ReidRecipe):
    """Trains an `STA` on clips, and retrieves tracklets by it.

    It logs ``loss``, its parts ``loss_identity``, ``loss_triplet`` and ``regularization``, and ``entropy``, how evenly
    scores are spread over the frames, 1 being a mean. After ``val_`` or ``test_`` come, besides what `ReidRecipe` logs,
    ``entropy`` and, where the data set knows what is hidden, ``occluded_attention``, how much of the attention lies
    there.

    Args:
        network: options of `gingham.methods.sta.network.STA`.
        identity_weight: of the cross-entropy, 0 or more.
        triplet_weight: of the triplets, 0 or more.
        regularization: weight of the distance between the attention of two frames, 0 or more. Not confirmed; as
            attention sums to 1 in a frame, distances are far below 1.
        pairs: whose attention is compared: of "one" pair of frames, drawn at random from each clip, or of "all".
        margin: of the triplets, or "soft".
        label_smoothing: from 0 to below 1.
        milestones: shares of the training, ascending between 0 and 1, after which the learning rate is divided by 10.
        frames_at_once: how many frames go through the backbone together in evaluation, 1 or more.
        optimizer: as in `gingham.methods.network_recipe.NetworkRecipe`.
        learning_rate: as there.
        weight_decay: as there.
        options: of `gingham.methods.reid_recipe.ReidRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    def __init__(
        self,
        network: dict[str, Any],
        identity_weight: float = 1.0,
        triplet_weight: float = 1.0,
        regularization: float = 1.0,
        pairs: Literal["one", "all"] = "one",
        margin: float | Literal["soft"] = 0.3,
        label_smoothing: float = 0.0,
        milestones: tuple[float, ...] = (0.25, 0.5, 0.75),
        frames_at_once: int = 128,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        learning_rate: float = 3e-4,
        weight_decay: float = 5e-4,
        **options: Any,
    ) -> None:
        super().__init__(
            STA, network, optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, **options
        )
        self.require_not_negative(
            identity_weight=identity_weight, triplet_weight=triplet_weight, regularization=regularization
        )
        if regularization and self.network.attention == "none":
            raise ValueError("regularization must be 0 for a network without attention")
        if pairs not in ("one", "all"):
            raise ValueError(f"pairs must be 'one' or 'all', got {pairs!r}")
        if margin != "soft" and not (not isinstance(margin, str) and margin >= 0):
            raise ValueError(f"margin must be 0 or more, or 'soft', got {margin!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, got {label_smoothing}")
        if sorted({*milestones, 0.0, 1.0}) != [0.0, *milestones, 1.0]:
            raise ValueError(f"milestones must be ascending shares between 0 and 1, got {tuple(milestones)}")
        if frames_at_once < 1:
            raise ValueError(f"frames_at_once must be 1 or more, got {frames_at_once}")
        self.identity_weight, self.triplet_weight, self.regularization = identity_weight, triplet_weight, regularization
        self.pairs: Literal["one", "all"] = pairs
        self.margin: float | Literal["soft"] = margin
        self.label_smoothing, self.milestones, self.frames_at_once = label_smoothing, tuple(milestones), frames_at_once
        #: Of "val" and "test".
        self.entropies = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})
        self.occluded = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})
        self._scores: list[Tensor] | None = None  # of the clips that are evaluated, where they are watched

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "test_sample"):
            raise DataError("STA is trained on tracklets: take gingham.methods.reid_data.TrackletData")
        if stage == "fit" and data.num_persons > self.network_options.get("num_persons", 625):
            raise DataError(
                f"the network has num_persons {self.network.classifier.out_features}, the training set has "
                f"{data.num_persons}"
            )

        counts: tuple[int, int] = (data.persons_per_batch, data.items_per_person)
        if stage == "fit" and self.triplet_weight and min(counts) < 2:
            raise DataError(
                "triplets need two persons in a batch and two tracklets of each, or more: data.persons_per_batch is "
                f"{counts[0]}, data.items_per_person {counts[1]}"
            )

    def rate_factor(self, step: int, total: int) -> float:
        return float(0.1 ** sum(step >= share * total for share in self.milestones))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        clips, persons = batch["frames"], batch["person"]
        output = self.network(_channels_last(clips))
        margin = self.margin if self.triplet_weight else None
        terms = clip_losses(output, persons, margin=margin, label_smoothing=self.label_smoothing, pairs=self.pairs)
        loss = self.identity_weight * terms.identity + self.triplet_weight * terms.triplet
        loss = loss + self.regularization * terms.regularization
        watched = {"loss_identity": terms.identity} | ({} if margin is None else {"loss_triplet": terms.triplet})
        watched |= {"regularization": terms.regularization, "entropy": score_entropy(output.scores.detach())}
        self.log_dict(watched, batch_size=len(clips))
        self.log("loss", loss, prog_bar=True, batch_size=len(clips))
        return loss

    # -------------------------------------------------------------------------------------------- evaluation

    def embed(self, pixels: Tensor) -> Tensor:
        """The features [n, D] of clips [n, T, 3, H, W], T being any number: the backbone sees a part at a time."""
        frames = pixels.flatten(0, 1).split(self.frames_at_once)
        parts = [self.network.regions(part.contiguous(memory_format=torch.channels_last)) for part in frames]
        regions = FrameRegions(
            torch.cat([part.sums for part in parts]), torch.cat([part.energies for part in parts]), parts[0].positions
        )
        clips = torch.arange(len(regions.sums), device=pixels.device).unflatten(0, pixels.shape[:2])
        features, scores = self.network.embed(regions, clips)
        if self._scores is not None:
            self._scores.append(scores)
        return features

    def evaluate(self, batch: Any, split: str) -> None:
        """Count a batch of "val" or "test" in the meters, and watch the scores of its clips."""
        self._scores = []
        super().evaluate(batch, split)
        watched, self._scores = self._scores[:: 2 if self.flip_test else 1], None  # mirrored clips come in between
        hidden = [clip for tracklet in batch.get("occluded", ()) for clip in tracklet]
        for scores in watched:
            self.entropies[split].update(score_entropy(scores), len(scores))  # type: ignore[operator]
            if hidden:
                shares = occluded_attention(scores, torch.stack(hidden[: len(scores)]))
                self.occluded[split].update(shares.mean(), len(scores))  # type: ignore[operator]
                del hidden[: len(scores)]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to collect anew."""
        super().report(split)
        for name, metric in (("entropy", self.entropies[split]), ("occluded_attention", self.occluded[split])):
            mean: Any = metric
            if mean.weight > 0 and not self.trainer.sanity_checking:
                self.log(f"{split}_{name}", mean.compute())
            mean.reset()


def _channels_last(clips: Tensor) -> Tensor:
    frames = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return frames.unflatten(0, clips.shape[:2])
