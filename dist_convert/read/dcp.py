"""A distributed checkpoint of PyTorch (DCP) on disk: `.metadata`, and the `.distcp` files that hold the blobs it names.

Each blob is what `torch.save` made of one box of one tensor, or of one object. Only `.metadata` and the blobs' headers
are read. Facts: docs/formats.md, "torch_dist"; source:
https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.restricted_pickle import Dtype, Inert, Tensor, load
from dist_convert.read.source import opened_source, read_small_file
from dist_convert.read.torch_file import MAX_PICKLE_BYTES, open_object, place_tensors
from dist_convert.records import DTYPE_BYTES, JsonObject, StoredTensor

METADATA_FILE = ".metadata"
SUFFIX = ".distcp"
#: What HuggingFaceStorageWriter calls the files of a distributed checkpoint, beside which there is no `.metadata`.
SHARDS = "shard-*-model-*.safetensors"
_MOST_DIMENSIONS = 8
_MOST = 1 << 60
_LONGEST_NAME_BYTES = 255
#: Of a chunk in `.metadata`, less than what it takes; tensors of a pickle may share a list of a million.
_LEAST_CHUNK_BYTES = 16


@dataclass(frozen=True)
class Blob:
    """Where a box of a tensor, or an object, was saved: a stretch of a file beside `.metadata`."""

    file: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, by its first element and its size in every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the checkpoint: the safetensors name of its dtype, its shape, and the boxes it was saved in."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says: tensors and objects by their keys."""

    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, Blob]


def read_metadata(path: Path) -> Metadata:
    """Read `.metadata`; nothing of it is imported or run.

    Raises:
        CorruptFile, UnsafePickle: it is damaged, or names what no checkpoint needs.
        UnsupportedModel: its blobs are compressed or changed otherwise.
    """
    file = str(path)
    content = read_small_file(path, MAX_PICKLE_BYTES)
    saved = load(content, file)
    is_core = isinstance(saved, Inert) and saved.class_name.endswith(".MCoreMetadata")  # up to Megatron-Core 0.15
    kind = "MCoreMetadata" if is_core else "Metadata"
    state = _state(saved, kind, file)
    blobs = _blobs(_mapping(state, "storage_data", file), file)
    tensors = {}
    objects = {}
    most = chunks_left = len(content) // _LEAST_CHUNK_BYTES
    for key, saved in _mapping(state, "state_dict_metadata", file).items():
        if not isinstance(key, str):
            raise _damaged(file, "a tensor's key", key)
        if isinstance(saved, Inert) and saved.class_name.endswith(".BytesStorageMetadata"):
            objects[key] = _blob(blobs, key, None, file)
        else:
            described = _state(saved, "TensorStorageMetadata", file)
            listed = described.get("chunks")
            chunks_left -= len(listed) if isinstance(listed, list) else 0
            if chunks_left < 0:
                expected = f"at most {most:,} chunks, as many as a file of its size can list"
                raise _damaged(file, expected, f"more of them up to {key[:80]}")
            tensors[key] = _tensor(key, described, blobs, file)
    return Metadata(tensors, objects)


#: Key and first element -> the blob, or several of them. Objects have no first element.
_Blobs = Mapping[tuple[str, tuple[int, ...] | None], set[Blob]]


def _blobs(stored: Mapping[Any, Any], file: str) -> _Blobs:
    found: dict[tuple[str, tuple[int, ...] | None], set[Blob]] = {}
    for index, info in stored.items():
        named, place = _state(index, "MetadataIndex", file), _state(info, "_StorageInfo", file)
        if place.get("transform_descriptors"):
            raise UnsupportedModel(
                "blobs that were compressed or otherwise changed when saved",
                file,
                tensor=_shown(named.get("fqn")),
                found=f"transform_descriptors {_shown(place['transform_descriptors'])}",
                remedy="save the checkpoint without extensions of the storage writer",
            )
        name, offset_bytes, size_bytes = (place.get(what) for what in ("relative_path", "offset", "length"))
        key = named.get("fqn")
        if not isinstance(key, str):
            raise _damaged(file, "the key of a blob", key)
        if not isinstance(name, str) or not _is_bare(name):
            raise _damaged(file, "the bare name of a file beside .metadata", name)
        if not _is_count(offset_bytes) or not _is_count(size_bytes):
            raise _damaged(file, f"the offset and length of a blob in {name}", (offset_bytes, size_bytes))
        offset = named.get("offset")
        at = key, None if offset is None else _size(offset, file)
        found.setdefault(at, set()).add(Blob(name, offset_bytes, size_bytes))
    return found


def _blob(blobs: _Blobs, key: str, offsets: tuple[int, ...] | None, file: str) -> Blob:
    found = blobs.get((key, offsets), set())
    if len(found) != 1:
        where = f"one blob of {key}" + (f" at {list(offsets)}" if offsets else "")
        raise _damaged(file, where, " and ".join(map(str, list(found)[:2])) or "none")
    [blob] = found
    return blob


def _tensor(key: str, state: JsonObject, blobs: _Blobs, file: str) -> SavedTensor:
    shape = _size(state.get("size"), file)
    properties = state.get("properties")
    inside = properties.state if isinstance(properties, Inert) else None
    dtype = inside[0] if isinstance(inside, tuple) and inside else None
    dtype = inside.get("dtype") if isinstance(inside, Mapping) else dtype
    if not isinstance(dtype, Dtype):
        raise _damaged(file, f"the dtype of {key}", dtype)
    chunks = []
    listed = state.get("chunks")
    for chunk in listed if isinstance(listed, list) else ():
        inner = _state(chunk, "ChunkStorageMetadata", file)
        offsets, sizes = _size(inner.get("offsets"), file), _size(inner.get("sizes"), file)
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(first + count > size for first, count, size in zip(offsets, sizes, shape, strict=True)):
            raise _damaged(file, f"a chunk of {key} inside {list(shape)}", f"{list(sizes)} at {list(offsets)}")
        if 0 in sizes:  # of a rank that has no row, as there are more of them than rows
            continue
        chunks.append(Chunk(offsets, sizes, _blob(blobs, key, offsets, file)))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise _damaged(file, f"chunks that make up {key}, {list(shape)}", f"{len(chunks)} chunks of another size")
    return SavedTensor(dtype.name, shape, tuple(chunks))


def _state(record: object, kind: str, file: str) -> JsonObject:
    if isinstance(record, Inert) and record.class_name.endswith(f".{kind}") and isinstance(record.state, Mapping):
        return record.state
    raise _damaged(file, f"a {kind}", record)


def _is_bare(name: str) -> bool:
    """Whether a text can be the name of a file in a directory: one with half a surrogate pair is of none."""
    is_possible = name.isprintable() and len(os.fsencode(name)) <= _LONGEST_NAME_BYTES
    return is_possible and name not in ("", ".", "..") and "/" not in name


def _mapping(state: JsonObject, name: str, file: str) -> Mapping[Any, Any]:
    found = state.get(name)
    if not isinstance(found, Mapping):
        raise _damaged(file, name, found)
    return found


def _size(record: object, file: str) -> tuple[int, ...]:
    """The numbers of a `torch.Size`."""
    if isinstance(record, tuple) and len(record) <= _MOST_DIMENSIONS and all(map(_is_count, record)):
        return record
    raise _damaged(file, "a torch.Size", record)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _damaged(file: str, expected: str, found: object) -> CorruptFile:
    return CorruptFile("damaged .metadata of a distributed checkpoint", file, expected, found=_shown(found))


def _shown(value: object) -> str:
    """A value of a pickle for a message: it may be huge, or share parts a million times."""
    if isinstance(value, Inert):
        return f"a {value.class_name}"[:200]
    return str(value)[:200] if isinstance(value, str | int | Blob | None) else f"a {type(value).__name__}"


def read_object(directory: Path, blob: Blob) -> Any:
    """An object as it was saved, with inert records in place of classes; raises what `open_object` does."""
    path = directory / blob.file
    with opened_source(path) as file:
        _check_apart(path, [blob], file)
        return open_object(file, blob.file, blob.offset_bytes, blob.size_bytes)[1]


def place_chunks(directory: Path, file: str, chunks: Sequence[tuple[str, str, Chunk]]) -> list[StoredTensor]:
    """Where the elements of some chunks of one file lie (key, dtype and box of each), from their blobs' headers.

    Raises:
        CorruptFile, UnsafePickle: a blob that is damaged, out of its file, or not what `.metadata` says.
    """
    path, placed, known = directory / file, [], dict[bytes, Any]()
    with opened_source(path) as opened:
        _check_apart(path, [chunk.blob for _, _, chunk in chunks], opened)
        for key, dtype, chunk in chunks:
            place = chunk.blob.offset_bytes, chunk.blob.size_bytes
            container, saved = open_object(opened, file, *place, known=known)
            found = (saved.storage.dtype, saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            if not isinstance(saved, Tensor) or found != (dtype, chunk.sizes):
                expected = f"{(dtype, chunk.sizes)} at byte {chunk.blob.offset_bytes}"
                raise not_as_listed(path, key, expected, found)
            placed.append(place_tensors({key: saved}, container)[key])
    return placed


def not_as_listed(path: Path, key: str, expected: object, found: object) -> CorruptFile:
    """The error about a chunk that is not the one that `.metadata` lists."""
    remedy = "files of two checkpoints may be mixed; copy the directory again"
    return CorruptFile("a blob differs from what .metadata says", path, expected, found, remedy, tensor=key)


def _check_apart(path: Path, blobs: Sequence[Blob], file: BinaryIO) -> None:
    """Refuse blobs that overlap or reach past their file."""
    file_bytes = os.fstat(file.fileno()).st_size
    ordered = sorted((blob.offset_bytes, blob.offset_bytes + blob.size_bytes) for blob in blobs)
    for (first, end), (following, _) in pairwise([*ordered, (file_bytes, file_bytes)]):
        if end > following:
            what = "a blob reaches into the next one or past its file"
            expected = f"the blob at byte {first} ends by byte {following}"
            raise CorruptFile(what, path, expected, found=f"it ends at byte {end}; the file has {file_bytes}")
