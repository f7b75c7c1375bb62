"""The folder of a training's refined labels, and the mark in it that says whose they are.

Two trainings that wrote and read the same files would learn from a mixture of both.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from gingham.errors import DataError

_MARK = "run.json"


@dataclass(frozen=True)
class Owner:
    """A training that refines labels.

    Args:
        run: its name, drawn at random; the same in all parts of a training that is continued.
        checkpoints: the folder of its checkpoints, if it has one.
    """

    run: str
    checkpoints: str | None

    def can_be_continued(self) -> bool:
        """Whether there is a checkpoint."""
        return self.checkpoints is not None and any(Path(self.checkpoints).glob("*.ckpt"))


def owner_of(folder: Path) -> Owner | None:
    """Whose refined labels a folder holds, None where no training has claimed it."""
    try:
        return Owner(**json.loads((folder / _MARK).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def claim(folder: Path, owner: Owner) -> None:
    """Make a folder that of a training, or find that it is.

    Labels of a training that is overwritten, one with the same folder of checkpoints and none in it, are deleted. A
    training that was moved with its checkpoints keeps its labels.

    Args:
        folder: made where it does not exist.
        owner: who writes there from now on.

    Raises:
        DataError: it cannot be written, or holds labels of another training or anything else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        found = owner_of(folder)
        if found == owner:
            return
        if found is not None and not found.can_be_continued():
            if found.run == owner.run:
                _mark(folder, owner, replace=True)
                return
            if found.checkpoints is not None and found.checkpoints == owner.checkpoints:
                for cycle in folder.glob("cycle_*"):
                    shutil.rmtree(cycle)
                (folder / _MARK).unlink()
        if any(folder.iterdir()) or not _mark(folder, owner):
            raise DataError(
                f"{folder}: holds refined labels of another run; delete them, or name another folder as labels_dir"
            )
    except OSError as error:
        raise DataError(
            f"{folder}: no labels can be written there ({error.strerror}); name another folder as labels_dir"
        ) from error


def _mark(folder: Path, owner: Owner, *, replace: bool = False) -> bool:
    """Whether this process has made the mark: of two that try at once, only one does."""
    try:
        with (folder / _MARK).open("w" if replace else "x") as file:
            json.dump(asdict(owner), file)
    except FileExistsError:
        return False
    return True


def require_owner(folder: Path, owner: Owner) -> None:
    """Find that nobody else has taken a folder since it was claimed.

    Raises:
        DataError: it was deleted, or is another training's.
    """
    if owner_of(folder) != owner:
        raise DataError(
            f"{folder}: was deleted or taken by another run during this one; name another folder as labels_dir and go "
            "on from the last checkpoint"
        )


def leave(folder: Path, owner: Owner) -> None:
    """Take the mark from a folder in which a training has written nothing."""
    if owner_of(folder) == owner and [file.name for file in folder.iterdir()] == [_MARK]:
        (folder / _MARK).unlink()


def labels_to_go_on_with(cycle: int, run: str, *, known: str | None, folder: Path) -> Path:
    """The refined labels of the last cycle of a training that is continued.

    Args:
        cycle: its number.
        run: name of the training.
        known: where its checkpoint says that they are.
        folder: that of the training, which may have been moved.

    Raises:
        DataError: they are in neither place.
    """
    for place in [] if known is None else [Path(known), folder / f"cycle_{cycle}"]:
        owner = owner_of(place.parent)
        if place.is_dir() and owner is not None and owner.run == run:
            return place
    raise DataError(
        f"{known or folder}: no refined labels of cycle {cycle}, with which this training goes on; give it the run_dir "
        "or labels_dir that it had"
    )
