"""STA's network: a backbone for every frame, the attention that makes one vector of a clip, two layers on top.

Paper: Fu et al., STA: Spatial-Temporal Attention for Large-Scale Video-based Person Re-Identification, AAAI 2019,
https://arxiv.org/abs/1811.04129. There is no official code; the layers behind the attention are those of AGRL,
https://github.com/weleen/AGRL.pytorch, by another author.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gingham.nn.backbone import Backbone
from gingham.nn.pretrained import PretrainedModel
from gingham.nn.spatial_temporal_attention import SpatialTemporalAttention
from gingham.ops import spatial_temporal_attention_from_sums, spatial_temporal_sums

Attention = Literal["both", "sum", "none"]
Neck = Literal["relu", "bn", "linear"]


class STAOutput(NamedTuple):
    """What the network gives for a batch of clips."""

    features: Tensor  # [B, D], what tracklets are compared by
    logits: Tensor  # [B, P], of the training persons
    scores: Tensor  # [B, T, K], of each frame's parts; those of a part sum to 1
    attention: Tensor | None  # [B, T, h, w], within each frame; None without attention


class FrameRegions(NamedTuple):
    """What a clip's vector is made of, frame by frame."""

    sums: Tensor  # [N, K, C], of the features over each part
    energies: Tensor  # [N, K], what each part gets of its frame's attention
    positions: int  # of the feature map


class STA(
    PretrainedModel,
    repo_url="https://arxiv.org/abs/1811.04129",
    paper_url="https://arxiv.org/abs/1811.04129",
    pipeline_tag="image-feature-extraction",
):
    """Turns a clip of a person, of any number of frames, into a vector that is near those of the same person.

    The attention has no parameters: all variants have the same state, and clips of training and test may differ in
    length.

    Args:
        backbone: "small" or any timm model, see `gingham.nn.backbone.Backbone`; "resnet50" in the paper.
        num_persons: P, persons of the training set.
        output_stride: pixels of the image per pixel of the features. Stages beyond it lose their stride and are not
            dilated: 16, with which a frame of 256x128 has 16x8 features, sets the last stride of a ResNet to 1.
        parts: K, horizontal bands of a frame, 1 or more.
        energy: how attention is read off the features, "sq", "l2" or "agrl", see
            `gingham.ops.spatial_temporal_attention`.
        attention: "both": the best frame of each part, and all frames by their scores. What it is compared with:
            "sum": the latter in place of both; "none": the mean of all frames in place of both.
        detach_attention: whether gradients shall not pass through the scores.
        embedding_channels: D.
        neck: what follows the first layer: batch normalisation and "relu", as in AGRL; "bn" alone; or nothing,
            "linear".
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        clips [B, T, 3, H, W], normalised -> `STAOutput`.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range, an unknown name, or, when called, images without the axis of frames.

    Source: section 3. That two layers follow the pooling is confirmed; D, batch normalisation and ReLU are AGRL's.

    Example:
        >>> model = STA("small", num_persons=5, output_stride=4, embedding_channels=16).eval()
        >>> output = model(torch.randn(2, 4, 3, 64, 32))
        >>> output.features.shape, output.scores.shape, output.attention.shape
        (torch.Size([2, 16]), torch.Size([2, 4, 4]), torch.Size([2, 4, 16, 8]))
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_persons: int = 625,
        output_stride: int = 16,
        parts: int = 4,
        energy: Literal["sq", "l2", "agrl"] = "sq",
        attention: Attention = "both",
        detach_attention: bool = False,
        embedding_channels: int = 1024,
        neck: Neck = "relu",
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_persons", num_persons), ("embedding_channels", embedding_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choice, valid in (("attention", attention, get_args(Attention)), ("neck", neck, get_args(Neck))):
            if choice not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {choice!r}")
        self.attention: Attention = attention
        self.backbone = Backbone(
            backbone,
            stages=1,
            output_stride=output_stride,
            dilate=False,
            weights=backbone_weights,
            options=backbone_options,
        )
        self.head = SpatialTemporalAttention(parts, energy=energy, detach_attention=detach_attention, return_map=True)
        (channels,) = self.backbone.channels
        layers: list[nn.Module] = [nn.Linear(2 * channels, embedding_channels, bias=False)]
        layers += [nn.BatchNorm1d(embedding_channels)] if neck != "linear" else []
        layers += [nn.ReLU()] if neck == "relu" else []
        self.embedding = nn.Sequential(*layers)
        self.classifier = nn.Linear(embedding_channels, num_persons)
        for layer in (layers[0], self.classifier):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, clips: Tensor) -> STAOutput:
        if clips.dim() != 5 or clips.size(1) == 0:
            raise ValueError(f"clips must be [B, T, 3, H, W] with T >= 1, got {list(clips.shape)}")
        maps = self.maps(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        attention: Tensor | None = None
        if self.attention == "none":
            pooled = maps.mean(dim=(1, 3, 4)).repeat(1, 2)
            scores = _equal_scores(maps, self.head.parts)
        else:
            pooled, scores, _, attention = self.head(maps)
            if self.attention == "sum":
                pooled = _second_half_twice(pooled)
        features = self.embedding(pooled)
        return STAOutput(features, self.classifier(features), scores, attention)

    def maps(self, frames: Tensor) -> Tensor:
        """The features [N, C, h, w] of frames [N, 3, H, W]."""
        (features,) = self.backbone(frames)
        return features

    def regions(self, frames: Tensor) -> FrameRegions:
        """What `embed` needs to know of frames [N, 3, H, W], whatever clips they will be part of."""
        maps = self.maps(frames)
        sums, energies = spatial_temporal_sums(maps, self.head.parts, energy=self.head.energy, eps=self.head.eps)
        return FrameRegions(sums, energies, maps.size(2) * maps.size(3))

    def embed(self, regions: FrameRegions, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of clips, without reading any frame again.

        Args:
            regions: of N frames.
            clips: [B, T] int64, which frames each clip consists of.

        Returns:
            features [B, D] and scores [B, T, K], as of `forward`.

        Raises:
            ValueError: clips that have not two axes, or no frame.
        """
        if clips.dim() != 2 or clips.size(1) == 0:
            raise ValueError(f"clips must be [B, T] with T >= 1, got {list(clips.shape)}")
        sums, energies = regions.sums[clips], regions.energies[clips]
        if self.attention == "none":
            pooled = (sums.sum(dim=(1, 2)) / (clips.size(1) * regions.positions)).repeat(1, 2)
            scores = _equal_scores(sums, self.head.parts)
        else:
            pooled, scores, _ = spatial_temporal_attention_from_sums(
                sums, energies, regions.positions, eps=self.head.eps
            )
            if self.attention == "sum":
                pooled = _second_half_twice(pooled)
        return self.embedding(pooled.to(self.classifier.weight.dtype)), scores


def _second_half_twice(pooled: Tensor) -> Tensor:
    return pooled.chunk(2, dim=1)[1].repeat(1, 2)


def _equal_scores(frames: Tensor, parts: int) -> Tensor:
    batch, length = frames.shape[:2]
    return frames.new_full((batch, length, parts), 1 / length, dtype=torch.promote_types(frames.dtype, torch.float32))
