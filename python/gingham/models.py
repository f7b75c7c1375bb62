"""The models of the package by name: `create_model` and `list_models`."""

import inspect
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from gingham.errors import GinghamError

# name -> module and class, imported when the model is created
_MODELS = {
    "ccnet": ("gingham.methods.ccnet.network", "CCNet"),
    "classifier": ("gingham.methods.dap.network", "Classifier"),
    "dcr": ("gingham.methods.dcr.network", "DCR"),
    "oneshot_reid": ("gingham.methods.oneshot_reid.network", "OneShotReID"),
    "pdml": ("gingham.methods.pdml.network", "PDML"),
    "schp": ("gingham.methods.schp.network", "ACE2P"),
    "seenet": ("gingham.methods.seenet.network", "SeeNet"),
    "sgone": ("gingham.methods.sgone.network", "SGOne"),
    "spgnet": ("gingham.methods.spgnet.network", "SPGNet"),
    "sta": ("gingham.methods.sta.network", "STA"),
}


class ModelError(GinghamError, ValueError):
    """A model that does not exist, or an option that it does not have."""


def list_models() -> list[str]:
    """Names that `create_model` takes, sorted.

    Example:
        >>> "ccnet" in list_models()
        True
    """
    return sorted(_MODELS)


def model_class(name: str) -> Any:
    """The class of a model by its name.

    Raises:
        ModelError: unknown name; the text lists the valid ones.
    """
    if name not in _MODELS:
        raise ModelError(f"unknown model {name!r}; valid are {', '.join(list_models())}")
    module, attribute = _MODELS[name]
    return getattr(import_module(module), attribute)


def create_model(name: str, **options: Any) -> Any:
    """Build a model by name.

    Args:
        name: one of `list_models`.
        options: arguments of the model's class, such as ``backbone`` and ``num_classes``.

    Returns:
        An `nn.Module` with ``save_pretrained`` and ``from_pretrained``.

    Raises:
        ModelError: unknown name or option; the text lists the valid ones.

    Example:
        >>> model = create_model("ccnet", backbone="resnet18", num_classes=19, head_channels=64)
        >>> model.head.cca.loops
        2
    """
    cls = model_class(name)
    valid = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in valid:
            close = get_close_matches(option, valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ModelError(f"{name} has no option {option!r}{hint}; valid are {', '.join(valid)}")
    return cls(**options)
