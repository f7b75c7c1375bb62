"""Mean intersection over union from one confusion matrix over the whole set."""

import pickle

import pytest
import torch
from torch import Tensor

from gingham.errors import DataError
from gingham.metrics import SegmentationMeter


def counted(*batches: tuple[Tensor, Tensor], **options) -> SegmentationMeter:
    meter = SegmentationMeter(**{"num_classes": 3, **options})
    for prediction, labels in batches:
        meter.update(prediction, labels)
    return meter


def test_scores_of_a_small_example() -> None:
    labels = torch.tensor([[[0, 0, 0, 1], [1, 2, 255, 255]]])
    prediction = torch.tensor([[[0, 0, 1, 1], [2, 2, 0, 1]]])
    scores = counted((prediction, labels)).compute()
    torch.testing.assert_close(scores.iou, torch.tensor([2 / 3, 1 / 3, 1 / 2]))
    torch.testing.assert_close(scores.miou, torch.tensor(0.5))
    torch.testing.assert_close(scores.pixel_accuracy, torch.tensor(4 / 6))
    torch.testing.assert_close(scores.mean_accuracy, torch.tensor((2 / 3 + 1 / 2 + 1) / 3))


def test_rows_of_the_confusion_are_labels() -> None:
    meter = counted((torch.tensor([[1]]), torch.tensor([[0]])))
    assert meter.confusion.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_set_is_scored_as_one_not_as_a_mean_of_batches() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6, 5, 7))
    labels[0] = 255
    prediction = torch.randint(0, 3, (6, 5, 7))
    whole = counted((prediction, labels)).compute()
    parts = counted(
        (prediction[:1], labels[:1]), (prediction[1:2], labels[1:2]), (prediction[2:], labels[2:])
    ).compute()
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_two_shards_sum_to_one() -> None:
    torch.manual_seed(0)
    labels, prediction = torch.randint(0, 3, (2, 4, 5, 7))
    whole = counted((prediction, labels))
    left, right = counted((prediction[:1], labels[:1])), counted((prediction[1:], labels[1:]))
    assert left._reductions["confusion"](torch.stack([left.confusion, right.confusion])).equal(whole.confusion)
    left.merge_state(right)
    assert torch.equal(left.compute().iou, whole.compute().iou)


def test_absent_classes_score_zero_or_are_left_out() -> None:
    batch = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 0]])
    scores = counted(batch).compute()
    torch.testing.assert_close(scores.iou, torch.tensor([2 / 3, 0.0, 0.0]))
    torch.testing.assert_close(scores.miou, torch.tensor(2 / 9))
    torch.testing.assert_close(scores.mean_accuracy, torch.tensor(2 / 9))
    skipping = counted(batch, skip_absent=True).compute()
    torch.testing.assert_close(skipping.iou, torch.tensor([2 / 3, 0.0, torch.nan]), equal_nan=True)
    torch.testing.assert_close(skipping.miou, torch.tensor(1 / 3))
    torch.testing.assert_close(skipping.mean_accuracy, torch.tensor(2 / 3))


def test_predictions_on_ignored_pixels_do_not_count() -> None:
    labels = torch.full((1, 2, 2), 255)
    meter = counted((torch.full((1, 2, 2), 99), labels))
    assert meter.confusion.sum() == 0
    assert meter.compute().miou == 0


@pytest.mark.parametrize(
    ("prediction", "label", "text"),
    [
        (0, 3, r"labels contain the value 3, which is neither a class \(0 to 2\) nor ignore_index 255"),
        (0, -1, "labels contain the value -1"),
        (7, 0, "prediction contain the value 7"),
    ],
)
def test_wrong_values_are_named(prediction: int, label: int, text: str) -> None:
    with pytest.raises(DataError, match=text):
        counted((torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label)))


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match=r"one shape, got \[1, 2, 2\] and \[1, 2, 3\]"):
        counted((torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)))


def test_counts_beyond_two_to_the_31_stay_exact() -> None:
    meter = counted()
    meter.confusion += 2**33
    meter.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert meter.confusion[0, 0] == 2**33 + 1
    assert torch.equal(pickle.loads(pickle.dumps(meter)).confusion, meter.confusion)


def _count_shard(rank: int, address: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    labels, prediction = torch.randint(0, 3, (2, 4, 5, 7))
    meter = counted((prediction[rank::2], labels[rank::2]))
    results.put([score.tolist() for score in meter.compute()])
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path) -> None:
    torch.manual_seed(0)
    labels, prediction = torch.randint(0, 3, (2, 4, 5, 7))
    expected = [score.tolist() for score in counted((prediction, labels)).compute()]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    workers = [context.Process(target=_count_shard, args=(rank, address, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [expected, expected]
    for worker in workers:
        worker.join(timeout=30)
