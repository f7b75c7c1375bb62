"""``gingham predict``: pictures of what a recipe predicts, and a summary, for an image or a folder of images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gingham.cli.support import image_files, read_support, sighting_files
from gingham.errors import DataError, GinghamError


class DeviceError(GinghamError, ValueError):
    """A device that does not exist here, or that this build has no kernels for."""


def main(words: list[str]) -> int:
    """Returns 0, or 1 when images were skipped because they could not be read or segmented."""
    parser = argparse.ArgumentParser(
        prog="gingham predict",
        description="Write an index mask, an overlay with a legend and the class shares of an image or of a folder's; "
        "with a detector, the boxes before and after refinement; with attention, its maps, pictures of them and seed "
        "labels; with a classifier, the likeliest classes; for re-identification, the nearest of a gallery.",
    )
    parser.add_argument(
        "--config",
        required=True,
        help="configuration of the training: a packaged name such as ccnet_world, or a file; a run that was trained "
        "with further options keeps its own in config.yaml of its run_dir",
    )
    parser.add_argument(
        "--ckpt_path", required=True, help="checkpoint of the training: a file, or 'last', 'best' ... of the run_dir"
    )
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="folder of the run (default: the configuration's)")
    parser.add_argument("--images", required=True, type=Path, metavar="PATH", help="an image, or a folder of images")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where masks/, overlays/ and shares.json go; or boxes/ and detections.json; or maps/, attention/, "
        "overlays/, seeds/ and attention.json; or pictures/ and classes.json; or galleries/ and galleries.json",
    )
    parser.add_argument(
        "--support",
        type=Path,
        metavar="PATH",
        help="few-shot methods: an image that shows what to look for, or a folder of such images",
    )
    parser.add_argument(
        "--support_masks",
        type=Path,
        metavar="PATH",
        help="the mask of that image, or a folder of masks that are named as their images, but .png: all but 0 is the "
        "object; in masks with a palette and other values too, 255 is not known; in grey masks with soft outlines, 128 "
        "or more is the object",
    )
    parser.add_argument("--support_value", type=int, metavar="N", help="only this value of the masks is the object")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--tags",
        type=Path,
        metavar="FILE",
        help="attention: a list of images with class numbers, as VOC's train_cls.txt; only images in it are taken, and "
        "those that a folder lacks are named (default: all, with the classes that the network finds)",
    )
    parser.add_argument(
        "--seeds", choices=("confident", "harmonic"), help="attention: write seed labels too, made by this rule"
    )
    parser.add_argument(
        "--seed_options",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="attention: of that rule: least, sure, attended, salient and least_share of confident, weight of "
        "harmonic; see gingham.methods.seenet.seeds",
    )
    parser.add_argument(
        "--saliency", type=Path, metavar="DIR", help="attention: grey saliency maps NAME.png to make seeds with"
    )
    parser.add_argument(
        "--gallery",
        type=Path,
        metavar="DIR",
        help="re-identification: a folder of images in which the persons of --images are looked for; for tracklets, "
        "both are folders of folders with the frames of one each",
    )
    options = parser.parse_args(words)
    files = (sighting_files if options.gallery else image_files)("--images", options.images)
    support = read_support(options.support, options.support_masks, options.support_value)
    device = _device(options.device)
    recipe, data = _load(options.config, options.ckpt_path, options.run_dir)
    recipe.to(device)

    from tqdm import tqdm

    from gingham.cli.galleries import GalleryWriter
    from gingham.cli.predictions import AttentionOptions, writer_for

    attention = AttentionOptions(options.tags, options.saliency, options.seeds, _numbers(options.seed_options))
    writer = writer_for(recipe, data, options.out, support, attention, options.gallery)
    skipped = writer.left_out if isinstance(writer, GalleryWriter) else 0
    if writer.stems is not None:
        files = [file for file in files if file.stem in writer.stems]
        if not files:
            raise DataError(f"--images {options.images}: holds no image that is in {options.tags}")
        there = {file.stem for file in files}
        missing = [stem for stem in writer.stems if stem not in there] if options.images.is_dir() else []
        for stem in missing:
            print(
                f"gingham: skipped {stem}: {options.tags} lists it, {options.images} has no such image", file=sys.stderr
            )
        skipped += len(missing)
    try:
        for name in writer.folders:
            (options.out / name).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"--out {options.out}: {error.filename} is a file, but a folder is needed there") from error
    written: dict[str, Any] = {}
    try:
        for file in tqdm(files, unit="image", disable=None):
            try:
                written[file.name] = writer.write(file.name, writer.read(file))
            except (DataError, MemoryError) as error:
                reason = str(error).removeprefix(f"{file}: ") or "not enough memory"
                print(f"gingham: skipped {file}: {reason}", file=sys.stderr)
                skipped += 1
    finally:  # an interrupted run keeps what it has
        (options.out / writer.summary).write_text(json.dumps(written, indent=2) + "\n")
    print(f"{len(written)} images written to {options.out}" + (f", {skipped} skipped" if skipped else ""))
    return 1 if skipped else 0


def _numbers(words: list[str]) -> dict[str, float]:
    """The options NAME=NUMBER."""
    from gingham.cli.options import ConfigError

    found = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--seed_options {word}: expected NAME=NUMBER, such as sure=0.9") from None
    return found


def _device(name: str | None) -> torch.device:
    from gingham._library import native

    built = bool(native().cuda_architectures)
    if name is None:
        return torch.device("cuda" if built and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; use cpu")
    if device.type == "cuda" and not built:
        raise DeviceError(f"--device {name}: this gingham was built without CUDA; use cpu")
    return device


def _load(config: str, checkpoint: str, run_dir: Path | None) -> tuple[Any, Any]:
    """The recipe with the checkpoint's weights, in evaluation mode, and the data module, of a configuration."""
    from gingham.cli.options import ConfigError, config_file, instantiate, read_config
    from gingham.cli.records import resolve_checkpoint
    from gingham.nn.checkpoint import load_state_dict, read_state_dict

    file = config_file(config)
    content = read_config(file)
    if not {"model", "data"} <= content.keys():
        raise ConfigError(f"{file}: a configuration needs the entries model and data")
    weights = resolve_checkpoint(checkpoint, run_dir or Path(content.get("run_dir", "runs")))
    assert weights is not None
    parts = instantiate({name: content[name] for name in ("model", "data")}, source=file)
    load_state_dict(parts.model, read_state_dict(weights), source=weights)
    if hasattr(parts.model, "mirror_pairs"):
        parts.model.mirror_pairs = parts.data.label_space().mirror_pairs
    return parts.model.eval(), parts.data
