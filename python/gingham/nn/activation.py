"""The activations that the published heads differ in."""

from typing import Literal

from torch import nn

Activation = Literal["relu", "leaky_relu"]


def make_activation(name: Activation) -> nn.Module:
    """A ReLU, or a leaky one of slope 0.01, in place.

    Args:
        name: "relu" or "leaky_relu".

    Raises:
        ValueError: another name.

    Example:
        >>> make_activation("leaky_relu")
        LeakyReLU(negative_slope=0.01, inplace=True)
    """
    if name not in ("relu", "leaky_relu"):
        raise ValueError(f"activation must be 'relu' or 'leaky_relu', got {name!r}")
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(0.01, inplace=True)
