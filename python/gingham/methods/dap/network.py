"""An ordinary image classifier: what Drop-and-Pick trains, which changes no network.

Networks and pretrained weights come from timm. The paper's are resnet50, densenet121 and MobileNet-V1
(mobilenetv1_100); the shallow stem is that of ResNets for CIFAR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gingham.nn.backbone import Backbone, BackboneError
from gingham.nn.pretrained import PretrainedModel


class Classifier(
    PretrainedModel,
    paper_url="https://arxiv.org/abs/1811.09347",
    pipeline_tag="image-classification",
):
    """A network from timm, or a small one, whose last features are averaged over the image and classified.

    Args:
        backbone: "small" or any timm model, see `gingham.nn.backbone.Backbone`.
        num_classes: K, 2 or more.
        shallow_stem: ResNets only: a 3x3 convolution of stride 1 in place of the 7x7 of stride 2, and no max-pool, as
            for CIFAR's 32x32 pixels.
        dropout: probability that a feature is dropped before it is classified, 0 to below 1.
        output_stride: "small" only: pixels of the image per pixel of the last features, 8, 4 or 2.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file, whose classifier is ignored.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] -> logits [B, K].

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range.

    Example:
        >>> import torch
        >>> model = Classifier("small", num_classes=10)
        >>> model(torch.randn(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 1000,
        shallow_stem: bool = False,
        dropout: float = 0.0,
        output_stride: int | None = None,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if backbone != "small" and output_stride is not None:
            raise ValueError(f"output_stride is an option of the backbone small, not of {backbone}; leave it out")
        self.backbone = Backbone(
            backbone,
            stages=1,
            output_stride=output_stride or (4 if backbone == "small" else 32),
            weights=backbone_weights,
            options=backbone_options,
        )
        if shallow_stem:
            _make_shallow(self.backbone.body, backbone)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.backbone.channels[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        logits: Tensor = self.classifier(self.dropout(features.mean((-2, -1))))
        return logits


def _make_shallow(body: Any, name: str) -> None:
    parts = dict(body.named_children())
    first = parts.get("conv1")
    if not isinstance(first, nn.Conv2d) or "maxpool" not in parts:
        raise BackboneError(f"backbone {name!r} has no stem of a ResNet; leave shallow_stem out")
    body["conv1"] = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(body["conv1"].weight, mode="fan_out", nonlinearity="relu")
    body["maxpool"] = nn.Identity()
