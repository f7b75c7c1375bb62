"""Readers of Market-1501, MARS and the two of DukeMTMC, on small trees in their layouts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from gingham.data.check import check_dataset
from gingham.data.market1501 import DukeMTMCReID, Market1501
from gingham.data.mars import MARS, DukeMTMCVideoReID
from gingham.data.reid import hold_back
from gingham.data.wardrobe.persons import PersonImages
from gingham.data.wardrobe.reid_export import write_market1501, write_mars
from gingham.data.wardrobe.tracklets import Tracklets
from gingham.errors import DataError
from gingham.metrics.retrieval import rank

SPLITS = ("train", "val_query", "val_gallery", "query", "gallery")


def picture(file: Path, value: int, size: tuple[int, int] = (4, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(file)


def same(memory: Any, files: Any) -> None:
    assert memory.names == files.names and len(files) > 0
    assert memory.persons.tolist() == files.persons.tolist() and memory.cameras.tolist() == files.cameras.tolist()
    for one, other in zip(memory, files, strict=True):
        key = "image" if "image" in one else "frames"
        assert torch.equal(one[key], other[key])


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def market(tmp_path: Path) -> Path:
    """Four persons in training, of whom one has a picture only; junk and a distractor in the gallery."""
    root = tmp_path / "x_c3" / "Market-1501-v15.09.15"  # the folder's name looks like a camera's
    for name in ("0012", "0003", "0007"):
        for camera in (1, 6):
            for frame in (1, 2):
                picture(root / "bounding_box_train" / f"{name}_c{camera}s1_{frame:06d}_00.jpg", 10 * frame)
    picture(root / "bounding_box_train" / "0099_c2s1_000001_00.jpg", 5)
    picture(root / "query" / "0001_c1s1_000001_00.jpg", 0)
    for name in ("0001_c2s1_000001_01", "-1_c1s1_000001_02", "0000_c4s2_000001_03", "0002_c3s1_000001_00"):
        picture(root / "bounding_box_test" / f"{name}.jpg", 50)
    (root / "bounding_box_test" / "Thumbs.db").write_bytes(b"x")
    return root.parent


def test_names_say_person_and_camera(market: Path) -> None:
    train = Market1501(market, "train", complete=False)
    assert train.num_persons == 4 and len(train) == 13
    assert train.persons.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert train.person_ids.tolist()[0] == 3 and train.cameras.tolist()[:4] == [0, 0, 5, 5]
    assert train[0]["image"].shape == (3, 8, 4) and train.names[0] == "0003_c1s1_000001_00"
    assert check_dataset(train) == []


def test_junk_is_dropped_and_distractors_stay(market: Path) -> None:
    gallery = Market1501(market / "Market-1501-v15.09.15", "gallery", complete=False)
    assert sorted(gallery.persons.tolist()) == [0, 1, 2] and gallery.num_persons == 2
    assert sorted(Market1501(market, "gallery", complete=False, keep_junk=True).persons.tolist()) == [-1, 0, 1, 2]
    assert Market1501(market, "query", complete=False).persons.tolist() == [1]


def test_persons_are_held_back_whole_and_each_camera_asks_once(market: Path) -> None:
    train, query, gallery = (
        Market1501(market, split, validation_persons=2, complete=False)
        for split in ("train", "val_query", "val_gallery")
    )
    assert train.person_ids.tolist() == [3] * 4 + [7] * 4 and train.num_persons == 2
    assert query.persons.tolist() == [12, 12, 99] and query.cameras.tolist() == [0, 5, 1]
    assert gallery.persons.tolist() == [12, 12] and not {*train.names} & {*query.names, *gallery.names}
    with pytest.raises(ValueError, match="validation_persons must be 0 to below the 4"):
        Market1501(market, "train", validation_persons=4, complete=False)
    assert {name: found.tolist() for name, found in hold_back([5, 5], [0, 1], 0).items()} == {
        "train": [0, 1],
        "val_query": [],
        "val_gallery": [],
    }


def test_persons_with_one_item_from_every_camera_can_be_found() -> None:
    """Nobody would be left to find if every camera asked; others ask as ever."""
    persons, cameras = [3, 3, 3, 5, 5, 5, 8, 9, 9, 1], [2, 0, 1, 1, 0, 1, 4, 0, 0, 0]
    found = hold_back(persons, cameras, 4)
    assert found["train"].tolist() == [9]
    assert found["val_query"].tolist() == [1, 3, 4, 6, 7] and found["val_gallery"].tolist() == [0, 2, 5, 8]


def test_two_files_of_one_name_are_named(market: Path) -> None:
    picture(market / "Market-1501-v15.09.15" / "query" / "0001_c1s1_000001_00.png", 0)
    with pytest.raises(
        DataError, match=r"0001_c1s1_000001_00\.png: there is 0001_c1s1_000001_00\.jpg of the same name"
    ):
        Market1501(market, "query", complete=False)


def test_queries_of_nobody_are_refused(market: Path, mars: Path) -> None:
    """Whose persons are numbered from 0 would lose one of them in training and never find a distractor."""
    picture(market / "Market-1501-v15.09.15" / "query" / "0000_c1s1_000001_00.jpg", 0)
    with pytest.raises(
        DataError, match=r"query: a query is of person 0, but 0 is a distractor, .*: number persons from 1"
    ):
        Market1501(market, "query", complete=False)
    savemat(mars / "info" / "query_IDX.mat", {"query_IDX": [[1, 20]]})
    with pytest.raises(DataError, match=r"query_IDX\.mat: a query is of person -1"):
        MARS(mars, "query", complete=False)
    picture(mars / "query" / "0000" / "0001" / "0000_C2_F0001_X1.jpg", 0)
    with pytest.raises(DataError, match="query: a query is of person 0"):
        DukeMTMCVideoReID(mars, "query", complete=False)


def test_incomplete_and_broken_folders_are_named(market: Path) -> None:
    with pytest.raises(DataError, match="bounding_box_train: 13 images, but the published data set has 12936"):
        Market1501(market, "train")
    with pytest.raises(DataError, match="query: 1 images, but the published data set has 3368"):
        Market1501(market, "query")
    with pytest.raises(DataError, match="2228"):
        DukeMTMCReID(market / "Market-1501-v15.09.15", "query")
    with pytest.raises(ValueError, match="split must be one of"):
        Market1501(market, "test", complete=False)
    with pytest.raises(DataError, match=r"bounding_box_train: no such folder"):
        Market1501(market / "nowhere", "train")
    folder = market / "Market-1501-v15.09.15" / "query"
    picture(folder / "portrait.jpg", 0)
    with pytest.raises(DataError, match=r"portrait\.jpg: the name does not say who is seen"):
        Market1501(market, "query", complete=False)
    (folder / "portrait.jpg").unlink()
    (folder / "0001_c1s1_000001_00.jpg").write_bytes(b"torn")
    (problem,) = check_dataset(Market1501(market, "query", complete=False))
    assert "0001_c1s1_000001_00.jpg: cannot be read" in problem
    (folder / "0001_c1s1_000001_00.jpg").unlink()
    with pytest.raises(DataError, match="query: no images found"):
        Market1501(market, "query", complete=False)


def test_duke_is_read_alike(tmp_path: Path) -> None:
    picture(tmp_path / "DukeMTMC-reID" / "bounding_box_train" / "0005_c8_f0046985.jpg", 1)
    train = DukeMTMCReID(tmp_path, "train", complete=False)
    assert train.person_ids.tolist() == [5] and train.cameras.tolist() == [7]


def test_persons_of_the_world_come_back_from_files_as_market(tmp_path: Path) -> None:
    for split in SPLITS:
        write_market1501(tmp_path, PersonImages(split, 3, domain="target", images=2))
    for split in SPLITS:
        files = Market1501(tmp_path, split, validation_persons=3, complete=False)
        same(PersonImages(split, 3, domain="target", images=2), files)


# ------------------------------------------------------------------------------------------------ tracklets


@pytest.fixture
def mars(tmp_path: Path) -> Path:
    """Six persons with two tracklets from each of three cameras, half of them of the test; junk and distractors."""
    rows: dict[str, list[list[int]]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    for person in range(1, 7):
        part = "train" if person % 2 else "test"
        for camera in (1, 2, 3):
            for tracklet in (1, 2):
                first = len(names[part]) + 1
                names[part] += [f"{person:04d}C{camera}T{tracklet:04d}F{frame:03d}.jpg" for frame in range(1, 6)]
                rows[part].append([first, len(names[part]), person, camera])
    for label, person in (("00-1", -1), ("0000", 0)):
        for tracklet in (1, 2):
            first = len(names["test"]) + 1
            names["test"] += [f"{label}C1T{tracklet:04d}F001.jpg", f"{label}C1T{tracklet:04d}F002.jpg"]
            rows["test"].append([first, len(names["test"]), person, 1])
    for part, listed in names.items():
        for name in listed:
            picture(tmp_path / f"bbox_{part}" / name[:4] / name, int(name.partition("F")[2][:3]))
        (tmp_path / "info").mkdir(exist_ok=True)
        (tmp_path / "info" / f"{part}_name.txt").write_text("\n".join(listed) + "\n")
        savemat(tmp_path / "info" / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(rows[part])})
    queries = [1, 3, 5, 7, 9, 11, 13, 15, 17]  # the first of each person and camera
    savemat(tmp_path / "info" / "query_IDX.mat", {"query_IDX": np.array([queries], np.uint16)})
    return tmp_path


def test_tables_say_which_frames_are_a_tracklet(mars: Path) -> None:
    train, query, gallery = (MARS(mars, split, complete=False) for split in ("train", "query", "gallery"))
    assert train.persons.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and train.cameras.tolist()[:6] == [0, 0, 1, 1, 2, 2]
    assert train.names[1] == "0001C1T0002" and train.lengths.tolist() == [5] * 18
    assert (train[1]["frames"].float().mean((1, 2, 3)).round() - torch.arange(1, 6)).abs().max() <= 1
    assert query.persons.tolist() == [2, 2, 2, 4, 4, 4, 6, 6, 6] and query.cameras.tolist() == [0, 1, 2] * 3
    assert len(gallery) == 9 + 2 and not {*gallery.names} & {*query.names}
    assert sorted(gallery.persons.tolist())[:3] == [0, 0, 2] and gallery.lengths[-1] == 2
    assert train.frames_of(0, [4, 0]).shape == (2, 3, 8, 4) and check_dataset(gallery) == []


def test_the_official_gallery_is_all_of_the_test(mars: Path) -> None:
    official = MARS(mars, "gallery", protocol="official", complete=False)
    assert len(official) == 22 and (official.persons == -1).sum() == 2
    assert {*MARS(mars, "query", complete=False).names} < {*official.names}
    with pytest.raises(ValueError, match="protocol must be"):
        MARS(mars, "query", protocol="matlab")  # type: ignore[arg-type]


def test_tracklets_can_be_held_back(mars: Path) -> None:
    train, query, gallery = (
        MARS(mars, split, validation_persons=1, complete=False) for split in ("train", "val_query", "val_gallery")
    )
    assert train.num_persons == 2 and query.names == ("0005C1T0001", "0005C2T0001", "0005C3T0001")
    assert gallery.names == ("0005C1T0002", "0005C2T0002", "0005C3T0002")


def test_files_of_mars_that_are_wrong_are_named(mars: Path) -> None:
    with pytest.raises(DataError, match=r"tracks_train_info\.mat: 18 tracklets, but the published data set has 8298"):
        MARS(mars, "train")
    with pytest.raises(DataError, match=r"tracks_test_info\.mat: 22 tracklets, but the published data set has 12180"):
        MARS(mars, "query")
    info = mars / "info"
    missing = mars / "bbox_train" / "0003" / "0003C1T0001F003.jpg"
    missing.unlink()
    (problem,) = check_dataset(MARS(mars, "train", complete=False))
    assert "0003C1T0001F003.jpg: no such file" in problem
    picture(missing, 1, size=(6, 8))
    (problem,) = check_dataset(MARS(mars, "train", complete=False))
    assert "0003C1T0001F003.jpg: 6x8 pixels (width x height), but 0003C1T0001F001.jpg" in problem
    assert MARS(mars, "train", complete=False, frame_size=(16, 8))[6]["frames"].shape == (5, 3, 16, 8)
    savemat(info / "query_IDX.mat", {"query_IDX": [[1, 23]]})
    with pytest.raises(DataError, match=r"query_IDX\.mat: query_IDX must be rows 1 to 22"):
        MARS(mars, "query", complete=False)
    for content, reason in (
        ({"other": [[1, 2]]}, "has no numeric table track_train_info"),
        ({"track_train_info": [[1, 2, 3]]}, r"must be \[n, 4\]"),
        ({"track_train_info": [[1, 5, 1, 1], [6, 99, 1, 1]]}, r"row 2 is \[6, 99, 1, 1\], expected"),
        ({"track_train_info": [[5, 4, 1, 1]]}, "row 1 is"),
    ):
        savemat(info / "tracks_train_info.mat", content)
        with pytest.raises(DataError, match=reason):
            MARS(mars, "train", complete=False)
    rows = [[1, 5, 1, 1], [6, 11, 1, 1]]  # the last line is of the next camera
    savemat(info / "tracks_train_info.mat", {"track_train_info": rows})
    with pytest.raises(
        DataError,
        match=r"row 2 makes a tracklet of lines 6 to 11 of train_name\.txt, but line 11, 0001C2T0001F001\.jpg, is of",
    ):
        MARS(mars, "train", complete=False)
    savemat(info / "tracks_train_info.mat", {"track_train_info": rows[:1]})
    listed = (info / "train_name.txt").read_text()
    (info / "train_name.txt").write_text("cat.jpg\n" + listed)
    with pytest.raises(DataError, match=r"train_name\.txt: line 1 is cat\.jpg, expected a name as 0999C1T0001F002"):
        MARS(mars, "train", complete=False)
    (info / "tracks_train_info.mat").write_bytes(b"no MATLAB")
    with pytest.raises(DataError, match=r"tracks_train_info\.mat: not a readable file of MATLAB"):
        MARS(mars, "train", complete=False)
    (info / "tracks_train_info.mat").unlink()
    with pytest.raises(DataError, match=r"tracks_train_info\.mat: no such file"):
        MARS(mars, "train", complete=False)
    (info / "train_name.txt").unlink()
    with pytest.raises(DataError, match=r"train_name\.txt: no such file"):
        MARS(mars, "train", complete=False)


def test_tracklets_of_the_world_come_back_from_files_as_mars(tmp_path: Path) -> None:
    made = {split: Tracklets(split, 2, frames=3) for split in SPLITS}
    write_mars(tmp_path, list(made.values()))
    for split in SPLITS:
        same(made[split], MARS(tmp_path, split, validation_persons=2, complete=False))


def tables_of_the_published_size(root: Path) -> None:
    """Tables with the numbers of MARS, one frame a tracklet: 140 queries whose persons nobody else has seen."""
    info = root / "info"
    info.mkdir()
    train = [(1 + i % 625, 1 + i % 6) for i in range(8298)]
    asked = [(1 + i % 486, 1 + i // 486) for i in range(1840)] + [(1001 + i, 1) for i in range(140)]
    others = [(1 + i % 486, 1 + i // 486 % 2) for i in range(8062 - 1980)]
    for part, rows in (("train", train), ("test", [(-1, 1)] * 870 + [(0, 2)] * 3248 + asked + others)):
        names = [f"{max(person, 0):04d}C{camera}T{i:05d}F001.jpg\n" for i, (person, camera) in enumerate(rows)]
        (info / f"{part}_name.txt").write_text("".join(names))
        table = [(i, i, *row) for i, row in enumerate(rows, 1)]
        savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(table, np.float64)})
    savemat(info / "query_IDX.mat", {"query_IDX": np.arange(870 + 3248 + 1, 870 + 3248 + 1981)[None]})


def test_the_two_protocols_of_mars_have_the_published_numbers(tmp_path: Path) -> None:
    tables_of_the_published_size(tmp_path)
    train, query, gallery = (MARS(tmp_path, split) for split in ("train", "query", "gallery"))
    assert (len(train), train.num_persons, len(query), len(gallery)) == (8298, 625, 1980, 9330)
    official = MARS(tmp_path, "gallery", protocol="official")
    assert len(official) == 12180
    sights = [torch.from_numpy(x) for x in (query.persons, query.cameras, gallery.persons, gallery.cameras)]
    scores = rank(torch.zeros(1980, 1).expand(-1, len(gallery)), *sights)
    assert (scores.scored, scores.skipped) == (1840, 140)


def test_queries_of_the_published_numbers_are_accepted(tmp_path: Path) -> None:
    for reader, count, persons in ((Market1501, 3368, 750), (DukeMTMCReID, 2228, 702)):
        folder = tmp_path / reader.__name__ / "query"
        folder.mkdir(parents=True)
        for index in range(count):
            (folder / f"{1 + index % persons:04d}_c{1 + index // persons}s1_{index:06d}_00.jpg").touch()
        query = reader(tmp_path / reader.__name__, "query")
        assert len(query) == count and query.num_persons == persons
        next(folder.iterdir()).unlink()
        with pytest.raises(DataError, match=f"{count - 1} images, but the published data set has {count}"):
            reader(tmp_path / reader.__name__, "query")


@pytest.mark.parametrize("name", ["0001_C6_F{:04d}_X30823.jpg", "0001C6F{:04d}X30823.jpg"])
def test_tracklets_of_duke_are_ordered_by_time(tmp_path: Path, name: str) -> None:
    root = tmp_path / "DukeMTMC-VideoReID"
    for frame in (10, 2, 100):  # neither from 1 on nor without gaps
        picture(root / "train" / "0001" / "0017" / name.format(frame), frame, size=(4, 8 + frame))
    picture(root / "train" / "0030" / "0001" / "0030_C2_F0001_X1.jpg", 0)
    picture(root / "train" / "0000" / "0001" / "0000_C2_F0001_D1.jpg", 0)  # a distractor is nobody to learn
    train = DukeMTMCVideoReID(tmp_path, "train", complete=False, frame_size=(16, 8))
    assert train.persons.tolist() == [0, 1] and train.cameras.tolist() == [5, 1] and train.lengths.tolist() == [3, 1]
    assert train.names == ("0001_0017", "0030_0001") and train[0]["frames"].shape == (3, 3, 16, 8)
    assert (train[0]["frames"][:, 0].float().mean((1, 2)) - torch.tensor([2.0, 10, 100])).abs().max() <= 1
    with pytest.raises(DataError, match="train: 3 tracklets, but the published data set has 2196"):
        DukeMTMCVideoReID(tmp_path, "train")
    with pytest.raises(DataError, match="query: no such folder"):
        DukeMTMCVideoReID(tmp_path, "query")
    picture(root / "train" / "0030" / "0001" / "0030_C3_F0002_X1.jpg", 0)
    with pytest.raises(DataError, match="a tracklet is from one camera, got images from"):
        DukeMTMCVideoReID(tmp_path, "train", complete=False)
    picture(root / "train" / "0030" / "0002" / "cat.jpg", 0)
    with pytest.raises(DataError, match=r"(cat\.jpg: the name does not say|is from one camera)"):
        DukeMTMCVideoReID(tmp_path, "train", complete=False)
    (root / "train" / "someone").mkdir()
    with pytest.raises(DataError, match="someone: the name of the folder must be a number"):
        DukeMTMCVideoReID(tmp_path, "train", complete=False)
