"""Opens a checkpoint of Megatron-Core's `torch_dist` format: `.metadata`, the args, and the headers of all blobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from dist_convert.errors import CheckpointNotFound, InconsistentShards, MissingShard, below
from dist_convert.formats.foreign import notes_on_classes, refuse_foreign_tensors
from dist_convert.formats.megatron.iterations import notes_on_iteration
from dist_convert.formats.megatron.names import is_of_mtp, normalise
from dist_convert.formats.megatron.said import Said, said_of
from dist_convert.formats.tokenizer.find import shared_tokenizer
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.formats.torch_dist.catalog import (
    DistCatalog,
    Stored,
    StoredChunk,
    open_catalog,
    stored_args,
    with_own_head,
)
from dist_convert.formats.torch_dist.contents import read_contents
from dist_convert.models.blocks import MTP_REASON
from dist_convert.models.catalog import LeftBehind, Where
from dist_convert.options import TORCH_DIST
from dist_convert.ranks.collectives import World, broadcast, gather_objects
from dist_convert.read.dcp import METADATA_FILE, Blob, Chunk, place_chunks
from dist_convert.read.discover import Discovery, discover
from dist_convert.read.source import reading, stamp
from dist_convert.records import DTYPE_BYTES, names


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

    @property
    def format(self) -> str:
        return TORCH_DIST

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
            padded = self.said.architecture(vocab=None, file=self.args_file).padded_vocab
            size = min(self.vocab or vocab or padded, padded)
            architecture = self.said.architecture(vocab=size, file=self.args_file)
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
    said = _shared_metadata(directory, world)
    args: dict[str, Any] = said["args"]
    args_file: str = said["args_file"]
    tensors = {key: _saved(saved) for key, saved in said["tensors"].items()}
    refuse_foreign_tensors({METADATA_FILE: tensors}, directory)
    chunks_of: dict[str, list[tuple[str, str, Chunk]]] = {}
    for key, (dtype, _, chunks) in tensors.items():
        for chunk in chunks:
            chunks_of.setdefault(chunk.blob.file, []).append((key, dtype, chunk))
    seen = [file for file in sorted(chunks_of) if (directory / file).is_file()]
    found = discover(
        world, directory, seen, partial(_read_header, directory, chunks_of), expected=f"{', '.join(chunks_of)[:200]}"
    )
    found = found.with_checksums(
        (file, offset_bytes, size_bytes, checksum)
        for file, header in found.headers.items()
        for _, _, _, offset_bytes, _, size_bytes, checksum in header
    )
    missing = sorted(chunks_of.keys() - found.headers.keys())
    if missing:
        raise MissingShard(
            "files that .metadata names are on no rank's disk",
            file=str(directory),
            expected=f"{len(chunks_of)} files with weights",
            found=f"{len(missing)} missing: {names(missing)}",
            remedy="copy the missing files beside the others, or run on all nodes that hold some of them",
        )
    stored, beside = _stored(tensors, found), [tuple(item) for item in said["beside"]]
    if where.drops_mtp:
        dropped = [tensor for key, tensor in stored.items() if is_of_mtp(normalise(key))]
        stored = {key: tensor for key, tensor in stored.items() if not is_of_mtp(normalise(key))}
        size_bytes = sum(DTYPE_BYTES[tensor.dtype] * prod(tensor.shape) for tensor in dropped)
        beside += [(MTP_REASON, len(dropped), size_bytes)] if dropped else []
    with below(directory):
        known = said_of(where, stored_args(args, stored), args_file)
        padded = known.architecture(vocab=None, file=args_file).padded_vocab
    tokenizer, vocab = shared_tokenizer(where, known.args, directory, world, padded=padded, file=args_file)
    classes = notes_on_classes(said["foreign_classes"])
    notes = (*notes_on_iteration(directory, said["iteration"]), *classes, *known.notes)
    return DistModel(
        directory, found, stored, known, args_file, said["iteration"], tokenizer, vocab, tuple(beside), notes
    )


#: dtype, shape and chunks of a tensor.
_Saved = tuple[str, tuple[int, ...], tuple[Chunk, ...]]


def _saved(values: Sequence[Any]) -> _Saved:
    """The inverse of what `read_contents` makes of a tensor."""
    dtype, shape, chunks = values
    return dtype, tuple(shape), tuple(Chunk(tuple(at), tuple(sizes), Blob(*blob)) for at, sizes, *blob in chunks)


def _shared_metadata(directory: Path, world: World) -> dict[str, Any]:
    """What one rank that sees `.metadata` reads of it and of the args, for all.

    Raises:
        CheckpointNotFound: no rank sees it.
        InconsistentShards: nodes have different ones.
    """
    path = directory / METADATA_FILE
    stamps: list[list[int] | None] = gather_objects(world, list(stamp(path)) if path.is_file() else None)
    firsts = {stamps.index(one) for one in stamps if one is not None}
    if not firsts:
        raise CheckpointNotFound(
            "no rank sees .metadata, without which the .distcp files cannot be read",
            file=str(path),
            expected="the file that training writes last, on the node of its first rank",
            remedy="copy it beside the .distcp files; a save that was interrupted has none: take an earlier iteration",
        )
    reader = min(firsts)
    with reading(path):
        mine = _digest(path) if world.rank in firsts else ""
    digests: list[str] = gather_objects(world, mine)
    others = [rank for rank in sorted(firsts) if digests[rank] != digests[reader]]
    if others:
        raise InconsistentShards(
            "nodes have different files .metadata",
            file=str(path),
            expected="one checkpoint's on every node that has it",
            found=f"another one on rank {others[0]} than on rank {reader}",
            remedy="nodes hold files of different runs or iterations; name the iteration, or copy the right files",
        )
    data = json.dumps(read_contents(directory)).encode() if world.rank == reader else b""
    size_bytes: int = gather_objects(world, len(data))[reader]
    said: dict[str, Any] = json.loads(broadcast(world, data, size_bytes, reader))
    return said


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_header(directory: Path, chunks_of: Mapping[str, Sequence[tuple[str, str, Chunk]]], file: str) -> list[Any]:
    """Of each chunk of a file its key, its box, where its elements lie, and their size and checksum."""
    chunks = chunks_of[file]
    placed = place_chunks(directory, file, chunks)
    return [
        [key, chunk.offsets, chunk.sizes, tensor.offset_bytes, tensor.strides, tensor.size_bytes, tensor.checksum]
        for (key, _, chunk), tensor in zip(chunks, placed, strict=True)
    ]


def _stored(tensors: Mapping[str, _Saved], found: Discovery) -> dict[str, Stored]:
    chunks_of: dict[str, list[StoredChunk]] = {key: [] for key in tensors}
    for file, header in sorted(found.headers.items()):
        for key, offsets, sizes, offset_bytes, strides, _, _ in header:
            chunk = StoredChunk(tuple(offsets), tuple(sizes), file, offset_bytes, tuple(strides))
            chunks_of[key].append(chunk)
    return {key: Stored(key, dtype, shape, tuple(chunks_of[key])) for key, (dtype, shape, _) in tensors.items()}
