"""SeeNet's network: its branches, what reaches which, sizes and parameters of the official deploy network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gingham
from gingham.methods.seenet.network import Branch, SeeNet
from gingham.nn.backbone import BackboneError

SMALL: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 4,
    "output_stride": 4,
    "head_channels": 8,
    "head_std": None,
    "backbone_options": {"widths": [8, 8]},
}
TAGS = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])


def small(**options: Any) -> SeeNet:
    torch.manual_seed(0)
    return SeeNet(**SMALL | options)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_those_of_the_official_network() -> None:
    with torch.device("meta"):
        made = SeeNet()
        separate = SeeNet(share_background=False)
        three = Branch(512, 20, convs=3)
    assert parameters(made.backbone) == 14_714_688
    assert parameters(made.attended) == parameters(made.potential) == 4_729_876
    assert parameters(made) == 24_174_440
    assert parameters(separate) == 28_904_316
    assert parameters(separate.background) == parameters(separate.potential)
    assert parameters(three) == 4_729_876 + 512 * 512 * 9 + 512


def test_pools_round_up_as_caffe_does() -> None:
    for ceil_mode, last in ((True, 21), (False, 20)):
        with torch.device("meta"):
            made = SeeNet(ceil_mode=ceil_mode).eval()
            for size, expected in ((224, 14), (256, 16), (333, last)):
                output = made(torch.zeros(1, 3, size, 64), torch.zeros(1, 20))
                assert output.attended.shape == output.potential.shape == (1, 20, expected, 4)


def test_heads_begin_as_the_official_ones() -> None:
    torch.manual_seed(0)
    made = small(head_channels=64, head_std=0.01)
    for head in (made.attended, made.potential):
        assert isinstance(head, nn.Module)
        convs = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
        assert [conv.kernel_size for conv in convs] == [(3, 3), (3, 3), (1, 1)]
        assert all(not conv.bias.any() for conv in convs if conv.bias is not None)
        assert all(0.008 < conv.weight.std() < 0.012 for conv in convs)
    dropouts = [module.p for module in made.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.5, 0.0]


@pytest.mark.parametrize("backbone", ["small", "resnet18", "vgg11", "mobilenetv2_100"])
def test_any_backbone_and_oblong_images_will_do(backbone: str) -> None:
    stride, options = (4, {"widths": [8, 8]}) if backbone == "small" else (16, None)
    with torch.device("meta" if backbone == "vgg11" else "cpu"):  # its classifier, which is not kept, takes seconds
        made = SeeNet(backbone, 4, stride, 8, backbone_options=options)
        output = made(torch.zeros(2, 3, 64, 96), torch.zeros(2, 4))
    maps = (output.attended, output.potential, output.background)
    assert {map_.shape for map_ in maps if map_ is not None} == {(2, 4, 64 // stride, 96 // stride)}
    assert output.zones.shape == (2, 64 // stride, 96 // stride) and output.zones.dtype == torch.int8


def test_the_background_branch_is_for_training_and_has_the_second_ones_weights_or_its_own() -> None:
    images = torch.randn(2, 3, 32, 48)
    shared, separate = small(dropout=0.0), small(dropout=0.0, share_background=False)
    assert shared.background is None and parameters(separate) == parameters(shared) + parameters(separate.background)
    for made in (shared, separate):
        assert made.train()(images, TAGS).background.shape == (2, 4, 8, 12)
        assert made.eval()(images, TAGS).background is None
    head = shared.train().potential
    before = shared(images, TAGS).background
    head[-1].bias.data += 1
    torch.testing.assert_close(shared(images, TAGS).background, before + 1)
    own = separate.train()(images, TAGS).background
    separate.potential[-1].bias.data += 1
    torch.testing.assert_close(separate(images, TAGS).background, own)


def test_evaluation_has_thresholds_of_its_own() -> None:
    made = small(train_thresholds=(0.5, 0.3), test_thresholds=(0.8, 0.0))
    images = torch.randn(2, 3, 32, 48)
    made.eval()
    assert (made(images, TAGS).zones != -1).all()
    made.test_thresholds = (0.5, 0.3)
    assert (made(images, TAGS).zones == -1).any()
    assert (made.train()(images, TAGS).zones == -1).any()


def test_branches_can_be_left_out() -> None:
    images = torch.randn(2, 3, 32, 48)
    cam = small(erase=False, background_threshold=None).train()
    assert cam(images).potential is None and cam(images, TAGS).zones is None
    plain = small(background_threshold=None, train_thresholds=(0.7, 0.0)).train()
    output = plain(images, TAGS)
    assert output.background is None and (output.zones != -1).all() and (output.zones == 0).any()
    untagged = plain.eval()(images)
    assert untagged.potential is None and torch.equal(untagged.attended, plain(images, TAGS).attended)


def test_no_gradient_reaches_the_first_branch_through_the_zones() -> None:
    made = small().train()
    made(torch.randn(2, 3, 32, 48), TAGS).potential.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in made.attended.parameters())
    assert any(p.grad is not None and p.grad.any() for p in made.backbone.parameters())


def test_images_of_a_batch_have_zones_of_their_own() -> None:
    made = small().eval()
    made.test_thresholds = (0.5, 0.1)
    images = torch.randn(2, 3, 32, 48)
    together = made(images, TAGS)
    for index in range(2):
        alone = made(images[index : index + 1], TAGS[index : index + 1])
        torch.testing.assert_close(alone.potential[0], together.potential[index])
        assert torch.equal(alone.zones[0], together.zones[index])


def test_a_model_is_saved_and_comes_back(tmp_path: Path) -> None:
    made = gingham.create_model("seenet", **SMALL).eval()
    made.save_pretrained(tmp_path)
    again = SeeNet.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(made(images, TAGS).potential, again(images, TAGS).potential)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"head_channels": 0},
        {"head_convs": -1},
        {"head_std": 0.0},
        {"dropout": 1.0},
        {"background": 2},
        {"norm": "mean"},
        {"background_threshold": 0.3, "erase": False},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        small(**options)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="tags must be given in training"):
        small().train()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="low at most high"):
        small(train_thresholds=(0.1, 0.7))
    with pytest.raises(BackboneError, match="'vgg16' has output_stride 16 here, not 8"):
        SeeNet("vgg16", output_stride=8)
