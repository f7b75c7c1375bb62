"""STA's losses and what is watched of its attention, against numbers worked out by hand or from the specification."""

import math

import pytest
import torch
from torch import Tensor

from gingham.methods.sta.network import STA, STAOutput
from gingham.methods.sta.objective import clip_losses, occluded_attention, score_entropy

POINTS = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 0], [3, 1], [4, 0]])
PERSONS = torch.tensor([0, 0, 0, 1, 1, 1])


def output(features: Tensor = POINTS, attention: Tensor | None = None) -> STAOutput:
    logits = torch.stack([torch.zeros(len(features)), math.log(3) * torch.ones(len(features))], dim=1)
    return STAOutput(features, logits, torch.ones(len(features), 1, 1), attention)


def test_the_terms_are_those_of_the_specification() -> None:
    found = clip_losses(output(), PERSONS)
    assert found.triplet.item() == pytest.approx(0.08934466, abs=1e-7)
    assert found.identity.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, abs=1e-6)
    assert found.regularization.item() == 0
    assert clip_losses(output(), PERSONS, margin=0.5).triplet.item() == pytest.approx(0.12267800, abs=1e-7)
    assert clip_losses(output(), PERSONS, margin="soft").triplet.item() == pytest.approx(0.38816357, abs=1e-7)


def test_smoothed_labels_share_out_what_they_take() -> None:
    even = (math.log(4) + math.log(4 / 3)) / 2
    found = clip_losses(output(), torch.tensor([1, 1, 1, 1, 1, 0]), label_smoothing=0.1).identity.item()
    plain = (5 * math.log(4 / 3) + math.log(4)) / 6
    assert found == pytest.approx(0.9 * plain + 0.1 * even, abs=1e-6)


def test_attention_that_jumps_between_frames_costs() -> None:
    attention = torch.zeros(6, 3, 4, 2)
    attention[:, 0, 0, 0] = attention[:, 1, 3, 1] = attention[:, 2, 3, 1] = 1
    assert clip_losses(output(attention=attention), PERSONS, pairs="all").regularization.item() == pytest.approx(
        2 * math.sqrt(2) / 3
    )
    still = attention[:, :1].expand(-1, 3, -1, -1)
    assert clip_losses(output(attention=still), PERSONS).regularization.item() == 0
    drawn = {round(clip_losses(output(attention=attention), PERSONS).regularization.item(), 4) for _ in range(20)}
    assert len(drawn) > 1 and max(drawn) <= round(math.sqrt(2), 4)


def test_a_batch_of_one_person_is_refused() -> None:
    with pytest.raises(ValueError, match="person"):
        clip_losses(output(), torch.zeros(6, dtype=torch.int64))


def test_losses_reach_the_backbone_by_way_of_the_attention() -> None:
    torch.manual_seed(0)
    model = STA("small", num_persons=2, output_stride=4, embedding_channels=8, backbone_options={"widths": [8, 8]})
    clips = torch.randn(6, 3, 3, 32, 16)
    clip_losses(model(clips), PERSONS).regularization.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in model.embedding.parameters())


def test_entropy_is_one_of_equal_scores_and_zero_of_one_frame_that_has_all() -> None:
    assert score_entropy(torch.full((2, 5, 3), 0.2)).item() == pytest.approx(1)
    alone = torch.zeros(2, 5, 3)
    alone[:, 1] = 1
    assert score_entropy(alone).item() == 0
    assert score_entropy(torch.zeros(1, 4, 2)).item() == 0
    assert score_entropy(torch.ones(2, 1, 3)).item() == 1
    uneven = torch.tensor([0.7, 0.2, 0.1])[None, :, None]
    expected = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(3)
    assert score_entropy(uneven).item() == pytest.approx(expected, abs=1e-6)


def test_attention_on_occluders_is_the_hidden_share_of_each_part_by_its_score() -> None:
    occluded = torch.zeros(2, 2, 8, 4, dtype=torch.bool)
    occluded[0, 1, 4:7] = True  # of the second frame: all of the third part, half of the fourth
    scores = torch.tensor([[0.5, 0.5, 0.8, 0.9], [0.5, 0.5, 0.2, 0.1]]).expand(2, -1, -1)
    found = occluded_attention(scores, occluded)
    assert found.tolist() == pytest.approx([(0.2 + 0.5 * 0.1) / 4, 0])
    equal = torch.full((2, 2, 4), 0.5)
    assert occluded_attention(equal, occluded).tolist() == pytest.approx(occluded.float().mean(dim=(1, 2, 3)).tolist())
    assert occluded_attention(equal, torch.ones_like(occluded)).tolist() == pytest.approx([1, 1])
    assert occluded_attention(equal[:, :, :3], torch.ones_like(occluded)).tolist() == pytest.approx([1, 1])


def test_scores_and_masks_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores must be \[B, T, K\], got \[2, 3\]"):
        score_entropy(torch.ones(2, 3))
    for shape in ((2, 3, 8, 4), (1, 2, 8, 4), (2, 2, 3, 4), (2, 2, 8)):
        with pytest.raises(ValueError, match=r"occluded must be \[B, T, H, W\] for scores \[2, 2, 4\]"):
            occluded_attention(torch.ones(2, 2, 4), torch.ones(shape, dtype=torch.bool))
