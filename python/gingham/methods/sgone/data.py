"""Episodes for training and evaluation: which data set, which classes are novel, and which protocol draws them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from gingham.data.episodes import (
    EPISODE_LABELS,
    Border,
    Draw,
    Episode,
    EpisodeDataset,
    Item,
    Protocol,
    RandomEpisodes,
    collate_episodes,
    find_items,
    images_by_class,
    pascal_fold,
    read_episodes,
    read_items,
)
from gingham.data.labels import LabelSpace, bit_interleaved_palette
from gingham.data.segmentation import FolderSegmentation, SegmentationDataset
from gingham.data.transforms import EvaluationTransform, FixedSize, Normalize, imagenet_normalize
from gingham.data.voc import VOC_LABELS, VOCSegmentation
from gingham.data.wardrobe.episode_scenes import (
    CATEGORY_CLASSES,
    CATEGORY_LABELS,
    GARMENT_CLASSES,
    GARMENT_LABELS,
    CategoryScenes,
    GarmentScenes,
)
from gingham.errors import DataError
from gingham.methods.resumable_data import ResumableData
from gingham.methods.segmentation_data import FilledUp

EpisodeSource = Literal["voc", "wardrobe_garments", "wardrobe_categories"]

_WORLDS: dict[str, tuple[Any, LabelSpace, dict[str, tuple[int, ...]]]] = {
    "wardrobe_garments": (GarmentScenes, GARMENT_LABELS, GARMENT_CLASSES),
    "wardrobe_categories": (CategoryScenes, CATEGORY_LABELS, CATEGORY_CLASSES),
}

_LISTS = ("trainaug", "val", "val")
_TRAIN_LABELS, _EVALUATION_LABELS = "SegmentationClassAug", "SegmentationClass"
#: What the code of each protocol reads: which lists of images, from which folders of labels.
_READ_BY = {
    "oslsm": (("val",), (_EVALUATION_LABELS,)),
    "panet": (("val", "trainaug"), (_EVALUATION_LABELS, _TRAIN_LABELS)),
    "hsnet": (("val",), (_EVALUATION_LABELS, _TRAIN_LABELS)),
}
_DRAWN = "of episodes that are drawn, not of those of a file"


class EpisodeData(ResumableData):
    """Episodes of a data set by name: of its training classes to learn from, of its novel classes for the test.

    The validation split asks for the training classes in images that are not trained on, so that nothing is chosen by
    the novel ones; in the world "wardrobe_garments" it has garments of its own.

    Args:
        name: of the embedded world "wardrobe_garments" or "wardrobe_categories", or "voc": a folder in the layout of
            the VOC development kit.
        root: that folder.
        fold: of PASCAL-5i, 0 to 3: which classes of VOC are novel, see `gingham.data.episodes.pascal_fold`.
        classes: "voc" with other classes: the name of a world, or names of your own for the values 0, 1, ... of the
            labels, 0 the background.
        novel: which of your own classes are novel.
        protocol: how episodes of evaluation are drawn and scored.
        episodes: a file of episodes (`gingham.data.episodes.write_episodes`) that the test split consists of; size,
            border and the validation split remain the protocol's.
        items: a published list of the test's items (`gingham.data.episodes.read_items`), in place of searching the
            labels.
        validation_episodes: of the validation split.
        train_shots: K in training.
        episodes_per_epoch: of training.
        images: "single_class": train on images with one class only, as the official code does; "any": on all images,
            other classes being background.
        train_border: what pixels 255 are in training, "object" in the official code.
        train_size: rows and columns that training pictures are resized to; None: their own, with batches of 1.
        flip: probability that a training picture is mirrored; the official code has no augmentation.
        lists: of images in train, val and test, in ``ImageSets/Segmentation``. Images of the other two are left out of
            training.
        train_labels: folder of the training labels.
        evaluation_labels: folder of the labels of val and test; the code of HSNet reads "SegmentationClassAug".
        legacy_bgr_train: exchange red and blue in training only, as the official code does by mistake.
        legacy_support_size: resize all supports of an episode to the size of the first, as the official scripts with
            five shots do.
        batch_size: episodes in a training batch of one process.
        evaluation_batch_size: episodes in an evaluation batch.
        workers: processes that load data.
        seed: of the training episodes; those of evaluation have the protocol's.
        lengths: the world only: scenes in train, val and test.

    Raises:
        ValueError: an argument outside its range, or arguments that do not go together.
        DataError: when a split is opened: files are missing, or not what their layout promises.
    """

    def __init__(
        self,
        name: EpisodeSource = "voc",
        root: str | None = None,
        fold: int | None = None,
        classes: str | tuple[str, ...] | None = None,
        novel: tuple[str, ...] = (),
        protocol: Protocol = Protocol(),  # noqa: B008 - it cannot change
        episodes: str | None = None,
        items: str | None = None,
        validation_episodes: int = 200,
        train_shots: int = 1,
        episodes_per_epoch: int = 1000,
        images: Literal["single_class", "any"] = "single_class",
        train_border: Border = "ignore",
        train_size: tuple[int, int] | None = None,
        flip: float = 0.0,
        lists: tuple[str, str, str] = _LISTS,
        train_labels: str = _TRAIN_LABELS,
        evaluation_labels: str = _EVALUATION_LABELS,
        legacy_bgr_train: bool = False,
        legacy_support_size: bool = False,
        batch_size: int = 1,
        evaluation_batch_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        lengths: tuple[int, int, int] = (1600, 300, 500),
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, seed)
        for option, value, least in (
            ("validation_episodes", validation_episodes, 1),
            ("train_shots", train_shots, 1),
            ("episodes_per_epoch", episodes_per_epoch, 1),
            ("lengths", min(lengths), 0),
        ):
            if value < least:
                raise ValueError(f"{option} must be {least} or more, got {value}")
        if name not in get_args(EpisodeSource):
            raise ValueError(f"name must be one of {', '.join(get_args(EpisodeSource))}, got {name!r}")
        if images not in ("single_class", "any"):
            raise ValueError(f"images must be 'single_class' or 'any', got {images!r}")
        if train_border not in get_args(Border):
            raise ValueError(f"train_border must be one of {', '.join(get_args(Border))}, got {train_border!r}")
        embedded, on_disk = name in _WORLDS, "of voc, not of the world"
        for option, does_nothing, owner in (
            ("root", embedded and root is not None, on_disk),
            ("lists", embedded and tuple(lists) != _LISTS, on_disk),
            ("train_labels", embedded and train_labels != _TRAIN_LABELS, on_disk),
            ("evaluation_labels", embedded and evaluation_labels != _EVALUATION_LABELS, on_disk),
            ("protocol.episodes", episodes is not None and protocol.episodes is not None, _DRAWN),
            ("protocol.runs", episodes is not None and protocol.runs is not None, _DRAWN),
        ):
            if does_nothing:
                raise ValueError(f"{option} is an option {owner}; leave it out")
        if episodes is not None and items is not None:
            raise ValueError("episodes and items do not go together: a list of episodes needs no items")
        self.name: EpisodeSource = name
        self.root = root
        self.fold = fold
        self.labels, self._classes = _class_split(name, fold, classes, tuple(novel))
        self.protocol, self.validation_episodes = protocol, validation_episodes
        self.episode_file, self.item_file = episodes, items
        self.train_shots, self.episodes_per_epoch = train_shots, episodes_per_epoch
        self.images, self.train_border = images, train_border
        self.lists = dict(zip(("train", "val", "test"), lists, strict=True))
        self.lengths = dict(zip(("train", "val", "test"), lengths, strict=True))
        self.train_labels, self.evaluation_labels = train_labels, evaluation_labels
        self.legacy_support_size = legacy_support_size
        rgb = imagenet_normalize()
        train = Normalize(rgb.mean, rgb.std, channels="BGR") if legacy_bgr_train else rgb
        self.augment = FixedSize(train_size, flip_probability=flip, normalize=train)
        self.evaluate = EvaluationTransform(normalize=rgb)
        self._sources: dict[str, SegmentationDataset] = {}
        self._draws: dict[str, list[Draw]] = {}
        self._datasets: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------- classes and images

    def label_space(self) -> LabelSpace:
        """What is told apart: background and object."""
        return EPISODE_LABELS

    def classes_of(self, split: str) -> tuple[int, ...]:
        """The class indices of a split's episodes."""
        return self._classes[split]

    def splits(self) -> tuple[str, ...]:
        """The splits that have images of their own."""
        if self.name in _WORLDS or self.lists["val"] != self.lists["test"]:
            return ("train", "val", "test")
        return ("train", "val")

    def open(self, split: str, *, require_labels: bool = True) -> SegmentationDataset:
        """The images of a split with all their classes, read anew.

        Raises:
            DataError: a folder or a list is missing, or an image has no label although `require_labels`.
        """
        if self.name in _WORLDS:
            scenes: SegmentationDataset = _WORLDS[self.name][0](split, self.lengths[split], cache=True)
            return scenes
        found = self._listed(split, require_labels)
        if split == "train":
            held_out = {
                file.name for other in ("val", "test") for file in self._listed(other, require_labels=False).images
            }
            found.images = [file for file in found.images if file.name not in held_out]
        return found

    def _listed(self, split: str, require_labels: bool) -> FolderSegmentation:
        if self.root is None:
            raise DataError("data.root is not set: give the folder of VOC2012 with --data.root DIR")
        folder = self.train_labels if split == "train" else self.evaluation_labels
        return VOCSegmentation(
            self.root, self.lists[split], labels=self.labels, label_folder=folder, require_labels=require_labels
        )

    def _source(self, split: str) -> SegmentationDataset:
        if split not in self._sources:
            self._sources[split] = self.open(split)
        return self._sources[split]

    # -------------------------------------------------------------------------------------------- episodes

    def protocol_of(self, split: str) -> Protocol:
        """The protocol of "val" or "test"."""
        if split == "test":
            return self.protocol
        return replace(self.protocol, episodes=self.validation_episodes, runs=1)

    def seeds_of(self, split: str) -> list[int]:
        """The seeds of a split's runs."""
        if split == "test" and self.episode_file is not None:
            return sorted({draw.seed for draw in self._drawn(split)})
        return list(self.protocol_of(split).seeds)

    def episodes_of(self, split: str) -> list[Episode]:
        """The episodes of "val" or "test" by the names of their images."""
        if split == "test" and self.episode_file is not None:
            return read_episodes(self.episode_file)
        source = self._source(split)
        fold = self.fold if split == "test" else None
        return [
            Episode(
                fold=fold,
                class_index=draw.class_index,
                support=tuple(source.name_of(index) for index in draw.support),
                query=source.name_of(draw.query),
                protocol=self.protocol.name,
                seed=draw.seed,
            )
            for draw in self._drawn(split)
        ]

    def describe(self, split: str) -> str:
        """What the scores of "val" or "test" depend on: the classes and the protocol, in a line."""
        names = [self.labels.names[index] for index in self.classes_of(split)]
        classes = ", ".join(names) if len(names) <= 20 else f"{len(names)} classes, {names[0]} to {names[-1]}"
        kind = "novel" if split == "test" or self.name == "wardrobe_garments" else "training"
        where = f"fold {self.fold}, " if self.fold is not None else ""
        listed = self.item_file if split == "test" else None
        how = self.protocol_of(split).describe(items=listed, changed=self._changed(split))
        if split == "test" and self.episode_file is not None:
            episodes = self.episodes_of(split)
            drawn = " and ".join(sorted({episode.protocol for episode in episodes}))
            how = (
                f"{len(episodes[0].support)}-shot: {len(episodes)} episodes of {self.episode_file}, drawn as {drawn}; "
            )
            how += self.protocol.describe_scoring()
        if self.legacy_support_size:
            how += ", supports at the size of the first"
        if self.name not in _WORLDS:
            how += f"; images of {self.lists[split]}, labels of {self.evaluation_labels}"
        return f"{where}{kind} classes {classes}; {how}"

    def _changed(self, split: str) -> bool:
        """Whether the images are not as the protocol of that name has them."""
        name = self.protocol.name
        items = split == "test" and self.item_file is not None and name != "hsnet"  # whose code has such lists
        lists, folders = _READ_BY[name]
        others = self.lists[split] not in lists or self.evaluation_labels not in folders
        return items or self.legacy_support_size or (others and self.name not in _WORLDS)

    def _drawn(self, split: str) -> list[Draw]:
        if split not in self._draws:
            self._draws[split] = self._read_draws() if split == "test" and self.episode_file else self._draw(split)
        return self._draws[split]

    def _draw(self, split: str) -> list[Draw]:
        protocol, source = self.protocol_of(split), self._source(split)
        if split == "test" and self.item_file is not None:
            found = [item for item in read_items(self.item_file, source) if item.class_index in self.classes_of(split)]
        else:
            found = self._find(split, small_objects=protocol.keeps_small_objects)
        try:
            draws = protocol.draw(found)
        except DataError as error:
            raise DataError(f"the {split} split of {self.name}: {error}") from error
        images = images_by_class(found)
        counts = {self.labels.names[index]: len(images.get(index, ())) for index in self.classes_of(split)}
        few = [f"{name} has {count}" for name, count in counts.items() if count <= protocol.shots]
        if few:
            rank_zero_warn(
                f"the {split} split of {self.name}: an episode needs {protocol.shots + 1} images of its class, and "
                f"{', '.join(few)}: what has no episodes scores 0, and counts in the mean"
            )
        return draws

    def _read_draws(self) -> list[Draw]:
        assert self.episode_file is not None
        source = self._source("test")
        places = {source.name_of(index): index for index in range(len(source))}
        draws = []
        present: dict[int, set[int]] = {}
        for number, episode in enumerate(read_episodes(self.episode_file), 1):
            strangers = [name for name in (*episode.support, episode.query) if name not in places]
            if strangers:
                raise DataError(f"{self.episode_file}: episode {number} has {strangers[0]!r}, which is not in the list")
            if episode.class_index not in self.classes_of("test"):
                valid = ", ".join(map(str, self.classes_of("test")))
                raise DataError(
                    f"{self.episode_file}: episode {number} is of class {episode.class_index}, novel are {valid}"
                )
            support = tuple(places[name] for name in episode.support)
            for index in (*support, places[episode.query]):
                if index not in present:
                    present[index] = set(source.read_label(index).unique().tolist())
                if episode.class_index not in present[index]:
                    raise DataError(
                        f"{self.episode_file}: episode {number} is of class {episode.class_index}, which is not in its "
                        f"image {source.name_of(index)!r}"
                    )
            draws.append(Draw(episode.class_index, support, places[episode.query], episode.seed))
        return draws

    def _find(self, split: str, **options: Any) -> list[Item]:
        from tqdm import tqdm

        def progress(indices: Iterable[int]) -> Iterable[int]:
            return tqdm(
                indices, desc=f"looking for classes in {split}", unit="image", delay=2, disable=None, leave=False
            )

        return find_items(self._source(split), self.classes_of(split), progress=progress, **options)

    # -------------------------------------------------------------------------------------------- data sets

    def dataset(self, split: str) -> Any:
        """The episodes of "train", "val" or "test", ready for the network. Kept once made."""
        if split not in self._datasets:
            self._datasets[split] = self._training_episodes() if split == "train" else self._evaluation_episodes(split)
        return self._datasets[split]

    def _training_episodes(self) -> RandomEpisodes:
        found = self._find("train", single_class=self.images == "single_class")
        try:
            return RandomEpisodes(
                self._source("train"),
                found,
                shots=self.train_shots,
                length=self.episodes_per_epoch,
                border=self.train_border,
                transform=self.augment,
            )
        except DataError as error:
            raise DataError(f"the train split of {self.name}: {error}") from error

    def _evaluation_episodes(self, split: str) -> EpisodeDataset:
        return EpisodeDataset(
            self._source(split),
            self._drawn(split),
            border=self.protocol.query_border,
            transform=self.evaluate,
            seeds=self.seeds_of(split),
            size=self.protocol.image_size,
            label_resize=self.protocol.label_resize,
            first_support_size=self.legacy_support_size,
        )

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.dataset("train"), collate=collate_episodes)

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        _, processes = self.process()
        return self.evaluation_loader(FilledUp(self.dataset(split), processes), collate=collate_episodes)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")


def _class_split(
    name: str, fold: int | None, classes: str | tuple[str, ...] | None, novel: tuple[str, ...]
) -> tuple[LabelSpace, dict[str, tuple[int, ...]]]:
    """The classes of the labels, and the indices of those of train, val and test."""
    world = name if name in _WORLDS else classes
    if isinstance(world, str):
        if world not in _WORLDS:
            raise ValueError(f"classes must be names of your own or one of {', '.join(_WORLDS)}, got {world!r}")
        if fold is not None or novel or (name in _WORLDS and classes is not None):
            raise ValueError(f"fold, classes and novel are not of the world, whose novel classes are fixed: {world}")
        _, labels, split = _WORLDS[world]
        return labels, split
    if classes is None:
        if fold is None or novel:
            raise ValueError(f"fold must be 0 to 3 for voc, and novel empty, got {fold} and {novel}")
        labels, novel_indices = VOC_LABELS, pascal_fold(fold)
    else:
        names = tuple(classes)
        strangers = [name for name in novel if name not in names[1:]]
        if fold is not None or not novel or strangers or len(novel) >= len(names) - 1:
            raise ValueError(f"novel must be some of the classes {', '.join(names[1:])}, and fold None, got {novel}")
        labels = LabelSpace(names, bit_interleaved_palette(len(names)))
        novel_indices = tuple(sorted(names.index(name) for name in novel))
    others = tuple(index for index in range(1, labels.num_classes) if index not in novel_indices)
    return labels, {"train": others, "val": others, "test": novel_indices}
