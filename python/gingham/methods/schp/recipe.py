"""How SCHP is trained and evaluated: https://arxiv.org/abs/1910.09777, with the numbers of the official code.

for each epoch e:
    learning rate of `schedule.cyclical_rate`, constant in the epoch
    for each batch:
        t = (1 - alpha) softmax(teacher(images)) + alpha labels           from the first cycle on, alpha = 1 / (n + 1)
        loss = 1/2 sum over parsing and fusion of [Lovász(labels) + cross-entropy(labels) or KL(t)]
               + edges (class-balanced, or KL of their t) + 0.1 consistency of both with the edges
        SGD with momentum
    at the end of a cycle: teacher = mean of the networks so far, its batch-norm statistics estimated anew; n = n + 1

Rates, cycles and teacher are those of the callback `self_correction.py`; what is here trains without it, too.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from gingham.methods.schp.geometry import IMAGENET_BLACK, Protocol, warp_from_network, warp_to_network
from gingham.methods.schp.network import ACE2P
from gingham.methods.schp.objective import (
    Blend,
    Reduction,
    Semantics,
    SoftLabels,
    edge_map,
    parsing_loss,
    refined_labels,
)
from gingham.methods.segmentation_recipe import Refinement, SegmentationRecipe


class SCHPRecipe(SegmentationRecipe):
    """Trains and evaluates an `ACE2P`.

    Args:
        network: options of `gingham.methods.schp.network.ACE2P`.
        semantics: "corrected", or "official" for what the official code computes: no consistency term, labels blended
            with the teacher's logits, a teacher in training mode, ignored pixels that count as background in cycles,
            and an evaluation that is off by half a pixel in even sizes.
        parsing_weight: lambda_s, 0 or more.
        edge_weight: lambda_e, 0 or more.
        consistency_weight: lambda_c, 0 or more.
        lovasz_share: of Lovász-softmax in the parsing terms, 0 to 1; the rest is cross-entropy.
        reduction: of the divergences from refined labels, "element" (the official code's mean over pixels and classes)
            or "pixel".
        warp_size: side of the square that every picture is warped into for evaluation, with `scales` and `flip` in that
            square, 2 or more; None to evaluate pictures as they are.
        protocol: how predictions come back from that square, "labels" (the official evaluation) or "logits" (the
            official extractor), see `gingham.methods.schp.geometry.warp_from_network`.
        black: what lies around the pictures in that square: black, normalised as the data module does it.
        options: of `gingham.methods.segmentation_recipe.SegmentationRecipe`.

    Raises:
        ValueError: an argument outside its range, or one that would do nothing without a `warp_size`.
        BackboneError: a backbone that does not exist or does not have an option.

    Source: the official code.

    Example:
        >>> import torch
        >>> recipe = SCHPRecipe({"backbone": "small", "num_classes": 8, "output_stride": 4}, warp_size=64)
        >>> recipe.eval()(torch.randn(1, 3, 40, 30)).shape
        torch.Size([1, 8, 40, 30])
    """

    def __init__(
        self,
        network: dict[str, Any],
        semantics: Semantics = "corrected",
        parsing_weight: float = 1.0,
        edge_weight: float = 1.0,
        consistency_weight: float = 0.1,
        lovasz_share: float = 0.5,
        reduction: Reduction = "element",
        warp_size: int | None = 473,
        protocol: Protocol = "labels",
        black: tuple[float, float, float] = IMAGENET_BLACK,
        **options: Any,
    ) -> None:
        if semantics not in ("corrected", "official"):
            raise ValueError(f"semantics must be 'corrected' or 'official', got {semantics!r}")
        self.require_not_negative(
            parsing_weight=parsing_weight, edge_weight=edge_weight, consistency_weight=consistency_weight
        )
        if not 0 <= lovasz_share <= 1:
            raise ValueError(f"lovasz_share must be between 0 and 1, got {lovasz_share}")
        if reduction not in ("element", "pixel"):
            raise ValueError(f"reduction must be 'element' or 'pixel', got {reduction!r}")
        if warp_size is not None and warp_size < 2:
            raise ValueError(f"warp_size must be 2 pixels or more, got {warp_size}")
        if protocol not in ("labels", "logits"):
            raise ValueError(f"protocol must be 'labels' or 'logits', got {protocol!r}")
        for option, given in (("protocol", protocol != "labels"), ("black", tuple(black) != IMAGENET_BLACK)):
            if given and warp_size is None:
                raise ValueError(f"{option} is an option of evaluation with a warp_size; leave it out")
        super().__init__(ACE2P, network, **options)
        if warp_size is not None:  # the official sizes are rounded down: 473 * 0.75 is 354
            self.scales = tuple(max(1, math.floor(warp_size * scale)) / warp_size for scale in self.scales)
        self.semantics: Semantics = semantics
        self.parsing_weight, self.edge_weight, self.consistency_weight = parsing_weight, edge_weight, consistency_weight
        self.lovasz_share, self.reduction = lovasz_share, reduction
        self.warp_size, self.protocol, self.black = warp_size, protocol, black

    @property
    def blend(self) -> Blend:
        """In what the teacher and the given labels are mixed."""
        return "logits" if self.semantics == "official" else "probabilities"

    def loss(self, output: Any, batch: Any, refined: Refinement | None) -> Tensor:
        labels = batch["label"]
        soft = None
        if refined is not None:
            edges = None
            if refined.teacher is not None:
                edges = refined_labels(refined.teacher.edge, edge_map(labels), refined.alpha, blend=self.blend)
            soft = SoftLabels(refined.labels, edges)
        return parsing_loss(
            output,
            labels,
            soft=soft,
            parsing_weight=self.parsing_weight,
            edge_weight=self.edge_weight,
            consistency_weight=self.consistency_weight,
            lovasz_share=self.lovasz_share,
            reduction=self.reduction,
            semantics=self.semantics,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K, H, W] of images [B, 3, H, W], by way of the square that the network sees."""
        if self.warp_size is None:
            return super().forward(images)
        logits = super().forward(warp_to_network(images, self.warp_size, black=self.black))
        return warp_from_network(
            logits,
            (images.shape[-2], images.shape[-1]),
            protocol=self.protocol,
            whole_centre=self.semantics == "official" and self.protocol == "labels",
        )
