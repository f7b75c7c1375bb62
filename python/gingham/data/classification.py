"""What every classification data set is: pictures with one class each, and how they are augmented."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gingham.data.detection import class_colours
from gingham.data.labels import Colour
from gingham.data.transforms import imagenet_normalize


class ClassificationItem(TypedDict):
    """One picture with its class.

    `image` is uint8 RGB [3, H, W] (float32 after a normalising transform), `label` int64 [] from 0 on, `name` unique
    within the split.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str


Transform = Callable[[ClassificationItem], ClassificationItem]


class ClassificationDataset(Dataset[ClassificationItem], ABC):
    """A sized collection of `ClassificationItem`.

    Args:
        split: the name of the split.
        class_names: of the labels 0, 1, ...
        targets: the label of every item, int64 [N].
        transform: applied to each item on its way out.
    """

    def __init__(
        self, split: str, class_names: Sequence[str], targets: torch.Tensor, transform: Transform | None = None
    ) -> None:
        self.split = split
        self.class_names = tuple(class_names)
        self.targets = targets
        self.transform = transform

    @property
    def palette(self) -> tuple[Colour, ...]:
        """One colour for each class."""
        return class_colours(len(self.class_names))

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def image(self, index: int) -> torch.Tensor:
        """The picture of an item as it is stored, uint8 RGB [3, H, W]."""

    def name(self, index: int) -> str:
        """The name of an item."""
        return f"{self.split}_{index:06d}"

    def read(self, index: int) -> ClassificationItem:
        """The item as it is stored, before any transform."""
        return {"image": self.image(index), "label": self.targets[index], "name": self.name(index)}

    def __getitem__(self, index: int) -> ClassificationItem:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} items")
        item = self.read(index % len(self))
        return item if self.transform is None else self.transform(item)


class StoredImages(ClassificationDataset):
    """Pictures of one size that are all in memory.

    Args:
        split: the name of the split.
        class_names: of the labels 0, 1, ...
        images: uint8 [N, 3, H, W], or grey [N, H, W].
        targets: int64 [N].
        transform: applied to each item.

    Raises:
        ValueError: not one label for each picture.

    Example:
        >>> grey = StoredImages("train", ("a", "b"), torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> grey[1]["image"].shape, grey[1]["label"].item()
        (torch.Size([3, 28, 28]), 1)
    """

    def __init__(
        self,
        split: str,
        class_names: Sequence[str],
        images: torch.Tensor,
        targets: torch.Tensor,
        transform: Transform | None = None,
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(f"targets must be one for each of {len(images)} images, got {len(targets)}")
        super().__init__(split, class_names, targets, transform)
        self.images = images

    def image(self, index: int) -> torch.Tensor:
        image = self.images[index]
        return image if image.ndim == 3 else image.expand(3, -1, -1)


class SomeItems(ClassificationDataset):
    """Some of a data set's items, in the order given, under the names that they have there.

    Args:
        dataset: whose transform is not applied.
        indices: of its items, int64 [n].
        transform: applied to each item.
    """

    def __init__(
        self, dataset: ClassificationDataset, indices: torch.Tensor, transform: Transform | None = None
    ) -> None:
        super().__init__(dataset.split, dataset.class_names, dataset.targets[indices], transform)
        self.dataset, self.indices = dataset, indices

    def image(self, index: int) -> torch.Tensor:
        return self.dataset.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))


class WrongLabels(ClassificationDataset):
    """A data set in which a share of the items has the label of another class, drawn from (seed, index).

    Args:
        dataset: its transform is kept.
        share: of the items, 0 to 1; each is wrong with this probability.
        seed: of the draw.

    Raises:
        ValueError: a share outside its range, or fewer than two classes.

    Attributes:
        wrong: which items are mislabelled, bool [N].

    Example:
        >>> images = torch.zeros(100, 4, 4, dtype=torch.uint8)
        >>> noisy = WrongLabels(StoredImages("train", ("a", "b"), images, torch.zeros(100, dtype=torch.int64)), 0.2)
        >>> bool(((noisy.targets == 1) == noisy.wrong).all()), 10 < int(noisy.wrong.sum()) < 30
        (True, True)
    """

    def __init__(self, dataset: ClassificationDataset, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be 0 to 1, got {share}")
        if len(dataset.class_names) < 2:
            raise ValueError("a wrong label needs at least two classes")
        generator = torch.Generator().manual_seed(seed)
        self.wrong = torch.rand(len(dataset), generator=generator) < share
        shift = torch.randint(1, len(dataset.class_names), (len(dataset),), generator=generator)
        targets = (dataset.targets + shift * self.wrong) % len(dataset.class_names)
        super().__init__(dataset.split, dataset.class_names, targets, dataset.transform)
        self.dataset = dataset

    def image(self, index: int) -> torch.Tensor:
        return self.dataset.image(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)


def first_of_each_class(targets: torch.Tensor, count: int) -> torch.Tensor:
    """The first items of a data set, as many of each class as of the others, where there are that many.

    Args:
        targets: int64 [N].
        count: how many items at most.

    Returns:
        Their indices in ascending order, int64 [min(count, N)].

    Example:
        >>> first_of_each_class(torch.tensor([0, 0, 0, 1, 2, 1]), 3).tolist()
        [0, 3, 4]
    """
    by_class = torch.sort(targets, stable=True).indices
    counts = torch.bincount(targets)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(targets)
    rank[by_class] = torch.arange(len(targets)) - first[targets[by_class]]
    return torch.sort(rank, stable=True).indices[:count].sort().values


class ClassificationTransform:
    """Augment or only resize a picture, and normalise it by ImageNet's mean and standard deviation.

    The random numbers come from torch's generator.

    Args:
        size: side of the square that comes out, or None for the picture's own size.
        augmentation: "none"; "padded_crop", a crop of that size after four pixels of black were added on every side;
            or "resized_crop", 8 % to all of the picture, of side ratio 3:4 to 4:3, resized to it.
        flip: probability that the picture is mirrored, 0 to 1.
        resize: shorter side to which the picture is resized before a central crop, where there is no augmentation.

    Raises:
        ValueError: a number outside its range, or a crop without a size.

    Example:
        >>> images = torch.zeros(1, 3, 40, 30, dtype=torch.uint8)
        >>> evaluate = ClassificationTransform(24, resize=32)
        >>> StoredImages("val", ("a",), images, torch.tensor([0]), evaluate)[0]["image"].shape
        torch.Size([3, 24, 24])
    """

    def __init__(
        self,
        size: int | None = None,
        augmentation: Literal["none", "padded_crop", "resized_crop"] = "none",
        flip: float = 0.0,
        resize: int | None = None,
    ) -> None:
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be 0 to 1, got {flip}")
        for name, side in (("size", size), ("resize", resize)):
            if side is not None and side < 1:
                raise ValueError(f"{name} must be 1 pixel or more, got {side}")
        if size is None and (augmentation != "none" or resize is not None):
            raise ValueError("size must be given for a crop")
        steps: list[Any] = []
        if size is not None:
            if augmentation == "resized_crop":
                steps.append(v2.RandomResizedCrop(size))
            elif augmentation == "padded_crop":
                steps.append(v2.RandomCrop(size, padding=4))
            elif augmentation == "none":
                steps += [v2.Resize(resize)] if resize is not None else []
                steps.append(v2.CenterCrop(size))
            else:
                raise ValueError(f"augmentation must be 'none', 'padded_crop' or 'resized_crop', got {augmentation!r}")
        steps.append(v2.RandomHorizontalFlip(flip))
        self.normalize = imagenet_normalize()
        self.transforms = v2.Compose([*steps, self.normalize])

    def __call__(self, item: ClassificationItem) -> ClassificationItem:
        image = self.transforms(tv_tensors.Image(item["image"])).as_subclass(torch.Tensor).contiguous()
        return {"image": image, "label": item["label"], "name": item["name"]}
