"""A-CE2P, the network of SCHP: a dilated ResNet with pyramid pooling, a parsing, an edge and a fusion branch.

Papers: Li et al., Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777, with the layers of the official
code; the network before its augmentation is CE2P, Ruan et al., https://arxiv.org/abs/1809.05996.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.nn.backbone import Backbone
from gingham.nn.convolution import convolution
from gingham.nn.pretrained import PretrainedModel
from gingham.nn.pyramid_pooling import PyramidPooling

_STAGES = 4  # x2, x3, x4, x5 of the papers
_convolution = partial(convolution, activation="leaky_relu")


class ParsingOutput(NamedTuple):
    """What `ACE2P` gives for a batch of images, all at the resolution of the backbone's first returned stage."""

    logits: Tensor  # [B, K, h, w], of the fusion branch: the prediction
    parsing: Tensor  # [B, K, h, w], of the parsing branch
    edge: Tensor  # [B, 2, h, w]: no edge, edge


class ACE2P(
    PretrainedModel,
    repo_url="https://github.com/GoGoDuck912/Self-Correction-Human-Parsing",
    paper_url="https://arxiv.org/abs/1910.09777",
    pipeline_tag="image-segmentation",
):
    """Human parsing from context, details and edges.

    The defaults are the official network for LIP. Every convolution before a batch norm is without bias, every head
    activates with a leaky ReLU of slope 0.01, and every resizing is bilinear with aligned corners.

    Args:
        backbone: "small" or any timm model with four stages or more, see `gingham.nn.backbone.Backbone`.
        num_classes: K.
        deep_stem: ResNets only: three 3x3 convolutions in place of the 7x7, as in the official code; False to use
            timm's pretrained weights. None: wherever the network has such a 7x7.
        output_stride: pixels of the image per pixel of the last stage, 32, 16 or 8 ("small": 8, 4 or 2).
        bins: rows and columns of the grids of the pyramid pooling.
        context_channels: of the pyramid pooling, each bin and the result.
        parsing_channels: of the parsing feature and of the fusion branch.
        detail_channels: to which the first returned stage is reduced for the parsing branch.
        edge_channels: of each of the three edge features.
        dropout: probability that the fusion branch drops a channel before it classifies.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] -> `ParsingOutput`; every H and W that the backbone takes. In training B is 2 or more.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a backbone with fewer than four stages, or a number out of its range.

    Example:
        >>> options = {"context_channels": 16, "parsing_channels": 16, "detail_channels": 8, "edge_channels": 8}
        >>> output = ACE2P("small", num_classes=8, output_stride=4, **options).eval()(torch.randn(1, 3, 64, 32))
        >>> output.logits.shape, output.edge.shape
        (torch.Size([1, 8, 32, 16]), torch.Size([1, 2, 32, 16]))
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 20,
        deep_stem: bool | None = None,
        output_stride: int = 16,
        bins: Sequence[int] = (1, 2, 3, 6),
        context_channels: int = 512,
        parsing_channels: int = 256,
        detail_channels: int = 48,
        edge_channels: int = 256,
        dropout: float = 0.1,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "num_classes": num_classes,
            "context_channels": context_channels,
            "parsing_channels": parsing_channels,
            "detail_channels": detail_channels,
            "edge_channels": edge_channels,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.backbone = Backbone(
            backbone,
            stages=_STAGES,
            output_stride=output_stride,
            deep_stem=deep_stem,
            ceil_mode=False,
            weights=backbone_weights,
            options=backbone_options,
        )
        if len(self.backbone.channels) < _STAGES:
            raise ValueError(f"backbone must have four stages or more, {backbone} has {len(self.backbone.channels)}")
        *edge_in, last = self.backbone.channels
        self.context = PyramidPooling(last, context_channels, bins=bins, activation="leaky_relu")
        self.parsing = ParsingBranch(context_channels, edge_in[0], num_classes, parsing_channels, detail_channels)
        self.edge = EdgeBranch(edge_in, edge_channels)
        self.fusion = nn.Sequential(
            *_convolution(parsing_channels + len(edge_in) * edge_channels, parsing_channels),
            nn.Dropout2d(dropout),
            nn.Conv2d(parsing_channels, num_classes, 1),
        )

    def forward(self, images: Tensor) -> ParsingOutput:
        details, *middle, last = self.backbone(images)
        parsing, parsing_features = self.parsing(self.context(last), details)
        edge, edge_features = self.edge([details, *middle])
        logits = self.fusion(torch.cat([parsing_features, edge_features], dim=1))
        return ParsingOutput(logits, parsing, edge)


class ParsingBranch(nn.Module):
    """Bring the context to the size of an early stage, fuse the two, classify.

    Args:
        context_channels: of the context.
        detail_in: channels of the early stage.
        num_classes: K.
        channels: of the context when it is fused, and of the parsing feature.
        detail_channels: to which the early stage is reduced.

    Shape:
        context [B, context_channels, h', w'], details [B, detail_in, h, w] ->
        logits [B, K, h, w], parsing feature [B, channels, h, w].

    Source: the official code.

    Example:
        >>> branch = ParsingBranch(32, 16, 20, channels=24, detail_channels=8)
        >>> logits, features = branch(torch.randn(2, 32, 5, 9), torch.randn(2, 16, 17, 33))
        >>> logits.shape, features.shape
        (torch.Size([2, 20, 17, 33]), torch.Size([2, 24, 17, 33]))
    """

    def __init__(
        self,
        context_channels: int,
        detail_in: int,
        num_classes: int,
        channels: int = 256,
        detail_channels: int = 48,
    ) -> None:
        super().__init__()
        self.context = _convolution(context_channels, channels)
        self.details = _convolution(detail_in, detail_channels)
        self.fuse = nn.Sequential(
            *_convolution(channels + detail_channels, channels), *_convolution(channels, channels)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, context: Tensor, details: Tensor) -> tuple[Tensor, Tensor]:
        context = _resized(self.context(context), details.shape[-2:])
        features = self.fuse(torch.cat([context, self.details(details)], dim=1))
        return self.classifier(features), features


class EdgeBranch(nn.Module):
    """Find the edges between parts in several stages, at each one's own resolution, and combine them.

    Args:
        in_channels: of each stage, the one with the highest resolution first.
        channels: of each stage's edge feature.

    Shape:
        list of [B, in_channels[i], h_i, w_i] -> logits [B, 2, h_0, w_0], edge feature [B, n * channels, h_0, w_0].

    Source: the official code.

    Example:
        >>> branch = EdgeBranch([16, 32], channels=8)
        >>> logits, features = branch([torch.randn(2, 16, 17, 33), torch.randn(2, 32, 9, 17)])
        >>> logits.shape, features.shape
        (torch.Size([2, 2, 17, 33]), torch.Size([2, 16, 17, 33]))
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_convolution(stage, channels) for stage in in_channels)
        self.detect = nn.Conv2d(channels, 2, 3, padding=1)  # one for all stages
        self.combine = nn.Conv2d(2 * len(in_channels), 2, 1)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        size = stages[0].shape[-2:]
        first, *others = (reduce(stage) for reduce, stage in zip(self.reduce, stages, strict=True))
        edges = [self.detect(first), *(_resized(self.detect(feature), size) for feature in others)]
        features = [first, *(_resized(feature, size) for feature in others)]
        return self.combine(torch.cat(edges, dim=1)), torch.cat(features, dim=1)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)
