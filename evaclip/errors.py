"""Errors that are for users: the command line prints their message alone, without a stack trace."""

from __future__ import annotations


class EvaclipError(Exception):
    """Something a person can mend; the message names the cause, the value and the remedy."""


class ConfigError(EvaclipError):
    """The configuration is invalid, or does not fit the machine or the run it would continue."""


class DataError(EvaclipError):
    """Shards, captions or evaluation sets that cannot be used."""


class CheckpointError(EvaclipError):
    """A checkpoint that cannot be written, read or continued."""


class TrainingStoppedError(EvaclipError):
    """Training ended before its last step.

    Attributes:
        can_continue: The run was asked to stop and is saved; otherwise a rule ended it.
    """

    def __init__(self, message: str, *, can_continue: bool = False) -> None:
        super().__init__(message)
        self.can_continue = can_continue
