"""The headers of a distributed checkpoint: `.metadata`, read by one rank, and those of the chunks, dealt by file."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

from dist_convert.errors import CheckpointNotFound, MissingShard, below
from dist_convert.formats.dcp.chunks import Stored, StoredChunk, chunk_name
from dist_convert.formats.foreign import refuse_foreign_tensors
from dist_convert.formats.huggingface.read import header_from_json, header_to_json, read_safetensors_shard
from dist_convert.models.catalog import by_reason
from dist_convert.ranks.collectives import World, broadcast, gather_objects
from dist_convert.read.dcp import METADATA_FILE, SHARDS, Blob, Chunk, Metadata, SavedTensor, not_as_listed, place_chunks
from dist_convert.read.discover import Discovery, check_same_files, discover, gather_listings
from dist_convert.read.source import file_signature, opened_source, read_small_file
from dist_convert.read.torch_file import MAX_PICKLE_BYTES
from dist_convert.records import JsonObject, StoredTensor, names


def sort_out(metadata: Metadata, reason_of: Callable[[str, SavedTensor | Blob], str]) -> dict[str, Any]:
    """The tensors of the model by their keys, and what lies beside it by reason, in JSON values.

    Args:
        metadata: what `.metadata` says.
        reason_of: why something under a key is left, "" for tensors of the model.
    """
    tensors = {}
    left = []
    listed: dict[str, SavedTensor | Blob] = {**metadata.tensors, **metadata.objects}
    for key, saved in listed.items():
        reason = reason_of(key, saved)
        if isinstance(saved, SavedTensor) and not reason:
            chunks = [[c.offsets, c.sizes, c.blob.file, c.blob.offset_bytes, c.blob.size_bytes] for c in saved.chunks]
            tensors[key] = [saved.dtype, saved.shape, chunks]
        else:
            left.append((reason, 1, saved.size_bytes))
    return {"tensors": tensors, "beside": by_reason(left)}


def _tensor_from_json(values: Sequence[Any]) -> SavedTensor:
    dtype, shape, chunks = values
    listed = tuple(Chunk(tuple(at), tuple(sizes), Blob(*blob)) for at, sizes, *blob in chunks)
    return SavedTensor(dtype, tuple(shape), listed)


def read_by_one(directory: Path, world: World, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What one rank that sees `.metadata` reads of it and of what lies beside it, in JSON values, for all.

    Raises:
        CheckpointNotFound: no rank sees it.
        InconsistentShards: nodes have different ones.
    """
    if any(gather_objects(world, bool(shards_of(directory)))):
        return _shared(directory, 0, world, read)
    path = directory / METADATA_FILE
    listings = gather_listings(world, {METADATA_FILE: file_signature(path)} if path.is_file() else {})
    seeing = [rank for rank, listing in enumerate(listings) if listing]
    if not seeing:
        what = "no rank sees .metadata, and the .distcp files cannot be read without it"
        expected = "the file that training writes last, on the node of its first rank"
        remedy = "copy it beside the .distcp files; an interrupted save has none: then use an earlier iteration"
        raise CheckpointNotFound(what, path, expected, remedy=remedy)
    check_same_files(
        world, directory, listings, lambda _: hashlib.sha256(read_small_file(path, MAX_PICKLE_BYTES)).hexdigest()
    )
    return _shared(directory, seeing[0], world, read)


def _shared(directory: Path, reader: int, world: World, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    data = json.dumps(read(directory)).encode() if world.rank == reader else b""
    size_bytes = gather_objects(world, len(data))[reader]
    said: dict[str, Any] = json.loads(broadcast(world, data, size_bytes, reader))
    return said


def find_chunks(directory: Path, listed: JsonObject, world: World) -> tuple[Discovery, dict[str, Stored]]:
    """The files of a checkpoint, and where in them each chunk lies: each blob's header is read on a rank that sees it.

    Args:
        directory: with `.metadata`, as this rank sees it.
        listed: the tensors by key, as `sort_out` gives them.
        world: this rank.

    Raises:
        CheckpointNotFound, SourceError: it is incomplete or damaged, or of a kind that is not read.
    """
    tensors = {key: _tensor_from_json(values) for key, values in listed.items()}
    refuse_foreign_tensors({METADATA_FILE: tensors}, directory)
    chunks_of: dict[str, list[tuple[str, str, Chunk]]] = {}
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            chunks_of.setdefault(chunk.blob.file, []).append((key, tensor.dtype, chunk))
    seen = [file for file in sorted(chunks_of) if (directory / file).is_file()]
    with below(directory):
        read_header = partial(_read_header, directory, chunks_of)
        found = discover(world, directory, seen, read_header, expected=f"{', '.join(chunks_of)[:200]}")
    missing = sorted(chunks_of.keys() - found.headers.keys())
    if missing:
        raise MissingShard(
            "files that .metadata names are on no rank's disk",
            directory,
            expected=f"{len(chunks_of)} files with weights",
            found=f"{len(missing)} missing: {names(missing)}",
            remedy="copy the missing files beside the others, or run on all nodes that hold some of them",
        )
    placed: dict[str, list[StoredChunk]] = {key: [] for key in tensors}
    for file, header in sorted(found.headers.items()):
        for (key, _, chunk), place in zip(chunks_of[file], header_from_json(file, header).values(), strict=True):
            place = replace(place, name=chunk_name(key, chunk.offsets))
            placed[key].append(StoredChunk(chunk.offsets, place))
    found = found.with_checksums(chunk.place for chunks in placed.values() for chunk in chunks)
    return found, {key: Stored(key, t.dtype, t.shape, tuple(placed[key])) for key, t in tensors.items()}


def _read_header(directory: Path, chunks_of: Mapping[str, Sequence[tuple[str, str, Chunk]]], file: str) -> list[Any]:
    """Where the elements of each chunk of a file lie, by its number, as `header_to_json` has it."""
    chunks, path = chunks_of[file], directory / file
    with opened_source(path) as opened:
        is_safetensors = opened.read(9)[8:] == b"{"  # behind the length of the header; a zip has zeros there
    placed = _in_safetensors(path, file, chunks) if is_safetensors else place_chunks(directory, file, chunks)
    return header_to_json({str(number): tensor for number, tensor in enumerate(placed)})


def _in_safetensors(path: Path, file: str, chunks: Sequence[tuple[str, str, Chunk]]) -> list[StoredTensor]:
    """The same as `place_chunks`, of blobs that are one safetensors file together, where their offsets say nothing."""
    tensors, offsets = read_safetensors_shard(path, file)
    for key, dtype, chunk in chunks:
        tensor = tensors.get(key)
        found = (tensor.dtype, tensor.shape, offsets.get(key)) if tensor else "no such tensor"
        if found != (dtype, chunk.sizes, chunk.offsets):
            raise not_as_listed(path, key, (dtype, chunk.sizes, chunk.offsets), found)
    return [tensors[key] for key, _, _ in chunks]


def shards_of(directory: Path) -> list[str]:
    """The files that HuggingFaceStorageWriter saved of a distributed checkpoint, which has no `.metadata`."""
    return [] if (directory / METADATA_FILE).is_file() else sorted(path.name for path in directory.glob(SHARDS))


def read_shards(directory: Path) -> Metadata:
    """What `.metadata` would say of such files; `find_chunks` compares them with it.

    Raises:
        CorruptFile: a damaged file.
    """
    chunks_of: dict[str, list[Chunk]] = {}
    dtypes = {}
    for file in shards_of(directory):
        with below(directory):
            tensors, offsets = read_safetensors_shard(directory / file, file)
        for key, tensor in tensors.items():
            if key not in offsets:
                raise not_as_listed(directory / file, key, "its place in DCP_SHARDING_INFO", "none")
            if 0 not in tensor.shape:  # as that of a rank without rows
                dtypes[key] = tensor.dtype
                chunks_of.setdefault(key, []).append(Chunk(offsets[key], tensor.shape, Blob(file, 0, 0)))
    listed = {}
    for key, chunks in chunks_of.items():
        ends = [map(add, chunk.offsets, chunk.sizes) for chunk in chunks]
        listed[key] = SavedTensor(dtypes[key], tuple(map(max, zip(*ends, strict=False))), tuple(chunks))
    return Metadata(listed, {})
