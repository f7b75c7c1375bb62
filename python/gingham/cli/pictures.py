"""Pictures that people look at: masks over images with a legend, and curves of a run."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

Palette = Sequence[Sequence[int]]


def colour(mask: Tensor, palette: Palette) -> Any:
    """Class indices [H, W] as colours, uint8 [H, W, 3]; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    return table[mask.numpy().astype(np.uint8)]


def overlay(image: Tensor, mask: Tensor, palette: Palette, opacity: float = 0.55) -> Any:
    """The mask [H, W] over the image, uint8 [3, H, W]; uint8 [H, W, 3]."""
    picture = image.permute(1, 2, 0).numpy().astype(np.float32)
    return np.rint((1 - opacity) * picture + opacity * colour(mask, palette)).astype(np.uint8)


def save_mask(path: Path, mask: Tensor, palette: Palette) -> None:
    """Class indices [H, W] as a palette PNG: its values are the indices, its colours those of the classes."""
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)


def save_overlay(path: Path, image: Tensor, mask: Tensor, names: Sequence[str], palette: Palette) -> None:
    """The mask [H, W] over the image, uint8 [3, H, W], pixel for pixel; below it, the classes that occur."""
    height, width = mask.shape
    size = min(max(width // 40, 12), 40)  # of the letters
    font = ImageFont.load_default(size)
    line = size + size // 2
    entries = []  # class, left and line of each
    x = row = right = 0
    for index in mask.unique().tolist():
        length = 2 * size + int(font.getlength(names[index])) + size // 2
        if x and x + length > width:
            x, row = 0, row + 1
        entries.append((index, x, row))
        x += length
        right = max(right, x)
    canvas = Image.new("RGB", (max(width, right), height + (row + 1) * line), "white")
    canvas.paste(Image.fromarray(overlay(image, mask, palette)))
    draw = ImageDraw.Draw(canvas)
    for index, left, row in entries:
        middle = height + row * line + line // 2
        box = (left + size // 4, middle - size // 2, left + size // 4 + size, middle + size // 2)
        draw.rectangle(box, fill=tuple(palette[index]), outline="grey")
        draw.text((left + size + size // 2, middle), names[index], fill="black", font=font, anchor="lm")
    canvas.save(path)


def save_panels(
    path: Path, rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]], names: Sequence[str], palette: Palette
) -> None:
    """One row an image: the image, then each of its masks laid over it; the classes below."""
    if not rows:
        return
    columns = 1 + max(len(masks) for _, masks in rows)
    size = (2 * columns, 2 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for number, (line, (image, masks)) in enumerate(zip(axes, rows, strict=True)):
        panels = {"image": image.permute(1, 2, 0).numpy()} | {
            title: overlay(image, mask, palette) for title, mask in masks.items()
        }
        for axis, (title, panel) in zip(line, panels.items(), strict=False):
            axis.imshow(panel, interpolation="nearest")
            if number == 0:
                axis.set_title(title, fontsize=8)
        for axis in line:
            axis.axis("off")
    patches = [
        Patch(facecolor=(rgb[0] / 255, rgb[1] / 255, rgb[2] / 255), edgecolor="grey", label=name)
        for name, rgb in zip(names, palette, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 5), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
