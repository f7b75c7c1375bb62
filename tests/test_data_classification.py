"""Classification data: readers of the published layouts, splits, wrong labels, augmentation, what they refuse."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="data sets need the extra: pip install gingham[train]")
pytest.importorskip("lightning", reason="data modules need the extra: pip install gingham[train]")
from PIL import Image

from gingham.data import CIFAR, FashionMNIST, ImageFolder, PackagedGarments, check_dataset, fashion_mnist
from gingham.data.classification import ClassificationTransform, StoredImages, WrongLabels, first_of_each_class
from gingham.errors import DataError
from gingham.methods.dap.data import ClassificationData, FilledUp

PIXELS = np.arange(3 * 32 * 32, dtype=np.int64)


def write_cifar(root: Path, classes: int) -> None:
    folder = root / {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[classes]
    folder.mkdir(parents=True)
    names = "".join(f"kind {number}\n" for number in range(classes))
    files = {
        10: ["batches.meta.txt", *(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"],
        100: ["fine_label_names.txt", "train.bin", "test.bin"],
    }[classes]
    (folder / files[0]).write_text(names + "\n")
    for number, file in enumerate(files[1:]):
        records = b""
        for item in range(4):
            label = (4 * number + item) % classes
            head = [label] if classes == 10 else [19, label]
            records += bytes(head) + ((PIXELS + label) % 256).astype(np.uint8).tobytes()
        (folder / file).write_bytes(records)


@pytest.mark.parametrize(("classes", "train"), [(10, 20), (100, 4)])
def test_cifar_is_read_from_its_binary_version(tmp_path: Path, classes: int, train: int) -> None:
    write_cifar(tmp_path, classes)
    dataset = CIFAR(tmp_path, "train", classes=classes)
    assert len(dataset) == train and len(CIFAR(tmp_path, "test", classes=classes)) == 4
    item = dataset[3]
    assert item["label"] == 3 and item["name"] == "train_000003"
    assert dataset.class_names[3] == "kind 3" and len(dataset.class_names) == classes
    expected = torch.from_numpy(((PIXELS + 3) % 256).astype(np.uint8)).reshape(3, 32, 32)
    assert torch.equal(item["image"], expected)  # red, green, blue; row by row
    assert len(CIFAR(dataset.folder, "test", classes=classes)) == 4


def test_cifar_files_that_are_missing_or_torn_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cifar-10-batches-bin: no such folder, expected the binary version"):
        CIFAR(tmp_path)
    write_cifar(tmp_path, 10)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{file}: 12291 bytes are no whole number of pictures of 3073 bytes"):
        CIFAR(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=f"{file}: no such file"):
        CIFAR(tmp_path)
    test = file.with_name("test_batch.bin")
    test.write_bytes(bytes([10]) + test.read_bytes()[1:])
    with pytest.raises(DataError, match="a label of 10, expected 0 to 9"):
        CIFAR(tmp_path, "test")


def idx(values: np.ndarray) -> bytes:  # type: ignore[type-arg]
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_fashion_mnist(root: Path, count: int = 40) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for prefix, number in (("train", count), ("t10k", 20)):
        images = np.arange(number)[:, None, None] + np.arange(784).reshape(28, 28) % 199
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(number) % 10)):
            content = idx(values)
            packed = prefix == "train"
            file = root / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content) if packed else content)


def test_fashion_mnist_is_read_packed_or_not(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    dataset = FashionMNIST(tmp_path)
    assert len(dataset) == 40 and len(FashionMNIST(tmp_path, "test")) == 20
    item = dataset[13]
    assert item["label"] == 3 and dataset.class_names[3] == "dress"
    assert item["image"].shape == (3, 28, 28) and item["image"][2, 0, 1] == 14
    assert (item["image"][0] == item["image"][1]).all()


def test_idx_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    for broken, reason in (
        (content[:-1], "19 values, its head promises 20"),
        (b"hello", "no IDX file of unsigned bytes"),
        (content[:6], "no IDX file of unsigned bytes"),
        (idx(np.arange(19)), r"images \[20, 28, 28\] and labels \[19\]"),
        (idx(np.full(20, 10)), "a label of 10, expected 0 to 9"),
    ):
        labels.write_bytes(broken)
        with pytest.raises(DataError, match=reason):
            FashionMNIST(tmp_path, "test")
    labels.unlink()
    with pytest.raises(DataError, match=f"{labels}: no such file"):
        FashionMNIST(tmp_path, "test")
    packed = tmp_path / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{packed}: cannot be unpacked"):
        FashionMNIST(tmp_path)


def write_folders(root: Path) -> None:
    for split, kinds in (("train", ("cat", "dog", "eel")), ("val", ("cat", "eel"))):
        for number, kind in enumerate(kinds):
            for item in range(2):
                folder = root / split / kind / "more" if item else root / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30 + item), (50 * number, 0, 0)).save(folder / f"{item}.png")


def test_folders_are_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path)
    dataset = ImageFolder(tmp_path)
    assert dataset.class_names == ("cat", "dog", "eel") and dataset.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert {dataset[2]["name"], dataset[3]["name"]} == {"dog/0.png", "dog/more/1.png"}
    assert dataset[4]["image"][0, 0, 0] == 100
    data = ClassificationData("image_folder", str(tmp_path), batch_size=2, size=24, resize=28)
    assert data.class_names == ("cat", "dog", "eel")
    assert data.dataset("val").targets.tolist() == [0, 0, 2, 2]  # the training split's numbers
    assert data.dataset("test").targets.tolist() == [0, 0, 2, 2] and data.splits() == ("train", "val")
    assert next(iter(data.val_dataloader()))["image"].shape == (4, 3, 24, 24)
    picture: Any = {"image": torch.randint(256, (3, 40, 31), dtype=torch.uint8), "label": torch.tensor(0), "name": "a"}
    assert torch.equal(data.augment(picture)["image"], data.evaluate(picture)["image"])  # as nothing augments
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"no picture")
    Image.fromarray(np.full((30, 40), 300, np.uint16)).save(tmp_path / "val" / "eel" / "0.png")
    Image.new("L", (100, 100)).save(tmp_path / "val" / "eel" / "more" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    wrong = [text.split(": ")[1] for text in check_dataset(data.dataset("val"))]
    assert wrong[:2] == [
        "cannot be read, truncated or not an image; replace the file",
        "has more than 8 bits a channel (mode I;16); convert it to 8 bits first",
    ]
    assert len(wrong) == 3 and "10000 pixels" in wrong[2]


def test_folders_that_are_no_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder, expected one folder for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no folders in it"):
        ImageFolder(tmp_path)
    write_folders(tmp_path)
    with pytest.raises(DataError, match=r"val/eel: no class of this data set, which has 2"):
        ImageFolder(tmp_path, "val", class_names=("cat", "dog"))
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="fox"):
        ImageFolder(tmp_path)


def test_the_packaged_garments_do_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    data = ClassificationData(held_out=10_000, lengths=(8000, 2000, 10_000))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [2400, 600, 1000]
    assert data.splits() == ("train", "val", "test")
    assert torch.equal(data.dataset("val")[3]["label"], PackagedGarments("val")[3]["label"])
    write_fashion_mnist(tmp_path / "nowhere")
    data = ClassificationData(held_out=10)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 10, 20]


def test_what_is_held_out_is_of_all_classes_and_not_trained_on(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = ClassificationData(root=str(tmp_path), held_out=10, lengths=(20, 10, 10))
    train, val = data.dataset("train"), data.dataset("val")
    assert torch.bincount(val.targets).tolist() == [1] * 10 and torch.bincount(train.targets).tolist() == [2] * 10
    assert not {train.name(i) for i in range(20)} & {val.name(i) for i in range(10)}
    whole = ClassificationData(root=str(tmp_path))
    assert len(whole.dataset("train")) == 40 and whole.dataset("val").name(0) == "test_000000"
    with pytest.raises(DataError, match="held_out must be below the 40 pictures"):
        ClassificationData(root=str(tmp_path), held_out=40).dataset("train")


def test_first_items_are_as_many_of_each_class() -> None:
    targets = torch.tensor([2, 2, 2, 2, 0, 1, 1, 0])
    assert first_of_each_class(targets, 4).tolist() == [0, 1, 4, 5]
    assert first_of_each_class(targets, 99).tolist() == list(range(8))


def test_wrong_labels_are_the_same_whenever_they_are_drawn() -> None:
    plain = PackagedGarments("train")
    noisy, again, other = (WrongLabels(plain, 0.2, seed) for seed in (0, 0, 1))
    assert torch.equal(noisy.targets, again.targets) and not torch.equal(noisy.targets, other.targets)
    assert torch.equal(noisy.targets != plain.targets, noisy.wrong)
    assert noisy.wrong.float().mean() == pytest.approx(0.2, abs=0.03)
    assert noisy[7]["label"] == noisy.targets[7] and torch.equal(noisy[7]["image"], plain[7]["image"])
    data = ClassificationData(label_noise=0.3, lengths=(100, 10, 10), seed=4)
    assert isinstance(data.dataset("train"), WrongLabels) and not isinstance(data.dataset("val"), WrongLabels)


def test_a_padded_crop_moves_the_picture_by_four_pixels_at_most() -> None:
    image = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    image[..., 14, 14] = 255
    dataset = StoredImages("train", ("a", "b"), image, torch.tensor([0]), ClassificationTransform(28, "padded_crop"))
    torch.manual_seed(0)
    places = {tuple((dataset[0]["image"][0] > 0).nonzero()[0].tolist()) for _ in range(300)}
    assert {row for row, _ in places} == {column for _, column in places} == set(range(10, 19))
    assert dataset[0]["image"].shape == (3, 28, 28)


def test_a_mirrored_picture_is_mirrored() -> None:
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(1, 3, 4, 5)
    plain, mirrored = (
        StoredImages("train", ("a",), image, torch.tensor([0]), ClassificationTransform(flip=flip))[0]["image"]
        for flip in (0.0, 1.0)
    )
    assert torch.equal(mirrored, plain.flip(-1))


def test_a_split_shorter_than_the_processes_is_filled_up() -> None:
    filled = FilledUp(ClassificationData(lengths=(1, 1, 1)).dataset("val"), 3)
    first, *others = [int(filled[index]["label"]) for index in range(len(filled))]
    assert 0 <= first < 10 and others == [-1, -1]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"name": "mnist"}, "name"),
        ({"held_out": -1}, "held_out"),
        ({"name": "image_folder", "held_out": 3}, "held_out"),
        ({"lengths": (0, 1, 1)}, "lengths"),
        ({"splits": ("a", "b", "c")}, "splits"),
        ({"label_noise": 2.0}, "label_noise"),
        ({"flip": 2.0}, "flip"),
        ({"size": 0}, "size"),
        ({"augmentation": "padded_crop"}, "size"),
        ({"augmentation": "some", "size": 3}, "augmentation"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_data_options_outside_their_range_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        ClassificationData(**options)


def test_a_data_set_on_disk_needs_its_folder() -> None:
    for name in ("cifar10", "image_folder"):
        with pytest.raises(DataError, match=f"data.root is not set: give the folder of {name}"):
            ClassificationData(name).dataset("train")  # type: ignore[arg-type]
