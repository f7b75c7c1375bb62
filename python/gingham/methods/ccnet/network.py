"""CCNet: a dilated ResNet, a head with recurrent criss-cross attention, and an auxiliary head.

Paper: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, https://arxiv.org/abs/1811.11721,
with the layers of the official code.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gingham.nn.activation import Activation, make_activation
from gingham.nn.backbone import Backbone
from gingham.nn.convolution import convolution
from gingham.nn.criss_cross_attention import RecurrentCrissCrossAttention
from gingham.nn.pretrained import PretrainedModel


class SegmentationOutput(NamedTuple):
    """What a segmentation network gives for a batch of images, all at the resolution of its features."""

    logits: Tensor  # [B, K, h, w]
    auxiliary: Tensor | None  # [B, K, h, w], in training only
    features: Tensor  # [B, C, h, w], for the category-consistent loss


class CCNet(
    PretrainedModel,
    repo_url="https://github.com/speedinghzl/CCNet",
    paper_url="https://arxiv.org/abs/1811.11721",
    pipeline_tag="image-segmentation",
):
    """Semantic segmentation with recurrent criss-cross attention.

    The defaults are the official network for Cityscapes. mmsegmentation's variant is ``backbone="resnet101c",
    contract_dilation=True, activation="relu", auxiliary_channels=256``.

    Args:
        backbone: "small" or any timm model, see `gingham.nn.backbone.Backbone`.
        num_classes: K.
        loops: R, how often criss-cross attention is applied. 0 is the baseline without attention.
        shared: one set of attention weights for all loops, or one for each.
        deep_stem: ResNets only: three 3x3 convolutions in place of the 7x7, as in the paper; False to use timm's
            pretrained weights. None: wherever the network has such a 7x7.
        output_stride: pixels of the image per pixel of the features, 32, 16 or 8 ("small": 8, 4 or 2).
        contract_dilation: ResNets only: let the first block of a dilated stage keep the dilation before it.
        head_channels: C, channels in the head.
        activation: of the heads, "leaky_relu" (slope 0.01, official) or "relu" (mmsegmentation).
        dropout: probability that the heads drop a channel before they classify.
        auxiliary: whether a second head classifies the last stage but one in training.
        auxiliary_channels: channels of that head.
        category_channels: None, or the channels to which a 1x1 convolution reduces the features that are returned for
            the category-consistent loss. Place and size of that reduction in the paper are not confirmed; with 512 head
            channels, its reported ratio of 16 means 32. Set it only when the loss is used.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] -> `SegmentationOutput`; every H and W that the backbone takes.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: fewer head channels than the attention needs, or another number out of its range.

    Example:
        >>> model = CCNet("small", num_classes=5, output_stride=4, head_channels=32)
        >>> model.eval()(torch.randn(1, 3, 64, 64)).logits.shape
        torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 19,
        loops: int = 2,
        shared: bool = True,
        deep_stem: bool | None = None,
        output_stride: int = 8,
        contract_dilation: bool = False,
        head_channels: int = 512,
        activation: Activation = "leaky_relu",
        dropout: float = 0.1,
        auxiliary: bool = True,
        auxiliary_channels: int = 512,
        category_channels: int | None = None,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.backbone = Backbone(
            backbone,
            stages=2,
            output_stride=output_stride,
            deep_stem=deep_stem,
            contract_dilation=contract_dilation,
            weights=backbone_weights,
            options=backbone_options,
        )
        auxiliary_in, head_in = self.backbone.channels
        self.head = CrissCrossHead(
            head_in,
            num_classes,
            loops=loops,
            shared=shared,
            channels=head_channels,
            activation=activation,
            dropout=dropout,
        )
        self.auxiliary = (
            nn.Sequential(
                nn.Conv2d(auxiliary_in, auxiliary_channels, 3, padding=1),  # the official code has a bias here
                nn.BatchNorm2d(auxiliary_channels),
                make_activation(activation),
                nn.Dropout2d(dropout),
                nn.Conv2d(auxiliary_channels, num_classes, 1),
            )
            if auxiliary
            else None
        )
        self.category_projection = (
            nn.Conv2d(head_channels, category_channels, 1) if category_channels is not None else nn.Identity()
        )

    def forward(self, images: Tensor) -> SegmentationOutput:
        auxiliary_features, features = self.backbone(images)
        logits, context = self.head(features)
        auxiliary = self.auxiliary(auxiliary_features) if self.auxiliary is not None and self.training else None
        return SegmentationOutput(logits, auxiliary, self.category_projection(context))


class CrissCrossHead(nn.Module):
    """Reduce, attend `loops` times, fuse with the backbone's features, classify.

    Args:
        in_channels: of the backbone's features.
        num_classes: K.
        loops: R; with 0 the attention is the identity and has no weights.
        shared: one set of attention weights for all loops, or one for each.
        channels: C, channels of the head.
        activation: "leaky_relu" (slope 0.01) or "relu".
        dropout: probability of dropping a channel before the classifier.

    Shape:
        features [B, in_channels, h, w] -> logits [B, K, h, w], attended features [B, C, h, w].

    Source: CCNet, figure 2, with the layers of the official code.

    Example:
        >>> head = CrissCrossHead(64, 19, channels=32)
        >>> logits, context = head(torch.randn(2, 64, 9, 17))
        >>> logits.shape, context.shape
        (torch.Size([2, 19, 9, 17]), torch.Size([2, 32, 9, 17]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        loops: int = 2,
        shared: bool = True,
        channels: int = 512,
        activation: Activation = "leaky_relu",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.conva = convolution(in_channels, channels, 3, activation=activation)
        self.cca = RecurrentCrissCrossAttention(channels, loops=loops, shared=shared)
        self.convb = convolution(channels, channels, 3, activation=activation)
        self.bottleneck = nn.Sequential(
            *convolution(in_channels + channels, channels, 3, activation=activation),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        context = self.cca(self.conva(features))
        logits = self.bottleneck(torch.cat([features, self.convb(context)], dim=1))
        return logits, context
