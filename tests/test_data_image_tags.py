"""Image-level labels: lists, masks, the VOC reader, the tag scenes, and attention and saliency in files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gingham.data import TagScenes, VOCImageTags, VOCSegmentation, check_dataset
from gingham.data.attention_maps import export_attention, read_attention, read_saliency, write_attention
from gingham.data.image_tags import read_tags, tag_vector, tags_of, tags_of_masks, write_tags
from gingham.data.wardrobe import TAG_SCENE_LABELS, make_tag_scene, write_voc_tags
from gingham.errors import DataError

# ------------------------------------------------------------------------------------------------ lists


def test_a_list_comes_back_in_its_order(tmp_path: Path) -> None:
    tags = {"2007_000032": (0, 14), "2007_000001": (), "b": (19,)}
    write_tags(tmp_path / "lists" / "train_cls.txt", tags)
    assert (tmp_path / "lists" / "train_cls.txt").read_text() == "2007_000032 0 14\n2007_000001\nb 19\n"
    assert list(read_tags(tmp_path / "lists" / "train_cls.txt", 20).items()) == list(tags.items())


def test_a_path_stands_for_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("/JPEGImages/a.png 0 3\n/JPEGImages/b.jpg\nc 1\n")
    assert read_tags(tmp_path / "list.txt", 5) == {"a": (0, 3), "b": (), "c": (1,)}
    (tmp_path / "list.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")
    with pytest.raises(DataError, match="expected a name and class numbers"):
        read_tags(tmp_path / "list.txt", 5)


def test_blanks_at_the_end_of_a_line_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a 0 14 \n\n b  3\t4\n")
    assert read_tags(tmp_path / "list.txt", 20) == {"a": (0, 14), "b": (3, 4)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 20\n", "line 'a 20', expected a name and class numbers from 0 to 19"),
        ("a -1\n", "line 'a -1'"),
        ("a dog\n", "line 'a dog'"),
        ("a 1\na 2\n", "names a twice"),
        ("", "no images found"),
    ],
)
def test_wrong_lists_are_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=f"list.txt: {expected}"):
        read_tags(tmp_path / "list.txt", 20)


def test_names_with_blanks_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names must be without blanks, got 'a b'"):
        write_tags(tmp_path / "list.txt", {"a b": (0,)})


def test_tags_are_the_classes_of_the_mask() -> None:
    assert tags_of(torch.tensor([[0, 255], [3, 1]])) == (0, 2)
    assert tags_of(torch.zeros(2, 2, dtype=torch.int64)) == ()
    assert tag_vector((0, 2), 4).tolist() == [1, 0, 1, 0]
    assert tag_vector((), 3).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------ the reader


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        write_voc_tags(tmp_path, TagScenes(split, count))
    return tmp_path


def test_files_give_the_items_of_memory(voc: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        scenes, files = TagScenes(split, count), VOCImageTags(voc, split, labels=TAG_SCENE_LABELS)
        assert len(files) == count
        for one, other in zip(scenes, files, strict=True):
            assert one.keys() == other.keys() and one["name"] == other["name"]
            assert all(torch.equal(one[key], other[key]) for key in ("image", "label", "tags"))  # type: ignore[literal-required]
        assert tags_of_masks(files) == read_tags(voc / "ImageSets" / "Segmentation" / f"{split}_cls.txt", 5)


def test_tags_need_no_masks(voc: Path) -> None:
    for file in (voc / "SegmentationClass").iterdir():
        file.unlink()
    (voc / "SegmentationClass").rmdir()
    files = VOCImageTags(voc, "train", labels=TAG_SCENE_LABELS)
    assert (files[0]["label"] == 255).all() and torch.equal(files[0]["tags"], TagScenes("train", 1)[0]["tags"])
    assert check_dataset(files) == []


def test_augmented_masks_go_first_and_seeds_can_be_anywhere(voc: Path, tmp_path: Path) -> None:
    for folder in ("SegmentationClassAug", "seeds"):
        (voc / folder).mkdir()
        for name in ("wardrobe_train_000000", "wardrobe_train_000001", "wardrobe_train_000002"):
            Image.new("L", (64, 64), 2).save(voc / folder / f"{name}.png")
    assert (VOCImageTags(voc, "train", labels=TAG_SCENE_LABELS)[0]["label"] == 2).all()
    for place in ("seeds", str(voc / "seeds")):
        seeds = VOCSegmentation(voc, "train_cls", label_folder=place, labels=TAG_SCENE_LABELS)
        assert [item["name"] for item in seeds] == [item["name"] for item in TagScenes("train", 3)]
        assert (seeds[1]["label"] == 2).all() and torch.equal(seeds[1]["image"], TagScenes("train", 2)[1]["image"])


def test_missing_files_are_named(voc: Path) -> None:
    with pytest.raises(DataError, match=r"test_cls\.txt: no such file"):
        VOCImageTags(voc, "test", labels=TAG_SCENE_LABELS)
    with pytest.raises(DataError, match="nowhere: no such folder, expected the labels"):
        VOCSegmentation(voc, "train", label_folder="nowhere", labels=TAG_SCENE_LABELS)
    (voc / "JPEGImages" / "wardrobe_train_000001.png").unlink()
    with pytest.raises(DataError, match=r"wardrobe_train_000001\.jpg: no such file, but .*train_cls\.txt names it"):
        VOCImageTags(voc, "train", labels=TAG_SCENE_LABELS)
    lenient = VOCImageTags(voc, "train", labels=TAG_SCENE_LABELS, require_labels=False)
    assert [text.partition(": ")[2] for text in check_dataset(lenient)] == ["no such file"]


# ------------------------------------------------------------------------------------------------ the scenes


def test_a_scene_depends_on_split_and_index_alone() -> None:
    for split in ("train", "val", "test"):
        one, other = TagScenes(split, 2, cache=True)[1], TagScenes(split, 9)[1]
        assert all(torch.equal(one[key], other[key]) for key in ("image", "label", "tags"))  # type: ignore[literal-required]
    assert not torch.equal(TagScenes("train", 1)[0]["image"], TagScenes("val", 1)[0]["image"])


def test_tags_are_what_the_masks_hold_and_clutter_has_no_label() -> None:
    counts = torch.zeros(5)
    for index in range(60):
        scene = make_tag_scene("train", index)
        label = torch.from_numpy(scene.label).long()
        kinds = sorted(instance.label - 1 for instance in scene.instances if instance.label)
        assert kinds == list(tags_of(label)) and 1 <= len(kinds) <= 2 and len(scene.instances) == 6
        counts[kinds] += 1
        for instance in scene.instances:
            inside = label[torch.from_numpy(instance.mask)]
            assert set(inside.unique().tolist()) <= {instance.label, 255}
    assert counts.min() > 8


def test_outlines_are_ignored_as_in_voc() -> None:
    label = torch.from_numpy(make_tag_scene("train", 0).label)
    objects, border = (label > 0) & (label < 255), label == 255
    near = torch.nn.functional.max_pool2d(objects[None].float(), 3, 1, 1)[0] > 0
    assert border.any() and not (near & (label == 0)).any()


def test_badges_are_small_and_of_one_colour_a_kind() -> None:
    from gingham.data.wardrobe.tag_scenes import COLOURS

    shares: dict[int, list[float]] = {kind: [] for kind in range(5)}
    for index in range(40):
        scene = make_tag_scene("val", index)
        pixels = scene.image.astype(int)
        for instance in scene.instances:
            if instance.label:
                colour = np.round(255 * np.array(COLOURS[instance.label - 1]))
                badge = (abs(pixels - colour).max(-1) <= 1) & instance.mask
                shares[instance.label - 1].append(badge.sum() / instance.mask.sum())
    for found in shares.values():
        assert min(found) > 0.01 and max(found) < 0.35


@pytest.mark.parametrize(("size", "garments"), [(32, 4), (96, 10)])
def test_size_and_number_of_garments(size: int, garments: int) -> None:
    scene = make_tag_scene("test", 3, size=size, garments=garments)
    assert scene.image.shape == (size, size, 3) and scene.label.shape == (size, size)
    assert len(scene.instances) == garments


# ------------------------------------------------------------------------------------------------ attention in files


def test_attention_comes_back_at_half_precision(tmp_path: Path) -> None:
    attention = torch.rand(4, 5, 9, generator=torch.Generator().manual_seed(0))
    tags = torch.tensor([0, 1, 0, 1])
    write_attention(tmp_path / "a.npz", attention, tags)
    found = read_attention(tmp_path / "a.npz", 4)
    torch.testing.assert_close(found, attention * tags[:, None, None], atol=5e-4, rtol=0)
    write_attention(tmp_path / "none.npz", attention, torch.zeros(4))
    assert read_attention(tmp_path / "none.npz", 4).shape == (4, 5, 9)
    assert not list(tmp_path.glob(".part*"))


def test_exported_attention_is_rounded_down(tmp_path: Path) -> None:
    attention = torch.tensor([[[0.0, 0.5, 0.9999, 1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    export_attention(tmp_path, "a", attention, torch.tensor([1, 0]))
    assert [file.name for file in tmp_path.iterdir()] == ["a_0.png"]
    with Image.open(tmp_path / "a_0.png") as image:
        assert image.mode == "L" and np.array(image).tolist() == [[0, 127, 254, 255]]


def test_saliency_is_grey_and_of_the_picture_s_size(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "a.png")
    torch.testing.assert_close(read_saliency(tmp_path / "a.png", (1, 3)), torch.tensor([[0.0, 0.2, 1.0]]))
    with pytest.raises(DataError, match=r"a\.png: saliency is 3x1 pixels \(width x height\), its picture is 1x3"):
        read_saliency(tmp_path / "a.png", (3, 1))
    Image.new("RGB", (3, 1)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: expected an 8-bit grey image, got mode RGB"):
        read_saliency(tmp_path / "b.png", (1, 3))
    with pytest.raises(DataError, match=r"c\.png: no such file"):
        read_saliency(tmp_path / "c.png", (1, 3))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", None])
def test_damaged_attention_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.npz"
    if content is None:
        with pytest.raises(DataError, match=r"a\.npz: no such file"):
            read_attention(file, 4)
        write_attention(file, torch.zeros(4, 2, 2), torch.ones(4))
        with pytest.raises(DataError, match=r"a\.npz: holds class number 3, expected 0 to 2"):
            read_attention(file, 3)
        return
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as attention"):
        read_attention(file, 4)
