"""Are the copies equal that several rank files hold of one shard? Training writes them from one value.

Norms lie in the files of all tensor parallel ranks, dense weights in those of all expert parallel ranks, a tied
embedding on the last stage too. Where a zip record holds a copy alone, its CRC-32 in the file's directory is compared,
which reads nothing. Others are compared by their first, middle and last bytes. `verify` compares all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_convert.errors import ConversionError, InconsistentShards, raise_together
from dist_convert.formats.megatron.names import TIED, normalise
from dist_convert.formats.megatron.parameters import Parameter
from dist_convert.formats.torch.catalog import TorchCatalog, equal_replicas, parameters
from dist_convert.formats.torch.open import TorchModel
from dist_convert.formats.torch.order import check_order
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.buffers import make_buffer
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader
from dist_convert.read.source import Listing
from dist_convert.records import DTYPE_BYTES, Box, View, tiles

ACCEPT = "--accept-differing-copies"
_SAMPLE_BYTES = 64 << 10
#: Of so many parameters it is worked out how far their copies are apart, which reads all of both.
_MEASURED = 4
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class _Copies:
    """The copies of a stored piece of one shard, in the order of their files' ranks; the first one speaks for all."""

    parameter: Parameter
    shard: int
    views: tuple[View, ...]
    checksums: tuple[int | None, ...]

    @property
    def are_known(self) -> bool:
        return None not in self.checksums and len({view.dtype for view in self.views}) == 1

    @property
    def dtype(self) -> str:
        """In which they are compared: a tied head may be kept in another one than the embedding."""
        return min((view.dtype for view in self.views), key=lambda dtype: DTYPE_BYTES[dtype])


def settle_copies(model: TorchModel, world: World, *, accept: bool | None, accept_order: bool = False) -> TorchModel:
    """The model, after its copies were compared.

    A head beside args that do not say whether it is tied is so only if it is the embedding.

    Args:
        model: whose headers are read.
        world: this rank.
        accept: where copies differ, take that of the lowest rank, and give a head that is not its embedding a place of
            its own. None: copies may differ, as whoever asks compares them; only such a head is looked at.
        accept_order: see `check_order`.

    Raises:
        InconsistentShards: copies differ, and that is not accepted, or see `check_order`; all of them together.
    """
    is_silent = model.args.get("untie_embeddings_and_output_weights") is None
    if accept is None and not (is_silent and _has_head(model)):
        return model
    catalog, _ = model.catalog(with_tied_copies=True)
    if accept is not None:
        check_order(model, catalog, world, accept=accept_order)
    differing = _differing(catalog, model, world)
    heads = [one for one in differing if _is_head(one)]
    if accept is None:
        return replace(model, is_untied=model.is_untied or bool(heads))
    wrong = [] if accept else [one for one in differing if not (is_silent and _is_head(one))]
    raise_together([_problem(one, model, world, is_measured=n < _MEASURED) for n, one in enumerate(wrong)])
    names = frozenset(one.parameter.name for one in differing if not _is_head(one))
    return replace(model, pinned=names, is_untied=model.is_untied or bool(heads))


def _has_head(model: TorchModel) -> bool:
    return any(normalise(name) == TIED[1] for s in model.shards.values() for chunk in s.chunks for name in chunk)


def _is_head(copies: _Copies) -> bool:
    """Whether it is the last stage's copy of the embedding that differs."""
    return copies.parameter.name == TIED[0] and copies.views[-1].tensor.endswith(TIED[1])


def _copies(catalog: TorchCatalog) -> Iterator[_Copies]:
    """Everything of which there are several copies."""
    for parameter in parameters(catalog):
        for shard in range(parameter.shards):
            found = equal_replicas(catalog, parameter, shard)
            for number in range(len(found[0]) if len(found) > 1 else 0):
                views = tuple(replica[number][2] for replica in found)
                checksums = tuple(catalog.checksum(view) for view in views)
                yield _Copies(parameter, shard, views, checksums)


def _differing(catalog: TorchCatalog, model: TorchModel, world: World) -> list[_Copies]:
    """The copies that differ, the first one and one that is another; each rank reads what it is the first to see."""
    found: list[_Copies] = []
    unknown: list[_Copies] = []
    for copies in _copies(catalog):
        if copies.are_known:
            found += _pairs(copies, copies.checksums)
        else:
            unknown.append(copies)
    readers = {view.file: _first_to_see(view.file, model.found.visible) for one in unknown for view in one.views}
    mine: dict[str, str] = {}
    with closing(FileReader(model.directory, make_buffer(2 * _BLOCK_BYTES), model.found.listing)) as reader:
        for number, copies in enumerate(unknown):
            for copy, view in enumerate(copies.views):
                if readers[view.file] == world.rank:
                    mine[f"{number}/{copy}"] = _sample(reader, view, copies.dtype)
    digests: dict[str, str] = {key: value for of_rank in gather_objects(world, mine) for key, value in of_rank.items()}
    for number, copies in enumerate(unknown):
        sums = [digests[f"{number}/{copy}"] for copy in range(len(copies.views))]
        found += _pairs(copies, sums)
    return found


def _pairs(copies: _Copies, sums: Sequence[object]) -> Iterator[_Copies]:
    """The first copy with the first that differs from it, and with the first head that does."""
    for wants_head in (False, True):
        for view, found in zip(copies.views, sums, strict=True):
            pair = replace(copies, views=(copies.views[0], view), checksums=(None, None))
            if found != sums[0] and _is_head(pair) is wants_head:
                yield pair
                break


def _first_to_see(file: str, visible: Sequence[frozenset[str]]) -> int:
    return next(rank for rank, files in enumerate(visible) if file in files)


def _sample(reader: FileReader, view: View, dtype: str) -> str:
    """A digest of a copy's first, middle and last rows, as values of a dtype."""
    row_bytes = view.columns * DTYPE_BYTES[dtype]
    rows = min(view.rows, max(1, _SAMPLE_BYTES // row_bytes))
    buffer = make_buffer(rows * row_bytes)
    digest = hashlib.sha256()
    for first in dict.fromkeys((0, (view.rows - rows) // 2, view.rows - rows)):
        for window in _windows(view.window(Box(first, 0, rows, view.columns))):
            reader.read(window, dtype, 0, buffer, 0)
            digest.update(buffer.memory[: window.rows * window.columns * DTYPE_BYTES[dtype]])
    return digest.hexdigest()


def _windows(view: View) -> Iterator[View]:
    """A view in parts whose elements lie near enough to each other to be read together."""
    columns = min(view.columns, 512) if view.is_transposed else view.columns
    rows = max(1, _BLOCK_BYTES // (columns * DTYPE_BYTES[view.dtype]))
    for tile in tiles(view.rows, view.columns, rows, columns):
        yield view.window(tile)


def _problem(copies: _Copies, model: TorchModel, world: World, *, is_measured: bool) -> ConversionError:
    first, other = copies.views
    what = "copies of one parameter differ"
    remedy = "one of them is of another run, or damaged: copy the checkpoint again from where it was saved; or take "
    remedy += f"that of the lowest rank with {ACCEPT}"
    if _is_head(copies):
        what = "the head on the last stage is not the embedding that the args tie it to"
        remedy = f"if the model was trained with a head of its own, convert it so with {ACCEPT}"
    return InconsistentShards(
        what,
        tensor=f"{copies.parameter.name}, shard {copies.shard}",
        file=f"{model.directory / other.file}",
        expected=f"the values in {model.directory / first.file}",
        found=_largest_difference(first, other, model.directory, model.found.visible, model.found.listing, world)
        if is_measured
        else "others",
        remedy=remedy,
    )


def _largest_difference(
    first: View, other: View, directory: Path, visible: Sequence[frozenset[str]], listing: Listing, world: World
) -> str:
    """How far two copies are apart, as the first rank finds that sees both."""
    able = [rank for rank, files in enumerate(visible) if {first.file, other.file} <= files]
    mine = None
    if able and world.rank == able[0]:
        buffers = make_buffer(_BLOCK_BYTES), make_buffer(_BLOCK_BYTES)
        largest, at = 0.0, (0, 0)
        with closing(FileReader(directory, make_buffer(2 * _BLOCK_BYTES), listing)) as reader:
            columns = min(first.columns, 512)
            for tile in tiles(first.rows, first.columns, _BLOCK_BYTES // (8 * columns), columns):
                values = []
                for view, buffer in zip((first, other), buffers, strict=True):
                    reader.read(view.window(tile), first.dtype, 0, buffer, 0)
                    size_bytes = tile.elements * DTYPE_BYTES[first.dtype]
                    values.append(buffer.tensor[:size_bytes].view(TORCH_DTYPES[first.dtype]).to(torch.float64))
                apart = (values[0] - values[1]).abs().nan_to_num(nan=float("inf"))
                if float(apart.max()) > largest:
                    index = int(apart.argmax())
                    largest, at = (
                        float(apart.max()),
                        (tile.row + index // tile.columns, tile.column + index % tile.columns),
                    )
        mine = f"others, at most {largest:.3g} apart, at row {at[0]}, column {at[1]} of the shard"
    told: list[str | None] = gather_objects(world, mine)
    return told[able[0]] or "" if able else "others, on different nodes"
