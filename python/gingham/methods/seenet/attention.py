"""SeeNet's attention at test time: both branches' maps, on the picture and its mirror image, fused by their maximum.

The order is that of the official notebook: maps are brought to the picture's size, then clipped, then divided by their
maximum. https://arxiv.org/abs/1810.09821
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-8


class Attention(NamedTuple):
    """What the network attends to."""

    maps: Tensor  # [B, C, H, W] in 0 to 1, 0 for classes that are not tagged
    logits: Tensor  # [B, C], of the classes, from the first branch and the picture as it is


def scaled_to_maximum(maps: Tensor) -> Tensor:
    """Clip at 0 and divide by the maximum of each map; a map without a positive value becomes 0.

    Args:
        maps: [..., H, W].

    Returns:
        The same shape, 0 to 1.

    Source: the official notebook.

    Example:
        >>> scaled_to_maximum(torch.tensor([[-1.0, 2.0, 4.0]]))
        tensor([[0.0000, 0.5000, 1.0000]])
    """
    clipped = maps.clamp(min=0)
    return clipped / (clipped.amax((-2, -1), keepdim=True) + _EPSILON)


@torch.no_grad()
def attend(
    network: Any,
    images: Tensor,
    tags: Tensor,
    *,
    size: int | None = 256,
    flip: bool = True,
    per_class: bool = False,
) -> Attention:
    """Attention of the tagged classes of images, whatever their size and shape.

    Args:
        network: a `gingham.methods.seenet.network.SeeNet`.
        images: [B, 3, H, W], normalised.
        tags: [B, C], above 0 where an image has the class.
        size: side of the square that images are resized to for the network (bicubic); None to leave them.
        flip: whether the mirrored images are looked at too.
        per_class: build the zones of each class from its map alone, instead of from those of all tagged classes.

    Returns:
        Maps at the size of the images, and class logits.

    Raises:
        ValueError: tags that are not [B, C], or a size below 1.

    Source: the official notebook, whose zones come from the tags of all pictures so far; these come from the picture's.

    Example:
        >>> from gingham.methods.seenet.network import SeeNet
        >>> model = SeeNet("small", num_classes=3, output_stride=4, head_channels=8).eval()
        >>> attention = attend(model, torch.randn(1, 3, 40, 60), torch.tensor([[0, 1, 0]]), size=64)
        >>> attention.maps.shape, bool(attention.maps[:, 0].any())
        (torch.Size([1, 3, 40, 60]), False)
    """
    if images.dim() != 4 or tags.dim() != 2 or len(tags) != len(images):
        raise ValueError(f"tags must be [B, C] for images [B, 3, H, W], got {list(tags.shape)}, {list(images.shape)}")
    if size is not None and size < 1:
        raise ValueError(f"size must be 1 pixel or more, got {size}")
    shown = images if size is None else _resized(images, (size, size))
    image, kind = (tags > 0).nonzero(as_tuple=True)
    fused, logits = images.new_zeros(len(image), *images.shape[-2:], dtype=torch.float32), None
    for mirrored in (False, True) if flip else (False,):
        seen = (shown.flip(-1) if mirrored else shown).contiguous(memory_format=torch.channels_last)
        output = network(seen, tags)
        if logits is None:
            logits = output.attended.float().mean(dim=(-2, -1))
        chosen = [output.attended[image, kind]]
        if output.potential is not None:
            if per_class and len(image):
                output = network(seen[image], F.one_hot(kind, tags.shape[1]))
                chosen.append(output.potential[torch.arange(len(kind), device=kind.device), kind])
            else:
                chosen.append(output.potential[image, kind])
        for maps in chosen:
            large = scaled_to_maximum(_resized(maps[:, None].float(), images.shape[-2:])[:, 0])
            fused = torch.maximum(fused, large.flip(-1) if mirrored else large)
    assert logits is not None  # at least the picture as it is
    result = fused.new_zeros(*tags.shape, *images.shape[-2:])
    result[image, kind] = fused
    return Attention(result, logits)


def _resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    if not len(maps) or maps.shape[-2:] == tuple(size):
        return maps if len(maps) else maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=tuple(size), mode="bicubic", align_corners=False)
