"""Loading checkpoints of the official CCNet code and of mmsegmentation.

Official code: https://github.com/speedinghzl/CCNet. mmsegmentation: its CCHead and ResNetV1c.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gingham.errors import CheckpointError
from gingham.methods.ccnet.network import CCNet
from gingham.nn.backbone import deep_stem_names
from gingham.nn.checkpoint import load_state_dict, read_state_dict

_IN_PLACE_EPS = 1e-5

# prefix there -> prefix here; what matches none belongs to the backbone (official) or is unexpected (mmsegmentation)
_OFFICIAL = {
    "head.bottleneck.3.": "head.bottleneck.4.",
    "head.": "head.",
    "dsn.3.": "auxiliary.4.",
    "dsn.": "auxiliary.",
}
_MMSEGMENTATION = {
    "decode_head.convs.0.conv.": "head.conva.0.",
    "decode_head.convs.0.bn.": "head.conva.1.",
    "decode_head.cca.gamma.scale": "head.cca.gamma",
    "decode_head.cca.": "head.cca.",
    "decode_head.convs.1.conv.": "head.convb.0.",
    "decode_head.convs.1.bn.": "head.convb.1.",
    "decode_head.conv_cat.conv.": "head.bottleneck.0.",
    "decode_head.conv_cat.bn.": "head.bottleneck.1.",
    "decode_head.conv_seg.": "head.bottleneck.4.",
    "auxiliary_head.convs.0.conv.": "auxiliary.0.",
    "auxiliary_head.convs.0.bn.": "auxiliary.1.",
    "auxiliary_head.conv_seg.": "auxiliary.4.",
}


def load_checkpoint(model: CCNet, path: str | Path, *, inplace_batch_norm: bool = True) -> None:
    """Load a checkpoint of the official code or of mmsegmentation into a model built to match it.

    The default `CCNet` matches the official code, whose images are BGR in [0, 255] minus
    (104.00698793, 116.66876762, 122.67891434). mmsegmentation's R101-D8 is ``CCNet(backbone="resnet101c",
    contract_dilation=True, activation="relu", auxiliary_channels=256)``. A `category_projection` is
    in neither and keeps its values; the auxiliary head is skipped where the model has none.

    Args:
        model: takes the weights.
        path: checkpoint file, read with ``torch.load(weights_only=True)`` or as safetensors.
        inplace_batch_norm: whether an official checkpoint comes from its in-place batch norm, see `convert_official`.

    Raises:
        CheckpointError: one line that names missing, unexpected and differently shaped tensors.

    Example:
        >>> import os, tempfile
        >>> model = CCNet("resnet18", head_channels=16, auxiliary_channels=16)
        >>> path = os.path.join(tempfile.mkdtemp(), "empty.pth")
        >>> torch.save({"decode_head.conv_seg.bias": torch.zeros(19)}, path)
        >>> load_checkpoint(model, path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        gingham.errors.CheckpointError: ...empty.pth does not fit the model: ... missing (backbone.body.conv1...
    """
    state = read_state_dict(path)
    if any(name.startswith("decode_head.") for name in state):
        converted = convert_mmsegmentation(state)
    elif any(name.startswith("head.conva.") for name in state):
        converted = convert_official(state, inplace_batch_norm=inplace_batch_norm)
    else:
        raise CheckpointError(f"{path}: no CCNet checkpoint: neither decode_head.* nor head.conva.* is in it")
    if model.auxiliary is None:
        converted = {name: value for name, value in converted.items() if not name.startswith("auxiliary.")}
    for name, value in model.category_projection.state_dict(prefix="category_projection.").items():
        converted.setdefault(name, value)
    load_state_dict(model, converted, source=str(path))


def convert_official(state: Mapping[str, Tensor], *, inplace_batch_norm: bool = True) -> dict[str, Tensor]:
    """The tensors of an official checkpoint under the names of `CCNet`.

    Args:
        state: tensors by their official names, without "module.".
        inplace_batch_norm: the official in-place batch norm scales by ``|weight| + 1e-5``; True turns such weights into
            those of an ordinary batch norm. Confirmed for the code's own extension; whether the later inplace_abn
            package does the same is not.
    """
    if inplace_batch_norm:
        state = {name: _plain_scale(name, value, state) for name, value in state.items()}
    heads = {name: value for name, value in state.items() if name.startswith(("head.", "dsn."))}
    backbone = {name: value for name, value in state.items() if name not in heads}
    converted = {_renamed(name, _OFFICIAL): value for name, value in heads.items()}
    return converted | {f"backbone.body.{name}": value for name, value in deep_stem_names(backbone).items()}


def convert_mmsegmentation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an mmsegmentation checkpoint (EncoderDecoder with CCHead) under the names of `CCNet`.

    Its auxiliary convolution has no bias; it is given one of zeros.

    Args:
        state: tensors by mmsegmentation's names, without "module.".
    """
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    converted = {f"backbone.body.{name}": value for name, value in deep_stem_names(backbone).items()}
    for name, value in state.items():
        if not name.startswith(prefix):
            converted[_renamed(name, _MMSEGMENTATION)] = value
    weight = converted.get("auxiliary.0.weight")
    if weight is not None:
        converted.setdefault("auxiliary.0.bias", weight.new_zeros(weight.shape[0]))
    return converted


def _plain_scale(name: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    layer, _, tensor = name.rpartition(".")
    is_batch_norm = tensor == "weight" and f"{layer}.running_var" in state
    return torch.abs(value) + _IN_PLACE_EPS if is_batch_norm else value


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for there, here in table.items():  # the longer prefixes stand first
        if name.startswith(there):
            return here + name.removeprefix(there)
    return name
