"""What the tests of recipes train with: a trainer that says nothing, and pictures that are learnt in seconds."""

import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    """A trainer on one CPU, without any output but to `folder`."""
    warnings.filterwarnings("ignore")
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**defaults | options)


def items(count: int, size: tuple[int, int] = (32, 48), *, ignored_rows: int = 0) -> list[dict[str, Tensor]]:
    """Pictures whose class, one of four in each quadrant, is their colour; the labels of the first rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [-1.0, -1.0, 2.0]])
    found = []
    for _ in range(count):
        quadrants = torch.randint(0, 4, (1, 1, 2, 2), generator=generator).float()
        label = F.interpolate(quadrants, size, mode="nearest")[0, 0].long()
        image = colours[label].permute(2, 0, 1) + 0.3 * torch.randn(3, *size, generator=generator)
        label[:ignored_rows] = 255
        found.append({"image": image, "label": label})
    return found
