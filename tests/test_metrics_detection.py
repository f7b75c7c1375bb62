"""Average precision of COCO and VOC, and false positives at a recall."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gingham.data.coco_detection import write_coco_results
from gingham.errors import DataError
from gingham.metrics import DetectionMeter, voc_average_precision


def truth(*rows: tuple[float, ...]) -> Tensor:
    """(label, x, y, width, height) and perhaps whether it is ignored, of each object."""
    full = [(*row[:5], row[3] * row[4], row[5] if len(row) > 5 else 0.0) for row in rows]
    return torch.tensor(full, dtype=torch.float64).reshape(-1, 7)


def scene(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Truth, and boxes, labels and scores of which about half are right."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 150, (6, 2), generator=generator).double()
    size = torch.randint(8, 120, (6, 2), generator=generator).double()
    label = torch.randint(1, 4, (6,), generator=generator)
    ignored = (torch.rand(6, generator=generator) < 0.2).double()
    true = torch.cat([label.double()[:, None], corner, size, size.prod(1, keepdim=True), ignored[:, None]], dim=1)
    shift = 0.15 * size.repeat(2, 1) * torch.randn(12, 2, generator=generator).double()
    boxes = torch.cat([corner.repeat(2, 1) + shift, corner.repeat(2, 1) + shift + size.repeat(2, 1)], dim=1).float()
    labels = torch.where(torch.rand(12, generator=generator) < 0.7, label.repeat(2), 1)
    return true, boxes, labels, torch.rand(12, generator=generator)


def filled(meter: DetectionMeter, order: list[int], at_once: int) -> DetectionMeter:
    for first in range(0, len(order), at_once):
        images = order[first : first + at_once]
        meter.update(images, *(list(x) for x in zip(*(scene(i) for i in images), strict=True)))
    return meter


def test_scores_are_those_of_pycocotools_on_the_files(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [3, 8, 21, 40, 41]
    scores = filled(DetectionMeter(3), images, 2).compute()
    write_coco_results(tmp_path / "results.json", scores.detections, (2, 5, 9))
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    notes = [
        dict(
            zip(
                names,
                (len(images) * i + k, image, (2, 5, 9)[int(row[0]) - 1], row[1:5], row[5], int(row[6])),
                strict=True,
            )
        )
        for i, image in enumerate(images)
        for k, row in enumerate(scene(image)[0].tolist(), 100 * i + 1)
    ]
    content = {
        "images": [{"id": i} for i in images],
        "annotations": notes,
        "categories": [{"id": i} for i in (2, 5, 9)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = [scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_medium, scores.ap_large]
    assert 0.1 < scores.ap < 0.9
    assert [x.item() for x in ours] == pytest.approx(evaluation.stats[:6].tolist(), rel=1e-6)


def test_scores_do_not_depend_on_batches_or_the_order_of_images() -> None:
    once = filled(DetectionMeter(3), [3, 8, 21, 40], 4).compute()
    again = filled(DetectionMeter(3), [40, 21, 3, 8], 1).compute()
    for name in ("ap", "ap50", "ap75", "class_ap", "class_ap50", "false_positives"):
        torch.testing.assert_close(getattr(once, name), getattr(again, name), rtol=0, atol=0, equal_nan=True)


def test_false_positives_are_counted_where_the_recall_is_reached() -> None:
    objects = truth(
        (1, 0, 0, 10, 10), (1, 30, 0, 10, 10), (2, 60, 0, 10, 10), (2, 90, 0, 10, 10), (1, 0, 50, 10, 10, 1)
    )
    found = [  # x of a box of 10x10, label, score
        (0, 1, 0.9),
        (200, 1, 0.85),
        (0, 1, 0.8),  # a second time
        (60, 1, 0.75),  # of another class
        (30, 1, 0.7),
        (220, 2, 0.65),
        (62, 2, 0.6),
        (240, 2, 0.6),  # ties with the last one that is needed
        (250, 2, 0.5),
    ]
    boxes = torch.tensor([[x, 0.0, x + 10, 10] for x, _, _ in found] + [[0.0, 50, 10, 60]])  # the last is a crowd
    labels = torch.tensor([label for _, label, _ in found] + [1])
    values = torch.tensor([score for _, _, score in found] + [0.95])
    expected = {0.25: 0, 0.5: 3, 0.75: 5, 0.7: 5, 1.0: math.inf}
    for recall, wrong in expected.items():
        meter = DetectionMeter(2, recall=recall)
        meter.update([0, 1], [objects, truth()], [boxes, torch.zeros(0, 4)], [labels, labels[:0]], [values, values[:0]])
        assert meter.compute().false_positives == wrong / 2  # two images


def test_nothing_found_and_nothing_to_find() -> None:
    meter = DetectionMeter(2)
    none = torch.zeros(0)
    meter.update([0], [truth((1, 0, 0, 5, 5))], [torch.zeros(0, 4)], [none.long()], [none])
    scores = meter.compute()
    assert (scores.ap, scores.false_positives, scores.objects) == (0, math.inf, 1)
    assert torch.isnan(scores.class_ap[1])
    empty = DetectionMeter(2).compute()
    assert empty.objects == 0
    assert torch.isnan(empty.ap)


def test_labels_that_are_none_are_named() -> None:
    meter = DetectionMeter(2)
    meter.update([0], [truth((3, 0, 0, 5, 5))], [torch.zeros(0, 4)], [torch.zeros(0).long()], [torch.zeros(0)])
    with pytest.raises(DataError, match="truth have the label 3, expected 1 to 2"):
        meter.compute()


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"recall": 0.0}, {"recall": 1.1}], ids=str)
def test_options_outside_their_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        DetectionMeter(**{"num_classes": 2} | options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ VOC


def voc(objects: Tensor, found: list[tuple[float, ...]], **options: bool) -> float:
    """AP of class 1; `found` are (image, x, y, width, height, score), objects all of image 0."""
    rows = torch.tensor([(*row, 1.0) for row in found], dtype=torch.float64).reshape(-1, 7)
    with_image = torch.cat([torch.zeros(len(objects), 1, dtype=torch.float64), objects], dim=1)
    return float(voc_average_precision(with_image, rows, 1, **options)[0])


def test_an_overlap_of_exactly_a_half_is_not_enough() -> None:
    objects = truth((1, 0, 0, 10, 10))
    assert voc(objects, [(0, 0, 0, 10, 5, 0.9)]) == 0
    assert voc(objects, [(0, 0, 0, 10, 5.01, 0.9)]) == 1


def test_the_second_detection_of_an_object_is_wrong_and_that_of_a_difficult_one_does_not_count() -> None:
    objects = truth((1, 0, 0, 10, 10), (1, 20, 0, 10, 10), (1, 40, 0, 10, 10, 1))
    found = [(0, 0, 0, 10, 10, 0.9), (0, 0, 0, 10, 9, 0.8), (0, 40, 0, 10, 10, 0.7), (0, 20, 0, 10, 10, 0.6)]
    # recall 1/2 at precision 1, recall 1 at precision 2/3
    assert voc(objects, found) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert voc(objects, found, eleven_points=True) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert voc(objects, [(1, 0, 0, 10, 10, 0.9)]) == 0  # another image


def test_equal_scores_count_alike_whichever_process_found_them() -> None:
    objects = truth((1, 0, 0, 10, 10))
    right, wrong, second = (0, 0, 0, 10, 10, 0.9), (1, 0, 0, 10, 10, 0.9), (0, 0, 0, 10, 9, 0.9)
    alone = voc(objects, [right, second, wrong])
    assert alone == voc(objects, [wrong, right, second]) == 1
    assert voc(objects, [wrong, second, right]) == voc(objects, [second, right, wrong])  # of one image, in their order


def test_classes_without_objects_have_no_precision() -> None:
    result = voc_average_precision(torch.zeros(0, 8), torch.zeros(0, 7), 3)
    assert torch.isnan(result).all()
    assert result.shape == (3,)
