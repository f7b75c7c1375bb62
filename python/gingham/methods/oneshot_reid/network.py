"""The network of one-shot adaptation: a backbone, outputs that triplets are made of, and classifiers if wanted.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1. Layers as
in the authors' later code, https://github.com/OasisYang/SSG.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gingham.nn.backbone import Backbone, BackboneError
from gingham.nn.pretrained import PretrainedModel


class EmbeddingOutput(NamedTuple):
    """What the network gives for a batch of images."""

    pooled: Tensor  # [B, C]: x1, what images are retrieved by
    embedding: Tensor  # [B, E]: x2
    source_logits: Tensor | None = None  # [B, K], of the persons of the source
    target_logits: Tensor | None = None  # [B, L], of the persons of the target
    parts: Tensor | None = None  # [B, P, C]: pooled over each part of the rows, where there are several


class OneShotReID(
    PretrainedModel,
    repo_url="https://arxiv.org/abs/1811.10144v1",
    paper_url="https://arxiv.org/abs/1811.10144v1",
    pipeline_tag="image-feature-extraction",
):
    """Pooled features of a backbone, an embedding of them, and the logits of classifiers on the embedding.

    Args:
        backbone: "resnet50" as in the code, "small" or any timm model, see `gingham.nn.backbone.Backbone`.
        num_classes: persons of the source that are classified; 0 for no classifier.
        target_classes: persons of the target that are classified; 0 for no classifier, as in the code.
        embedding_channels: E.
        dropout: before the classifiers, 0 to below 1.
        num_parts: P. 2 and more also pool that many parts of the map, of H // P rows each from the top (rows that are
            left over are in none), as the paper that followed does with 2; 1 pools the whole alone.
        last_stride: 2, or 1 for maps of twice the size in the last stage, which is not dilated. Of "small": 2 is its
            output stride 8, 1 its output stride 4.
        bn_group: images that batch normalisation takes its statistics over in training: a batch is cut into groups of
            so many at least, as if they were on several devices. None for the whole batch, which is all that backbones
            with normalisation layers of their own can do.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] -> `EmbeddingOutput`.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option, or whose batch normalisation has no
            groups.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range; images whose map has fewer rows than parts.

    Source: the authors' later code. There the classifier is built for training on the source only.

    Example:
        >>> model = OneShotReID("small", num_classes=10, embedding_channels=32).eval()
        >>> output = model(torch.randn(2, 3, 64, 32))
        >>> output.pooled.shape, output.embedding.shape, output.source_logits.shape
        (torch.Size([2, 64]), torch.Size([2, 32]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 0,
        target_classes: int = 0,
        embedding_channels: int = 2048,
        dropout: float = 0.1,
        num_parts: int = 1,
        last_stride: int = 2,
        bn_group: int | None = 64,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("target_classes", target_classes)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if embedding_channels < 1:
            raise ValueError(f"embedding_channels must be 1 or more, got {embedding_channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be 0 to below 1, got {dropout}")
        if num_parts < 1:
            raise ValueError(f"num_parts must be 1 or more, got {num_parts}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {last_stride}")
        if bn_group is not None and bn_group < 2:
            raise ValueError(f"bn_group must be 2 or more, got {bn_group}")
        self.num_parts = num_parts
        usual = 8 if backbone == "small" else 32
        self.backbone = Backbone(
            backbone,
            stages=1,
            output_stride=usual if last_stride == 2 else usual // 2,
            dilate=False,
            weights=backbone_weights,
            options=backbone_options,
        )
        (channels,) = self.backbone.channels
        self.embedding = nn.Sequential(
            nn.Linear(channels, embedding_channels, bias=False), nn.BatchNorm1d(embedding_channels), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.source_classifier = nn.Linear(embedding_channels, num_classes) if num_classes else None
        self.target_classifier = nn.Linear(embedding_channels, target_classes) if target_classes else None
        for layer in (self.embedding[0], self.source_classifier, self.target_classifier):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.001)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if bn_group is not None:
            _group_batch_norm(self, bn_group)

    def forward(self, images: Tensor) -> EmbeddingOutput:
        (features,) = self.backbone(images)
        pooled = features.mean(dim=(2, 3))
        embedding = self.embedding(pooled)
        parts = self._pool_parts(features) if self.num_parts > 1 else None
        if self.source_classifier is None and self.target_classifier is None:
            return EmbeddingOutput(pooled, embedding, parts=parts)
        dropped = self.dropout(embedding)
        source, target = (
            None if classifier is None else classifier(dropped)
            for classifier in (self.source_classifier, self.target_classifier)
        )
        return EmbeddingOutput(pooled, embedding, source, target, parts)

    def _pool_parts(self, features: Tensor) -> Tensor:
        rows = features.shape[2] // self.num_parts
        if rows == 0:
            raise ValueError(
                f"images must be large enough for {self.num_parts} parts, got a map of {features.shape[2]} rows"
            )
        parts = features[:, :, : rows * self.num_parts].unflatten(2, (self.num_parts, rows))
        return parts.mean(dim=(3, 4)).transpose(1, 2)


class GroupedBatchNorm(_BatchNorm):
    """Batch normalisation over groups of a batch, as if each were on a device of its own.

    Running statistics move once for every group. In evaluation it is batch normalisation, and its state is the same.

    Args:
        norm: the batch normalisation whose weights, statistics and options it takes over.
        group: images in a group at least, 2 or more; a batch of fewer is one group.

    Shape:
        [B, C, ...] -> the same.

    Example:
        >>> norm = GroupedBatchNorm(nn.BatchNorm1d(1, affine=False), group=2)
        >>> norm(torch.tensor([[0.0], [2.0], [10.0], [12.0]])).round().flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """

    def __init__(self, norm: _BatchNorm, group: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict())
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, features: Tensor) -> Tensor:
        groups = len(features) // self.group
        if not self.training or groups < 2:
            return super().forward(features)
        return torch.cat([super(GroupedBatchNorm, self).forward(x) for x in features.tensor_split(groups)])


def has_groups(network: nn.Module) -> bool:
    """Whether a network has batch normalisation over groups."""
    return any(isinstance(layer, GroupedBatchNorm) for layer in network.modules())


def _group_batch_norm(module: nn.Module, group: int) -> None:
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            _group_batch_norm(child, group)
        elif type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            setattr(module, name, GroupedBatchNorm(child, group))
        else:
            raise BackboneError(f"layers {type(child).__name__} of the backbone have no groups; pass bn_group=None")
