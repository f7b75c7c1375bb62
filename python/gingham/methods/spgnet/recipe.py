"""How SPGNet is trained and evaluated: https://arxiv.org/abs/1908.09798. The paper's recipe is not confirmed.

for each step t of T:
    P_1, ..., P_S = network(images)                     P_s gates the features that stage s + 1 gets
    loss = sum over s of w_s cross_entropy(P_s)
    SGD with momentum, learning rate lr (1 - t / T)^0.9
prediction: P_S
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gingham.methods.segmentation_recipe import Refinement, SegmentationRecipe
from gingham.methods.spgnet.network import SPGNet
from gingham.methods.spgnet.objective import check_stage_weights, stage_supervision
from gingham.nn.segmentation_loss import HardPixels


class SPGNetRecipe(SegmentationRecipe):
    """Trains and evaluates an `SPGNet`.

    Images and logits are resized as the network resizes its maps, by its ``align_corners``.

    Args:
        network: options of `gingham.methods.spgnet.network.SPGNet`.
        stage_weights: of the loss of each stage, the last one last, 0 or more; 1 for each where None.
        hard_pixels: select hard pixels for the last stage's loss (OHEM), or None.
        average: of scales and mirrored images in evaluation: of their "logits" or "probabilities".
        options: of `gingham.methods.segmentation_recipe.SegmentationRecipe`.

    Raises:
        ValueError: an argument outside its range, or a gate whose prediction nothing would train: with
            ``detach_guidance``, every stage needs a weight above 0.
        BackboneError: a backbone that does not exist or does not have an option.

    Source: that every stage's prediction has a loss is inferred from the paper; its schedule is not known.

    Example:
        >>> recipe = SPGNetRecipe({"backbone": "small", "num_classes": 7, "decoder_channels": 16})
        >>> recipe.eval()(torch.randn(1, 3, 40, 64)).shape
        torch.Size([1, 7, 40, 64])
    """

    network: SPGNet

    def __init__(
        self,
        network: dict[str, Any],
        stage_weights: tuple[float, ...] | None = None,
        hard_pixels: HardPixels | None = None,
        average: Literal["logits", "probabilities"] = "probabilities",
        **options: Any,
    ) -> None:
        super().__init__(SPGNet, network, average=average, **options)
        stages = len(self.network.stages)
        self.stage_weights = (1.0,) * stages if stage_weights is None else tuple(stage_weights)
        self.hard_pixels = hard_pixels
        try:
            check_stage_weights(self.stage_weights, stages)
        except ValueError as error:
            raise ValueError(f"stage_{error}") from None
        if self.network.gates and network.get("detach_guidance") and min(self.stage_weights[:-1]) == 0:
            raise ValueError(
                f"stage_weights must be above 0 with detach_guidance, since nothing else would train the predictions "
                f"that guide the next stage, got {self.stage_weights}"
            )

    def loss(self, output: Any, batch: Any, refined: Refinement | None) -> Tensor:
        return stage_supervision(
            output.stages,
            batch["label"],
            weights=self.stage_weights,
            soft=None if refined is None else refined.labels,
            hard_pixels=self.hard_pixels,
            align_corners=self.network.corners_align(batch["image"].shape[-2:]),
        )

    def corners_align(self, size: tuple[int, int] | torch.Size) -> bool:
        return self.network.corners_align(size)

    def pretrained_parts(self, network: Any) -> list[nn.Module]:
        return [network.stem, *(stage.encoder for stage in network.stages)]
