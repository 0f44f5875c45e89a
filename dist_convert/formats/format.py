"""What a command asks of a checkpoint of any format: what its headers say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.models.catalog import Catalog, LeftBehind
from dist_convert.read.discover import Discovery


class Model(Protocol):
    """A checkpoint of some format whose headers are read, on every rank."""

    @property
    def directory(self) -> Path:
        """Of its files, as this rank sees it."""

    @property
    def found(self) -> Discovery:
        """Its files, and which rank sees them."""

    @property
    def format(self) -> str:
        """Its name, such as "torch"."""

    @property
    def vocab(self) -> int | None:
        """Tokens without padding; None where nobody says."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The content of config.json, or of the one that the user names; None where there is none."""

    @property
    def args(self) -> Mapping[str, Any] | None:
        """The training arguments; None where the format has none."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the training arguments or the user name, as rank 0 sees it; of kind "none" otherwise."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it is read, a line each."""

    def catalog(self, vocab: int | None = None, *, with_tied_copies: bool = False) -> tuple[Catalog, LeftBehind]:
        """The checkpoint as a catalog, and what of it is no part of the model.

        Args:
            vocab: tokens without padding, for a checkpoint that does not say; None takes the padded size.
            with_tied_copies: further copies of a tied embedding count as replicas of it.

        Raises:
            SourceError: all that the headers show to be wrong.
        """
