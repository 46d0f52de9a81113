"""Errors that are for users: the command line prints their message alone, without a stack trace."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager


class EvaclipError(Exception):
    """Something a person can mend; the message names the cause, the value and the remedy.

    Attributes:
        on_all_ranks: Every rank raises the same, so one of them need say it.
    """

    on_all_ranks: bool = False


class ConfigError(EvaclipError):
    """The configuration is invalid, or does not fit the machine or the run it would continue."""


class RunLockedError(ConfigError):
    """Another process trains in the run directory; it may be about to end."""


class DataError(EvaclipError):
    """Shards, captions or evaluation sets that cannot be used."""


class InterruptedEvaluationError(EvaclipError):
    """Somebody waits for the training to save: the evaluation gives way."""


class CheckpointError(EvaclipError):
    """A checkpoint that cannot be written, read or continued."""


class WeightsError(EvaclipError):
    """Somebody's weights that cannot be read, or do not fit the model."""


class OutOfMemoryError(EvaclipError):
    """A step needs more memory than there is."""


class TrainingStoppedError(EvaclipError):
    """Training ended before its last step.

    Attributes:
        can_continue: The run was asked to stop and is saved; otherwise a rule ended it.
    """

    def __init__(self, message: str, *, can_continue: bool = False) -> None:
        super().__init__(message)
        self.can_continue = can_continue


@contextmanager
def writing(what: str, kind: type[EvaclipError] = EvaclipError) -> Generator[None]:
    """Say what a person can do about something that could not be written."""
    try:
        yield
    except OSError as error:
        # numpy tells of a full disk in words alone
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "requested and" in str(error)
        remedy = "free some space" if full else "choose a folder that can be written"
        raise kind(f"{what} cannot be written: {error.strerror or error}; {remedy}, and start again") from error
