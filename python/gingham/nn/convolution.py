"""The layer that every head and small network is made of: convolution, batch norm, activation."""

from torch import nn

from gingham.nn.activation import Activation, make_activation


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    activation: Activation = "relu",
) -> nn.Sequential:
    """A convolution without bias, a batch norm and an activation.

    Args:
        in_channels: of the features.
        out_channels: of the result.
        kernel_size: rows and columns, odd; padding keeps the size, up to the stride.
        stride: of the convolution.
        activation: "relu" or "leaky_relu" (slope 0.01).

    Returns:
        The three, numbered 0 to 2 in the names of its weights.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> import torch
        >>> convolution(3, 8, 3, stride=2)(torch.randn(2, 3, 9, 16)).shape
        torch.Size([2, 8, 5, 8])
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        make_activation(activation),
    )
