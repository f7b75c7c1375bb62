"""The network of the official SCHP code as plain functions of a state under its names, from its written description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Widths(NamedTuple):
    """Of a network; the defaults are those of the official one."""

    blocks: Sequence[int] = (3, 4, 23, 3)
    stages: Sequence[int] = (64, 128, 256, 512)
    context: int = 512
    parsing: int = 256
    details: int = 48
    edge: int = 256


OFFICIAL = Widths()


def official_shapes(classes: int, widths: Widths = OFFICIAL) -> dict[str, tuple[int, ...]]:
    """Every entry of the state, by its official name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, outputs: int, inputs: int, size: int, *, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{entry}"] = (channels,)

    channels = 3
    for index, width in enumerate((64, 64, 128), 1):
        convolution(f"conv{index}", width, channels, 3)
        norm(f"bn{index}", width)
        channels = width
    stage_channels = []
    for layer, (blocks, width) in enumerate(zip(widths.blocks, widths.stages, strict=True), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            convolution(f"{name}.conv1", width, channels, 1)
            convolution(f"{name}.conv2", width, width, 3)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            for index, outputs in enumerate((width, width, 4 * width), 1):
                norm(f"{name}.bn{index}", outputs)
            if block == 0:
                convolution(f"{name}.downsample.0", 4 * width, channels, 1)
                norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
        stage_channels.append(channels)
    for stage in range(4):
        convolution(f"context_encoding.stages.{stage}.1", widths.context, channels, 1)
        norm(f"context_encoding.stages.{stage}.2", widths.context)
    convolution("context_encoding.bottleneck.0", widths.context, 4 * widths.context + channels, 3)
    norm("context_encoding.bottleneck.1", widths.context)
    for index in (1, 2, 3):
        convolution(f"edge.conv{index}.0", widths.edge, stage_channels[index - 1], 1)
        norm(f"edge.conv{index}.1", widths.edge)
    convolution("edge.conv4", 2, widths.edge, 3, bias=True)
    convolution("edge.conv5", 2, 6, 1, bias=True)
    convolution("decoder.conv1.0", widths.parsing, widths.context, 1)
    norm("decoder.conv1.1", widths.parsing)
    convolution("decoder.conv2.0", widths.details, stage_channels[0], 1)
    norm("decoder.conv2.1", widths.details)
    convolution("decoder.conv3.0", widths.parsing, widths.parsing + widths.details, 1)
    norm("decoder.conv3.1", widths.parsing)
    convolution("decoder.conv3.2", widths.parsing, widths.parsing, 1)
    norm("decoder.conv3.3", widths.parsing)
    convolution("decoder.conv4", classes, widths.parsing, 1, bias=True)
    convolution("fushion.0", widths.parsing, widths.parsing + 3 * widths.edge, 1)
    norm("fushion.1", widths.parsing)
    convolution("fushion.3", classes, widths.parsing, 1, bias=True)
    return shapes


def random_state(classes: int, widths: Widths, seed: int = 0) -> State:
    """A state none of whose entries has a value that a missing step would leave unnoticed; half the scales negative."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in official_shapes(classes, widths).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            value = 0.5 + value.abs()
        elif len(shape) == 4:
            value *= (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith("weight"):
            value = value.sign() * (0.5 + value.abs() / 2)
        else:
            value *= 0.3
        state[name] = value
    return state


def forward(state: State, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parsing, fusion and edge logits, in evaluation, of images in the order of channels that the state wants."""

    def convolve(name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, dilation)

    def normalize(name: str, x: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.{entry}"].reshape(1, -1, 1, 1) for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * (scale.abs() + 1e-5) + shift

    def head(convolution: str, norm: str, x: Tensor) -> Tensor:
        y = normalize(norm, convolve(convolution, x))
        return torch.where(y > 0, y, 0.01 * y)

    def resize(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)

    def bottleneck(name: str, x: Tensor, stride: int, dilation: int) -> Tensor:
        y = normalize(f"{name}.bn1", convolve(f"{name}.conv1", x)).clamp(min=0)
        y = normalize(f"{name}.bn2", convolve(f"{name}.conv2", y, stride, dilation)).clamp(min=0)
        y = normalize(f"{name}.bn3", convolve(f"{name}.conv3", y))
        if f"{name}.downsample.0.weight" in state:
            x = normalize(f"{name}.downsample.1", convolve(f"{name}.downsample.0", x, stride))
        return (x + y).clamp(min=0)

    x = images
    for index, stride in ((1, 2), (2, 1), (3, 1)):
        x = normalize(f"bn{index}", convolve(f"conv{index}", x, stride)).clamp(min=0)
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    stages = []
    for layer, stride, dilation in ((1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 1, 2)):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in state:
            x = bottleneck(f"layer{layer}.{block}", x, stride if block == 0 else 1, dilation)
            block += 1
        stages.append(x)
    x2, x3, x4, x5 = stages

    pyramid = []
    for stage, bins in enumerate((1, 2, 3, 6)):
        pooled = F.adaptive_avg_pool2d(x5, bins)
        name = f"context_encoding.stages.{stage}"
        pyramid.append(resize(head(f"{name}.1", f"{name}.2", pooled), x5))
    name = "context_encoding.bottleneck"
    context = head(f"{name}.0", f"{name}.1", torch.cat((*pyramid, x5), 1))

    coarse = resize(head("decoder.conv1.0", "decoder.conv1.1", context), x2)
    fine = head("decoder.conv2.0", "decoder.conv2.1", x2)
    parsing_feature = head("decoder.conv3.0", "decoder.conv3.1", torch.cat((coarse, fine), 1))
    parsing_feature = head("decoder.conv3.2", "decoder.conv3.3", parsing_feature)
    parsing = convolve("decoder.conv4", parsing_feature)

    edge_features, edge_maps = [], []
    for index, stage_map in enumerate((x2, x3, x4), 1):
        feature = head(f"edge.conv{index}.0", f"edge.conv{index}.1", stage_map)
        edge_maps.append(resize(convolve("edge.conv4", feature), x2))
        edge_features.append(resize(feature, x2))
    edge = convolve("edge.conv5", torch.cat(edge_maps, 1))

    fused = head("fushion.0", "fushion.1", torch.cat((parsing_feature, *edge_features), 1))
    return parsing, convolve("fushion.3", fused), edge
