"""How CCNet is trained and evaluated: https://arxiv.org/abs/1811.11721, sections 3.3 and 4.1, and the official code.

for each step t of T:
    logits, auxiliary = network(images)                        R loops of criss-cross attention
    loss = cross_entropy(logits) + 0.4 cross_entropy(auxiliary)   (+ category-consistent loss)
    SGD with momentum, learning rate lr (1 - t / T)^0.9
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gingham.methods.ccnet.network import CCNet
from gingham.methods.ccnet.objective import category_consistent_loss, segmentation_loss
from gingham.methods.segmentation_recipe import Refinement, SegmentationRecipe
from gingham.nn.segmentation_loss import HardPixels


class CCNetRecipe(SegmentationRecipe):
    """Trains and evaluates a `CCNet`.

    Args:
        network: options of `gingham.methods.ccnet.network.CCNet`.
        gamma_rate: factor on the learning rate of the attention's scale gamma, 0 or more.
        auxiliary_weight: of the auxiliary head's loss, 0 or more.
        hard_pixels: select hard pixels for the main loss (OHEM), or None.
        category_weights: weights of the category-consistent loss's variance, distance and regularisation terms, or None
            to leave the loss out. The network has ``category_channels`` if, and only if, they are given.
        align_corners: of every resizing of images and logits; mmsegmentation has False for even crops.
        options: of `gingham.methods.segmentation_recipe.SegmentationRecipe`. The official code has no warm-up.

    Raises:
        ValueError: an argument outside its range, or arguments that do not fit together.
        BackboneError: a backbone that does not exist or does not have an option.
    """

    def __init__(
        self,
        network: dict[str, Any],
        gamma_rate: float = 1.0,
        auxiliary_weight: float = 0.4,
        hard_pixels: HardPixels | None = None,
        category_weights: tuple[float, float, float] | None = None,
        align_corners: bool = True,
        **options: Any,
    ) -> None:
        self.require_not_negative(gamma_rate=gamma_rate, auxiliary_weight=auxiliary_weight)
        if category_weights is not None and (len(category_weights) != 3 or min(category_weights) < 0):
            raise ValueError(f"category_weights must be three numbers of 0 or more, got {tuple(category_weights)}")
        if (category_weights is None) != (network.get("category_channels") is None):
            raise ValueError(
                "category_weights and network's category_channels come together: give both or neither, got "
                f"{category_weights} and {network.get('category_channels')}"
            )
        super().__init__(CCNet, network, **options)
        self.gamma_rate, self.align_corners = gamma_rate, align_corners
        self.auxiliary_weight, self.hard_pixels, self.category_weights = auxiliary_weight, hard_pixels, category_weights

    def loss(self, output: Any, batch: Any, refined: Refinement | None) -> Tensor:
        labels = batch["label"]
        loss = segmentation_loss(
            output,
            labels,
            soft=None if refined is None else refined.labels,
            hard_pixels=self.hard_pixels,
            auxiliary_weight=self.auxiliary_weight,
            align_corners=self.align_corners,
        )
        if self.category_weights is not None:
            terms = category_consistent_loss(output.features, labels, align_corners=self.align_corners)
            loss = loss + sum(weight * term for weight, term in zip(self.category_weights, terms, strict=True))
        return loss

    def corners_align(self, size: tuple[int, int] | torch.Size) -> bool:
        return self.align_corners

    def parameter_groups(self) -> list[dict[str, Any]]:
        # Not those of the backbone: layer scales are named gamma too.
        gammas = [p for name, p in self.network.head.cca.named_parameters() if name.endswith("gamma")]
        others = [p for p in self.network.parameters() if all(p is not gamma for gamma in gammas)]
        groups: list[dict[str, Any]] = [{"params": others}]
        if gammas:
            groups.append({"params": gammas, "lr": self.learning_rate * self.gamma_rate})
        return groups
