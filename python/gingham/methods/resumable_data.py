"""Data in an order, and with an augmentation, that any run can be continued in.

The order of an epoch follows from (seed, epoch) and the augmentation of an item from (seed, epoch, index). Nothing
depends on what was drawn before, on the number of workers, or on when a run was interrupted: a checkpoint holds only
how many batches were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gingham.data.batch_order import OrderedBatches, Position, mixed_seed
from gingham.errors import CheckpointError, DataError


class Selection(Protocol):
    """Which items an epoch has, where a strategy such as drop-and-pick leaves some out."""

    def count(self, epoch: int) -> int:
        """The number of items of an epoch: of every one so far, and of the next."""

    def indices(self, epoch: int) -> Tensor:
        """The items of an epoch, int64, ascending: of the one that is going on, or of the next."""


class SeededItems(Dataset[Any]):
    """A data set whose augmentation is drawn anew for each position, and the same whenever that comes again.

    Args:
        dataset: of dictionaries, where `with_index`.
        seed: of the augmentation.
        with_index: whether an item brings its "index" along, for a strategy that keeps something for every item.
    """

    def __init__(self, dataset: Any, seed: int, *, with_index: bool = False) -> None:
        self.dataset = dataset
        self.seed = seed
        self.with_index = with_index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(reduce(mixed_seed, position, self.seed))  # and not that of a GPU
            item = self.dataset[position[1]]
        return {**item, "index": position[1]} if self.with_index else item


class EpochBatches(OrderedBatches[tuple[int, int]]):
    """Batches of permutations that follow from (seed, epoch); each process takes its share of every batch.

    Args:
        length: number of items.
        batch_size: items in a batch of one process.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.
        trained: gives the number of batches trained so far in all epochs, asked for when a pass begins.
        drop_last: leave out what does not fill a batch of all processes. If not, they share it evenly; where it does
            not go round, its first items come twice, fewer of them than there are processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        trained: Callable[[], int] = lambda: 0,
        *,
        drop_last: bool = True,
    ) -> None:
        super().__init__(trained)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.drop_last = drop_last

    def batches_of(self, items: int) -> int:
        """The number of batches that so many items make."""
        step = self.batch_size * self.world_size
        return items // step if self.drop_last else -(-items // step)

    def items(self, epoch: int) -> Tensor:
        """What an epoch visits, int64."""
        return torch.arange(self.length)

    def __len__(self) -> int:
        return self.batches_of(self.length)

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        items = self.items(epoch)
        order = items[torch.randperm(len(items), generator=generator)].tolist()
        step = self.batch_size * self.world_size
        begins = range(0, self.batches_of(len(items)) * step, step)
        return [[(epoch, index) for index in self._share(order[begin : begin + step])] for begin in begins]

    def _share(self, items: list[int]) -> list[int]:
        """What this process takes of a batch of all processes."""
        each = -(-len(items) // self.world_size)
        return (items * self.world_size)[self.rank * each : (self.rank + 1) * each]


class SelectedBatches(EpochBatches):
    """Batches of the items that a selection gives to each epoch, so that epochs differ in length; a pass is what is
    left of one.

    Args:
        selection: says what the items of an epoch are.
        options: of `EpochBatches`.
    """

    def __init__(self, selection: Selection, *options: Any, **further: Any) -> None:
        super().__init__(*options, **further)
        self.selection = selection

    def items(self, epoch: int) -> Tensor:
        return self.selection.indices(epoch)

    def _place(self) -> tuple[int, int]:
        """The epoch that is going on, and how many of its batches were trained."""
        epoch, trained = 0, self.trained()
        while trained >= (batches := self.batches_of(self.selection.count(epoch))):
            trained -= batches
            epoch += 1
        return epoch, trained

    def __len__(self) -> int:
        epoch, _ = self._place()
        return self.batches_of(self.selection.count(epoch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, trained = self._place()
        yield from self.batches(epoch)[trained:]


class ShareOfItems(Sampler[int]):
    """Every world_size-th item, without the repetitions that would count items twice in a metric."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class LateLoader(DataLoader[Any]):
    """A loader that begins, workers and order included, when its first batch is asked for.

    Lightning makes the iterator of a training before callbacks are asked what it begins or goes on with, to count its
    steps. Workers that started then would know nothing of labels that come later.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


def _own_generator() -> torch.Generator:
    # A loader draws a seed for its workers each time it starts. From torch's own generator, that would shift dropout,
    # and a resumed run starts its loaders at other moments.
    return torch.Generator().manual_seed(0)


class ResumableData(lightning.LightningDataModule):
    """Loaders of training and evaluation that every kind of data set shares.

    Args:
        batch_size: items in a training batch of one process, 1 or more.
        evaluation_batch_size: items in an evaluation batch, 1 or more.
        workers: processes that load data, 0 or more.
        seed: of order and augmentation, any whole number.
        drop_last: leave out, in every epoch, the items that do not fill a training batch of all processes.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self, batch_size: int, evaluation_batch_size: int, workers: int, seed: int, *, drop_last: bool = True
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("evaluation_batch_size", evaluation_batch_size, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{option} must be {least} or more, got {value}")
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size
        self.workers, self.seed, self.drop_last = workers, seed, drop_last
        #: Says which items an epoch has, all by default; set by a callback such as drop-and-pick before training. The
        #: items, dictionaries, then bring their "index" along.
        self.selection: Selection | None = None
        self._trained_before = 0  # batches, when the run was interrupted

    def process(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        trainer: Any = self.trainer
        if trainer is None:
            return 0, 1
        connector = getattr(trainer, "_accelerator_connector", None)
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise MisconfigurationException(
                "use_distributed_sampler of the trainer must be False: the data is shared among processes already, and "
                "would be shared once more"
            )
        return trainer.global_rank, trainer.world_size

    def _trained(self) -> int:
        """Batches that were trained so far, those before an interruption included."""
        if self.trainer is None:
            return 0
        # Lightning restores its count only after a schedule has asked for the length of the loader.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return max(self._trained_before, progress.total.processed)

    def training_batches(self, length: int) -> EpochBatches:
        """The batches of a data set of so many items, in the order of this run, from where it is."""
        options = (length, self.batch_size, self.seed, *self.process(), self._trained)
        if self.selection is not None:
            return SelectedBatches(self.selection, *options, drop_last=self.drop_last)
        return EpochBatches(*options, drop_last=self.drop_last)

    def training_loader(
        self,
        dataset: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        batches: OrderedBatches[Any] | None = None,
    ) -> DataLoader[Any]:
        """Batches of a data set in the order of this run, from where it is.

        Args:
            dataset: what to train on.
            collate: makes a batch of items, by default torch's.
            batches: this process's, by default permutations of the data set.

        Raises:
            DataError: the data set does not fill one batch of all processes.
        """
        if batches is None:
            batches = self.training_batches(len(dataset))
        if len(batches) == 0:
            raise DataError(f"the train split has {len(dataset)} images, fewer than one batch of all processes needs")
        return LateLoader(
            SeededItems(dataset, self.seed, with_index=self.selection is not None),
            batch_sampler=batches,
            num_workers=self.workers,
            generator=_own_generator(),
            collate_fn=collate,
        )

    def evaluation_loader(self, dataset: Any, *, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
        """This process's share of a data set, in its order, without repetitions."""
        return DataLoader(
            dataset,
            self.evaluation_batch_size,
            sampler=ShareOfItems(len(dataset), *self.process()),
            num_workers=self.workers,
            generator=_own_generator(),
            collate_fn=collate,
        )

    def state_dict(self) -> dict[str, int]:
        return {"trained": self._trained(), "batch": self.batch_size * self.process()[1]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        batch = self.batch_size * self.process()[1]
        if (before := state_dict.get("batch", batch)) != batch and self.trainer.state.fn == "fit":  # type: ignore[union-attr]
            raise CheckpointError(
                f"the checkpoint is of a training with batches of {before} items in all processes together, now "
                f"{batch}: its epochs would be others; mend the batch size or trainer.devices"
            )
        self._trained_before = state_dict.get("trained", 0)
