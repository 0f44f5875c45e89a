"""What a conversion asks of a target's format, besides its catalog: its files, and all that is no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_convert.records import TargetFile
from dist_convert.write.checksums import KnownRange


class Target(Protocol):
    """A checkpoint of some format that is to be made.

    Every rank has it, and calls what it says of itself; `partial` is the directory in which the target is made.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the weights files' bytes depend on besides the source, in JSON values."""

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """Make weights files in their final size; `is_first` on one rank, which also makes what may fail early."""

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """Complete some weights files, which no other rank does, and on one rank add all that is no weight.

        Args:
            partial: the directory.
            files: this rank's share of the files.
            known: by file, the ranges whose checksums were taken when they were written.
            is_first: whether this rank adds the rest.
        """

    def publish(self) -> None:
        """What follows the renaming, on the first rank of each place."""

    def to_do(self) -> str:
        """What is left for the user to do, for the very end; nothing where nothing is."""
