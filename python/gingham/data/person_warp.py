"""The affine warp that brings a whole picture of a person to a network's size, and training items augmented by it.

Source: the official code of SCHP (Li et al., https://arxiv.org/abs/1910.09777), after CE2P's. All randomness comes from
torch's generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors

from gingham.data.labels import IGNORE_INDEX, mirror_labels
from gingham.data.segmentation import SegmentationItem
from gingham.data.transforms import Normalize, Pair, imagenet_normalize
from gingham.nn.inference import mirror_channels


def person_matrix(
    size: Pair,
    target: Pair,
    *,
    box_factor: float = 1.0,
    angle: float = 0.0,
    centre: tuple[float, float] | None = None,
) -> Tensor:
    """The similarity that maps a picture into a target, whole and in the middle.

    The box around the picture is extended along its shorter side to the target's shape, and laid onto the target, first
    pixel onto first and last onto last: a picture of the target's size stays as it is.

    Args:
        size: rows and columns of the picture.
        target: rows and columns that it is mapped into, 2 or more each.
        box_factor: the box is so many times as large, and the person that many times as small; above 0.
        angle: of the rotation about the centre, in degrees; positive is counter-clockwise as the picture is seen.
        centre: (column, row) of the picture that comes to the middle of the target; its own middle by default.

    Returns:
        [2, 3], float64: the target's (column, row) is this times the picture's (column, row, 1).

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> person_matrix((300, 200), (473, 473)).tolist()  # doctest: +ELLIPSIS
        [[1.578..., 0.0, 78.929...], [0.0, 1.578..., 0.0]]
    """
    if min(size) < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    if min(target) < 2:
        raise ValueError(f"target must be 2 or more, got {target}")
    if box_factor <= 0:
        raise ValueError(f"box_factor must be above 0, got {box_factor}")
    extents = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float64)
    target_extents = torch.tensor([target[1] - 1, target[0] - 1], dtype=torch.float64)
    # The longer side decides; a picture of one pixel is treated as one of two.
    scale = 1 / ((extents / target_extents).max().clamp(min=1 / target_extents.min()) * box_factor)
    radians = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    cosine, sine = radians.cos(), radians.sin()
    linear = scale * torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])
    middle = extents / 2 if centre is None else torch.tensor(centre, dtype=torch.float64)
    return torch.cat([linear, (target_extents / 2 - linear @ middle)[:, None]], dim=1) + 0.0  # no negative zeros


def inverse_matrix(matrix: Tensor) -> Tensor:
    """The way back of a `person_matrix`.

    Example:
        >>> inverse_matrix(torch.tensor([[2.0, 0.0, 6.0], [0.0, 2.0, 0.0]], dtype=torch.float64)).tolist()
        [[0.5, 0.0, -3.0], [0.0, 0.5, 0.0]]
    """
    linear = torch.linalg.inv(matrix[:, :2])
    return torch.cat([linear, -linear @ matrix[:, 2:]], dim=1) + 0.0  # no negative zeros


def warp_bilinear(maps: Tensor, matrix: Tensor, size: Pair, *, fill: float | Sequence[float] = 0.0) -> Tensor:
    """Warp images or logits, each value from the four around its place.

    Args:
        maps: floating [B, C, H, W]; half precision gives float32.
        matrix: [2, 3], from their (column, row, 1) to the result's (column, row).
        size: rows and columns of the result.
        fill: what lies around the maps, for all channels or for each.

    Returns:
        [B, C, *size].

    Example:
        >>> shift = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> warp_bilinear(torch.tensor([[[[2.0, 4.0]]]]), shift, (1, 3))
        tensor([[[[1., 3., 2.]]]])
    """
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()
    height, width = maps.shape[-2:]
    column, row = _places(matrix, size)
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    grid = grid.to(maps.dtype).to(maps.device).expand(maps.shape[0], -1, -1, -1)
    around = torch.as_tensor(fill, dtype=maps.dtype, device=maps.device).reshape(-1, 1, 1)
    return F.grid_sample(maps - around, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + around


def warp_nearest(maps: Tensor, matrix: Tensor, size: Pair, *, fill: float = 0) -> Tensor:
    """Warp labels or anything else, each value from the pixel nearest to its place.

    Args:
        maps: [..., H, W], of any type.
        matrix: [2, 3], from their (column, row, 1) to the result's (column, row).
        size: rows and columns of the result.
        fill: what lies around the maps.

    Returns:
        [..., *size].

    Example:
        >>> double = torch.tensor([[2.0, 0.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> warp_nearest(torch.tensor([[3, 4]]), double, (1, 6), fill=255)
        tensor([[  3,   3,   4,   4, 255, 255]])
    """
    height, width = maps.shape[-2:]
    column, row = (torch.floor(place + 0.5).long() for place in _places(matrix, size))
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    column, row = column.clamp(0, width - 1).to(maps.device), row.clamp(0, height - 1).to(maps.device)
    return maps[..., row, column].masked_fill(outside.to(maps.device), fill)


class PersonAugmentation:
    """The training augmentation of SCHP: mirror, scale and rotate the whole picture by one warp, then normalise.

    Around the picture lie black, before normalisation, and ignored labels. Nothing is cropped on purpose and no colour
    changes. The defaults are those of the official code.

    Args:
        size: side of the square, or (rows, columns), that every item comes out with.
        scale: the box around the picture is 1 + scale * N(0, 1) times as large, within 1 - scale and 1 + scale; 0 or
            more and below 1.
        rotation: degrees; the angle is rotation * N(0, 1), within twice the rotation; 0 or more.
        rotation_probability: of any rotation, 0 to 1.
        flip_probability: of mirroring, 0 to 1.
        mirror_pairs: classes that mirroring exchanges, of the data set's `LabelSpace`.
        normalize: what the network expects.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> from gingham.data import CueScenes
        >>> item = CueScenes("train", 1, transform=PersonAugmentation((48, 80)))[0]
        >>> item["image"].shape, item["image"].dtype, item["label"].shape
        (torch.Size([3, 48, 80]), torch.float32, torch.Size([48, 80]))
    """

    def __init__(
        self,
        size: int | Pair,
        *,
        scale: float = 0.25,
        rotation: float = 30.0,
        rotation_probability: float = 0.6,
        flip_probability: float = 0.5,
        mirror_pairs: Sequence[Pair] = (),
        normalize: Normalize | None = None,
    ) -> None:
        self.size: Pair = (size, size) if isinstance(size, int) else size
        if min(self.size) < 2:
            raise ValueError(f"size must be 2 or above, got {size}")
        if not 0 <= scale < 1:
            raise ValueError(f"scale must be 0 or more and below 1, got {scale}")
        if rotation < 0:
            raise ValueError(f"rotation must be 0 or more, got {rotation}")
        for name, value in (("rotation_probability", rotation_probability), ("flip_probability", flip_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {value}")
        self.scale, self.rotation = scale, rotation
        self.rotation_probability, self.flip_probability = rotation_probability, flip_probability
        self.mirror_pairs = tuple(mirror_pairs)
        self.normalize = normalize or imagenet_normalize()

    def __call__(self, item: SegmentationItem) -> SegmentationItem:
        image, label, soft = item["image"], item["label"], item.get("soft")
        matrix = self.draw_matrix((label.shape[0], label.shape[1]))
        if torch.rand(()) < self.flip_probability:
            image, label = image.flip(-1), mirror_labels(label.flip(-1), self.mirror_pairs)
            soft = None if soft is None else mirror_channels(soft.flip(-1), self.mirror_pairs)
        # Rounded, as files are: a picture that keeps its size comes out as it went in.
        warped = warp_bilinear(image[None].float(), matrix, self.size)[0].round().to(image.dtype)
        normalized = self.normalize(tv_tensors.Image(warped))
        result: SegmentationItem = {
            "image": normalized.as_subclass(torch.Tensor).contiguous(),
            "label": warp_nearest(label, matrix, self.size, fill=IGNORE_INDEX),
            "name": item["name"],
        }
        if soft is not None:
            result["soft"] = warp_nearest(soft, matrix, self.size)
        return result

    def draw_matrix(self, size: Pair) -> Tensor:
        """A random `person_matrix` for a picture of that many rows and columns."""
        box_factor = 1 + self.scale * float(torch.randn(()).clamp(-1, 1))
        angle = self.rotation * float(torch.randn(()).clamp(-2, 2))
        rotated = bool(torch.rand(()) < self.rotation_probability)
        return person_matrix(size, self.size, box_factor=box_factor, angle=angle if rotated else 0.0)


def _places(matrix: Tensor, size: Pair) -> tuple[Tensor, Tensor]:
    """Column and row, float64 [*size], that each pixel of a warp's result comes from."""
    back = inverse_matrix(matrix)
    row, column = torch.meshgrid(
        torch.arange(size[0], dtype=torch.float64), torch.arange(size[1], dtype=torch.float64), indexing="ij"
    )
    return (
        back[0, 0] * column + back[0, 1] * row + back[0, 2],
        back[1, 0] * column + back[1, 1] * row + back[1, 2],
    )
