"""PDML's network: a dilated ResNet, a pyramid-pooling or DeepLab head, and the features that the metric compares.

Paper: Qian et al., Weakly Supervised Scene Parsing with Point-Based Distance Metric Learning,
https://arxiv.org/abs/1811.02233. Which network the paper trained is not confirmed; PSPNet and DeepLab are what its
introduction names.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gingham.nn.activation import Activation
from gingham.nn.backbone import Backbone
from gingham.nn.convolution import convolution
from gingham.nn.pretrained import PretrainedModel
from gingham.nn.pyramid_pooling import PyramidPooling


class PDMLOutput(NamedTuple):
    """What the network gives for a batch of images, all at the resolution of its features."""

    logits: Tensor  # [B, K, h, w]
    features: Tensor  # [B, C, h, w], what the distance metric compares
    auxiliary: Tensor | None  # [B, K, h, w], in training only


class PDML(PretrainedModel, paper_url="https://arxiv.org/abs/1811.02233", pipeline_tag="image-segmentation"):
    """Scene parsing with features that can be compared across images.

    Nothing of the architecture is confirmed; all of it is an option. The defaults are PSPNet with ResNet-101 and output
    stride 8.

    Args:
        backbone: "small" or any timm model, see `gingham.nn.backbone.Backbone`.
        num_classes: K.
        head: "psp": pyramid pooling to `head_channels`, which are the features, and a 1x1 classifier. "deeplab": the
            backbone's last stage are the features, and the sum of four dilated 3x3 convolutions classifies.
        deep_stem: ResNets only: three 3x3 convolutions in place of the 7x7; False to use timm's pretrained weights.
            None: wherever the network has such a 7x7.
        output_stride: pixels of the image per pixel of the features, 32, 16 or 8 ("small": 8, 4 or 2).
        contract_dilation: ResNets only: let the first block of a dilated stage keep the dilation before it.
        head_channels: C of the head "psp".
        bins: rows and columns of the grids that "psp" averages over.
        branch_channels: of each bin; a quarter of the channels of the backbone's last stage where None.
        activation: of the heads, "relu" or "leaky_relu".
        dropout: probability that a channel is dropped before the classifiers. Features are read before it.
        auxiliary: whether a second head classifies the last stage but one in training.
        auxiliary_channels: channels of that head.
        metric_channels: None, or the channels of a 1x1 convolution between the features and the distance metric.
        align_corners: of every resizing of maps, in the head and of what comes out of it.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] -> `PDMLOutput`; every H and W that the backbone takes.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range, or an unknown head or activation.

    Source: PSPNet, https://arxiv.org/abs/1612.01105, and DeepLab-v2, https://arxiv.org/abs/1606.00915, for the heads.

    Example:
        >>> model = PDML("small", num_classes=5, output_stride=4, head_channels=32)
        >>> output = model.eval()(torch.randn(1, 3, 64, 48))
        >>> output.logits.shape, output.features.shape
        (torch.Size([1, 5, 16, 12]), torch.Size([1, 32, 16, 12]))
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 59,
        head: Literal["psp", "deeplab"] = "psp",
        deep_stem: bool | None = None,
        output_stride: int = 8,
        contract_dilation: bool = False,
        head_channels: int = 512,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        branch_channels: int | None = None,
        activation: Activation = "relu",
        dropout: float = 0.1,
        auxiliary: bool = False,
        auxiliary_channels: int = 256,
        metric_channels: int | None = None,
        align_corners: bool = True,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        numbers = {
            "num_classes": num_classes,
            "head_channels": head_channels,
            "branch_channels": branch_channels,
            "auxiliary_channels": auxiliary_channels,
            "metric_channels": metric_channels,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if head not in ("psp", "deeplab"):
            raise ValueError(f"head must be 'psp' or 'deeplab', got {head!r}")
        if activation not in ("relu", "leaky_relu"):
            raise ValueError(f"activation must be 'relu' or 'leaky_relu', got {activation!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.backbone = Backbone(
            backbone,
            stages=2,
            output_stride=output_stride,
            deep_stem=deep_stem,
            ceil_mode=False,
            contract_dilation=contract_dilation,
            weights=backbone_weights,
            options=backbone_options,
        )
        auxiliary_in, head_in = self.backbone.channels
        self.dropout = nn.Dropout2d(dropout)
        if head == "psp":
            self.head: nn.Module = PyramidPooling(
                head_in,
                head_channels,
                branch_channels=branch_channels or max(1, head_in // 4),
                bins=bins,
                activation=activation,
                align_corners=align_corners,
            )
            channels = head_channels
            self.classifier: nn.Module = _classifier(nn.Conv2d(channels, num_classes, 1))
        else:
            self.head = nn.Identity()
            channels = head_in
            self.classifier = DilatedClassifier(channels, num_classes)
        self.auxiliary = (
            nn.Sequential(
                *convolution(auxiliary_in, auxiliary_channels, 3, activation=activation),
                nn.Dropout2d(dropout),
                _classifier(nn.Conv2d(auxiliary_channels, num_classes, 1)),
            )
            if auxiliary
            else None
        )
        self.metric_projection = nn.Identity() if metric_channels is None else nn.Conv2d(channels, metric_channels, 1)
        self.feature_channels = channels if metric_channels is None else metric_channels

    def forward(self, images: Tensor) -> PDMLOutput:
        auxiliary_features, deep = self.backbone(images)
        features = self.head(deep)
        logits = self.classifier(self.dropout(features))
        auxiliary = self.auxiliary(auxiliary_features) if self.auxiliary is not None and self.training else None
        return PDMLOutput(logits, self.metric_projection(features), auxiliary)


class DilatedClassifier(nn.Module):
    """The sum of 3x3 convolutions with several dilations, each from features to logits.

    Args:
        in_channels: of the features.
        num_classes: K.
        dilations: one for each convolution.

    Shape:
        features [B, in_channels, h, w] -> logits [B, K, h, w].

    Source: DeepLab-v2, https://arxiv.org/abs/1606.00915.

    Example:
        >>> DilatedClassifier(8, 5)(torch.randn(1, 8, 9, 17)).shape
        torch.Size([1, 5, 9, 17])
    """

    def __init__(self, in_channels: int, num_classes: int, dilations: tuple[int, ...] = (6, 12, 18, 24)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _classifier(nn.Conv2d(in_channels, num_classes, 3, padding=dilation, dilation=dilation))
            for dilation in dilations
        )

    def forward(self, features: Tensor) -> Tensor:
        return reduce(torch.add, (branch(features) for branch in self.branches))


def _classifier(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
