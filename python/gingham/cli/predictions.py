"""What `gingham predict` writes of an image, by the kind of recipe: masks of classes, or boxes of detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.tv_tensors import Image as ImageTensor

from gingham.cli import pictures
from gingham.cli.options import ConfigError
from gingham.cli.support import SupportImage
from gingham.errors import CheckpointError
from gingham.methods.dcr.recipe import DCRRecipe
from gingham.methods.sgone.recipe import SGOneRecipe


class Writer(Protocol):
    """Writes the predictions of one image after the other into folders, and returns what a summary says of each."""

    folders: tuple[str, ...]
    summary: str  # name of its file

    def write(self, name: str, image: Tensor) -> Any:
        """Predict and write.

        Args:
            name: of the image's file.
            image: uint8 RGB [3, H, W].

        Raises:
            MemoryError: the image is too large for the device.
            CheckpointError: the model does not have the data set's classes.
        """


def writer_for(recipe: Any, data: Any, out: Path, support: Sequence[SupportImage] = ()) -> Writer:
    """What writes the predictions of a recipe.

    Args:
        recipe: in evaluation mode, on its device.
        data: the data module of its configuration.
        out: the folder that holds the writer's folders.
        support: images with masks of what a few-shot method shall look for.

    Raises:
        ConfigError: supports for a method that takes none, or none for one that needs them.
    """
    few_shot = isinstance(recipe, SGOneRecipe)
    if few_shot != bool(support):
        raise ConfigError(
            "this configuration segments what supports show: give --support and --support_masks"
            if few_shot
            else "--support is of few-shot methods, and this configuration is of none"
        )
    if isinstance(recipe, DCRRecipe):
        return DetectionWriter(recipe, data, out)
    return MaskWriter(recipe, data, out, _shown(recipe, data, support) if isinstance(recipe, SGOneRecipe) else recipe)


def _shown(recipe: SGOneRecipe, data: Any, support: Sequence[SupportImage]) -> Callable[[Tensor], Tensor]:
    """What segments images by the supports."""
    images = [_normalized(data.evaluate.normalize, one.image).to(recipe.device) for one in support]
    masks = [one.mask[None, None].to(recipe.device) for one in support]
    with torch.inference_mode():
        return recipe.with_support(images, masks)


def _normalized(normalize: Any, image: Tensor) -> Tensor:
    return normalize(ImageTensor(image)).as_subclass(Tensor)[None]


class MaskWriter:
    """Index masks, overlays with a legend, and the share of each class."""

    folders: tuple[str, ...] = ("masks", "overlays")
    summary = "shares.json"

    def __init__(self, recipe: Any, data: Any, out: Path, segment: Callable[[Tensor], Tensor]) -> None:
        self.device, self.out, self.segment = recipe.device, out, segment
        self.normalize, self.labels = data.evaluate.normalize, data.label_space()

    def write(self, name: str, image: Tensor) -> dict[str, float]:
        normalized = _normalized(self.normalize, image).to(self.device)
        logits = _run(lambda: self.segment(normalized)[0], image)
        if logits.shape[0] != self.labels.num_classes:
            raise CheckpointError(
                f"the model has {logits.shape[0]} classes, its data set {self.labels.num_classes}: mend --config"
            )
        mask = logits.argmax(0).cpu()
        # The whole file name, so that a.png and a.jpg stay apart.
        pictures.save_mask(self.out / "masks" / f"{name}.png", mask, self.labels.palette)
        pictures.save_overlay(
            self.out / "overlays" / f"{name}.png", image, mask, self.labels.names, self.labels.palette
        )
        counts = torch.bincount(mask.flatten(), minlength=self.labels.num_classes).double() / mask.numel()
        return {label: round(share, 6) for label, share in zip(self.labels.names, counts.tolist(), strict=True)}


class DetectionWriter:
    """Pictures with the boxes before and after refinement side by side, and what is drawn of those after it.

    The recipe's option ``shown`` is the score above which detections are drawn.
    """

    folders: tuple[str, ...] = ("boxes",)
    summary = "detections.json"

    def __init__(self, recipe: Any, data: Any, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.names, self.palette = data.class_names, data.palette
        if len(self.names) != recipe.num_classes:
            raise CheckpointError(
                f"the model has {recipe.num_classes} classes, its data set {len(self.names)}: mend --config"
            )

    def write(self, name: str, image: Tensor) -> list[dict[str, Any]]:
        views = _run(lambda: self.recipe.views({"image": image.float() / 255}), image)
        ordered = {title: views[title] for title in ("before", "refined") if title in views}
        pictures.draw_detections(image, ordered, self.names, self.palette).save(self.out / "boxes" / f"{name}.png")
        rows = zip(*(x.tolist() for x in views["refined"]), strict=True)
        return [
            {"class": self.names[label - 1], "box": [round(x, 2) for x in box], "score": round(score, 4)}
            for box, label, score in rows
        ]


def _run(predict: Any, image: Tensor) -> Any:
    try:
        with torch.inference_mode():
            return predict()
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise MemoryError(f"not enough memory for {image.shape[2]}x{image.shape[1]} pixels") from error
