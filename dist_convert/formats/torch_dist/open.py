"""Opens a checkpoint of Megatron-Core's `torch_dist` format: `.metadata`, the args, and the headers of all blobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from dist_convert.errors import below
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.dcp.headers import find_chunks, read_by_one
from dist_convert.formats.foreign import notes_on_classes
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.megatron.iterations import notes_on_iteration
from dist_convert.formats.megatron.names import is_of_mtp, normalise
from dist_convert.formats.megatron.said import Said, said_of
from dist_convert.formats.megatron.target_args import model_values
from dist_convert.formats.tokenizer.find import shared_tokenizer
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.formats.torch_dist.catalog import (
    DistCatalog,
    open_catalog,
    stored_args,
    with_own_head,
)
from dist_convert.formats.torch_dist.contents import read_contents
from dist_convert.models.blocks import MTP_REASON
from dist_convert.models.catalog import LeftBehind, Where
from dist_convert.options import TORCH_DIST
from dist_convert.ranks.collectives import World
from dist_convert.read.dcp import METADATA_FILE
from dist_convert.read.discover import Discovery
from dist_convert.records import DTYPE_BYTES


@dataclass(frozen=True)
class DistModel:
    """A checkpoint whose headers are read.

    Attributes:
        directory: the iteration's, as this rank sees it.
        found: its files that hold weights.
        stored: the tensors of the model, by their keys.
        said: the training arguments, and what is known beside.
        args_file: that holds them, in the directory.
        iteration: training step, or None.
        tokenizer: the one that the args or the user name, as rank 0 sees it.
        vocab: tokens without padding; None where nobody says.
        beside: what the checkpoint holds beside the model.
        notes: what the user should know of it.
    """

    directory: Path
    found: Discovery
    stored: Mapping[str, Stored]
    said: Said
    args_file: str
    iteration: int | None
    tokenizer: Tokenizer
    vocab: int | None
    beside: LeftBehind
    notes: tuple[str, ...] = ()
    format: str = TORCH_DIST

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Of such a model, where the user names one."""
        return self.said.config

    @property
    def args(self) -> Mapping[str, Any]:
        """The training arguments, as the user corrects them, with the rows of the embedding that is stored."""
        return self.said.args

    def catalog(self, vocab: int | None = None, *, with_tied_copies: bool = False) -> tuple[DistCatalog, LeftBehind]:
        """See `Model`; a tied embedding is stored once."""
        with below(self.directory):
            architecture = self.said.architecture(vocab=self.vocab or vocab, file=self.args_file)
            architecture = with_own_head(architecture, self.args, self.stored)
            return open_catalog(self.stored, architecture, self.args, METADATA_FILE), self.beside


def open_torch_dist(where: Where, directory: Path, world: World) -> DistModel:
    """Read `.metadata` on one rank that sees it, and each blob's header on a rank that sees its file.

    Args:
        where: the checkpoint.
        directory: of its iteration, as this rank sees it.
        world: this rank.

    Raises:
        CheckpointNotFound, SourceError: it is incomplete, or cannot be converted as it is.
    """
    said = read_by_one(directory, world, partial(read_contents, may_lack_args=where.like is not None))
    args: dict[str, Any] = said["args"]
    args_file: str = said["args_file"]
    notes = notes_on_iteration(directory, said["iteration"])
    if not args and where.like is not None:
        args = model_values(architecture_from_config(where.like, zero_output_bias=True))
        notes = (*notes, "warning: there are no args: --like says what the model is, and norms are as they are stored")
    found, stored = find_chunks(directory, said["tensors"], world)
    beside = [tuple(item) for item in said["beside"]]
    if where.asked.drop_mtp:
        dropped = [tensor for key, tensor in stored.items() if is_of_mtp(normalise(key))]
        stored = {key: tensor for key, tensor in stored.items() if not is_of_mtp(normalise(key))}
        size_bytes = sum(DTYPE_BYTES[tensor.dtype] * prod(tensor.shape) for tensor in dropped)
        beside += [(MTP_REASON, len(dropped), size_bytes)] if dropped else []
    with below(directory):
        known = said_of(where, stored_args(args, stored), args_file)
        padded = known.architecture(vocab=None, file=args_file).padded_vocab
    shown = str(directory / args_file)
    tokenizer, vocab = shared_tokenizer(where, known.args, directory, world, padded=padded, file=shown)
    classes = notes_on_classes(said["foreign_classes"])
    notes = (*notes, *classes, *known.notes)
    return DistModel(
        directory, found, stored, known, args_file, said["iteration"], tokenizer, vocab, tuple(beside), notes
    )
