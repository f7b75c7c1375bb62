"""Pictures that people look at: masks, attention and boxes over images, with a legend, and curves of a run."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gingham.data.detection import Detections

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Palette = Sequence[Sequence[int]]

_PANEL = 384  # the longest side of a picture in panels, in pixels


def colour(mask: Tensor, palette: Palette) -> Any:
    """Class indices [H, W] as colours, uint8 [H, W, 3]; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    return table[mask.numpy().astype(np.uint8)]


def overlay(image: Tensor, mask: Tensor, palette: Palette, opacity: float = 0.55) -> Any:
    """The mask [H, W] over the image, uint8 [3, H, W]; uint8 [H, W, 3]."""
    picture = image.permute(1, 2, 0).numpy().astype(np.float32)
    return np.rint((1 - opacity) * picture + opacity * colour(mask, palette)).astype(np.uint8)


def heat(image: Tensor, attention: Tensor, opacity: float = 0.7) -> Any:
    """Attention [H, W] in 0 to 1 as heat over the grey image, uint8 [3, H, W]; uint8 [H, W, 3]."""
    grey = image.float().mean(dim=0).numpy()[..., None]
    colours = 255 * matplotlib.colormaps["inferno"](attention.float().clamp(0, 1).numpy())[..., :3]
    return np.rint((1 - opacity) * grey + opacity * colours).astype(np.uint8)


def truth_of_item(item: Mapping[str, Any]) -> Any:
    """What pictures show as the truth of a data set's item: its label, [H, W] or of the whole image, or its boxes."""
    if "boxes" in item:
        return Detections(item["boxes"], item["labels"], torch.ones(len(item["labels"])))
    return item["label"]


def save_mask(path: Path, mask: Tensor, palette: Palette) -> None:
    """Class indices [H, W] as a palette PNG: its values are the indices, its colours those of the classes."""
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)


def save_overlay(path: Path, image: Tensor, mask: Tensor, names: Sequence[str], palette: Palette) -> None:
    """The mask [H, W] over the image, uint8 [3, H, W], pixel for pixel; below it, the classes that occur."""
    picture = Image.fromarray(overlay(image, mask, palette))
    size = min(max(picture.width // 40, 12), 40)  # of the letters
    _with_legend(picture, mask.unique().tolist(), names, palette, size).save(path)


def known(dataset: Any, index: int, item: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What is known of an item before it is predicted: its image, and views of what it was given and of the truth.

    Args:
        dataset: whose `read` gives the image, and perhaps "views" of what else the item holds.
        index: of the item.
        item: the item itself.
    """
    raw = dataset.read(index)
    return raw["image"], {**raw.get("views", {}), "truth": truth_of_item(item)}


def draw_panels(
    rows: Sequence[tuple[Tensor, Mapping[str, Any]]], names: Sequence[str], palette: Palette
) -> Image.Image:
    """One row an image: the image, then each of its views laid over it; the classes below.

    Args:
        rows: images, uint8 [3, H, W], at least one, with their views by title: classes [H, W], integers; attention
            [H, W], floating point in 0 to 1; the class of the whole image, a single integer, as a frame;
            `gingham.data.detection.Detections`, the first colour being that of label 1; or another image with a view of
            its own.
        names: of the classes; where they are those of whole images, only those that occur are listed.
        palette: their colours.
    """
    titles = ["image", *dict.fromkeys(title for _, views in rows for title in views)]
    panels = [
        [_panel(image.permute(1, 2, 0).numpy())]
        + [_view(image, views[title], palette) for title in titles[1:] if title in views]
        for image, views in rows
    ]
    width = max(panel.width for row in panels for panel in row)
    heights = [max(panel.height for panel in row) for row in panels]
    gap, head = 6, 20
    sheet = Image.new("RGB", (len(titles) * (width + gap), head + sum(heights) + gap * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        draw.text((column * (width + gap) + width // 2, head // 2), title, fill="black", font=font, anchor="mm")
    top = head
    for row, height in zip(panels, heights, strict=True):
        for column, panel in enumerate(row):
            sheet.paste(panel, (column * (width + gap), top))
        top += height + gap
    of_images = {int(x) for _, views in rows for x in views.values() if isinstance(x, Tensor) and x.ndim == 0}
    return _with_legend(sheet, sorted(of_images) or list(range(len(names))), names, palette, 12)


def _view(image: Tensor, view: Any, palette: Palette) -> Image.Image:
    if isinstance(view, tuple) and not isinstance(view, Detections):
        other, view_of_other = view
        return _view(other, view_of_other, palette)
    if isinstance(view, Detections):
        return _with_boxes(_panel(image.permute(1, 2, 0).numpy()), view, image.shape[-1], palette, 9)
    if view.ndim == 0:
        picture = _panel(image.permute(1, 2, 0).numpy())
        width = max(2, max(picture.size) // 24)
        ImageDraw.Draw(picture).rectangle((0, 0, *picture.size), outline=tuple(palette[int(view)]), width=width)
        return picture
    return _panel(heat(image, view) if view.is_floating_point() else overlay(image, view, palette))


def draw_detections(
    image: Tensor, views: Mapping[str, Detections], names: Sequence[str], palette: Palette
) -> Image.Image:
    """Detections over the image, uint8 [3, H, W], one picture beside the other; below them, the classes that occur.

    Args:
        image: small ones are drawn larger by whole pixels.
        views: by title, at least one.
        names: of the classes, that of label 1 first.
        palette: their colours.
    """
    factor = max(1, _PANEL // max(image.shape[-2:]))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    size = min(max(picture.width // 40, 10), 40)  # of the letters
    gap, head = 6, 2 * size
    sheet = Image.new("RGB", (len(views) * (picture.width + gap) - gap, head + picture.height), "white")
    font, draw = ImageFont.load_default(size), ImageDraw.Draw(sheet)
    for column, (title, found) in enumerate(views.items()):
        left = column * (picture.width + gap)
        draw.text((left + picture.width // 2, head // 2), title, fill="black", font=font, anchor="mm")
        sheet.paste(_with_boxes(picture.copy(), found, image.shape[-1], palette, size), (left, head))
    classes = sorted({label - 1 for found in views.values() for label in found.labels.tolist()})
    return _with_legend(sheet, classes, names, palette, size)


def _with_boxes(picture: Image.Image, found: Detections, width: int, palette: Palette, size: int) -> Image.Image:
    """A picture with boxes in pixels of an image that is `width` wide, and scores below 1 beside them."""
    draw, font, scale = ImageDraw.Draw(picture), ImageFont.load_default(size), picture.width / width
    rows = list(zip(*(values.tolist() for values in found), strict=True))
    for box, label, score in reversed(rows):  # the best on top
        left, top, right, bottom = (round(scale * x) for x in box)
        fill = tuple(palette[label - 1])
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=fill, width=max(1, size // 8))
        if score < 1:
            text = f"{100 * score:.0f}"
            area = draw.textbbox((left, top), text, font=font)
            draw.rectangle(area, fill=fill)
            draw.text((left, top), text, fill="white" if sum(fill) < 384 else "black", font=font)
    return picture


def _panel(pixels: Any) -> Image.Image:
    """A picture at a size to look at: small ones by whole pixels larger, large ones smaller."""
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > _PANEL:
        picture.thumbnail((_PANEL, _PANEL))
        return picture
    factor = max(1, _PANEL // 2 // longest)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def _with_legend(
    picture: Image.Image, classes: Sequence[int], names: Sequence[str], palette: Palette, size: int
) -> Image.Image:
    """A picture with the colours and names of some classes below it, in letters of that size."""
    font = ImageFont.load_default(size)
    line = size + size // 2
    entries = []  # class, left and line of each
    x = row = right = 0
    for index in classes:
        length = 2 * size + int(font.getlength(names[index])) + size // 2
        if x and x + length > picture.width:
            x, row = 0, row + 1
        entries.append((index, x, row))
        x += length
        right = max(right, x)
    canvas = Image.new("RGB", (max(picture.width, right), picture.height + (row + 1) * line), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for index, left, row in entries:
        middle = picture.height + row * line + line // 2
        box = (left + size // 4, middle - size // 2, left + size // 4 + size, middle + size // 2)
        draw.rectangle(box, fill=tuple(palette[index]), outline="grey")
        draw.text((left + size + size // 2, middle), names[index], fill="black", font=font, anchor="lm")
    return canvas


def save_curves(path: Path, metrics: Path) -> None:
    """The loss and the validation scores of a run, from Lightning's metrics.csv."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("step", "epoch") and "/" not in name:
                    series[name].append((int(row["step"]), float(text)))
    groups = [("loss",), tuple(name for name in series if name != "loss")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, group in zip(axes, groups, strict=True):
        for name in group:
            if series.get(name):
                axis.plot(*zip(*series[name], strict=True), label=name)
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
