"""Opens a distributed checkpoint of Megatron-Core's: `.metadata`, the args, and the headers of all blobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from dist_convert.errors import below
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.dcp.headers import find_chunks, read_by_one
from dist_convert.formats.foreign import notes_on_classes
from dist_convert.formats.format import MegatronModel
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.megatron.iterations import notes_on_iteration
from dist_convert.formats.megatron.names import is_of_mtp
from dist_convert.formats.megatron.parameters import MegatronCatalog
from dist_convert.formats.megatron.said import said_of
from dist_convert.formats.megatron.target_args import model_values
from dist_convert.formats.tokenizer.find import shared_tokenizer
from dist_convert.formats.torch_dist import catalog as catalogs
from dist_convert.formats.torch_dist.contents import read_contents
from dist_convert.models.blocks import MTP_REASON
from dist_convert.models.catalog import LeftBehind, Where
from dist_convert.options import TORCH_DIST
from dist_convert.ranks.collectives import World
from dist_convert.read.dcp import METADATA_FILE
from dist_convert.records import DTYPE_BYTES, JsonObject


@dataclass(frozen=True, kw_only=True)
class DistModel(MegatronModel):
    """A checkpoint whose headers are read; its args have the rows of the embedding that is stored.

    `stored` are the tensors of the model, by Megatron's names of them, `args_file` holds the args, in the directory,
    and `format` is which of Megatron's distributed formats.
    """

    stored: Mapping[str, Stored]
    args_file: str
    format: str

    def catalog(
        self, vocab: int | None = None, *, with_tied_copies: bool = False
    ) -> tuple[MegatronCatalog, LeftBehind]:
        """See `Model`; a tied embedding is stored once."""
        with below(self.directory):
            architecture = self.said.architecture(vocab=self.vocab or vocab, file=self.args_file)
            architecture = catalogs.with_own_head(architecture, self.args, self.stored)
            catalog = catalogs.open_catalog(self.stored, architecture, self.args, METADATA_FILE, self.format)
            return catalog, self.beside


def open_torch_dist(where: Where, directory: Path, world: World) -> DistModel:
    """Read `.metadata` on one rank that sees it, and each blob's header on a rank that sees its file.

    Raises:
        CheckpointNotFound, SourceError: it is incomplete, or cannot be converted as it is.
    """
    said = read_by_one(directory, world, partial(read_contents, may_lack_args=where.like is not None))
    args: JsonObject = said["args"]
    args_file: str = said["args_file"]
    notes = notes_on_iteration(directory, said["iteration"])
    if not args and where.like is not None:
        args = model_values(architecture_from_config(where.like, zero_output_bias=True))
        note = "warning: there are no args: --like says what the model is, and norms are read as stored"
        if said["format"] != TORCH_DIST:  # see `check_gates`
            note += "; gate and up are read as saved with a tensor parallel size of 1"
        notes = (*notes, note)
    found, chunks = find_chunks(directory, said["tensors"], world)
    with below(directory):
        stored = catalogs.by_name(chunks, said["prefix"])
    beside = [tuple(item) for item in said["beside"]]
    if where.asked.drop_mtp:
        dropped = [tensor for name, tensor in stored.items() if is_of_mtp(name)]
        stored = {name: tensor for name, tensor in stored.items() if not is_of_mtp(name)}
        size_bytes = sum(DTYPE_BYTES[tensor.dtype] * prod(tensor.shape) for tensor in dropped)
        beside += [(MTP_REASON, len(dropped), size_bytes)] if dropped else []
    with below(directory):
        known = said_of(where, catalogs.stored_args(args, stored), args_file)
        if said["format"] != TORCH_DIST:
            catalogs.check_gates(stored, known.args)
        padded = known.architecture(vocab=None, file=args_file).padded_vocab
    shown = str(directory / args_file)
    tokenizer, vocab = shared_tokenizer(where, known.args, directory, world, padded=padded, file=shown)
    return DistModel(
        directory=directory,
        found=found,
        said=known,
        iteration=said["iteration"],
        tokenizer=tokenizer,
        vocab=vocab,
        beside=tuple(beside),
        notes=(*notes, *notes_on_classes(said["foreign_classes"]), *known.notes),
        stored=stored,
        args_file=args_file,
        format=said["format"],
    )
