"""Errors that a user can act on, each with an exit code for job scripts."""

import enum


class ExitCode(enum.IntEnum):
    """Process exit codes; also written to `exit_status.json`."""

    DONE = 0
    CRASH = 1
    """A bug or a dead rank; the log ends with a traceback or names the rank."""
    USAGE = 64
    BAD_DATA = 65
    NUMERIC = 70
    TIMEOUT = 71
    """A rank was silent for too long, or a collective did not complete in time."""
    STORAGE = 74
    REQUEUE = 75
    CONFIG = 78
    INTERRUPTED = 130


class UserError(Exception):
    """What went wrong, where, and what to do about it, in one line.

    Args:
        what: what was found, with the numbers.
        where: file, line, key, rank or shard; None if `what` already says it.
        fix: what to do.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f"; fix: {self.fix}" if self.fix else ""
        return " ".join(f"{self.what}{where}{fix}".split())

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[UserError], what: str, where: str | None, fix: str | None) -> UserError:
    return cls(what, where=where, fix=fix)


class UsageError(UserError):
    """The command line itself is wrong."""


class ConfigError(UserError):
    """A setting is wrong; raised before the run starts."""

    exit_code = ExitCode.CONFIG


class DataError(UserError):
    """A data file or a sample is invalid."""

    exit_code = ExitCode.BAD_DATA


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = ExitCode.BAD_DATA


class NumericError(UserError):
    """A loss or gradient is not finite, or a step was computed on other samples than planned."""

    exit_code = ExitCode.NUMERIC


class StorageError(UserError):
    """A file could not be read or written, e.g. because the disk is full."""

    exit_code = ExitCode.STORAGE
