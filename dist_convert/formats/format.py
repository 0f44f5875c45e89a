"""What a command asks of a checkpoint of any format: what its headers say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_convert.formats.megatron.said import Said
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.models.catalog import Catalog, LeftBehind
from dist_convert.read.discover import Discovery
from dist_convert.records import JsonObject
from dist_convert.write.task import Source


class Model(Source, Protocol):
    """A checkpoint of some format whose headers are read, on every rank."""

    @property
    def vocab(self) -> int | None:
        """Tokens without padding; None where nobody says."""

    @property
    def config(self) -> JsonObject | None:
        """The content of config.json, or of the one that the user names; None where there is none."""

    @property
    def args(self) -> JsonObject | None:
        """The training arguments; None where the format has none."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the training arguments or the user name, as rank 0 sees it; of kind "none" otherwise."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it is read, a line each."""

    def catalog(self, vocab: int | None = None, *, with_tied_copies: bool = False) -> tuple[Catalog, LeftBehind]:
        """The checkpoint as a catalog, and what of it is not part of the model.

        Args:
            vocab: tokens without padding, for a checkpoint that does not say; None takes the padded size.
            with_tied_copies: further copies of a tied embedding count as replicas of it.

        Raises:
            SourceError: all that the headers show to be wrong.
        """


@dataclass(frozen=True, kw_only=True)
class MegatronModel:
    """What is known of a Megatron checkpoint whose headers are read, beside its tensors.

    Attributes:
        directory: the iteration's, as this rank sees it.
        found: its files that hold weights.
        said: the training arguments, as the user corrects them, and what is known beside.
        iteration: training step, or None.
        tokenizer, vocab, notes: see `Model`.
        beside: what the checkpoint holds beside the model.
    """

    directory: Path
    found: Discovery
    said: Said
    iteration: int | None
    tokenizer: Tokenizer
    vocab: int | None
    beside: LeftBehind
    notes: tuple[str, ...]

    @property
    def config(self) -> JsonObject | None:
        return self.said.config

    @property
    def args(self) -> JsonObject:
        return self.said.args
