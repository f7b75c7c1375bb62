"""Ranked galleries: who is asked for and who was found, as pictures, and what `gingham predict` writes of them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gingham.cli.options import ConfigError
from gingham.cli.support import image_files, read_upright, sighting_files
from gingham.data.clips import evaluation_clips
from gingham.data.reid import QueryAndGallery
from gingham.errors import DataError
from gingham.methods.reid_data import TrackletData
from gingham.methods.reid_recipe import ReidRecipe
from gingham.metrics.retrieval import SHOWN_ITEMS

_HEIGHT, _FRAME, _GAP, _HEAD, _TITLE = 128, 5, 4, 18, 28  # pixels
_COLOURS = {None: (150, 150, 150), True: (0, 158, 60), False: (213, 30, 30)}


class Shown(NamedTuple):
    """A picture of a gallery, uint8 [3, H, W], whether it is of the person (None: nobody knows), and a line on it."""

    image: Tensor
    right: bool | None = None
    caption: str = ""


def draw_galleries(rows: Sequence[tuple[Shown, Sequence[Shown]]]) -> Image.Image:
    """One row a query: the query, then its gallery, the nearest first; frames are green for the right person.

    Args:
        rows: at least one.
    """
    panels = [[_framed(query)] + [_framed(one) for one in gallery] for query, gallery in rows]
    width = max(panel.width for row in panels for panel in row) + _GAP
    height = panels[0][0].height + _GAP
    count = max(len(row) for row in panels)
    sheet = Image.new("RGB", (count * width + 2 * _GAP, _HEAD + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column in range(count):
        left = column * width + (2 * _GAP if column else 0)
        title = str(column) if column else "query"
        draw.text((left + width // 2, _HEAD // 2), title, fill="black", font=font, anchor="mm")
        for number, row in enumerate(panels):
            if column < len(row):
                sheet.paste(row[column], (left, _HEAD + number * height))
    return sheet


def _at_height(image: Tensor) -> Image.Image:
    """A picture, uint8 [3, H, W], as high as it is on a sheet."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = (max(1, round(picture.width * _HEIGHT / picture.height)), _HEIGHT)
    larger = Image.Resampling.NEAREST if _HEIGHT % picture.height == 0 else Image.Resampling.BILINEAR
    return picture.resize(size, larger)


def _framed(shown: Shown) -> Image.Image:
    picture = _at_height(shown.image)
    line = 14 if shown.caption else 0
    panel = Image.new("RGB", (picture.width + 2 * _FRAME, _HEIGHT + 2 * _FRAME + line), "white")
    draw = ImageDraw.Draw(panel)
    draw.rectangle((0, 0, panel.width, _HEIGHT + 2 * _FRAME - 1), fill=_COLOURS[shown.right])
    panel.paste(picture, (_FRAME, _FRAME))
    draw.text((panel.width // 2, panel.height - line // 2), shown.caption, "black", ImageFont.load_default(10), "mm")
    return panel


def gallery_sheet(dataset: QueryAndGallery, galleries: Tensor) -> Image.Image:
    """The galleries of an evaluation.

    Args:
        dataset: what was evaluated.
        galleries: places in it, [S, 1 + n]: of a query and of the items nearest to it, -1 for none.
    """
    rows = []
    for asked, *places in galleries.tolist():
        image, person = dataset.picture(asked)
        found = [dataset.picture(place) for place in places if place >= 0]
        rows.append((Shown(image), [Shown(other, whose == person) for other, whose in found]))
    return draw_galleries(rows)


def stacked(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """Sheets below each other, each under its title.

    Args:
        sheets: by title, at least one.
    """
    whole = Image.new(
        "RGB",
        (max(sheet.width for sheet in sheets.values()), sum(sheet.height + _TITLE for sheet in sheets.values())),
        "white",
    )
    draw, top = ImageDraw.Draw(whole), 0
    for title, sheet in sheets.items():
        draw.text((_GAP, top + _TITLE // 2), title, fill="black", font=ImageFont.load_default(16), anchor="lm")
        whole.paste(sheet, (0, top + _TITLE))
        top += sheet.height + _TITLE
    return whole


class GalleryWriter:
    """Pictures of the items of a gallery that are nearest to a query, and their distances.

    Args:
        recipe: in evaluation mode, on its device.
        data: the data module of its configuration.
        out: the folder that holds ``galleries``.
        gallery: a folder of images, or of folders with the frames of tracklets each.

    Raises:
        DataError: the gallery holds nothing that can be read.
        ConfigError: images for a configuration of tracklets, or the other way round.
    """

    folders: tuple[str, ...] = ("galleries",)
    summary = "galleries.json"
    stems: Collection[str] | None = None

    def __init__(self, recipe: ReidRecipe, data: Any, out: Path, gallery: Path) -> None:
        from tqdm import tqdm

        self.recipe, self.data, self.out = recipe, data, out
        self.of_tracklets = isinstance(data, TrackletData)
        self.left_out = 0  # items of the gallery that cannot be read
        self.names: list[str] = []
        self.images: list[Tensor] = []  # no larger than they are shown: a gallery has many
        features = []
        for file in tqdm(sighting_files("--gallery", gallery), desc="gallery", unit="item", disable=None):
            try:
                pixels = self.read(file, "--gallery")
                features.append(self._feature(pixels))
            except (DataError, MemoryError) as error:
                print(f"gingham: left out {file}: {str(error).removeprefix(f'{file}: ')}", file=sys.stderr)
                self.left_out += 1
                continue
            self.names.append(file.name)
            self.images.append(transforms.pil_to_tensor(_at_height(_middle(pixels))))
        if not features:
            raise DataError(f"--gallery {gallery}: nothing in it can be read")
        self.features = torch.cat(features).double()

    def read(self, file: Path, option: str = "--images") -> list[Tensor]:
        """An image, or the frames of a tracklet in the order of their names, uint8 [3, H, W] each."""
        if file.is_dir() != self.of_tracklets:
            wanted = "folders with the frames of one tracklet each" if self.of_tracklets else "images"
            raise ConfigError(f"{file}: this configuration retrieves {wanted}")
        return [read_upright(frame) for frame in (image_files(option, file) if file.is_dir() else [file])]

    def _feature(self, frames: list[Tensor]) -> Tensor:
        pixels = torch.stack([self.data.evaluate(frame) for frame in frames]).to(self.recipe.device)
        batch: dict[str, Any] = {"image": pixels}
        if self.of_tracklets:
            numbers = evaluation_clips(len(frames), self.data.frames, self.data.test_sample)
            batch = {"clips": [pixels[torch.from_numpy(numbers)]]}
        try:
            with torch.inference_mode():
                found = self.recipe.features(batch).float()
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise MemoryError(f"not enough memory for {len(frames)} pictures") from error
        if not bool(found.isfinite().all()):
            raise DataError("its features are NaN or infinite: the checkpoint is of a training that diverged")
        return F.normalize(found) if self.recipe.meters["val"].metric == "cosine" else found

    def write(self, name: str, image: list[Tensor]) -> list[dict[str, Any]]:
        distances = torch.cdist(self._feature(image).double(), self.features)[0].cpu()
        order = distances.argsort(stable=True)[:SHOWN_ITEMS].tolist()
        rows = [{"name": self.names[place], "distance": round(distances[place].item(), 6)} for place in order]
        shown = [Shown(self.images[place], caption=f"{distances[place]:.3g}") for place in order]
        draw_galleries([(Shown(_middle(image), caption=" "), shown)]).save(self.out / "galleries" / f"{name}.png")
        return rows


def _middle(frames: list[Tensor]) -> Tensor:
    return frames[len(frames) // 2]
