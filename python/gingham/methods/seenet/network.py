"""SeeNet's network: a backbone and three branches that see its features whole, self-erased, and as background alone.

Paper: Hou et al., Self-Erasing Network for Integral Object Attention, https://arxiv.org/abs/1810.09821. Backbone and
heads are those of the official deploy network; the third branch is not in it.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gingham.methods.seenet.erasing import background_mask, conditional_relu, require_zones, tag_attention, zone_mask
from gingham.nn.backbone import Backbone, BackboneError
from gingham.nn.pretrained import PretrainedModel


class SeeNetOutput(NamedTuple):
    """Class maps, raw logits, at the resolution of the features; their means over h and w are the class logits."""

    attended: Tensor  # [B, C, h, w], of the first branch
    potential: Tensor | None  # [B, C, h, w], of what is left after erasing; None without tags or that branch
    background: Tensor | None  # [B, C, h, w], of the background alone, in training only
    zones: Tensor | None  # [B, h, w] int8, 0 attended, 1 potential; the background as the network treats it


class SeeNet(
    PretrainedModel,
    repo_url="https://arxiv.org/abs/1810.09821",
    paper_url="https://arxiv.org/abs/1810.09821",
    pipeline_tag="image-classification",
):
    """Attention maps of the classes that an image is tagged with, over the whole of their objects.

    Without the second branch it is a class activation map (CAM); with ``train_thresholds=(0.7, 0.0)`` and without
    ``background_threshold`` it is adversarial erasing with nothing that holds it back.

    Args:
        backbone: "small" or any timm model. Of VGGs, the last stage before the last pooling is used, as official.
        num_classes: C, classes without background.
        output_stride: pixels of the image per pixel of the maps; VGGs have 16 ("small": 8, 4 or 2).
        head_channels: of the 3x3 convolutions of the branches.
        head_convs: 3x3 convolutions in a branch. Whether the paper has three is not confirmed; the official network
            has two.
        head_std: standard deviation of the heads' first weights, biases being 0; None for torch's own.
        dropout: before the classifier of the first branch.
        erase: whether there is the second branch, which sees features by zone.
        train_thresholds: (high, low) of the zones in training, see `gingham.methods.seenet.erasing.zone_mask`.
        test_thresholds: the same in evaluation; the official ones reverse nothing.
        background: what the second branch's features are multiplied by in the background zone.
        background_threshold: below which attention the third branch sees an image, or None for no third branch.
        share_background: whether the third branch has the weights of the second, which the official file hints at.
        norm: how class maps are scaled for the zones, see `gingham.methods.seenet.erasing.tag_attention`.
        leaky_backward: the gradient of the official layer, see `gingham.methods.seenet.erasing.conditional_relu`.
        ceil_mode: VGGs only: whether their max-pools round sizes up, as Caffe does.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file.
        backbone_options: further arguments of the backbone's constructor.

    Shape:
        images [B, 3, H, W] and tags [B, C] -> `SeeNetOutput`.

    Raises:
        BackboneError: a backbone that does not exist or does not have an option.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: a number out of its range, or options that do not go together.

    Source: sections 3.1 and 3.2; thresholds and the third branch are not confirmed.

    Example:
        >>> import torch
        >>> model = SeeNet("small", num_classes=5, output_stride=4, head_channels=16)
        >>> output = model(torch.randn(2, 3, 64, 48), torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0]]))
        >>> output.attended.shape, output.potential.shape, output.zones.shape
        (torch.Size([2, 5, 16, 12]), torch.Size([2, 5, 16, 12]), torch.Size([2, 16, 12]))
    """

    def __init__(
        self,
        backbone: str = "vgg16",
        num_classes: int = 20,
        output_stride: int = 16,
        head_channels: int = 512,
        head_convs: int = 2,
        head_std: float | None = 0.01,
        dropout: float = 0.5,
        erase: bool = True,
        train_thresholds: tuple[float, float] = (0.7, 0.05),
        test_thresholds: tuple[float, float] = (0.8, 0.0),
        background: Literal[-1, 0, 1] = -1,
        background_threshold: float | None = 0.375,
        share_background: bool = True,
        norm: Literal["range", "max"] = "range",
        leaky_backward: bool = False,
        ceil_mode: bool = True,
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("head_channels", head_channels, 1),
            ("head_convs", head_convs, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if head_std is not None and not head_std > 0:
            raise ValueError(f"head_std must be above 0, got {head_std}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if background not in (-1, 0, 1):
            raise ValueError(f"background must be -1, 0 or 1, got {background}")
        if norm not in ("range", "max"):
            raise ValueError(f"norm must be 'range' or 'max', got {norm!r}")
        if background_threshold is not None and not erase:
            raise ValueError(f"background_threshold must be None without erase, got {background_threshold}")
        for thresholds in (train_thresholds, test_thresholds):
            require_zones(*thresholds)
        self.train_thresholds, self.test_thresholds = tuple(train_thresholds), tuple(test_thresholds)
        self.background_value, self.background_threshold = background, background_threshold
        self.norm: Literal["range", "max"] = norm
        self.leaky_backward = leaky_backward
        self.backbone = _backbone(backbone, output_stride, ceil_mode, backbone_weights, backbone_options)

        def branch(dropout: float = 0.0) -> Branch:
            return Branch(self.backbone.channels[0], num_classes, head_channels, head_convs, dropout, head_std)

        self.attended = branch(dropout)
        self.potential = branch() if erase else None
        own_background = background_threshold is not None and not share_background
        self.background = branch() if own_background else None

    def forward(self, images: Tensor, tags: Tensor | None = None) -> SeeNetOutput:
        if tags is None and self.training and self.potential is not None:
            raise ValueError("tags must be given in training, got None")
        features = self.backbone(images)[0].relu()
        attended = self.attended(features)
        if tags is None or self.potential is None:
            return SeeNetOutput(attended, None, None, None)
        attention = tag_attention(attended, tags, norm=self.norm)
        high, low = self.train_thresholds if self.training else self.test_thresholds
        zones = zone_mask(attention, high, low, background=self.background_value)
        potential = self.potential(conditional_relu(features, zones, leaky_backward=self.leaky_backward))
        background = None
        if self.training and self.background_threshold is not None:
            head = self.potential if self.background is None else self.background
            background = head(conditional_relu(features, background_mask(attention, self.background_threshold)))
        return SeeNetOutput(attended, potential, background, zones)


class Branch(nn.Sequential):
    """A few 3x3 convolutions, each with a ReLU, dropout, and a 1x1 classifier.

    Args:
        in_channels: of the features.
        num_classes: C.
        channels: of the 3x3 convolutions.
        convs: how many.
        dropout: probability that a value is dropped before the classifier.
        std: standard deviation of the first weights, biases being 0; None for torch's own.

    Shape:
        features [B, in_channels, h, w] -> class maps [B, C, h, w].

    Source: the official deploy network.

    Example:
        >>> import torch
        >>> Branch(8, 5, channels=16)(torch.randn(1, 8, 9, 17)).shape
        torch.Size([1, 5, 9, 17])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 512,
        convs: int = 2,
        dropout: float = 0.0,
        std: float | None = 0.01,
    ) -> None:
        layers: list[nn.Module] = []
        for index in range(convs):
            layers += [nn.Conv2d(channels if index else in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Dropout(dropout), nn.Conv2d(channels if convs else in_channels, num_classes, 1))
        if std is not None:
            for module in self:
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=std)
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)


def _backbone(
    name: str, output_stride: int, ceil_mode: bool, weights: str | None, options: Mapping[str, Any] | None
) -> Backbone:
    if not name.startswith("vgg"):
        return Backbone(name, stages=1, output_stride=output_stride, weights=weights, options=options)
    if output_stride != 16:
        raise BackboneError(f"backbone {name!r} has output_stride 16 here, not {output_stride}")
    made = Backbone(name, stages=2, weights=weights, options=options)  # the first of them has stride 16
    for module in made.modules():
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = ceil_mode
    return made
