"""What `gingham predict` writes of an image, by the kind of recipe: masks, attention, detections, or its class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchvision.tv_tensors import Image as ImageTensor

from gingham.cli import pictures
from gingham.cli.galleries import GalleryWriter
from gingham.cli.options import ConfigError
from gingham.cli.support import StoredImage, SupportImage, as_stored, read_stored, read_upright, upright
from gingham.data.attention_maps import export_attention, read_saliency, write_attention
from gingham.data.image_tags import read_tags, tag_vector
from gingham.data.segmentation import write_label
from gingham.errors import CheckpointError, DataError
from gingham.methods.dap.recipe import ClassificationRecipe
from gingham.methods.dcr.recipe import DCRRecipe
from gingham.methods.reid_recipe import ReidRecipe
from gingham.methods.seenet.recipe import SeeNetRecipe
from gingham.methods.seenet.seeds import SeedRule, confident_labels, harmonic_labels, require_weight
from gingham.methods.sgone.recipe import SGOneRecipe


class Writer(Protocol):
    """Writes the predictions of one image after the other into folders, and returns what a summary says of each."""

    folders: tuple[str, ...]
    summary: str  # name of its file
    stems: Collection[str] | None  # of the files to take, that is their names without endings; None for all

    def read(self, file: Path) -> Any:
        """What `write` takes of a file.

        Raises:
            DataError: the file cannot be read.
        """

    def write(self, name: str, image: Any) -> Any:
        """Predict and write.

        Args:
            name: of the image's file.
            image: what `read` gives; in most cases uint8 RGB [3, H, W], upright.

        Raises:
            MemoryError: the image is too large for the device.
            CheckpointError: the model does not have the data set's classes.
            DataError: what the image needs beside itself is missing.
        """


@dataclass(frozen=True)
class AttentionOptions:
    """What a user asks of attention.

    Args:
        tags: a list of images with their classes, see `gingham.data.image_tags`; None for those that the network finds.
        saliency: a folder of saliency maps, one grey ``<name>.png`` an image.
        seeds: the rule by which seed labels are made, "confident" or "harmonic"; None for no seeds.
        seed_options: of that rule: those of `gingham.methods.seenet.seeds.SeedRule`, or ``weight`` of "harmonic".
    """

    tags: Path | None = None
    saliency: Path | None = None
    seeds: Literal["confident", "harmonic"] | None = None
    seed_options: Mapping[str, float] = field(default_factory=dict)


def writer_for(
    recipe: Any,
    data: Any,
    out: Path,
    support: Sequence[SupportImage] = (),
    attention: AttentionOptions | None = None,
    gallery: Path | None = None,
) -> Writer:
    """What writes the predictions of a recipe.

    Args:
        recipe: in evaluation mode, on its device.
        data: the data module of its configuration.
        out: the folder that holds the writer's folders.
        support: images with masks of what a few-shot method shall look for.
        attention: what is asked of a method with attention.
        gallery: in which a method of re-identification looks for persons.

    Raises:
        ConfigError: supports, a gallery or options of attention for a method that takes none, or no supports or no
            gallery for one that needs them.
        DataError: tags, or a folder of saliency maps, that cannot be read.
    """
    few_shot = isinstance(recipe, SGOneRecipe)
    if few_shot != bool(support):
        raise ConfigError(
            "this configuration segments what supports show: give --support and --support_masks"
            if few_shot
            else "--support is of few-shot methods, and this configuration is of none"
        )
    if isinstance(recipe, ReidRecipe) != (gallery is not None):
        raise ConfigError(
            "this configuration looks for persons in a gallery: give --gallery"
            if gallery is None
            else "--gallery is of re-identification, and this configuration is not"
        )
    if gallery is not None:
        return GalleryWriter(recipe, data, out, gallery)
    if isinstance(recipe, SeeNetRecipe):
        return AttentionWriter(recipe, data, out, attention or AttentionOptions())
    if attention not in (None, AttentionOptions()):
        raise ConfigError(
            "--tags, --seeds, --seed_options and --saliency are of methods with attention, such as seenet_voc"
        )
    if isinstance(recipe, DCRRecipe):
        return DetectionWriter(recipe, data, out)
    if isinstance(recipe, ClassificationRecipe):
        return ClassWriter(recipe, data, out)
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
    stems: Collection[str] | None = None

    def __init__(self, recipe: Any, data: Any, out: Path, segment: Callable[[Tensor], Tensor]) -> None:
        self.device, self.out, self.segment = recipe.device, out, segment
        self.normalize, self.labels = data.evaluate.normalize, data.label_space()

    @staticmethod
    def read(file: Path) -> Tensor:
        return read_upright(file)

    def write(self, name: str, image: Tensor) -> dict[str, float]:
        normalized = _normalized(self.normalize, image).to(self.device)
        logits = _run(lambda: self.segment(normalized)[0], image)
        _require_classes(logits.shape[0], self.labels.num_classes)
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
    stems: Collection[str] | None = None

    def __init__(self, recipe: Any, data: Any, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.names, self.palette = data.class_names, data.palette
        _require_classes(recipe.num_classes, len(self.names))

    @staticmethod
    def read(file: Path) -> Tensor:
        return read_upright(file)

    def write(self, name: str, image: Tensor) -> list[dict[str, Any]]:
        views = _run(lambda: self.recipe.views({"image": image.float() / 255}), image)
        ordered = {title: views[title] for title in ("before", "refined") if title in views}
        pictures.draw_detections(image, ordered, self.names, self.palette).save(self.out / "boxes" / f"{name}.png")
        rows = zip(*(x.tolist() for x in views["refined"]), strict=True)
        return [
            {"class": self.names[label - 1], "box": [round(x, 2) for x in box], "score": round(score, 4)}
            for box, label, score in rows
        ]


class ClassWriter:
    """Pictures framed in the colour of their likeliest class, and the probabilities of the five likeliest."""

    folders: tuple[str, ...] = ("pictures",)
    summary = "classes.json"
    stems: Collection[str] | None = None

    def __init__(self, recipe: ClassificationRecipe, data: Any, out: Path) -> None:
        self.recipe, self.out, self.transform = recipe, out, data.evaluate
        self.names, self.palette = data.class_names, data.palette
        _require_classes(recipe.num_classes, len(self.names))

    @staticmethod
    def read(file: Path) -> Tensor:
        return read_upright(file)

    def write(self, name: str, image: Tensor) -> dict[str, float]:
        item = {"image": image, "label": torch.tensor(0), "name": name}
        pixels = self.transform(item)["image"][None].to(self.recipe.device)
        found = _run(lambda: self.recipe(pixels)[0].softmax(0), image).cpu().topk(min(5, len(self.names)))
        views = {"prediction": found.indices[0]}
        sheet = pictures.draw_panels([(image, views)], self.names, self.palette)
        sheet.save(self.out / "pictures" / f"{name}.png")
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return {self.names[index]: round(share, 6) for index, share in pairs}


class AttentionWriter:
    """Attention maps as archives and grey images, pictures of them, and seed labels if they are asked for.

    The network sees pictures upright. What is written, but for the overlays, lies on the pixels as the file has them,
    which is how trainings read images and labels; saliency maps do, too.
    """

    summary = "attention.json"

    def __init__(self, recipe: SeeNetRecipe, data: Any, out: Path, options: AttentionOptions) -> None:
        self.recipe, self.out, self.options = recipe, out, options
        self.normalize, self.labels = data.evaluate.normalize, data.label_space()
        self.folders = ("maps", "attention", "overlays", *(["seeds"] if options.seeds else []))
        count = recipe.num_classes
        if self.labels.num_classes != count + 1:
            raise CheckpointError(
                f"the model has {count} classes, its data set {self.labels.num_classes} with the background: "
                "mend --config"
            )
        if options.saliency is not None and (options.seeds is None or not options.saliency.is_dir()):
            problem = "no such folder" if options.seeds else "needs --seeds, which it is for"
            raise DataError(f"--saliency {options.saliency}: {problem}")
        self._make_seeds = _seed_rule(options)
        self.tags = None if options.tags is None else read_tags(options.tags, count)
        self.stems: Collection[str] | None = self.tags
        self._written: dict[str, str] = {}

    @staticmethod
    def read(file: Path) -> StoredImage:
        return read_stored(file)

    def write(self, name: str, image: StoredImage) -> dict[str, float]:
        stem = Path(name).stem
        if (other := self._written.setdefault(stem, name)) != name:
            raise DataError(f"{name}: {other} has the same name but for its ending, and its maps would be overwritten")
        seen = upright(*image)
        pixels = _normalized(self.normalize, seen).to(self.recipe.device)
        tags, found = _run(lambda: self._attention(stem, pixels), seen)
        tags, attention = tags[0].cpu(), as_stored(found[0].cpu(), image.orientation)
        write_attention(self.out / "maps" / f"{stem}.npz", attention, tags)
        export_attention(self.out / "attention", stem, attention, tags)
        kinds = tags.nonzero().flatten().tolist()
        views = {self.labels.names[kind + 1]: attention[kind] for kind in kinds}
        if self._make_seeds is not None:
            saliency = None
            if self.options.saliency is not None:
                height, width = attention.shape[-2:]
                saliency = read_saliency(self.options.saliency / f"{stem}.png", (height, width))[None]
            views["seeds"] = self._make_seeds(attention[None], tags[None], saliency)[0]
            write_label(self.out / "seeds" / f"{stem}.png", views["seeds"], self.labels)
        turned = {title: upright(view, image.orientation) for title, view in views.items()}
        sheet = pictures.draw_panels([(seen, turned)], self.labels.names, self.labels.palette)
        sheet.save(self.out / "overlays" / f"{stem}.png")
        shares = (attention[kinds] >= self.recipe.threshold.cpu()).double().mean((-2, -1)).tolist()
        return {self.labels.names[kind + 1]: round(share, 6) for kind, share in zip(kinds, shares, strict=True)}

    def _attention(self, stem: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.tags is None:
            tags = self.recipe.predict_tags(pixels)
        else:
            tags = tag_vector(self.tags[stem], self.recipe.num_classes)[None].to(pixels.device)
        return tags, self.recipe.attend(pixels, tags).maps


def _seed_rule(options: AttentionOptions) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """What makes seeds of attention, tags and saliency; None where none are asked for."""
    given = dict(options.seed_options)
    if options.seeds is None:
        if given:
            raise ConfigError("--seed_options needs --seeds, which it is for")
        return None
    valid = [each.name for each in fields(SeedRule)] if options.seeds == "confident" else ["weight"]
    if unknown := [name for name in given if name not in valid]:
        raise ConfigError(f"--seed_options {unknown[0]}: {options.seeds} has {', '.join(valid)}")
    try:
        if options.seeds == "confident":
            return partial(confident_labels, rule=SeedRule(**given))
        return partial(harmonic_labels, weight=require_weight(given.get("weight", 1.0)))
    except ValueError as error:
        raise ConfigError(f"--seed_options: {error}") from error


def _require_classes(model: int, data: int) -> None:
    if model != data:
        raise CheckpointError(f"the model has {model} classes, its data set {data}: mend --config")


def _run(predict: Any, image: Tensor) -> Any:
    try:
        with torch.inference_mode():
            return predict()
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise MemoryError(f"not enough memory for {image.shape[2]}x{image.shape[1]} pixels") from error
