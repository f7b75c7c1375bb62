"""Detection data: scenes of look-alikes, the COCO and VOC readers, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from gingham.data import CocoDetection, DetectionDataset, LookAlikeScenes, VOCDetection, check_dataset
from gingham.data.coco_detection import COCO_OBJECTS, write_coco_results
from gingham.data.detection import DetectionTransform, JoinedDetection
from gingham.data.voc_detection import VOC_OBJECTS
from gingham.data.wardrobe import make_lookalike_scene, write_coco, write_voc_detection
from gingham.data.wardrobe.assets import load_wardrobe
from gingham.data.wardrobe.garments import Category, cut_garment
from gingham.data.wardrobe.lookalike_scenes import LOOK_ALIKES, SOUGHT
from gingham.errors import DataError

# ------------------------------------------------------------------------------------------------ the world


def test_what_is_sought_has_boxes_and_what_looks_like_it_has_none() -> None:
    for index in range(20):
        scene = make_lookalike_scene("train", index)
        sought = [instance for instance in scene.instances if instance.label]
        others = [instance for instance in scene.instances if not instance.label]
        assert 3 <= len(sought) <= 5
        assert 3 <= len(others) <= 5
        assert {instance.category for instance in sought} <= set(SOUGHT)
        assert {instance.category for instance in others} <= {*SOUGHT, *LOOK_ALIKES}
        item = LookAlikeScenes("train", index + 1).read(index)
        assert len(item["boxes"]) == len(sought)
        for (x1, y1, x2, y2), label, instance in zip(
            item["boxes"].int().tolist(), item["labels"].tolist(), sought, strict=True
        ):
            assert instance.category == SOUGHT[label - 1]
            rows, columns = np.nonzero(instance.mask)
            assert (x1, y1) <= (columns.min(), rows.min())
            assert (x2, y2) > (columns.max(), rows.max())
            assert max(x2 - x1, y2 - y1) <= 26


def test_a_scene_depends_on_its_split_and_index_alone() -> None:
    first, other = LookAlikeScenes("val", 3).read(2), LookAlikeScenes("val", 9, cache=True).read(2)
    assert all(torch.equal(first[name], other[name]) for name in ("image", "boxes", "labels", "truth"))  # type: ignore[literal-required]
    assert not torch.equal(first["image"], LookAlikeScenes("test", 3).read(2)["image"])
    assert first["image_id"] == 2


def test_what_is_kept_cannot_be_changed_by_who_reads_it() -> None:
    scenes = LookAlikeScenes("train", 1, cache=True)
    before = scenes.read(0)["image"].clone()
    scenes.read(0)["image"].zero_()
    assert torch.equal(scenes.read(0)["image"], before)


def test_a_piece_of_a_garment_is_what_the_whole_has_there() -> None:
    wardrobe = load_wardrobe("train")
    whole = cut_garment(wardrobe, Category.DRESS, 3, 20)
    lower = cut_garment(wardrobe, Category.DRESS, 3, 20, (0.5, 0.0, 1.0, 1.0))
    assert lower.alpha.shape == (10, whole.alpha.shape[1])
    assert np.array_equal(lower.grey, whole.grey[10:])
    assert cut_garment(wardrobe, Category.DRESS, 3, 4, (0.99, 0.99, 1.0, 1.0)).alpha.shape == (1, 1)


@pytest.mark.parametrize("options", [{"length": -1}, {"size": 32}, {"split": "moon"}], ids=str)
def test_scenes_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LookAlikeScenes(**{"split": "val", "length": 1} | options)


# ------------------------------------------------------------------------------------------------ transforms


def test_mirroring_moves_image_and_boxes_together() -> None:
    item = LookAlikeScenes("train", 1).read(0)
    item["image"] = item["image"][:, :, :80]  # H and W differ
    mirrored = DetectionTransform(1.0)(item)
    torch.testing.assert_close(mirrored["image"], item["image"].flip(-1) / 255)
    x1, y1, x2, y2 = item["boxes"].unbind(1)
    assert torch.equal(mirrored["boxes"], torch.stack([80 - x2, y1, 80 - x1, y2], dim=1))
    assert torch.equal(mirrored["truth"], item["truth"])
    plain = DetectionTransform()(item)
    assert torch.equal(plain["boxes"], item["boxes"])
    assert plain["image"].max() <= 1


def test_evaluation_takes_no_random_numbers() -> None:
    """They would be missing from the training that goes on after an evaluation, or that is resumed without it."""
    item = LookAlikeScenes("val", 1).read(0)
    before = torch.get_rng_state()
    DetectionTransform()(item)
    assert torch.equal(torch.get_rng_state(), before)
    DetectionTransform(0.5)(item)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_probability_is_checked() -> None:
    with pytest.raises(ValueError, match=r"flip_probability must be 0 to 1, got 1\.5"):
        DetectionTransform(1.5)


# ------------------------------------------------------------------------------------------------ the readers


def read(dataset: DetectionDataset) -> list[Any]:
    return [dataset.read(index) for index in range(len(dataset))]


def test_files_yield_what_the_scenes_are(tmp_path: Path) -> None:
    scenes = LookAlikeScenes("val", 3)
    write_coco(tmp_path / "coco", scenes)
    write_voc_detection(tmp_path / "voc", scenes)
    coco, voc = (
        CocoDetection(tmp_path / "coco", "val"),
        VOCDetection(tmp_path / "voc", "val", class_names=scenes.class_names),
    )
    assert coco.class_names == scenes.class_names
    for original, *others in zip(read(scenes), read(coco), read(voc), strict=True):
        for other in others:
            assert (other["name"], other["image_id"]) == (original["name"], original["image_id"])
            for name in ("image", "boxes", "labels", "truth"):
                assert torch.equal(other[name], original[name])
                assert other[name].dtype == original[name].dtype


def test_the_list_of_another_split_is_not_overwritten(tmp_path: Path) -> None:
    write_voc_detection(tmp_path, LookAlikeScenes("val", 3))
    with pytest.raises(DataError, match=r"val\.txt: names other images, such as wardrobe_val_000002"):
        write_voc_detection(tmp_path, LookAlikeScenes("val", 2))


def coco_folder(root: Path, annotations: list[dict[str, Any]], **content: Any) -> Path:
    """A data set of one picture of 40x30 pixels, and one without annotations."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30)).save(root / "val2017" / name)
    images = [{"id": 9 - i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(("a.jpg", "b.jpg"))]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    whole = {"images": images, "annotations": annotations, "categories": categories} | content
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(whole))
    return root


def note(box: Any, category: Any = 7, **options: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 9, "category_id": category, "bbox": box, "area": 60.0, "iscrowd": 0} | options


def test_coco_boxes_become_edges_and_crowds_are_for_evaluation_only(tmp_path: Path) -> None:
    notes = [
        note([1.5, 2.25, 10.0, 6.0]),
        note([35, 25, 10, 10], 3),  # beyond the picture
        note([0, 0, 40, 30], iscrowd=1),
        note([5, 5, 3, 3], area=0),
        note([8, 9, 0.25, 4]),  # thinner than a pixel
    ]
    dataset = CocoDetection(coco_folder(tmp_path, notes), "val2017")
    assert (dataset.class_names, dataset.category_ids) == (("dog", "cat"), (3, 7))
    item = dataset.read(0)
    assert item["boxes"].tolist() == [[1.5, 2.25, 11.5, 8.25], [35, 25, 40, 30], [8, 9, 9, 13]]
    assert item["labels"].tolist() == [2, 1, 2]
    assert item["truth"][:3].tolist() == [
        [2, 1.5, 2.25, 10, 6, 60, 0],
        [1, 35, 25, 10, 10, 60, 0],
        [2, 0, 0, 40, 30, 60, 1],
    ]
    assert (item["image_id"], item["name"]) == (9, "a")
    assert dataset.read(1)["boxes"].shape == (0, 4)
    assert [len(CocoDetection(tmp_path, "val2017", only_annotated=flag)) for flag in (False, True)] == [2, 1]
    truncated = CocoDetection(tmp_path, "val2017", whole_pixels=True).read(0)["boxes"]
    assert truncated[0].tolist() == [1, 2, 11, 8]  # 1.5 to 10.5 inclusive is 1 to 10


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (note([1, 2, 3]), r"a\.jpg: annotation 5 of instances_val2017\.json has the bbox \[1, 2, 3\], expected four"),
        (note([1, 2, 3, "4"]), "expected four numbers"),
        (note([1, 2, 3, float("nan")]), "expected four numbers"),
        (note([1, 2, -3, 4]), "lies outside of the picture of 40x30 pixels"),
        (note([50, 2, 3, 4]), "lies outside of the picture"),
        (note([1, 2, 3, 4], 8), "category_id 8, which no category has"),
        (note([1, 2, 3, 4], [7]), r"category_id \[7\], expected a whole number"),
        (note([1, 2, 3, 4], "7"), "category_id '7', expected a whole number"),
        (note([1, 2, 3, 4], area="much"), "area much, expected a number"),
    ],
)
def test_a_bad_coco_annotation_is_listed(wrong: dict[str, Any], reason: str, tmp_path: Path) -> None:
    dataset = CocoDetection(coco_folder(tmp_path, [wrong]), "val2017")
    with pytest.raises(DataError, match=reason):
        dataset.read(0)
    assert len(check_dataset(dataset)) == 1


def test_a_coco_picture_that_is_missing_torn_or_of_another_size_is_listed(tmp_path: Path) -> None:
    dataset = CocoDetection(coco_folder(tmp_path, [note([1, 2, 3, 4])]), "val2017")
    Image.new("RGB", (30, 40)).save(tmp_path / "val2017" / "a.jpg")
    (tmp_path / "val2017" / "b.jpg").unlink()
    first, second = check_dataset(dataset)
    assert first.endswith("a.jpg: is 30x40 pixels (width x height), instances_val2017.json says 40x30")
    assert second.endswith("b.jpg: no such file")
    whole = (tmp_path / "val2017" / "a.jpg").read_bytes()
    (tmp_path / "val2017" / "a.jpg").write_bytes(whole[:100])
    assert "cannot be read" in check_dataset(dataset)[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a JSON file"),
        ("[]", "not in COCO's format, which has the lists images, categories, annotations"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', "an entry of images has no file_name, width"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "annotations": []}',
            "two entries of categories have the same id",
        ),
        ('{"images": [], "categories": [], "annotations": [{"image_id": 3}]}', "an annotation is of no picture"),
        ('{"images": [], "categories": [], "annotations": [{"image_id": [3]}]}', "an annotation is of no picture"),
        (
            '{"images": [{"id": "x", "file_name": "x.jpg", "width": 4, "height": 3}], "categories": [], '
            '"annotations": []}',
            "an entry of images has the id 'x', expected a whole number",
        ),
        (
            '{"images": [{"id": 1, "file_name": 5, "width": 4, "height": 3}], "categories": [], "annotations": []}',
            "an entry of images has the file_name 5, expected a text",
        ),
        (
            '{"images": [], "categories": [{"id": "x", "name": "a"}], "annotations": []}',
            "an entry of categories has the id 'x', expected a whole number",
        ),
        (
            '{"images": [], "categories": [{"id": [1], "name": "a"}], "annotations": []}',
            r"an entry of categories has the id \[1\], expected a whole number",
        ),
    ],
)
def test_a_file_that_is_not_cocos_is_named(content: str, reason: str, tmp_path: Path) -> None:
    file = coco_folder(tmp_path, []) / "annotations" / "instances_val2017.json"
    file.write_text(content)
    with pytest.raises(DataError, match=f"instances_val2017.json: {reason}"):
        CocoDetection(tmp_path, "val2017")


@pytest.mark.parametrize(("identity", "fits"), [(-1, False), (0, True), (2**53 - 1, True), (2**53, False)])
def test_the_id_of_a_picture_is_one_that_results_can_name(identity: int, fits: bool, tmp_path: Path) -> None:
    images = [{"id": identity, "file_name": "a.jpg", "width": 40, "height": 30}]
    root = coco_folder(tmp_path, [note([1, 2, 3, 4], image_id=identity)], images=images)
    if not fits:
        reason = f"instances_val2017.json: an entry of images has the id {identity}, expected 0 to 9007199254740991"
        with pytest.raises(DataError, match=reason):
            CocoDetection(root, "val2017")
        return
    (item,) = read(CocoDetection(root, "val2017"))
    row = torch.tensor([[item["image_id"], 1, 2, 3, 4, 0.5, 1]], dtype=torch.float64)
    write_coco_results(tmp_path / "results.json", row, (3, 7))
    assert json.loads((tmp_path / "results.json").read_text())[0]["image_id"] == identity


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder, expected COCO's folder"):
        CocoDetection(tmp_path / "nowhere", "val2017")
    coco_folder(tmp_path / "coco", [])
    with pytest.raises(DataError, match=r"train2017: no such folder, expected the pictures"):
        CocoDetection(tmp_path / "coco", "train2017")
    with pytest.raises(DataError, match=r"voc: no such folder, expected a VOC folder"):
        VOCDetection(tmp_path / "voc", "val")
    write_voc_detection(tmp_path / "voc", LookAlikeScenes("val", 2))
    with pytest.raises(DataError, match=r"trainval\.txt: no such file"):
        VOCDetection(tmp_path / "voc", "trainval")
    (tmp_path / "voc" / "Annotations" / "wardrobe_val_000001.xml").unlink()
    with pytest.raises(DataError, match=r"wardrobe_val_000001\.xml: no such file, but .*val\.txt names it"):
        VOCDetection(tmp_path / "voc", "val")


def test_there_are_eighty_and_twenty_classes() -> None:
    assert (len(COCO_OBJECTS), COCO_OBJECTS[0], COCO_OBJECTS[-1]) == (80, "person", "toothbrush")
    assert (len(VOC_OBJECTS), VOC_OBJECTS[-1]) == (20, "tvmonitor")


def test_voc_coordinates_are_one_based_and_inclusive_and_difficult_objects_are_not_learned(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("000001\n")
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / "000001.jpg")
    entry = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"
    sides = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = entry.format("dog", 0, sides.format(1, 2, 1, 30)) + entry.format("cat", 1, sides.format(5, 5, 9, 9))
    (tmp_path / "Annotations" / "000001.xml").write_text(f"<annotation>{objects}</annotation>")
    item = VOCDetection(tmp_path, "val").read(0)
    assert item["boxes"].tolist() == [[0, 1, 1, 30]]
    assert item["labels"].tolist() == [VOC_OBJECTS.index("dog") + 1]
    assert item["truth"].tolist() == [[12, 0, 1, 1, 29, 29, 0], [8, 4, 4, 5, 5, 25, 1]]


def changed(file: Path, change: Callable[[ElementTree.Element], None]) -> None:
    tree = ElementTree.parse(file)
    change(tree.getroot())
    tree.write(file)


def set_text(path: str, text: str) -> Callable[[ElementTree.Element], None]:
    def change(root: ElementTree.Element) -> None:
        found = root.find(path)
        assert found is not None
        found.text = text

    return change


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("object/name", "hat", "an object is called 'hat', expected one of T-shirt, trousers"),
        ("object/bndbox/xmin", "", "has the bndbox"),
        ("object/bndbox/xmax", "97", "not within the picture of 96x96 pixels"),
        ("object/bndbox/ymin", "0", "not within the picture"),
        ("object/bndbox/ymax", "nan", "not within the picture"),
    ],
)
def test_a_bad_voc_annotation_is_listed(path: str, text: str, reason: str, tmp_path: Path) -> None:
    scenes = LookAlikeScenes("val", 1)
    write_voc_detection(tmp_path, scenes)
    file = tmp_path / "Annotations" / "wardrobe_val_000000.xml"
    changed(file, set_text(path, text))
    dataset = VOCDetection(tmp_path, "val", class_names=scenes.class_names)
    (problem,) = check_dataset(dataset)
    assert problem.startswith(f"{file}: ")
    assert reason in problem
    file.write_text("<annotation>")
    assert check_dataset(dataset)[0].startswith(f"{file}: not an XML file")


def test_data_sets_are_joined_one_after_the_other() -> None:
    parts = [LookAlikeScenes("train", 2), LookAlikeScenes("val", 0), LookAlikeScenes("val", 3)]
    joined = JoinedDetection(parts, transform=DetectionTransform())
    assert len(joined) == 5
    names = [
        f"wardrobe_{split}_00000{index}"
        for split, index in (("train", 0), ("train", 1), ("val", 0), ("val", 1), ("val", 2))
    ]
    assert [item["name"] for item in read(joined)] == names
    assert joined[4]["image"].is_floating_point()
    assert check_dataset(joined) == []
    with pytest.raises(ValueError, match="parts must be data sets of the same classes"):
        JoinedDetection([])


def test_result_files_name_categories_by_their_ids_and_keep_every_digit(tmp_path: Path) -> None:
    rows = torch.tensor([[9, 0.1, 1 / 3, 2, 3, 0.7, 2]], dtype=torch.float64)
    write_coco_results(tmp_path / "results.json", rows, (3, 7))
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result == {"image_id": 9, "category_id": 7, "bbox": [0.1, 1 / 3, 2, 3], "score": 0.7}
