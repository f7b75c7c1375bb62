"""Reading weights from files, and loading them with errors that a person can act on."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gingham.errors import CheckpointError

_SHOWN = 3  # names quoted per kind of mismatch


def read_file(path: str | Path) -> Any:
    """What a checkpoint file holds, on the CPU.

    Reads safetensors files and torch files (``torch.load(weights_only=True)``: nothing of the file is executed).

    Args:
        path: file ending in ``.safetensors``, or any file that ``torch.save`` wrote.

    Raises:
        CheckpointError: if the file is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:  # torch's text advises to execute the file
        reason = "truncated, no torch file, or one with code in it, which is not executed"
        raise CheckpointError(f"{path}: not a readable checkpoint of plain tensors ({reason})") from error
    except Exception as error:  # the readers raise many types, and all of them mean the same to the user
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint of plain tensors ({reason})") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name, on the CPU.

    Unwraps the usual containers ("state_dict", "model") and removes the "module." that DataParallel puts first.

    Args:
        path: as `read_file` takes it.

    Raises:
        CheckpointError: if the file is missing, cannot be read, or holds no tensors.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.pth")
        >>> torch.save({"state_dict": {"module.weight": torch.ones(2)}}, path)
        >>> read_state_dict(path)
        {'weight': tensor([1., 1.])}
    """
    content = read_file(path)
    for container in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in tensors if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load `state` into `module`, every tensor of it, or raise and leave the module as it was.

    Batch-norm step counters may be absent: older checkpoints do not have them. A ``gamma`` without dimensions fits
    one of shape [1].

    Args:
        module: takes the weights.
        state: tensors by the module's own names.
        source: what error texts call the checkpoint.

    Raises:
        CheckpointError: one line that names missing, unexpected and differently shaped tensors.
    """
    check_fit(module, state, source=source)
    module.load_state_dict(dict(state), strict=False)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Raise what `load_state_dict` would raise, and load nothing.

    Args:
        module: may take the weights.
        state: tensors by the module's own names.
        source: what error texts call the checkpoint.

    Raises:
        CheckpointError: one line that names missing, unexpected and differently shaped tensors.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and _shape(name, state[name]) != _shape(name, own[name])
    ]
    faults = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("of another shape", shapes)]
    if any(faults):
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(fault for fault in faults if fault)}")


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    return (1,) if name.endswith("gamma") and tensor.dim() == 0 else tuple(tensor.shape)


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
