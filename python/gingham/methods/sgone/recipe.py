"""How SG-One is trained and evaluated: https://arxiv.org/abs/1810.09091 and its official code.

for each step:
    query, support and mask of a training class                 drawn anew, see EpisodeData
    logits, similarity = network(query, support, mask)
    loss = cross_entropy(logits), background and object
    SGD with momentum 0.99, a constant learning rate: double for biases, tenfold for the features that are compared

evaluation: the episodes of a protocol; argmax, counted by class over all episodes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gingham.data.episodes import EpisodeItem, collate_episodes
from gingham.errors import DataError
from gingham.methods.network_recipe import NetworkRecipe
from gingham.methods.sgone.network import SGOne
from gingham.methods.sgone.objective import combine_masks, episode_loss
from gingham.metrics.few_shot import FewShotMeter, FewShotScores
from gingham.nn.segmentation_loss import upsample_logits

Combination = Literal["average", "union", "vote"]


class SGOneRecipe(NetworkRecipe):
    """Trains and evaluates an `SGOne` on batches of episodes, see `gingham.data.episodes.collate_episodes`.

    It logs ``loss`` and, after ``val_`` or ``test_``, ``miou``, ``fb_iou``, ``all_foreground``, with several runs
    ``miou_spread``, and ``iou/NN`` of every class that is evaluated, NN its index, see
    `gingham.metrics.few_shot.FewShotMeter`. The whole scores of a split are kept in `scores`.

    Args:
        network: options of `gingham.methods.sgone.network.SGOne`.
        combination: what K shots become: "average" of their vectors, or the "union" or the "vote" of the masks of K
            passes, see `gingham.methods.sgone.objective.combine_masks`. In evaluation; training averages.
        bias_rate: factor on the learning rate of biases, 0 or more.
        guidance_rate: factor on the learning rate of the layer whose features are compared, 0 or more.
        backbone_rate: factor on that of the backbone, 0 or more.
        optimizer: "sgd" or "adamw".
        learning_rate: above 0.
        momentum: of "sgd", from 0 to below 1. The official code has 0.99, where 0.9 would make steps a tenth as long.
        weight_decay: on every parameter, 0 or more.
        power: of the polynomial schedule; 0 is a constant learning rate.
        options: of `gingham.methods.network_recipe.NetworkRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    def __init__(
        self,
        network: dict[str, Any],
        combination: Combination = "average",
        bias_rate: float = 2.0,
        guidance_rate: float = 10.0,
        backbone_rate: float = 1.0,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 1e-5,
        momentum: float = 0.99,
        weight_decay: float = 5e-4,
        power: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            SGOne,
            network,
            optimizer=optimizer,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            power=power,
            **options,
        )
        if combination not in ("average", "union", "vote"):
            raise ValueError(f"combination must be 'average', 'union' or 'vote', got {combination!r}")
        self.require_not_negative(bias_rate=bias_rate, guidance_rate=guidance_rate, backbone_rate=backbone_rate)
        self.combination: Combination = combination
        self.bias_rate, self.guidance_rate, self.backbone_rate = bias_rate, guidance_rate, backbone_rate
        #: Of "val" and "test", for the classes and runs of the data module.
        self.meters = nn.ModuleDict()
        #: Of "val" and "test", from the last evaluation.
        self.scores: dict[str, FewShotScores] = {}

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "classes_of"):
            raise DataError("SG-One is trained on episodes: take gingham.methods.sgone.data.EpisodeData")
        for split in {"fit": ("val",), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.meters[split] = FewShotMeter(data.classes_of(split), runs=len(data.seeds_of(split)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for each learning rate: by default weights and biases, and those of the guidance layer."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            part = name.partition(".")[0]
            rate = {"backbone": self.backbone_rate, "guidance_layer": self.guidance_rate}.get(part, 1.0)
            groups.setdefault(rate * (self.bias_rate if name.endswith("bias") else 1), []).append(parameter)
        return [{"params": groups[rate], "lr": self.learning_rate * rate} for rate in sorted(groups)]

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        query, *support = (x.contiguous(memory_format=torch.channels_last) for x in (batch["image"], *batch["support"]))
        output = self.network(query, support, batch["support_mask"])
        loss = episode_loss(output.logits, batch["label"])
        self.log("loss", loss, prog_bar=True, batch_size=len(query))
        return loss

    # -------------------------------------------------------------------------------------------- evaluation

    def with_support(self, images: list[Tensor], masks: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """What segments queries by these supports, whose features are computed once.

        Args:
            images: K normalised images [B, 3, h, w], each of a size of its own.
            masks: their masks [B, 1, h, w].

        Returns:
            A function of queries [B, 3, H, W] that gives logits [B, 2, H, W]; with "union" and "vote" they are 0 and 1.
        """
        shots = (
            [(images, masks)]
            if self.combination == "average"
            else [([x], [y]) for x, y in zip(images, masks, strict=True)]
        )
        known = [self.network.support(*shot) for shot in shots]

        def segment(query: Tensor) -> Tensor:
            logits = [
                upsample_logits(self.network.compare(query, *one).logits, query.shape[-2:], align_corners=False)
                for one in known
            ]
            if self.combination == "average":
                return logits[0]
            combined = combine_masks(torch.stack([x.argmax(1) == 1 for x in logits]), self.combination)
            return torch.stack([~combined, combined], dim=1).to(logits[0].dtype)

        return segment

    def predict_objects(self, batch: Any) -> Tensor:
        """Where the object of each episode is seen, bool [B, H, W] at the size of the queries."""
        query = batch["image"].contiguous(memory_format=torch.channels_last)
        return self.with_support(batch["support"], batch["support_mask"])(query).argmax(1) == 1

    def views(self, item: EpisodeItem) -> dict[str, Tensor]:
        """What pictures show of an episode: the prediction, and the similarity where it is above 0."""
        batch = collate_episodes([item])
        query, support, mask = (_to(batch[name], self.device) for name in ("image", "support", "support_mask"))
        prediction = self.predict_objects({"image": query, "support": support, "support_mask": mask})
        similarity = self.network(query, support, mask).similarity
        heat = upsample_logits(similarity, query.shape[-2:], align_corners=False).clamp(0, 1)
        return {"prediction": prediction[0].long().cpu(), "similarity": heat[0, 0].float().cpu()}

    def evaluate(self, batch: Any, split: str) -> None:
        prediction = self.predict_objects(batch)
        self.meters[split].update(prediction, batch["label"], batch["class_index"], batch["run"])  # type: ignore[operator]

    def report(self, split: str) -> None:
        """Log the scores of a split, and begin to count anew."""
        meter: Any = self.meters[split]
        scores: FewShotScores = meter.compute()
        meter.reset()
        if not scores.episodes.any() and not self.trainer.sanity_checking:
            raise DataError(f"the {split} split has no labelled pixels in any episode")
        self.scores[split] = scores
        self.log(f"{split}_miou", scores.miou, prog_bar=True)
        self.log(f"{split}_fb_iou", scores.fb_iou)
        self.log(f"{split}_all_foreground", scores.all_foreground)
        if meter.runs > 1:
            self.log(f"{split}_miou_spread", scores.miou_spread)
        for class_index, iou in zip(meter.classes, scores.iou.reshape(-1).tolist(), strict=True):
            self.log(f"{split}_iou/{class_index:02d}", iou)


def _to(value: Any, device: torch.device) -> Any:
    return [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
