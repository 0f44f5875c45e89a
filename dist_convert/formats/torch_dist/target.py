"""A `torch_dist` checkpoint that is to be made; a `Target`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.formats.megatron.iterations import KIND_FILE
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.saved import common_content, lay_out_container, pickled
from dist_convert.formats.torch_dist.catalog import DistCatalog, Stored, open_catalog
from dist_convert.formats.torch_dist.contents import COMMON_FILE
from dist_convert.formats.torch_dist.lay_out import PlannedBlob, PlannedFiles, lay_out_files, stored_chunk, target_file
from dist_convert.formats.torch_dist.pickled_metadata import metadata_bytes
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE, Blob, Chunk, SavedTensor
from dist_convert.records import TargetFile
from dist_convert.write.checksums import KnownRange, checksum_of
from dist_convert.write.files import make_file, opened, write_file, writing

#: As every version of Megatron-Core from 0.13 on reads it.
_KIND = {
    "sharded_backend": TORCH_DIST,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class DistTarget:
    """What is to be made, and its files before any data."""

    target: MegatronTarget
    files: PlannedFiles

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.target.settings

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """See `Target`."""
        for file in files:
            make_file(partial, file.name, self._pieces(file.name), file.size_bytes)

    def _pieces(self, file: str) -> Iterator[tuple[int, bytes]]:
        """All of a file that is no tensor's values."""
        for blob in self.files.blobs[file]:
            pieces = self.files.templates[blob.dtype, blob.sizes].pieces
            yield from ((blob.place.offset_bytes + at, piece) for at, piece in pieces)

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """See `Target`: the checksums of all chunks; `.metadata` and the args."""
        for file in files:
            self._seal(partial, file.name, known.get(file.name, ()))
        if not is_first:
            return
        content = common_content(self.target.args.values, self.target.iteration or 0, COMMON_FILE)
        pieces, size_bytes, _ = lay_out_container(pickled(content), [])
        make_file(partial, COMMON_FILE, pieces, size_bytes)
        write_file(partial, KIND_FILE, json.dumps(_KIND).encode())
        write_file(partial, METADATA_FILE, metadata_bytes(*saved_metadata(self.files)))

    def _seal(self, partial: Path, name: str, known: Sequence[KnownRange]) -> None:
        """Write the checksum of each chunk to both places that hold it."""
        with writing(name), opened(partial, name, os.O_RDWR) as descriptor:
            for chunk in (blob for blob in self.files.blobs[name] if blob.dtype):
                template, first_byte = self.files.templates[chunk.dtype, chunk.sizes], chunk.place.offset_bytes
                start = first_byte + template.data_offset_bytes
                checksum = checksum_of(descriptor, name, start, start + template.data_bytes, known)
                for place in template.checksums:
                    os.pwrite(descriptor, checksum.to_bytes(4, "little"), first_byte + place)

    def beside(self) -> Mapping[str, bytes]:
        """See `Target`."""
        return self.target.beside()

    def to_do(self) -> str:
        """See `Target`."""
        return ""


def lay_out_torch_dist(target: MegatronTarget) -> DistTarget:
    """The files of a target.

    Raises:
        UsageError: experts that torch_dist has no keys for.
    """
    if target.architecture.experts and target.dialect.experts == "habana-dynamic":
        raise UsageError(
            "Habana's dynamic experts have no keys in torch_dist",
            expected="--expert-layout sequential, te-grouped or grouped, which are saved alike",
            found="habana-dynamic",
            remedy="give one of them, or --to torch",
        )
    return DistTarget(target, lay_out_files(target))


def saved_metadata(files: PlannedFiles) -> tuple[dict[str, SavedTensor], dict[str, Blob]]:
    """The tensors and objects of all files, by their keys."""
    chunks, dtypes = _by_key(files)
    tensors = {
        key: SavedTensor(dtypes[key], shape, tuple(Chunk(c.offsets, c.sizes, c.place) for c in chunks[key]))
        for key, shape in files.shapes.items()
    }
    return tensors, {blob.key: blob.place for blobs in files.blobs.values() for blob in blobs if not blob.dtype}


def _by_key(files: PlannedFiles) -> tuple[dict[str, list[PlannedBlob]], dict[str, str]]:
    """The chunks of each tensor, and its dtype."""
    chunks: dict[str, list[PlannedBlob]] = {key: [] for key in files.shapes}
    for chunk in (blob for blobs in files.blobs.values() for blob in blobs if blob.dtype):
        chunks[chunk.key].append(chunk)
    return chunks, {key: of_key[0].dtype for key, of_key in chunks.items()}


def catalog_of_target(target: DistTarget) -> tuple[DistCatalog, tuple[TargetFile, ...]]:
    """The target as a catalog, and its files."""
    files = target.files
    chunks, dtypes = _by_key(files)
    stored = {
        key: Stored(key, dtypes[key], shape, tuple(stored_chunk(files, chunk) for chunk in chunks[key]))
        for key, shape in files.shapes.items()
    }
    catalog = open_catalog(stored, target.target.architecture, target.target.args.values, METADATA_FILE)
    return catalog, tuple(target_file(files, name) for name in sorted(files.sizes_bytes))
