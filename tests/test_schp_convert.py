"""Checkpoints of the official SCHP code give the outputs of the network that is described for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gingham.errors import CheckpointError
from gingham.methods.schp.convert import convert_official, load_checkpoint
from gingham.methods.schp.network import ACE2P
from gingham.nn.checkpoint import check_fit
from oracles import ace2p

WIDTHS = ace2p.Widths((2, 1, 2, 2), (8, 8, 12, 16), context=16, parsing=12, details=6, edge=10)


def small(classes: int = 5) -> ACE2P:
    return ACE2P(
        "resnet50",
        num_classes=classes,
        context_channels=WIDTHS.context,
        parsing_channels=WIDTHS.parsing,
        detail_channels=WIDTHS.details,
        edge_channels=WIDTHS.edge,
        backbone_options={"layers": list(WIDTHS.blocks), "channels": list(WIDTHS.stages)},
    )


def save(path: Path, state: dict[str, Tensor]) -> Path:
    """As the official code saves it: under DataParallel's names, beside the cycle."""
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "cycle_n": 3}, path)
    return path


@pytest.mark.parametrize("size", [(65, 97), (97, 65), (118, 90), (64, 64)])
def test_converted_state_gives_the_official_outputs(tmp_path: Path, size: tuple[int, int]) -> None:
    """Another order in any concatenation, another resizing, dilation or slope, or a signed scale would show."""
    state = ace2p.random_state(5, WIDTHS)
    model = small()
    load_checkpoint(model, save(tmp_path / "schp.pth", state))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    parsing, fusion, edge = ace2p.forward(state, images)
    with torch.no_grad():
        output = model.eval()(images)
    for name, ours, theirs in (("parsing", output.parsing, parsing), ("logits", output.logits, fusion)):
        assert theirs.std() > 0.1, name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=name)
    assert edge.std() > 0.1
    torch.testing.assert_close(output.edge, edge, rtol=0, atol=1e-4)


@pytest.mark.parametrize("classes", [20, 18, 7])
def test_the_whole_network_has_the_official_entries(classes: int) -> None:
    shapes = ace2p.official_shapes(classes)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(state) == 603
    parameters = {name: value for name, value in state.items() if "running" not in name}
    assert len(parameters) == 365
    assert (
        sum(value.numel() for value in parameters.values()) == {20: 66_723_928, 18: 66_722_900, 7: 66_717_246}[classes]
    )
    with torch.device("meta"):
        model = ACE2P(num_classes=classes)
    check_fit(model, convert_official(state), source="official")


def test_scales_of_batch_norm_are_their_magnitudes() -> None:
    model = small()
    state = convert_official(ace2p.random_state(5, WIDTHS))
    state["fusion.1.running_mean"] = torch.zeros(12)
    state["fusion.1.running_var"] = torch.ones(12)
    state["fusion.1.bias"] = torch.zeros(12)
    state["fusion.1.weight"] = convert_official(
        {"fushion.1.weight": torch.full((12,), -0.5), "fushion.1.running_var": torch.ones(12)}
    )["fusion.1.weight"]
    model.load_state_dict(state, strict=False)
    output = model.eval().fusion[1](torch.full((1, 12, 1, 1), 2.0))
    torch.testing.assert_close(output, torch.full((1, 12, 1, 1), 1.00002), rtol=0, atol=1e-5)


def test_order_of_channels_is_an_option(tmp_path: Path) -> None:
    path = save(tmp_path / "schp.pth", ace2p.random_state(5, WIDTHS))
    blue_first, red_first = small().eval(), small().eval()
    load_checkpoint(blue_first, path)
    load_checkpoint(red_first, path, channels="RGB")
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = blue_first(images).logits
        torch.testing.assert_close(red_first(images.flip(1)).logits, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(red_first(images).logits, expected, atol=1e-2)
    with pytest.raises(ValueError, match="channels must be 'RGB' or 'BGR', got 'GBR'"):
        load_checkpoint(red_first, path, channels="GBR")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda state: state.pop("edge.conv5.bias"), r"1 missing \(edge.combine.bias\)"),
        (lambda state: state.update({"decoder.conv5.weight": torch.ones(1)}), r"1 unexpected \(decoder.conv5.weight\)"),
        (
            lambda state: state.update(ace2p.random_state(7, WIDTHS)),
            r"4 of another shape \(parsing.classifier.weight is \[7, 12, 1, 1\] in the file and \[5, 12, 1, 1\]",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("layer3")],
            r"missing \(backbone.body.layer3\S+, \S+, \S+ and \d+ more\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_described_in_one_line(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    state = ace2p.random_state(5, WIDTHS)
    spoil(state)
    path = save(tmp_path / "schp.pth", state)
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path} does not fit the model: ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(CheckpointError, match=r"absent.pth: no such checkpoint file"):
        load_checkpoint(model, tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: no SCHP checkpoint: fushion.\* is not in it"):
        load_checkpoint(model, save(tmp_path / "other.pth", {"head.weight": torch.ones(1)}))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken.pth: not a readable checkpoint"):
        load_checkpoint(model, tmp_path / "broken.pth")
