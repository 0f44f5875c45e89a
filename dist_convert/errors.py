"""What can go wrong, as a tree of exceptions.

::

    ConversionError
    ├── UsageError
    ├── SourceError
    │   ├── CheckpointNotFound ── NotFetched
    │   ├── MissingShard, InconsistentShards, CorruptFile, SourceChanged, UnsafePickle, MissingArguments
    │   └── UnsupportedModel, MissingTensor, UnknownTensor, WrongShape, ValueOverflow
    ├── MissingPackage, PlanError
    ├── TargetError
    │   └── TargetExists, TargetBusy, ResumeRefused, NotEnoughSpace
    ├── UploadError, DifferentModel
    ├── Interrupted ── Cancelled
    ├── LostRank, BudgetTooSmall
    └── Problems
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

#: How to go on where an unfinished target is left.
RESUME = "start the same command again; it goes on where this one stopped"

_LABELS = ("tensor", "file", "expected", "found", "remedy", "resume")


class ConversionError(Exception):
    """An error whose text is meant for the person who started the conversion.

    Args:
        what: one sentence on what is wrong.
        tensor, file, expected, found, remedy: the details, shown one a line where they are given.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        tensor: str = "",
        file: str = "",
        expected: object = "",
        found: object = "",
        remedy: str = "",
    ) -> None:
        self.what, self.tensor, self.file, self.remedy = what, tensor, file, remedy
        self.expected, self.found = str(expected), str(found)
        #: How to go on, where an unfinished target is left that can be gone on with.
        self.resume = ""
        #: Of the rank that met it, where that is another one; None otherwise.
        self.rank: int | None = None
        super().__init__(what)

    def __str__(self) -> str:
        details = [(label, str(getattr(self, label))) for label in _LABELS]
        return "\n".join([self.what, *(f"  {label + ':':10}{text}" for label, text in details if text)])


class UsageError(ConversionError):
    """A flag, a job file or a combination of flags is wrong (exit code 2)."""

    exit_code = 2


class SourceError(ConversionError):
    """The checkpoint cannot be converted as it is."""


class CheckpointNotFound(SourceError):
    """What the command names is not there, or is no checkpoint (exit code 2)."""

    exit_code = UsageError.exit_code


class NotFetched(CheckpointNotFound):
    """A hub does not give the model now, or not to this user, and its cache does not hold it."""

    exit_code = SourceError.exit_code


class MissingShard(SourceError):
    """A rank directory that the grid needs is not there."""


class InconsistentShards(SourceError):
    """Shards that cannot belong to one checkpoint."""


class CorruptFile(SourceError):
    """Truncated, or not what its header says."""


class SourceChanged(SourceError):
    """Written to or replaced while it was read."""


class UnsafePickle(SourceError):
    """The pickle names something that is never imported."""


class MissingArguments(SourceError):
    """No `args` in the checkpoint, or an argument that decides the model is absent."""


class UnsupportedModel(SourceError):
    """An architecture, option or format without a place in the target."""


class MissingTensor(SourceError):
    """A table row without a stored tensor."""


class UnknownTensor(SourceError):
    """A stored tensor without a table row."""


class WrongShape(SourceError):
    """A stored tensor of another shape or dtype than the arguments imply."""


class ValueOverflow(SourceError):
    """Finite values become infinite in the target dtype."""


class MissingPackage(ConversionError):
    """A package that only some conversions need is not installed."""


class PlanError(ConversionError):
    """A plan that does not cover its target exactly, or that differs between ranks."""


class TargetError(ConversionError):
    """The target cannot be written."""


class TargetExists(TargetError):
    """The target is not empty, and overwriting was not asked for."""


class TargetBusy(TargetError):
    """Another conversion is making the target."""


class ResumeRefused(TargetError):
    """An unfinished conversion of something else is where the target is made."""


class NotEnoughSpace(TargetError):
    """The target's file system is too small."""


class UploadError(ConversionError):
    """The hub cannot take the model; what was converted is complete."""


class DifferentModel(ConversionError):
    """`--verify` found that what was written is not the model that was read."""


class Interrupted(ConversionError):
    """A signal, SIGTERM or SIGINT, ended the conversion between two steps (exit code 143 or 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        self.resume = RESUME


class Cancelled(Interrupted):
    """The program that asked for the conversion ended it between two steps."""

    def __init__(self) -> None:
        super().__init__(signal.SIGINT)
        self.what = "cancelled"


class LostRank(ConversionError):
    """Another rank has ended, hangs, or cannot be reached."""


class BudgetTooSmall(ConversionError):
    """The memory budget, `--max-memory-per-rank`, does not hold one step (exit code 2)."""

    exit_code = UsageError.exit_code


class Problems(ConversionError):
    """Several errors, found together before the first byte moved."""

    SHOWN = 20

    def __init__(self, problems: Sequence[ConversionError]) -> None:
        self.problems = tuple(problems)
        if all(problem.exit_code == UsageError.exit_code for problem in problems):
            self.exit_code = UsageError.exit_code
        super().__init__(f"{len(self.problems)} problems found; nothing was written")

    def __str__(self) -> str:
        hidden = len(self.problems) - self.SHOWN
        lines = [self.what, *(str(problem) for problem in self.problems[: self.SHOWN])]
        return "\n".join(lines + ([f"... and {hidden} more"] if hidden > 0 else []))


def error_details(error: ConversionError) -> dict[str, Any]:
    """An error's class and its parts, in JSON values."""
    what = str(error) if isinstance(error, Problems) else error.what
    return {"class": type(error).__name__, "what": what, "exit_code": error.exit_code} | {
        label: getattr(error, label) for label in _LABELS
    }


def error_from_details(details: Mapping[str, Any]) -> ConversionError:
    """The error that was met elsewhere. Several together are one whose text is all of theirs."""
    kind = globals().get(details["class"], ConversionError)
    kind = ConversionError if issubclass(kind, Problems) else kind
    error: ConversionError = kind.__new__(kind)
    ConversionError.__init__(error, details["what"])  # others ask for what their words follow from
    for label in _LABELS:
        setattr(error, label, details[label])
    error.exit_code = details["exit_code"]
    return error


def lost_contact(found: str) -> LostRank:
    """Another rank is gone, or silent for too long."""
    return LostRank(
        "lost contact with another rank",
        found=found,
        remedy="look for the rank that ended first, or for a network that was cut, and start again",
    )


def raise_together(problems: Sequence[ConversionError]) -> None:
    """Raise one problem as itself and several as `Problems`; return when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)
