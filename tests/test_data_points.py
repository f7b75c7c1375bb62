"""Points: the file formats, the generator, points under augmentation, PASCAL-Context and the scenes with points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader

from gingham.data import CueScenes, LabelSpace, SegmentationDataset, SegmentationItem
from gingham.data.pascal_context import PASCAL_CONTEXT_ALPHABETICAL_LABELS, PASCAL_CONTEXT_LABELS, PascalContext
from gingham.data.point_formats import (
    read_ade20k_points,
    read_bearman_points,
    read_pascal_context_points,
    read_voc_instance_points,
)
from gingham.data.points import (
    PointGenerator,
    PointSet,
    WithPoints,
    collate_points,
    draw_points,
    point_agreement,
    read_points,
    write_points,
)
from gingham.data.transforms import EvaluationTransform, Normalize, RandomScale, RandomScaleCropFlip
from gingham.data.wardrobe import write_pascal_context
from gingham.data.wardrobe.point_scenes import POINT_SCENE_LABELS, PointScenes
from gingham.errors import DataError

RAW = Normalize((0.0, 0.0, 0.0))
HEADER = "# points v1 order=c,y,x base=0 classes=4\n"


def item(label: torch.Tensor, points: list[list[float]] | None = None, name: str = "picture") -> Any:
    made: dict[str, Any] = {
        "image": torch.zeros(3, *label.shape, dtype=torch.uint8),
        "label": label.long(),
        "name": name,
    }
    return made if points is None else made | {"points": torch.tensor(points, dtype=torch.float32).reshape(-1, 3)}


class Masks(SegmentationDataset):
    """Given masks, of classes 0 to 3."""

    def __init__(self, *masks: torch.Tensor) -> None:
        palette = tuple((index, 0, 0) for index in range(4))
        super().__init__("train", LabelSpace(("a", "b", "c", "d"), palette))
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def read(self, index: int) -> SegmentationItem:
        return item(self.masks[index], name=f"mask{index}")


def blocks() -> torch.Tensor:
    """[20, 30]: class 0 around, class 1 in two blocks (120 and 16 pixels), class 2 in one, a stripe ignored."""
    mask = torch.zeros(20, 30)
    mask[2:14, 2:12] = 1
    mask[15:19, 2:6] = 1
    mask[3:15, 15:27] = 2
    mask[:, 29] = 255
    return mask


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    points = PointSet(4, {"b": np.array([[3, 0, 7], [0, 12, 5]]), "a": np.zeros((0, 3), np.int64)})
    write_points(tmp_path / "points.txt", points)
    assert (tmp_path / "points.txt").read_bytes() == HEADER.encode() + b"b 3,0,7 0,12,5\na\n"
    with pytest.warns(UserWarning, match=r"points\.txt: no points in line 3"):
        read = read_points(tmp_path / "points.txt")
    assert read.num_classes == 4 and list(read.points) == ["b", "a"]
    for name, rows in points.points.items():
        np.testing.assert_array_equal(read.points[name], rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat 1,2,3\n", "points.txt, line 1: expected '# points v1 order=c,y,x base=0 classes=K'"),
        ("# points v1 order=c,x,y base=0 classes=4\n", "points.txt, line 1: expected"),
        ("", "points.txt, line 1: expected"),
        (HEADER + "cat 1,2,3\ndog 4,0,0\n", "points.txt, line 3: class 4 of dog is none of 0 to 3"),
        (HEADER + "cat -1,2,3\n", "points.txt, line 2: class -1 of cat is none of 0 to 3"),
        (HEADER + "cat 1,-2,3\n", "points.txt, line 2: point y=-2, x=3 of cat lies below 0"),
        (HEADER + "cat 1,2\n", "points.txt, line 2: point '1,2', expected c,y,x in whole numbers"),
        (HEADER + "cat 1,2.5,3\n", "points.txt, line 2: point '1,2.5,3', expected c,y,x in whole numbers"),
        (HEADER + f"cat 1,2,{10**20}\n", f"points.txt, line 2: point '1,2,{10**20}', expected c,y,x in whole numbers"),
        (HEADER + "cat 1,2,3\n\ncat 1,2,3\n", "points.txt, line 4: image cat stands in line 2 already"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_lines_are_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "points.txt"
    path.write_text(text)
    assert expected in error_of(lambda: read_points(path))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    assert "nowhere.txt: cannot be read" in error_of(lambda: read_points(tmp_path / "nowhere.txt"))
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00")
    assert "picture.txt: not a text file in UTF-8" in error_of(lambda: read_points(tmp_path / "picture.txt"))


def test_empty_lines_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(HEADER + "\ncat 1,2,3\n\n")
    with pytest.warns(UserWarning, match="no points in line 2 and 1 more lines"):
        assert list(read_points(tmp_path / "points.txt").points) == ["cat"]


def test_names_with_blanks_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contain no blanks, got 'my cat'"):
        write_points(tmp_path / "points.txt", PointSet(1, {"my cat": np.zeros((0, 3), np.int64)}))
    with pytest.raises(ValueError, match=r"points must be \[N, 3\] for each image, got \[2\] for cat"):
        PointSet(1, {"cat": np.zeros(2, np.int64)})


def test_coordinates_in_the_wrong_order_leave_the_image(tmp_path: Path) -> None:
    """Points c,x,y read as c,y,x: on images of 375 x 500 one in five has its x beyond the rows."""
    rng = np.random.default_rng(0)
    rows = {f"i{k}": [[1, int(rng.integers(375)), int(rng.integers(500))] for _ in range(5)] for k in range(200)}
    sizes = dict.fromkeys(rows, (375, 500))
    path = tmp_path / "points.txt"
    path.write_text(
        HEADER + "".join(f"{n} " + " ".join(f"{c},{y},{x}" for c, y, x in p) + "\n" for n, p in rows.items())
    )
    read_points(path).check_bounds(sizes)
    path.write_text(
        HEADER + "".join(f"{n} " + " ".join(f"{c},{x},{y}" for c, y, x in p) + "\n" for n, p in rows.items())
    )
    swapped = read_points(path)
    text = error_of(lambda: swapped.check_bounds(sizes))
    assert "points.txt, line 2: point y=" in text and "375 rows and 500 columns; the order is class,y,x" in text


def test_public_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("2008_000912 13,297,166 1,419,205\n2010_004301 59,10,20\n")
    context = read_pascal_context_points(path)
    assert context.num_classes == 59
    assert context.points["2008_000912"].tolist() == [[12, 297, 166], [0, 419, 205]]
    assert context.points["2010_004301"].tolist() == [[58, 10, 20]]
    path.write_text("2008_000912 0,297,166\n")
    assert "line 1: class -1 of 2008_000912" in error_of(lambda: read_pascal_context_points(path))

    path.write_text("ADE_train_00000001 0,5,6 149,7,8\n")
    ade = read_ade20k_points(path)
    assert ade.num_classes == 150 and ade.points["ADE_train_00000001"].tolist() == [[0, 5, 6], [149, 7, 8]]

    path.write_text("2011_003057 0,0,427,79 14,1,419,308\n")
    instances = read_voc_instance_points(path)
    assert instances.num_classes == 21 and instances.points["2011_003057"].tolist() == [[0, 427, 79], [14, 419, 308]]
    path.write_text("2011_003057 0,427,79\n")
    assert "expected c,instance,y,x in whole numbers" in error_of(lambda: read_voc_instance_points(path))

    clicks = [{"x": 258.6, "y": 314.2, "cls": 7, "rank": 1}, {"x": 3, "y": 4, "cls": 20, "rank": 2}]
    path.write_text(json.dumps({"2008_007573": clicks}))
    assert read_bearman_points(path).points["2008_007573"].tolist() == [[7, 314, 258], [20, 4, 3]]
    assert read_bearman_points(path, ranks=[1]).points["2008_007573"].tolist() == [[7, 314, 258]]
    for text in ("[1, 2]", '{"a": [{"x": 1}]}', '{"a": 3}'):
        path.write_text(text)
        assert f"{path}: expected {{name: " in error_of(lambda: read_bearman_points(path))
    path.write_text("{")
    assert "line 1: not JSON" in error_of(lambda: read_bearman_points(path))


def test_public_formats_pass_through_ours(tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("one 13,297,166 1,419,205\ntwo 59,10,20\n")
    converted = read_pascal_context_points(tmp_path / "public.txt")
    write_points(tmp_path / "ours.txt", converted)
    again = read_points(tmp_path / "ours.txt")
    assert again.num_classes == 59
    assert {n: p.tolist() for n, p in again.points.items()} == {n: p.tolist() for n, p in converted.points.items()}


# The generator


@pytest.mark.parametrize("rule", ["per_class", "per_region"])
@pytest.mark.parametrize("margin", [0, 2])
def test_every_point_lies_on_its_class_and_the_file_repeats(tmp_path: Path, rule: Any, margin: int) -> None:
    dataset = CueScenes("train", 5)
    files = []
    for seed in (3, 3, 4):
        points = draw_points(dataset, PointGenerator(rule, count=3, margin=margin, least_pixels=20, seed=seed))
        assert point_agreement(WithPoints(dataset, points)) == (count := sum(map(len, points.points.values())), count)
        write_points(tmp_path / "points.txt", points)
        files.append((tmp_path / "points.txt").read_bytes())
    assert files[0] == files[1] != files[2]
    # An item's points do not depend on what was drawn before.
    last = dataset.read(4)
    generator = PointGenerator(rule, count=3, margin=margin, least_pixels=20, seed=3)
    assert torch.equal(generator(last), generator(last))
    assert f"{last['name']} " + " ".join(",".join(str(int(v)) for v in p) for p in generator(last)) in files[0].decode()


def test_points_per_class_and_per_region() -> None:
    (mask,) = Masks(blocks())
    assert PointGenerator("per_class")(mask)[:, 0].tolist() == [0, 1, 2]
    assert PointGenerator("per_region")(mask)[:, 0].tolist() == [0, 1, 2]  # the small block of class 1 has none
    assert PointGenerator("per_region", least_pixels=16)(mask)[:, 0].tolist() == [0, 1, 1, 2]
    assert PointGenerator("per_region", least_pixels=1000)(mask).shape == (0, 3)
    twice = PointGenerator("per_class", count=2)(mask)
    assert twice[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and len(twice.unique(dim=0)) == 6
    all_pixels = PointGenerator("per_class", count=10_000)(mask)
    assert len(all_pixels) == len(all_pixels.unique(dim=0)) == 19 * 30 + 1 - 1 + 10  # all but the stripe of 20


def test_points_stay_away_from_borders_of_classes_but_not_of_the_picture() -> None:
    (mask,) = Masks(blocks())
    drawn = [PointGenerator("per_class", margin=3, seed=seed)(mask) for seed in range(200)]
    ones = torch.stack([points[1] for points in drawn])
    assert ones[:, 1].min() == 5 and ones[:, 1].max() == 10 and ones[:, 2].min() == 5 and ones[:, 2].max() == 8
    edge = Masks(torch.zeros(4, 4))[0]
    assert {tuple(PointGenerator(margin=3, seed=seed)(edge)[0].tolist()) for seed in range(200)} >= {
        (0, 0, 0),
        (0, 3, 3),
    }
    thin = torch.zeros(9, 9)
    thin[4] = 1
    assert PointGenerator(margin=3)(Masks(thin)[0])[1, :2].tolist() == [1, 4]  # rather than no point


def test_pixels_are_drawn_evenly() -> None:
    (mask,) = Masks(blocks())
    drawn = torch.cat([PointGenerator(seed=seed)(mask)[1:2] for seed in range(600)])
    share_in_small_block = (drawn[:, 1] >= 15).float().mean()
    assert abs(share_in_small_block - 16 / 136) < 4 * (16 / 136 * 120 / 136 / 600) ** 0.5


@pytest.mark.parametrize(
    "options", [{"rule": "per_pixel"}, {"count": 0}, {"margin": -1}, {"least_pixels": 0}, {"seed": -1}], ids=str
)
def test_generators_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be "):
        PointGenerator(**options)


# Data sets with points


def test_items_get_their_points_by_name() -> None:
    dataset = Masks(blocks(), blocks().T)
    points = PointSet(4, {"mask1": np.array([[1, 2, 3]]), "mask0": np.array([[0, 19, 28], [2, 3, 15]])})
    with_points = WithPoints(dataset, points)
    assert len(with_points) == 2 and with_points.class_names == dataset.class_names
    assert with_points[0]["points"].tolist() == [[0, 19, 28], [2, 3, 15]]  # type: ignore[typeddict-item]
    assert with_points[1]["points"].dtype == torch.float32  # type: ignore[typeddict-item]
    assert torch.equal(with_points[0]["label"], dataset[0]["label"])


def test_points_that_do_not_fit_the_data_set_are_refused() -> None:
    dataset = Masks(blocks())
    assert "points of 3 classes, the data set has 4" in error_of(lambda: WithPoints(dataset, PointSet(3, {})))
    missing = WithPoints(dataset, PointSet(4, {}, source="points.txt"))
    assert "points.txt: no points for image mask0" in error_of(lambda: missing[0])
    outside = WithPoints(dataset, PointSet(4, {"mask0": np.array([[0, 20, 3]])}, "points.txt", {"mask0": 7}))
    assert "points.txt, line 7: point y=20, x=3 lies outside image mask0" in error_of(lambda: outside[0])


def test_agreement_tells_another_order_of_classes() -> None:
    dataset = CueScenes("val", 6)
    drawn = draw_points(dataset, PointGenerator())
    shifted = PointSet(
        7, {n: np.array([1, 0, 0]) * ((p + 1) % 7) + np.array([0, 1, 1]) * p for n, p in drawn.points.items()}
    )
    found = point_agreement(WithPoints(dataset, shifted))
    assert found.labelled == sum(len(p) for p in drawn.points.values()) and found.agreeing == 0
    ignored = Masks(torch.full((5, 5), 255))
    assert point_agreement(WithPoints(ignored, PointSet(4, {"mask0": np.array([[0, 1, 1]])}))) == (0, 0)


def test_batches_are_filled_up() -> None:
    dataset = WithPoints(
        Masks(blocks(), blocks()),
        PointSet(4, {"mask0": np.array([[1, 2, 3], [2, 4, 16]]), "mask1": np.zeros((0, 3), int)}),
    )
    (batch,) = DataLoader(dataset, 2, collate_fn=collate_points)
    assert batch["points"].tolist() == [[[1, 2, 3], [2, 4, 16]], [[255, 0, 0], [255, 0, 0]]]
    assert batch["image"].shape == (2, 3, 20, 30) and batch["name"] == ["mask0", "mask1"]
    (alone,) = DataLoader([dataset[1]], 1, collate_fn=collate_points)  # type: ignore[arg-type]
    assert alone["points"].shape == (1, 0, 3)


# Augmentation


def test_mirror_and_scale_follow_their_formulas() -> None:
    picture = item(torch.zeros(10, 20), [[1, 3, 4], [2, 0, 19]])
    mirrored = RandomScaleCropFlip((10, 20), rescale=None, flip_probability=1.0)(picture)
    assert mirrored["points"].tolist() == [[1, 3, 15], [2, 0, 0]]
    twice = RandomScaleCropFlip((10, 20), rescale=None, flip_probability=1.0)(mirrored | {"image": picture["image"]})
    assert torch.equal(twice["points"], picture["points"])
    scaled = RandomScaleCropFlip((15, 30), rescale=RandomScale(1.5, 1.5), flip_probability=0)(picture)
    assert scaled["points"].tolist() == [[1, 4.5, 6], [2, 0, 28.5]]
    both = RandomScaleCropFlip((15, 30), rescale=RandomScale(1.5, 1.5), flip_probability=1.0)(picture)
    assert both["points"].tolist() == [[1, 4.5, 23], [2, 0, 0.5]]
    kept = RandomScaleCropFlip((10, 20), rescale=RandomScale(1, 1), flip_probability=0)(picture)
    assert torch.equal(kept["points"], picture["points"]) and type(kept["points"]) is torch.Tensor


def test_points_outside_a_crop_are_dropped_and_padding_keeps_the_rest() -> None:
    picture = item(torch.arange(200).reshape(10, 20), [[c, y, x] for c, (y, x) in enumerate([(0, 0), (4, 9), (9, 19)])])
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        cropped = RandomScaleCropFlip((8, 16), rescale=None, flip_probability=0, normalize=RAW)(picture)
        for c, y, x in cropped["points"].int().tolist():
            assert cropped["label"][y, x] == picture["label"][tuple(picture["points"][c, 1:].int())]
            seen.add(c)
        inside = [int(v) in cropped["label"] for v in (0, 4 * 20 + 9, 199)]
        assert len(cropped["points"]) == sum(inside)
    assert seen == {0, 1, 2}
    padded = RandomScaleCropFlip((30, 30), rescale=None, flip_probability=0)(picture)
    assert torch.equal(padded["points"], picture["points"])
    small = RandomScaleCropFlip((30, 30), rescale=RandomScale(0.5, 0.5), flip_probability=0)(picture)
    assert small["points"].tolist() == [[0, 0, 0], [1, 2, 4.5], [2, 4, 9]]  # the last row stays in the picture


def test_the_label_under_a_point_is_its_class() -> None:
    """Wherever the mask is of one class for a pixel around, after any augmentation."""
    scenes = PointScenes("train", 20)
    dataset = WithPoints(scenes, PointGenerator("per_class", count=20))
    dataset.transform = RandomScaleCropFlip((56, 72), rescale=RandomScale(0.5, 2.0))
    torch.manual_seed(0)
    right = judged = 0
    for index in list(range(20)) * 5:
        made: Any = dataset[index]
        classes, y, x = made["points"].round().long().unbind(1)
        label = made["label"].numpy()
        flat = (ndimage.minimum_filter(label, 3) == ndimage.maximum_filter(label, 3))[y, x]
        judged += int(flat.sum())
        right += int((made["label"][y, x] == classes)[torch.from_numpy(flat)].sum())
    assert judged > 2000 and right / judged > 0.99


def test_classes_with_a_left_and_a_right_change_places_in_points_too() -> None:
    picture = item(torch.tensor([[1, 1, 2, 2]]), [[1, 0, 0], [2, 0, 3]])
    mirror = RandomScaleCropFlip((1, 4), rescale=None, flip_probability=1.0, mirror_pairs=((1, 2),))
    made: Any = mirror(picture)
    assert made["points"].tolist() == [[2, 0, 3], [1, 0, 0]]
    assert made["label"].tolist() == [[1, 1, 2, 2]]
    plain: Any = RandomScaleCropFlip((1, 4), rescale=None, flip_probability=0, mirror_pairs=((1, 2),))(picture)
    assert plain["points"].tolist() == [[1, 0, 0], [2, 0, 3]]


def test_point_crops_hold_a_point_and_reach_every_such_window() -> None:
    picture = item(torch.zeros(40, 60), [[1, 35, 2]])
    transform = RandomScaleCropFlip((8, 10), rescale=None, flip_probability=0, point_crop=True)
    places = set()
    for seed in range(400):
        torch.manual_seed(seed)
        ((_, y, x),) = transform(picture)["points"].tolist()  # type: ignore[typeddict-item]
        places.add((y, x))
    # tops 28 to 32, lefts 0 to 2
    assert places == {(y, x) for y in (3, 4, 5, 6, 7) for x in (0, 1, 2)}
    without = item(torch.zeros(40, 60), [])
    assert transform(without)["image"].shape == (3, 8, 10)
    assert RandomScaleCropFlip((8, 10), rescale=None, point_crop=True)(item(torch.zeros(40, 60)))["label"].shape == (
        8,
        10,
    )


def test_a_point_between_two_pixels_is_not_lost_to_its_own_crop() -> None:
    picture = item(torch.zeros(4, 4), [[1, 3, 1]])  # scaled, at row 4.5 and column 1.5
    transform = RandomScaleCropFlip((2, 2), rescale=RandomScale(1.5, 1.5), flip_probability=0, point_crop=True)
    for seed in range(20):
        torch.manual_seed(seed)
        cropped: Any = transform(picture)
        (pixel,) = collate_points([cropped])["points"][0, :, 1:].tolist()
        assert set(pixel) <= {0, 1}


def test_evaluation_keeps_points() -> None:
    picture = item(torch.zeros(10, 20), [[1, 3, 4]])
    assert EvaluationTransform()(picture)["points"].tolist() == [[1, 3, 4]]  # type: ignore[typeddict-item]


# PASCAL-Context


def test_context_has_its_59_classes_in_the_official_order() -> None:
    for space in (PASCAL_CONTEXT_LABELS, PASCAL_CONTEXT_ALPHABETICAL_LABELS):
        assert space.num_classes == len(set(space.names)) == len(set(space.palette)) == 59
        named = {1: "aeroplane", 15: "person", 25: "building", 36: "grass", 37: "ground", 50: "sky", 54: "tree"}
        assert {number: space.names[number - 1] for number in named} == named
        assert (space.names[55], space.names[58]) == ("wall", "wood")
        decoded = space.decode(np.arange(60, dtype=np.uint8)[None], "values")[0]
        assert decoded[0] == 255 and sorted(decoded[1:].tolist()) == list(range(59))
    assert PASCAL_CONTEXT_LABELS.values == tuple(range(1, 60))
    by_alphabet = {
        "aeroplane": 1,
        "bag": 2,
        "bed": 3,
        "bedclothes": 4,
        "bench": 5,
        "bicycle": 6,
        "person": 37,
        "wood": 59,
    }
    alphabetical = PASCAL_CONTEXT_ALPHABETICAL_LABELS
    values = dict(zip(alphabetical.names, alphabetical.values, strict=True))
    assert {name: values[name] for name in by_alphabet} == by_alphabet


def make_context(root: Path) -> list[str]:
    names = ["2008_000002", "2008_000008"]
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, value in zip(names, (37, 0), strict=True):
        Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        values = np.full((6, 10), value, np.uint8)
        values[0, -1] = 2
        Image.fromarray(values).save(root / "SegmentationClassContext" / f"{name}.png")
    (root / "ImageSets/SegmentationContext/train.txt").write_text("".join(f"{name}\n" for name in names))
    return names


def test_context_is_read_in_either_numbering(tmp_path: Path) -> None:
    names = make_context(tmp_path)
    dataset = PascalContext(tmp_path, "train")
    assert [item["name"] for item in dataset] == names
    expected = torch.full((6, 10), dataset.class_names.index("ground"))
    expected[0, -1] = dataset.class_names.index("bicycle")
    assert torch.equal(dataset[0]["label"], expected) and dataset[0]["image"].shape == (3, 6, 10)
    assert (dataset[1]["label"] == 255).sum() == 59
    converted = PascalContext(tmp_path, "train", labels=PASCAL_CONTEXT_ALPHABETICAL_LABELS)
    assert converted.class_names[int(converted[0]["label"][0, 0])] == "person"
    assert converted.class_names[int(converted[0]["label"][0, -1])] == "bag"


def test_missing_context_files_are_named(tmp_path: Path) -> None:
    assert "nowhere" in error_of(lambda: PascalContext(tmp_path / "nowhere", "train"))
    names = make_context(tmp_path)
    assert "val.txt: no such file" in error_of(lambda: PascalContext(tmp_path, "val"))
    label = tmp_path / "SegmentationClassContext" / f"{names[1]}.png"
    label.unlink()
    assert f"{names[1]}.jpg: no label file, expected {label}" in error_of(lambda: PascalContext(tmp_path, "train"))
    assert (PascalContext(tmp_path, "train", require_labels=False)[1]["label"] == 255).all()
    (tmp_path / "JPEGImages" / f"{names[0]}.jpg").unlink()
    assert f"{names[0]}.jpg: no such file" in error_of(lambda: PascalContext(tmp_path, "train"))


# The world


def test_scenes_have_one_point_on_each_garment_and_one_on_the_background() -> None:
    scenes = PointScenes("train", 30)
    cues = CueScenes("train", 30)
    dataset = WithPoints(scenes, scenes.points)
    assert point_agreement(dataset) == (30 * 9, 30 * 9)
    for index in range(30):
        points: Any = dataset[index]["points"]  # type: ignore[typeddict-item]
        label = dataset[index]["label"]
        assert torch.equal(dataset[index]["image"], cues[index]["image"])
        assert torch.equal(label == 0, cues[index]["label"] == 0)
        assert (points[:, 0] == 0).sum() == 1
        parts, count = ndimage.label(label.numpy() > 0, np.ones((3, 3)))
        on = parts[points[1:, 1].int(), points[1:, 2].int()]
        assert len(np.unique(on)) == count <= 8  # garments may touch
    present = {int(value) for index in range(30) for value in dataset[index]["label"].unique()}
    assert present == set(range(scenes.num_classes)) and scenes.class_names[3] == "trousers"


def test_a_scene_and_its_points_depend_on_split_and_index_alone() -> None:
    long, short = PointScenes("val", 12), PointScenes("val", 3)
    for index in (2, 0):
        assert torch.equal(long[index]["image"], short[index]["image"])
        assert long.points(long[index]).tolist() == short.points(short[index]).tolist()
    train = PointScenes("train", 1)
    assert not torch.equal(train[0]["image"], short[0]["image"])
    short[1]["image"].zero_()
    assert torch.equal(long[1]["image"], short[1]["image"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"length": -1}, "length must be 0 or above, got -1"),
        ({"length": 1, "size": 16}, "size must be 32 or above, got 16"),
        ({"length": 1, "garments": 3}, "garments must be 4 to 10, got 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        PointScenes("train", **arguments)


def test_scenes_written_as_pascal_context_come_back(tmp_path: Path) -> None:
    scenes = PointScenes("val", 4)
    write_pascal_context(tmp_path, scenes)
    write_pascal_context(tmp_path, PointScenes("train", 2))
    write_points(tmp_path / "points.txt", scenes.points)
    read = WithPoints(PascalContext(tmp_path, "val", labels=POINT_SCENE_LABELS), read_points(tmp_path / "points.txt"))
    assert [made["name"] for made in read] == [made["name"] for made in scenes]
    made: Any
    for index, made in enumerate(read):
        assert torch.equal(made["image"], scenes[index]["image"]) and torch.equal(made["label"], scenes[index]["label"])
        assert torch.equal(made["points"], scenes.points(scenes[index]))
    write_pascal_context(tmp_path, scenes)  # again: the same files
    text = error_of(lambda: write_pascal_context(tmp_path, PointScenes("val", 2)))
    assert "val.txt: names 2 other images, such as wardrobe_val_000002" in text
