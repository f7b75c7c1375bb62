"""Backbones for dense prediction: any timm network by name, dilated ResNets as the papers define them, a small net.

Papers: Yu et al., Dilated Residual Networks, https://arxiv.org/abs/1705.09914; the deep stem is that of PSPNet,
https://arxiv.org/abs/1612.01105. Networks and pretrained weights come from timm.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gingham.errors import CheckpointError, GinghamError
from gingham.nn.checkpoint import load_state_dict, read_state_dict
from gingham.nn.convolution import convolution


class BackboneError(GinghamError, ValueError):
    """A backbone that does not exist, or that cannot be built with the given options."""


class Backbone(nn.Module):
    """Features of an image by stage, from a network given by its name.

    Args:
        name: "small" (`SmallNetwork`) or any timm model that gives features, for example "resnet101",
            "mobilenetv2_100" or "convnext_tiny".
        stages: how many of the last stages to return.
        output_stride: pixels of the image per pixel of the last stage, 32, 16 or 8 (small: 8, 4 or 2). Stages beyond
            it keep their size and are dilated instead.
        dilate: whether they are dilated. False: they only lose their stride, as the "last stride 1" of
            re-identification has it; weights are the same. "small" dilates nothing.
        deep_stem: ResNets only: three 3x3 convolutions (64, 64, 128 channels) in place of the 7x7. None: wherever the
            network has such a 7x7; others, such as "resnet101c", keep their own stem.
        ceil_mode: with a deep stem: whether its max-pool rounds sizes up, so that 512 rows give 129 (CCNet's official
            code), or down, so that they give 128 (SCHP's).
        contract_dilation: ResNets only: the first block of a dilated stage keeps the dilation of the stage before
            (timm, mmsegmentation) instead of taking that of its own stage (CCNet, PSPNet).
        weights: None; "timm" for timm's default pretrained weights; a timm tag such as "a1_in1k"; or a safetensors or
            torch file, whose classifier is ignored.
        options: further arguments of the network's constructor, such as timm's ``layers`` and ``channels``.

    Attributes:
        channels: channels of the returned stages, in order.
        strides: pixels of the image per pixel of the returned stages.

    Shape:
        images [B, 3, H, W] -> list of [B, channels[i], h, w].

    Raises:
        BackboneError: unknown name, or an option that this network does not have.
        CheckpointError: weights that cannot be found or do not fit.

    Example:
        >>> backbone = Backbone("resnet18", output_stride=8, deep_stem=True)
        >>> [list(stage.shape) for stage in backbone(torch.randn(1, 3, 65, 129))]
        [[1, 256, 9, 17], [1, 512, 9, 17]]
    """

    def __init__(
        self,
        name: str,
        *,
        stages: int = 2,
        output_stride: int = 32,
        dilate: bool = True,
        deep_stem: bool | None = False,
        ceil_mode: bool = True,
        contract_dilation: bool = False,
        weights: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        body: Any
        if name == "small":
            if weights is not None and not _is_file_name(weights):
                raise CheckpointError(f"backbone small has no pretrained weights named {weights!r}")
            if deep_stem:
                raise BackboneError("backbone 'small' is no ResNet and has no deep stem; leave deep_stem out")
            body = SmallNetwork(output_stride=output_stride, **options)
            self.channels: list[int] = body.channels[-stages:]
            self.strides: list[int] = body.strides[-stages:]
        else:
            body = _timm_network(name, stages, output_stride, deep_stem, ceil_mode, contract_dilation, weights, options)
            if not dilate:
                _undo_dilation(body)
            self.channels = body.feature_info.channels()
            self.strides = body.feature_info.reduction()
        self.body = body
        self.stages = stages
        if weights is not None and _is_file_name(weights):
            self._load_file(weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.body(images)[-self.stages :]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [stage.permute(0, 3, 1, 2) for stage in features]
        return features

    def _load_file(self, path: str) -> None:
        kept = {name for name, _ in self.body.named_children()}
        state = deep_stem_names(_flattened_names(read_state_dict(path), kept))
        # A whole classifier is stored; stages that are not asked for and its last layers have no place here.
        state = {name: value for name, value in state.items() if name.partition(".")[0] in kept}
        load_state_dict(self.body, state, source=path)


class SmallNetwork(nn.Module):
    """A plain convolutional network for small images: a stem of stride 2, then stages of 3x3 convolutions.

    Its receptive field stays small on purpose, so that whatever aggregates context on top of it has work to do.

    Args:
        output_stride: 2, 4 or 8; the stages after the stem halve the map until it is reached.
        widths: channels of the stem and of each stage.
        depth: 3x3 convolutions per stage.

    Shape:
        images [B, 3, H, W] -> list of [B, widths[i], h, w], one for the stem and for each stage.

    Raises:
        BackboneError: an output stride that the stages cannot reach.

    Example:
        >>> network = SmallNetwork(output_stride=4, widths=(16, 32, 32))
        >>> [list(stage.shape) for stage in network(torch.randn(1, 3, 64, 64))]
        [[1, 16, 32, 32], [1, 32, 16, 16], [1, 32, 16, 16]]
    """

    def __init__(self, *, output_stride: int = 4, widths: Sequence[int] = (32, 64, 64, 64), depth: int = 1) -> None:
        super().__init__()
        reachable = [2**exponent for exponent in range(1, len(widths) + 1)]
        if output_stride not in reachable:
            raise BackboneError(
                f"backbone small with {len(widths)} widths reaches output_stride {reachable}, not {output_stride}"
            )
        self.channels = list(widths)
        self.strides: list[int] = []
        self.stages = nn.ModuleList()
        channels, stride = 3, 1
        for width in widths:
            step = 2 if stride < output_stride else 1
            stride *= step
            self.strides.append(stride)
            layers: list[nn.Module] = []
            for index in range(depth if self.stages else 1):
                layers += convolution(channels, width, 3, stride=1 if index else step)
                channels = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features


def _flattened_names(state: Mapping[str, Tensor], children: Collection[str]) -> dict[str, Tensor]:
    """The tensors under the names of a feature extractor of timm: where stem.0 is a child of its own, it is stem_0."""
    result = {}
    for name, value in state.items():
        flat = name.replace(".", "_", 1)
        result[flat if flat.partition(".")[0] in children else name] = value
    return result


def deep_stem_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a deep-stem ResNet under timm's names, whichever of three namings they come in.

    Understands the official CCNet and CSAIL files (conv1, bn1, conv2, bn2, conv3, bn3), mmsegmentation's ResNetV1c
    (stem.0 ... stem.7) and timm's own (conv1.0 ... conv1.6, bn1), which pass unchanged, as all other names do.

    Args:
        state: tensors by name, without any prefix.
    """
    if "stem.0.weight" in state:
        renamed = {f"stem.{index}": f"conv1.{index}" for index in (0, 1, 3, 4, 6)} | {"stem.7": "bn1"}
    elif "conv3.weight" in state:
        renamed = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4"}
        renamed |= {"conv3": "conv1.6", "bn3": "bn1"}
    else:
        renamed = {}
    result = {}
    for name, value in state.items():
        layer, _, tensor = name.rpartition(".")
        result[f"{renamed.get(layer, layer)}.{tensor}" if layer else name] = value
    return result


def _timm_network(
    name: str,
    stages: int,
    output_stride: int,
    deep_stem: bool | None,
    ceil_mode: bool,
    contract_dilation: bool,
    weights: str | None,
    options: dict[str, Any],
) -> Any:
    """timm's feature extractor, changed to the dilations and the stem that are asked for."""
    import timm
    from timm.models import model_entrypoint, resnet

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(name, timm.list_models(), n=5)
        like = f", such as {', '.join(close)}" if close else ""
        raise BackboneError(f"unknown backbone {name!r}; valid are small and timm's models{like}")
    is_resnet = model_entrypoint(architecture).__module__ == resnet.__name__
    if deep_stem is None:
        deep_stem = is_resnet and _has_plain_stem(architecture)
    if deep_stem and not is_resnet:
        raise BackboneError(f"backbone {name!r} is no ResNet and has no deep stem; leave deep_stem out")
    if deep_stem:
        options = {"stem_type": "deep", "stem_width": 64, **options}
    if output_stride != 32:  # many networks have the one stride only and do not know the argument
        options["output_stride"] = output_stride
    pretrained = weights is not None and not _is_file_name(weights)
    source = _pretrained_name(name, weights) if pretrained and weights is not None else name
    try:
        network: Any = timm.create_model(
            source, pretrained=pretrained, features_only=True, out_indices=tuple(range(-stages, 0)), **options
        )
    except (TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0] or f"output_stride={output_stride} is not possible"
        raise BackboneError(f"backbone {name!r} cannot be built with {options}: {reason}") from error
    except Exception as error:
        if not pretrained:
            raise
        reason = str(error).strip().split("\n")[0]
        hint = "; timm's weights have timm's stem: pass deep_stem=False" if deep_stem else ""
        raise CheckpointError(f"no pretrained weights for backbone {source!r}: {reason}{hint}") from error
    if is_resnet:
        if deep_stem:
            network["maxpool"].ceil_mode = ceil_mode
        if not contract_dilation:
            _dilate_first_blocks(network)
    return network


def _has_plain_stem(architecture: str) -> bool:
    import timm

    with torch.device("meta"):
        return isinstance(timm.create_model(architecture).conv1, nn.Conv2d)


def _dilate_first_blocks(network: Any) -> None:
    """Give the first block of each stage the dilation of the blocks that follow."""
    for name, stage in network.items():
        if name.startswith("layer"):
            *_, dilation = (spatial.dilation for spatial in _spatial_convolutions(stage[-1]))
            for spatial in _spatial_convolutions(stage[0]):
                spatial.dilation = spatial.padding = dilation


def _undo_dilation(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            assert not isinstance(module.padding, str)
            rows, columns = (side // step for side, step in zip(module.padding, module.dilation, strict=True))
            module.padding, module.dilation = (rows, columns), (1, 1)


def _spatial_convolutions(block: nn.Module) -> Iterator[nn.Conv2d]:
    return (module for module in block.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))


def _pretrained_name(name: str, weights: str) -> str:
    import timm

    tagged = name if weights == "timm" else f"{name.partition('.')[0]}.{weights.rpartition('.')[2]}"
    available = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if weights != "timm" and tagged not in available:
        tags = ", ".join(entry.partition(".")[2] for entry in available) or "none"
        raise CheckpointError(f"backbone {name!r} has no weights {weights!r}: no such file, and timm's tags are {tags}")
    return tagged


def _is_file_name(weights: str) -> bool:
    path = Path(weights)
    return path.exists() or len(path.parts) > 1 or path.suffix in {".safetensors", ".pth", ".pt", ".bin", ".tar"}
