"""SG-One's network: one backbone for support and query, similarity guidance, and a light branch that segments.

Paper: Zhang et al., SG-One: Similarity Guidance Network for One-Shot Semantic Segmentation, IEEE Transactions on
Cybernetics 2020, https://arxiv.org/abs/1810.09091. Layers as in the official code, https://github.com/xiaomengyc/SG-One.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.errors import CheckpointError
from gingham.nn.backbone import Backbone, BackboneError
from gingham.nn.checkpoint import read_state_dict
from gingham.nn.masked_similarity import MaskedSimilarity
from gingham.nn.pretrained import PretrainedModel

Guidance = Literal["masked", "blanked", "global", "none"]
Maps = Tensor | Sequence[Tensor]


class SGOneOutput(NamedTuple):
    """What the network gives for a batch of queries."""

    logits: Tensor  # [B, 2, h, w], background and object
    similarity: Tensor  # [B, 1, h, w], -1 to 1


class SGOne(
    PretrainedModel,
    repo_url="https://arxiv.org/abs/1810.09091",
    paper_url="https://arxiv.org/abs/1810.09091",
    pipeline_tag="image-segmentation",
):
    """Segments in a query image what the masks of K support images show, a class that need not be known.

    The vector of the masked supports is compared with every pixel of the query's features; the cosines multiply the
    features of the branch that segments the query.

    Args:
        backbone: "vgg16", `VGG16`, as in the paper; "small" or any timm model, see `gingham.nn.backbone.Backbone`, of
            which the last three stages take the places of VGG's, coarser ones brought to the size of the first.
        output_stride: pixels of the image per pixel of the features; "vgg16" has 8.
        guidance: "masked": the method. What it is compared with: "blanked": pixels of the support image outside the
            mask are made the mean colour, and its features averaged over the whole picture; "global": they are
            averaged over the whole picture as it is; "none": the query is segmented without any support, and the layer
            that makes features to compare is left out.
        guidance_channels: C of the features that are compared.
        side_channels: D of the branch that segments.
        guidance_norm: standardise these features over the batch, by batch normalisation without scale and shift. Not in
            the paper: features of a network without pretrained weights all point the same way, so that every cosine
            is near 1.
        resize: "features": the supports' features count as interpolated to the size of the mask, as in the official
            code; "mask": the mask is interpolated to the size of the features.
        legacy_exit_padding: pad the last 1x1 convolution by 1, as the official code does: its output is two rows and
            columns larger, so that every prediction shrinks toward the centre. For weights trained that way.
        torch_compat: features without length have the gradient of `torch.nn.functional.cosine_similarity`, about 1e8,
            instead of none.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file, of torchvision's VGG-16 too.
        backbone_options: further arguments of the backbone's constructor; none for "vgg16".

    Shape:
        query [B, 3, H, W], support [B, K, 3, H', W'] and mask [B, K, 1, H', W'] (or K tensors [B, 3, h, w] and
        [B, 1, h, w], each of a size of its own; bool, uint8 or floating point) -> `SGOneOutput`. An empty mask gives
        the similarity 0.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range, an unknown guidance, or supports and masks that do not fit.

    Source: sections III-B and III-C; the placing of ReLUs, and 3x3 pools where VGG has 2x2, from the official code.

    Example:
        >>> model = SGOne("small", output_stride=4, guidance_channels=16, side_channels=8).eval()
        >>> query, support = torch.randn(2, 3, 64, 48), torch.randn(2, 5, 3, 40, 56)
        >>> output = model(query, support, torch.rand(2, 5, 1, 40, 56) > 0.5)
        >>> output.logits.shape, output.similarity.shape
        (torch.Size([2, 2, 16, 12]), torch.Size([2, 1, 16, 12]))
    """

    def __init__(
        self,
        backbone: str = "vgg16",
        output_stride: int = 8,
        guidance: Guidance = "masked",
        guidance_channels: int = 512,
        side_channels: int = 128,
        guidance_norm: bool = False,
        resize: Literal["features", "mask"] = "features",
        legacy_exit_padding: bool = False,
        torch_compat: bool = False,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("guidance_channels", guidance_channels), ("side_channels", side_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if guidance not in ("masked", "blanked", "global", "none"):
            raise ValueError(f"guidance must be 'masked', 'blanked', 'global' or 'none', got {guidance!r}")
        self.guidance = guidance
        self.backbone = _backbone(backbone, output_stride, backbone_weights, backbone_options)
        first, second, third = self.backbone.channels
        self.guidance_layer = nn.Conv2d(third, guidance_channels, 3, padding=1) if guidance != "none" else None
        self.guidance_norm = nn.BatchNorm2d(guidance_channels, affine=False) if guidance_norm else nn.Identity()
        self.similarity = MaskedSimilarity(resize=resize, torch_compat=torch_compat)
        self.side3 = nn.Conv2d(first, side_channels, 3, padding=1)
        self.side4 = nn.Conv2d(side_channels + second, side_channels, 3, padding=1)
        self.side5 = nn.Conv2d(side_channels + third, side_channels, 3, padding=1)
        self.refine = nn.Conv2d(side_channels, side_channels, 3, padding=1)
        self.exit = nn.Conv2d(side_channels, 2, 1, padding=1 if legacy_exit_padding else 0)
        for layer in (self.guidance_layer, self.side3, self.side4, self.side5):  # the others keep PyTorch's beginning
            if layer is None:
                continue
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, support: Maps, mask: Maps) -> SGOneOutput:
        return self.compare(query, *self.support(support, mask))

    def support(self, support: Maps, mask: Maps) -> tuple[Maps, Maps]:
        """The features [B, K, C, h, w] of supports (or K of them) and the masks under which they are averaged."""
        if isinstance(support, Tensor) and support.dim() != 5:
            raise ValueError(
                f"support must be [B, K, 3, H, W], or a list of K images [B, 3, h, w], got {list(support.shape)}"
            )
        if isinstance(support, Tensor) != isinstance(mask, Tensor) or len(support) != len(mask):
            raise ValueError("support and mask must be both tensors or both lists, of as many shots")
        if self.guidance_layer is None:
            return support, mask
        if self.guidance == "blanked":
            support = _each(torch.mul, support, mask)
        if self.guidance != "masked":
            mask = _each(lambda x, _: torch.ones_like(x), mask, mask)
        if isinstance(support, Tensor):
            return self._features(self.stages(support.flatten(0, 1))).unflatten(0, support.shape[:2]), mask
        return [self._features(self.stages(images)) for images in support], mask

    def compare(self, query: Tensor, features: Maps, mask: Maps) -> SGOneOutput:
        """Segment queries [B, 3, H, W] by what `support` gave, which several queries can share."""
        stages = self.stages(query)
        if self.guidance_layer is None:
            similarity = torch.ones_like(stages[0][:, :1])
        else:
            similarity = self.similarity(self._features(stages), features, mask)
        return SGOneOutput(self.segment(stages, similarity), similarity)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The three maps of images [B, 3, H, W] that all else is computed from, at one size."""
        first, *others = self.backbone(images)
        size = first.shape[-2:]
        return [first] + [
            x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            for x in others
        ]

    def _features(self, stages: Sequence[Tensor]) -> Tensor:
        """The features [B, C, h, w] that are compared."""
        assert self.guidance_layer is not None
        features: Tensor = self.guidance_norm(self.guidance_layer(stages[-1]))
        return features

    def segment(self, stages: Sequence[Tensor], similarity: Tensor) -> Tensor:
        """Logits [B, 2, h, w] of a query, by its `stages`, under a similarity [B, 1, h, w]."""
        side = F.relu(self.side3(stages[0]))
        side = F.relu(self.side4(torch.cat([side, stages[1]], dim=1)))
        side = self.side5(torch.cat([side, stages[2]], dim=1))
        logits: Tensor = self.exit(F.relu(self.refine(side * similarity)))
        return logits


def _each(function: Any, left: Maps, right: Maps) -> Maps:
    if isinstance(left, Tensor):
        return function(left, right)
    return [function(one, other) for one, other in zip(left, right, strict=True)]


class VGG16(nn.Module):
    """VGG-16's convolutions at output stride 8: pools are 3x3, the last two of stride 1; nothing is dilated.

    Returns the maps after the third, fourth and fifth pool.

    Attributes:
        channels: of the maps.

    Shape:
        images [B, 3, H, W] -> [B, 256, h, w], [B, 512, h, w], [B, 512, h, w]; h and w are H and W halved three times,
        each time rounded up.

    Source: SG-One's official code. Simonyan and Zisserman, https://arxiv.org/abs/1409.1556, for the convolutions.

    Example:
        >>> [list(x.shape) for x in VGG16()(torch.randn(1, 3, 33, 50))]
        [[1, 256, 5, 7], [1, 512, 5, 7], [1, 512, 5, 7]]
    """

    channels = (256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 3
        for width, convolutions, stride in ((64, 2, 2), (128, 2, 2), (256, 3, 2), (512, 3, 1), (512, 3, 1)):
            layers: list[nn.Module] = []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.blocks.append(nn.Sequential(*layers, nn.MaxPool2d(3, stride, padding=1)))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            images = block(images)
            maps.append(images)
        return maps[2:]

    def load_weights(self, weights: str) -> None:
        """Take the convolutions of torchvision's or timm's VGG-16: 13, in the same order.

        Args:
            weights: "timm", a timm tag, or a safetensors or torch file with ``features.*``.

        Raises:
            CheckpointError: weights that cannot be found, or are no VGG-16's.
        """
        if Path(weights).suffix or Path(weights).is_file():
            state = read_state_dict(weights)
            found = [value for name, value in state.items() if name.startswith("features.")]
        else:
            found = list(Backbone("vgg16", stages=1, weights=weights).parameters())
        if [x.shape for x in found] != [x.shape for x in self.parameters()]:
            raise CheckpointError(
                f"{weights}: no VGG-16, whose features.* are the weights and biases of 13 convolutions"
            )
        with torch.no_grad():
            for own, other in zip(self.parameters(), found, strict=True):
                own.copy_(other)


def _backbone(name: str, output_stride: int, weights: str | None, options: Mapping[str, Any] | None) -> Any:
    if name != "vgg16":
        return Backbone(name, stages=3, output_stride=output_stride, weights=weights, options=options)
    if output_stride != 8 or options:
        raise BackboneError(
            f"backbone 'vgg16' has output_stride 8 and no options, got {output_stride} and {dict(options or {})}"
        )
    network = VGG16()
    if weights is not None:
        network.load_weights(weights)
    return network
