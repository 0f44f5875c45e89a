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

import errno
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: How to go on where an unfinished target is left.
RESUME = "start the same command again; it continues where this one stopped"

_LABELS = ("tensor", "file", "expected", "found", "remedy", "resume")

_LONGEST, _LONGEST_LINE, _MOST_LINES = 200, 1000, 60
_PLAIN_OCTETS = frozenset(range(32, 127)) - set(b"\\'")
_LONG_WORD = re.compile(rf"(\S{{{_LONGEST}}})\S+")


def shown(text: object, most: int = _LONGEST) -> str:
    """A text as it is printed, whoever has written it: a line without anything that a terminal obeys, and not too long.

    Whatever comes from a file, a path, a flag or a hub goes through here before it is printed, and nowhere before.
    """
    line = str(text)
    line = line if len(line) <= most else f"{line[:most]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def shown_line(text: object) -> str:
    """A line of ours with names of others in it, as it is printed."""
    return shown(_LONG_WORD.sub(r"\1...", str(text)), _LONGEST_LINE)


def quoted(word: str) -> str:
    """A word of a command that is printed to be pasted; one that is not printable, in a form that bash and zsh know."""
    if word.isprintable():
        return shlex.quote(word)
    octets = (chr(octet) if octet in _PLAIN_OCTETS else f"\\x{octet:02x}" for octet in os.fsencode(word))
    return f"$'{''.join(octets)}'"


_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path without links that lead to themselves",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow this machine more open files",
    errno.ENOENT: "check that the path and the current directory are still there",
    errno.EFBIG: "lift the limit on the size of files (ulimit -f)",
    errno.EBUSY: "unmount what is mounted there",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow this user to read and write there"),
}


def remedy_of(error: OSError) -> str:
    """What helps against a refusal of the operating system, as a command without its end."""
    return _REMEDIES.get(error.errno or 0, "check the disk or network file system")


class ConversionError(Exception):
    """An error whose text is meant for the person who started the conversion.

    Args:
        what: one sentence on what is wrong.
        file, expected, found, remedy, tensor: the details, shown one a line where they are given.
        lines: what has lines of its own, such as a traceback; of many the last are shown.
    """

    exit_code = 1
    #: What helps where an error of this kind says nothing better.
    usual_remedy = ""

    def __init__(
        self,
        what: str,
        file: object = "",
        expected: object = "",
        found: object = "",
        remedy: str = "",
        *,
        tensor: str = "",
        lines: Sequence[str] = (),
    ) -> None:
        self.what, self.tensor, self.file, self.lines = what, tensor, str(file), tuple(lines)
        self.expected, self.found, self.remedy = str(expected), str(found), remedy or self.usual_remedy
        #: How to go on, where an unfinished target is left that can be gone on with.
        self.resume = ""
        #: Of the rank that met it, where that is another one; None otherwise.
        self.rank: int | None = None
        super().__init__(what)

    def __str__(self) -> str:
        details = [(label, str(getattr(self, label))) for label in _LABELS]
        lines = [shown_line(self.what)]
        lines += [f"  {label + ':':10}{shown_line(text)}" for label, text in details if text]
        lines += [f"  | {shown_line(line)}" for line in self.lines[-_MOST_LINES:]]
        return "\n".join(lines)


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

    usual_remedy = "the file is damaged or cut short: copy the file again from where it was saved, or download it again"


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
    """Several errors, found together before the first byte moved: causes first, and those alike as one."""

    SHOWN = 20

    def __init__(self, problems: Sequence[ConversionError]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: not isinstance(problem, _CAUSES)))
        if all(problem.exit_code == UsageError.exit_code for problem in problems):
            self.exit_code = UsageError.exit_code
        super().__init__(f"{len(self.problems)} problems found; nothing was written")

    def __str__(self) -> str:
        alike: dict[tuple[object, ...], list[ConversionError]] = {}
        for problem in self.problems:
            # Tensors are alike; of what concerns none, such as arguments, each says something else.
            said = (problem.what, problem.remedy, *(() if problem.tensor else (problem.expected, problem.found)))
            kind = type(problem), *(re.sub(r"\b\d+\b", "0", one[:_LONGEST_LINE]) for one in said)
            alike.setdefault(kind, []).append(problem)
        lines = [self.what]
        for first, *others in list(alike.values())[: self.SHOWN]:
            lines.append(str(first))
            if others:
                last = shown(others[-1].tensor or others[-1].file or others[-1].what)
                lines.append(f"  and {len(others)} more like it, the last for {last}")
        hidden = len(alike) - self.SHOWN
        return "\n".join(lines + ([f"... and {hidden} more kinds"] if hidden > 0 else []))


#: What makes tensors be missing or of another shape.
_CAUSES = (MissingShard, CorruptFile, InconsistentShards, MissingArguments, UnsupportedModel)


@contextmanager
def below(directory: Path, name: str = "") -> Iterator[None]:
    """Within it errors name files as a directory calls them, or none; they leave it with paths, or the directory's.

    `name` is that of the one file that all of it is about.
    """
    try:
        yield
    except ConversionError as error:
        for problem in error.problems if isinstance(error, Problems) else (error,):
            file = name or problem.file
            problem.file = file if Path(file).is_relative_to(directory) else str(directory / file)
        raise


@contextmanager
def called(name: str) -> Iterator[None]:
    """Puts the name of what is worked on before what is wrong with it."""
    try:
        yield
    except ConversionError as error:
        error.what = f"{name}: {error.what}"
        raise


def error_details(error: ConversionError) -> dict[str, Any]:
    """An error's class and its parts, in JSON values."""
    problems = [error_details(one) for one in error.problems] if isinstance(error, Problems) else []
    parts = {"class": type(error).__name__, "what": error.what, "exit_code": error.exit_code, "lines": error.lines}
    return {**parts, "problems": problems, **{label: getattr(error, label) for label in _LABELS}}


def error_from_details(details: Mapping[str, Any]) -> ConversionError:
    """The error that was met elsewhere."""
    kind = globals().get(details["class"], ConversionError)
    error: ConversionError = kind.__new__(kind)
    if isinstance(error, Problems):
        Problems.__init__(error, [error_from_details(one) for one in details["problems"]])
    else:
        ConversionError.__init__(error, details["what"])  # others ask for what their words follow from
    for label in _LABELS:
        setattr(error, label, details[label])
    error.lines = tuple(details["lines"])
    error.exit_code = details["exit_code"]
    return error


def collected(checks: Iterable[Callable[[], object]]) -> list[ConversionError]:
    """All that is wrong according to some checks."""
    problems: list[ConversionError] = []
    for check in checks:
        try:
            check()
        except ConversionError as error:
            problems += error.problems if isinstance(error, Problems) else (error,)
    return problems


def raise_together(problems: Sequence[ConversionError]) -> None:
    """Raise one problem as itself and several as `Problems`; return when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)
