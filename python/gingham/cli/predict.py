"""``gingham predict``: masks, overlays and class shares for a folder of images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gingham.errors import CheckpointError, DataError

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def main(words: list[str]) -> int:
    """Returns 0, or 1 when images were skipped because they could not be read."""
    parser = argparse.ArgumentParser(
        prog="gingham predict", description="Write an index mask, an overlay and the class shares of every image."
    )
    parser.add_argument("--config", required=True, help="the configuration of the training: a name or a file")
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint of the training")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of images")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where masks/, overlays/ and shares.json go"
    )
    options = parser.parse_args(words)
    if not options.images.is_dir():
        raise DataError(f"--images {options.images}: no such folder")
    files = sorted(path for path in options.images.iterdir() if path.suffix.lower() in _ENDINGS)
    if not files:
        raise DataError(f"--images {options.images}: no image in it (looked for {', '.join(sorted(_ENDINGS))})")
    recipe, data = _load(options.config, options.ckpt_path)
    labels = data.label_space()

    from torchvision.transforms.v2.functional import pil_to_tensor
    from torchvision.tv_tensors import Image as ImageTensor
    from tqdm import tqdm

    from gingham.cli.pictures import save_panels

    for name in ("masks", "overlays"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    shares: dict[str, Any] = {}
    skipped = 0
    for file in tqdm(files, unit="image", disable=None):
        try:
            with Image.open(file) as picture:
                image = pil_to_tensor(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            print(f"gingham: skipped {file}: cannot be read as an image ({error})", file=sys.stderr)
            skipped += 1
            continue
        normalized = data.evaluate.normalize(ImageTensor(image)).as_subclass(torch.Tensor)
        with torch.inference_mode():
            mask = recipe(normalized[None])[0].argmax(0)
        Image.fromarray(mask.to(torch.uint8).numpy()).save(options.out / "masks" / f"{file.name}.png")
        save_panels(
            options.out / "overlays" / f"{file.name}.png", [(image, {"prediction": mask})], labels.names, labels.palette
        )
        counts = torch.bincount(mask.flatten(), minlength=labels.num_classes).double() / mask.numel()
        shares[file.name] = {name: round(share, 6) for name, share in zip(labels.names, counts.tolist(), strict=True)}
    (options.out / "shares.json").write_text(json.dumps(shares, indent=2) + "\n")
    print(f"{len(shares)} images written to {options.out}" + (f", {skipped} skipped" if skipped else ""))
    return 1 if skipped else 0


def _load(config: str, checkpoint: str) -> tuple[Any, Any]:
    import lightning
    from lightning.pytorch.cli import LightningArgumentParser

    from gingham.cli.training import config_file

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(lightning.LightningModule, "model")
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    import yaml

    text = yaml.safe_load(Path(config_file(config)).read_text())
    parts = parser.instantiate_classes(parser.parse_object({name: text[name] for name in ("model", "data")}))
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"--ckpt_path {checkpoint}: no such file")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of gingham fit: {' '.join(str(error).split())}"
        ) from error
    expected = parts.model.state_dict()
    for name, value in expected.items():
        if name not in state:
            raise CheckpointError(f"{checkpoint} does not fit {config}: it has no {name}")
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{checkpoint} does not fit {config}: {name} is {list(state[name].shape)}, expected {list(value.shape)}"
            )
    parts.model.load_state_dict({name: state[name] for name in expected})
    return parts.model.eval(), parts.data
