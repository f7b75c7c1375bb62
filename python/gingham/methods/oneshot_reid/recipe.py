"""How the network learns from the source, and from a target that is labelled as `adaptation.py` says.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1, with the
numbers of the authors' later code.

for each step on the source:
    x1, x2, logits = network(images)
    loss = cross_entropy(logits, persons) + triplets(x1, persons)            batch-hard
for each step on the target:
    loss = triplets of x1 and x2 of the clusters + weighted triplets of x1 and x2 of (pseudo-)labelled images

evaluation: images and their mirror images, x1 added and normalised; see `gingham.methods.reid_recipe`
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from gingham.errors import DataError
from gingham.methods.oneshot_reid.data import AdaptationData
from gingham.methods.oneshot_reid.network import EmbeddingOutput, OneShotReID, has_groups
from gingham.methods.oneshot_reid.objective import Weighting, classification_loss, embedding_loss
from gingham.methods.oneshot_reid.streams import Stream
from gingham.methods.processes import several_processes, share_buffers
from gingham.methods.reid_recipe import ReidRecipe
from gingham.nn.checkpoint import load_state_dict, read_state_dict
from gingham.nn.triplet_loss import Mining, triplet_loss, weighted_cross_entropy


class OneShotRecipe(ReidRecipe):
    """Trains a `OneShotReID` on batches of `gingham.methods.oneshot_reid.data.AdaptationData`.

    It logs ``loss`` and its parts: ``loss_source`` and ``loss_source_classes``, or ``loss_mined``, ``loss_assigned``
    and, with a classifier of the target, ``loss_assigned_classes``; and the scores of
    `gingham.methods.reid_recipe.ReidRecipe`.

    Args:
        network: options of `gingham.methods.oneshot_reid.network.OneShotReID`.
        source_weights: a checkpoint of a training on the source, to begin with: of ``gingham fit``, or any file of the
            network's weights. Classifiers may differ or be missing, nothing else. Read when a training begins.
        margin: of triplets, 0 or more; or "soft".
        source_mining: of triplets of the source, "hard" or "semi", see `gingham.nn.triplet_loss.triplet_loss`.
        target_mining: of triplets of the target.
        weighting: what confidences do, see `gingham.methods.oneshot_reid.objective.embedding_loss`.
        new_layers_rate: factor on the learning rate of all that is not the backbone, above 0.
        constant_share: share of a training after which the learning rate, constant until then, falls exponentially to
            `final_factor`, 0 to below 1; None for the polynomial schedule.
        final_factor: above 0 and at most 1.
        tenth_every: share of a training after each of which the learning rate falls to a tenth, constant in between,
            above 0 and at most 1; None for another schedule. Not with `constant_share`.
        flip_test: evaluate by the features of an image and its mirror image, added.
        normalize: scale these to length 1.
        options: of `gingham.methods.reid_recipe.ReidRecipe`.

    Raises:
        ValueError: an argument outside its range.
        BackboneError: a backbone that does not exist or does not have an option.

    Source: the authors' later code: margin 0.5; for the source Adam, 3e-4 and weight decay 5e-4, constant for 100 of
    150 epochs and then down to a thousandth, three times as much in new layers; for the target SGD, 6e-5; for a new
    network on the last labels the source's, but a tenth after every 60 of 150 epochs.
    """

    def __init__(
        self,
        network: dict[str, Any],
        source_weights: str | None = None,
        margin: float | Literal["soft"] = 0.5,
        source_mining: Mining = "hard",
        target_mining: Mining = "semi",
        weighting: Weighting = "sample",
        new_layers_rate: float = 1.0,
        constant_share: float | None = None,
        final_factor: float = 1e-3,
        tenth_every: float | None = None,
        flip_test: bool = True,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(OneShotReID, network, flip_test=flip_test, normalize=normalize, **options)
        if margin != "soft" and (isinstance(margin, str) or not margin >= 0):
            raise ValueError(f"margin must be 0 or more, or 'soft', got {margin!r}")
        for name, mining in (("source_mining", source_mining), ("target_mining", target_mining)):
            if mining not in ("hard", "semi"):
                raise ValueError(f"{name} must be 'hard' or 'semi', got {mining!r}")
        if weighting not in ("sample", "batch", "none"):
            raise ValueError(f"weighting must be 'sample', 'batch' or 'none', got {weighting!r}")
        if not new_layers_rate > 0:
            raise ValueError(f"new_layers_rate must be above 0, got {new_layers_rate}")
        if constant_share is not None and not 0 <= constant_share < 1:
            raise ValueError(f"constant_share must be 0 to below 1, or None, got {constant_share}")
        if not 0 < final_factor <= 1:
            raise ValueError(f"final_factor must be above 0 and at most 1, got {final_factor}")
        if tenth_every is not None and not 0 < tenth_every <= 1:
            raise ValueError(f"tenth_every must be above 0 and at most 1, or None, got {tenth_every}")
        if tenth_every is not None and constant_share is not None:
            raise ValueError(f"tenth_every must be None with constant_share {constant_share}, got {tenth_every}")
        self._has_groups = has_groups(self.network)
        self.source_weights, self.margin = source_weights, margin
        self.source_mining: Mining = source_mining
        self.target_mining: Mining = target_mining
        self.weighting: Weighting = weighting
        self.new_layers_rate = new_layers_rate
        self.constant_share, self.final_factor, self.tenth_every = constant_share, final_factor, tenth_every

    # -------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, AdaptationData):
            raise DataError(f"this recipe is trained on AdaptationData, got {type(data).__name__}")
        for option, domain, layer, persons in (
            ("num_classes", "source", self.network.source_classifier, data.source.num_persons),
            ("target_classes", "target", self.network.target_classifier, len(data.known_ids)),
        ):
            if layer is not None and layer.out_features != persons:
                raise DataError(f"the network has {option} {layer.out_features}, the {domain} has {persons} persons")
        shape = data.shapes["source"]
        if shape.persons < 2:
            raise DataError(f"data.persons_per_batch must be 2 or more, got {shape.persons}")
        if self.source_mining == "semi" and shape.images < 2:
            raise DataError(
                f"data.items_per_person must be 2 or more where source_mining is 'semi', got {shape.images}"
            )
        if self.source_weights is not None and self.trainer.ckpt_path is None:
            self._load_source(self.source_weights)

    def _load_source(self, file: str) -> None:
        """Before callbacks label images by the network."""
        state = read_state_dict(file)
        inner = {name.removeprefix("network."): x for name, x in state.items() if name.startswith("network.")}
        classifiers = ("source_classifier.", "target_classifier.")
        own = {name: x for name, x in self.network.state_dict().items() if name.startswith(classifiers)}
        loaded = {name: x for name, x in (inner or state).items() if not name.startswith(classifiers)}
        load_state_dict(self.network, loaded | own, source=file)

    def on_fit_start(self) -> None:
        if self._has_groups and not has_groups(self.network):
            raise DataError(
                "trainer.sync_batchnorm replaces batch norms that take groups of a batch: leave it out, or set "
                "model.network.bn_group to null"
            )
        if self.source_weights is None:  # otherwise the backbone's weights are in them
            super().on_fit_start()

    def parameter_groups(self) -> list[dict[str, Any]]:
        backbone = list(self.network.backbone.parameters())
        known = {id(parameter) for parameter in backbone}
        others = [parameter for parameter in self.network.parameters() if id(parameter) not in known]
        return [{"params": backbone}, {"params": others, "lr": self.learning_rate * self.new_layers_rate}]

    def rate_factor(self, step: int, total: int) -> float:
        if self.tenth_every is not None:
            return float(0.1 ** math.floor(step / total / self.tenth_every + 1e-9))  # of a share that is no binary one
        if self.constant_share is None:
            return super().rate_factor(step, total)
        begin = self.constant_share * total
        return float(self.final_factor ** max(0.0, (step - begin) / (total - begin)))

    def embed(self, pixels: Tensor) -> Tensor:
        output: EmbeddingOutput = self.network(pixels)
        return output.pooled if output.parts is None else torch.cat([output.pooled, output.parts.flatten(1)], dim=1)

    def features_of(self, loader: DataLoader[Any]) -> Tensor:
        """What images are labelled by: features of image and mirror image, added and normalised.

        Args:
            loader: this process's share of N images, every world_size-th of them.

        Returns:
            [N, C] float32 on the CPU, in every process; with P parts of images [N, (1 + P) C], the whole first.

        Raises:
            DataError: the features of an image are NaN or infinite.
        """
        from tqdm import tqdm

        convert = self.trainer.precision_plugin.convert_input
        hidden = None if self.trainer.is_global_zero else True
        batches = tqdm(loader, desc="looking at images", unit="batch", delay=2, disable=hidden, leave=False)
        share_buffers(self.network)
        was_training = self.training
        self.eval()
        parts = []
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in batches:
                images = convert(batch["image"].to(self.device)).contiguous(memory_format=torch.channels_last)
                features = self.embed(images) + self.embed(images.flip(-1))
                parts.append(F.normalize(features.float()).cpu())
        self.train(was_training)
        length = len(loader.dataset)  # type: ignore[arg-type]
        features = _gathered(torch.cat(parts) if parts else torch.zeros(0, 0), length)
        if not bool(features.isfinite().all()):
            raise DataError("features must be finite, got NaN or infinity: the network has diverged")
        return features

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        parts: dict[str, Tensor] = {}
        unused = []
        for stream, part in batch.items():
            output: EmbeddingOutput = self.network(part["image"].contiguous(memory_format=torch.channels_last))
            parts |= self._losses(stream, output, part)
            unused += [0 * x.sum() for x in output if x is not None]  # gradients of 0 in every process
        loss = torch.stack([*parts.values(), *unused]).sum()
        size = sum(len(part["image"]) for part in batch.values())
        self.log_dict({f"loss_{name}": part for name, part in parts.items()}, batch_size=size)
        self.log("loss", loss, prog_bar=True, batch_size=size)
        return loss

    def _losses(self, stream: Stream, output: EmbeddingOutput, batch: Any) -> dict[str, Tensor]:
        persons, weights, margin = batch["person"], batch["weight"], self.margin
        if stream == "source":
            found = {"source": triplet_loss(output.pooled, persons, margin=margin, mining=self.source_mining)}
            if output.source_logits is not None:
                found["source_classes"] = weighted_cross_entropy(output.source_logits, persons)
            return found
        if stream == "mined":
            parts = batch.get("parts")
            options: dict[str, Any] = {"margin": margin, "mining": self.target_mining}
            return {"mined": embedding_loss(output, persons, part_persons=parts, **options)}
        weighting = self.weighting
        found = {
            "assigned": embedding_loss(
                output, persons, weights, margin=margin, mining=self.target_mining, weighting=weighting
            )
        }
        if output.target_logits is not None:
            found["assigned_classes"] = classification_loss(output.target_logits, persons, weights, weighting=weighting)
        return found


def _gathered(part: Tensor, length: int) -> Tensor:
    """The rows [n, C] of all processes, each of which has every world_size-th of so many, in their order."""
    if not several_processes():
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    whole: Tensor = parts[0].new_empty(length, parts[0].size(1))
    for rank, rows in enumerate(parts[:length]):  # with fewer images than processes, the others have none
        whole[rank :: len(parts)] = rows
    return whole
