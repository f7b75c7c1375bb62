"""Loading checkpoints of the official SCHP code, https://github.com/GoGoDuck912/Self-Correction-Human-Parsing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gingham.errors import CheckpointError
from gingham.methods.schp.network import ACE2P
from gingham.nn.backbone import deep_stem_names
from gingham.nn.checkpoint import load_state_dict, read_state_dict

_IN_PLACE_EPS = 1e-5

# layer there -> layer here; convolution and batch norm are .0 and .1 of both, and activations count here only
_HEADS = {
    **{
        f"context_encoding.stages.{stage}.{part}": f"context.stages.{stage}.{part}"
        for stage in range(4)
        for part in (1, 2)
    },
    **{f"context_encoding.bottleneck.{part}": f"context.bottleneck.{part}" for part in (0, 1)},
    **{f"edge.conv{stage + 1}.{part}": f"edge.reduce.{stage}.{part}" for stage in range(3) for part in (0, 1)},
    "edge.conv4": "edge.detect",
    "edge.conv5": "edge.combine",
    **{f"decoder.conv1.{part}": f"parsing.context.{part}" for part in (0, 1)},
    **{f"decoder.conv2.{part}": f"parsing.details.{part}" for part in (0, 1)},
    **{f"decoder.conv3.{there}": f"parsing.fuse.{here}" for there, here in enumerate((0, 1, 3, 4))},
    "decoder.conv4": "parsing.classifier",
    **{f"fushion.{there}": f"fusion.{here}" for there, here in ((0, 0), (1, 1), (3, 4))},  # spelt so
}
_HEAD_PREFIXES = ("context_encoding.", "edge.", "decoder.", "fushion.")


def load_checkpoint(model: ACE2P, path: str | Path, *, channels: Literal["RGB", "BGR"] = "BGR") -> None:
    """Load a checkpoint of the official code into an `ACE2P` of as many classes, all else at its defaults.

    Args:
        model: takes the weights.
        path: checkpoint file, read with ``torch.load(weights_only=True)`` or as safetensors.
        channels: see `convert_official`.

    Raises:
        CheckpointError: one line that names missing, unexpected and differently shaped tensors.
        ValueError: an unknown order of channels.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "empty.pth")
        >>> torch.save({"fushion.3.bias": torch.zeros(20)}, path)
        >>> load_checkpoint(ACE2P("resnet18"), path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        gingham.errors.CheckpointError: ...empty.pth does not fit the model: ... missing (backbone.body.conv1...
    """
    state = read_state_dict(path)
    if not any(name.startswith("fushion.") for name in state):
        raise CheckpointError(f"{path}: no SCHP checkpoint: fushion.* is not in it")
    load_state_dict(model, convert_official(state, channels=channels), source=str(path))


def convert_official(state: Mapping[str, Tensor], *, channels: Literal["RGB", "BGR"] = "BGR") -> dict[str, Tensor]:
    """The tensors of an official checkpoint under the names of `ACE2P`.

    The official in-place batch norm scales by ``|weight| + 1e-5``; the result has the weights of an ordinary one.

    Args:
        state: tensors by their official names, without "module.".
        channels: of the images that the model will get, normalised by `gingham.data.transforms.imagenet_normalize`. The
            official ones are "BGR"; for "RGB" the input channels of the first convolution change places.

    Raises:
        ValueError: an unknown order of channels.
    """
    if channels not in ("RGB", "BGR"):
        raise ValueError(f"channels must be 'RGB' or 'BGR', got {channels!r}")
    state = {name: _plain_scale(name, value, state) for name, value in state.items()}
    if channels == "RGB" and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    heads = {name: value for name, value in state.items() if name.startswith(_HEAD_PREFIXES)}
    backbone = {name: value for name, value in state.items() if name not in heads}
    return {_renamed(name): value for name, value in heads.items()} | {
        f"backbone.body.{name}": value for name, value in deep_stem_names(backbone).items()
    }


def _plain_scale(name: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    layer, _, tensor = name.rpartition(".")
    is_batch_norm = tensor == "weight" and f"{layer}.running_var" in state
    return torch.abs(value) + _IN_PLACE_EPS if is_batch_norm else value


def _renamed(name: str) -> str:
    layer, _, tensor = name.rpartition(".")
    return f"{_HEADS.get(layer, layer)}.{tensor}"
