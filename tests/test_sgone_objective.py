"""SG-One's loss, and the masks that several shots make."""

import math

import pytest
import torch
import torch.nn.functional as F

from gingham.errors import DataError
from gingham.methods.sgone.objective import combine_masks, episode_loss


def test_equal_logits_cost_ln_2_at_the_size_of_the_labels() -> None:
    labels = torch.randint(0, 2, (2, 33, 47))
    assert episode_loss(torch.zeros(2, 2, 5, 6), labels).item() == pytest.approx(math.log(2))


def test_the_loss_is_the_mean_over_pixels_of_upsampled_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (2, 32, 48))
    loss = episode_loss(logits, labels)
    upsampled = F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)
    likelihood = upsampled.log_softmax(1).gather(1, labels[:, None])
    torch.testing.assert_close(loss, -likelihood.mean())
    assert torch.autograd.gradcheck(lambda x: episode_loss(x, labels), (logits,))


def test_ignored_pixels_cost_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 8, 8)
    labels = torch.randint(0, 2, (1, 8, 8))
    ignored = labels.clone()
    ignored[:, :4] = 255
    expected = F.cross_entropy(logits[:, :, 4:], labels[:, 4:])
    torch.testing.assert_close(episode_loss(logits, ignored), expected)
    nothing = logits.requires_grad_()
    loss = episode_loss(nothing, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0 and nothing.grad is not None and not nothing.grad.any()
    with pytest.raises(DataError, match="labels contain the value 2"):
        episode_loss(logits, labels + 1)


def test_a_union_holds_the_mask_of_every_shot() -> None:
    masks = torch.rand(4, 2, 9, 7, generator=torch.Generator().manual_seed(0)) < 0.2
    union = combine_masks(masks, "union")
    assert all((union | mask).equal(union) for mask in masks)
    assert union.equal(masks.float().amax(dim=0) > 0)
    assert combine_masks(masks[:1].expand(4, -1, -1, -1), "union").equal(masks[0])


def test_votes_count_relative_to_the_most_in_an_image() -> None:
    masks = torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 1] = False
    masks[1:, 2] = False
    found = combine_masks(masks, "vote")
    for image in range(3):
        votes = masks[:, image].float().sum(dim=0)
        most = max(1.0, votes.max().item())
        assert found[image].equal(votes / most >= 0.5)
    assert not found[1].any() and found[2].equal(masks[0, 2])
    with pytest.raises(ValueError, match="rule must be 'union' or 'vote', got 'mean'"):
        combine_masks(masks, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masks must be \[K, B, H, W\]"):
        combine_masks(masks[0], "union")
