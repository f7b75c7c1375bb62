"""The errors that a user can cause and mend.

The command line prints ``str(error)`` of a `GinghamError` as one line and ends with exit code 2; every text therefore
names the file or argument, what was expected there, and what was found.
"""

from __future__ import annotations


class GinghamError(Exception):
    """Base of the errors whose one-line text tells the user what to do."""


class SettingError(GinghamError, ValueError):
    """An environment variable has a value that cannot be used."""


class DataError(GinghamError, ValueError):
    """A data set on disk is missing, incomplete, unreadable, or not what its layout promises."""


class CheckpointError(GinghamError, ValueError):
    """A checkpoint cannot be read, or does not fit the model that it is loaded into."""
