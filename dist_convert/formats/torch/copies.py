"""Are the copies equal that several rank files hold of one shard? Training writes them from one value.

Norms lie in the files of all tensor parallel ranks, dense weights in those of all expert parallel ranks, a tied
embedding on the last stage too. Where a zip record holds a copy alone, its CRC-32 in the file's directory is compared,
which reads nothing. Others are compared by their first, middle and last bytes. `verify` compares all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dist_convert.errors import ConversionError, InconsistentShards, raise_together
from dist_convert.formats.megatron.names import TIED, normalise
from dist_convert.formats.megatron.parameters import Parameter
from dist_convert.formats.torch.catalog import TorchCatalog, equal_replicas, parameters
from dist_convert.formats.torch.open import TorchModel
from dist_convert.formats.torch.order import order_problems
from dist_convert.formats.torch.samples import BLOCK_BYTES, reader_of, samples
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.buffers import make_buffer
from dist_convert.read.file_reader import TORCH_DTYPES
from dist_convert.records import DTYPE_BYTES, View, names, tiles

ACCEPT = "--accept-differing-copies"
#: Of so many parameters it is worked out how far their copies are apart, which reads all of both.
_MEASURED = 4


@dataclass(frozen=True)
class _Copies:
    """The copies of a stored piece of one shard, in the order of their files' ranks; the first one speaks for all."""

    parameter: Parameter
    shard: int
    views: tuple[View, ...]

    @property
    def dtype(self) -> str:
        """In which they are compared: a tied head may be kept in another one than the embedding."""
        return min((view.dtype for view in self.views), key=lambda dtype: DTYPE_BYTES[dtype])

    @property
    def ends_in_head(self) -> bool:
        """Whether the last one is the copy of the embedding that the last stage holds as its head."""
        return self.parameter.name == TIED[0] and self.views[-1].tensor.endswith(TIED[1])


def settle_copies(model: TorchModel, world: World, *, accept: bool | None, accept_order: bool = False) -> TorchModel:
    """The model, after its copies were compared.

    A head beside args that do not say whether it is tied is so only if it is the embedding.

    Args:
        model: whose headers are read.
        world: this rank.
        accept: where copies differ, take that of the lowest rank, and give a head that is not its embedding a place of
            its own. None: copies may differ, as whoever asks compares them; only such a head is looked at.
        accept_order: rank directories may hold others' shards.

    Raises:
        InconsistentShards: copies differ, or rank directories hold others' shards, and that is not accepted.
    """
    is_silent = model.args.get("untie_embeddings_and_output_weights") is None
    if accept is None and not (is_silent and _has_head(model)):
        return model
    catalog, _ = model.catalog(with_tied_copies=True)
    notes = list(model.notes)
    if accept is not None:
        problems = order_problems(model, catalog, world)
        raise_together([] if accept_order else problems)
        notes += [f"warning: accepted: {one.what}: {one.file}" for one in problems]
    differing = _differing(catalog, model, world)
    is_untied = model.is_untied or any(pair.ends_in_head for pair in differing)
    if accept is None:
        return replace(model, is_untied=is_untied)
    wrong = [] if accept else [pair for pair in differing if not (is_silent and pair.ends_in_head)]
    raise_together([_problem(pair, model, world, is_measured=n < _MEASURED) for n, pair in enumerate(wrong)])
    pinned = frozenset(pair.parameter.name for pair in differing if not pair.ends_in_head)
    if pinned:
        notes.append(f"warning: copies differ, and the lowest rank's are taken: {names(sorted(pinned))}")
    if is_untied and not is_silent:
        notes.append("warning: the head is not the embedding that the args tie it to: it becomes one of its own")
    return replace(model, pinned=pinned, is_untied=is_untied, notes=tuple(notes))


def _has_head(model: TorchModel) -> bool:
    return any(normalise(name) == TIED[1] for s in model.shards.values() for chunk in s.chunks for name in chunk)


def _copies(catalog: TorchCatalog) -> Iterator[_Copies]:
    """Everything of which there are several copies."""
    for parameter in parameters(catalog):
        for shard in range(parameter.shards):
            found = equal_replicas(catalog, parameter, shard)
            for number in range(len(found[0]) if len(found) > 1 else 0):
                yield _Copies(parameter, shard, tuple(replica[number][2] for replica in found))


def _differing(catalog: TorchCatalog, model: TorchModel, world: World) -> list[_Copies]:
    """Pairs of copies that differ: by their checksums, which read nothing, else by samples of their values."""
    found: list[_Copies] = []
    unknown: list[_Copies] = []
    for copies in _copies(catalog):
        checksums = [catalog.checksum(view) for view in copies.views]
        if None in checksums or len({view.dtype for view in copies.views}) > 1:
            unknown.append(copies)
        else:
            found += _pairs(copies, checksums)
    digests = iter(samples(model, [(view, one.dtype) for one in unknown for view in one.views], world))
    for copies in unknown:
        found += _pairs(copies, [next(digests) for _ in copies.views])
    return found


def _pairs(copies: _Copies, sums: Sequence[object]) -> Iterator[_Copies]:
    """The first copy with the first that differs from it, and with the first head that does."""
    others = (view for view, found in zip(copies.views, sums, strict=True) if found != sums[0])
    pairs = [replace(copies, views=(copies.views[0], view)) for view in others]
    for wants_head in (False, True):
        yield from [pair for pair in pairs if pair.ends_in_head is wants_head][:1]


def _problem(pair: _Copies, model: TorchModel, world: World, *, is_measured: bool) -> ConversionError:
    first, other = pair.views
    what = "copies of one parameter differ"
    remedy = "one of them is of another run, or damaged: copy the checkpoint again from where it was saved; or take "
    remedy += f"that of the lowest rank with {ACCEPT}"
    if pair.ends_in_head:
        what = "the head on the last stage is not the embedding that the args tie it to"
        remedy = f"if the model was trained with a head of its own, convert it so with {ACCEPT}"
    return InconsistentShards(
        what,
        tensor=f"{pair.parameter.name}, shard {pair.shard}",
        file=f"{model.directory / other.file}",
        expected=f"the values in {model.directory / first.file}",
        found=_largest_difference(first, other, model, world) if is_measured else "others",
        remedy=remedy,
    )


def _largest_difference(first: View, other: View, model: TorchModel, world: World) -> str:
    """How far two copies are apart, as the first rank finds that sees both."""
    able = [rank for rank, files in enumerate(model.found.visible) if {first.file, other.file} <= files]
    if not able:
        return "others, on different nodes"
    mine = ""
    if world.rank == able[0]:
        buffers = make_buffer(BLOCK_BYTES), make_buffer(BLOCK_BYTES)
        largest, row, column = 0.0, 0, 0
        columns = min(first.columns, 512)
        with reader_of(model) as reader:
            for tile in tiles(first.rows, first.columns, BLOCK_BYTES // (8 * columns), columns):
                values = []
                for view, buffer in zip((first, other), buffers, strict=True):
                    reader.read(view.window(tile), first.dtype, 0, buffer, 0)
                    size_bytes = tile.elements * DTYPE_BYTES[first.dtype]
                    values.append(buffer.tensor[:size_bytes].view(TORCH_DTYPES[first.dtype]).to(torch.float64))
                apart = (values[0] - values[1]).abs().nan_to_num(nan=float("inf"))
                if float(apart.max()) > largest:
                    inside = divmod(int(apart.argmax()), tile.columns)
                    largest, row, column = float(apart.max()), tile.row + inside[0], tile.column + inside[1]
        mine = f"others, at most {largest:.3g} apart, at row {row}, column {column} of the shard"
    told: list[str] = gather_objects(world, mine)
    return told[able[0]]
