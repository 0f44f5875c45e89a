"""Is each shard what its directory's name says, and equal in all files that hold it? Else the model would be wrong.

Norms lie in the files of all tensor parallel ranks, dense weights in those of all expert parallel ranks, a tied
embedding on the last stage too. Where a zip record holds a copy alone, its CRC-32 in the file's directory is compared,
which reads nothing. Others are compared by their first, middle and last bytes, small ones by all, and so is a head of
which args do not say whether it is tied. `verify` compares all of them. A shard's place is told by its directory's name
alone; headers show of some that they were copied twice or swapped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dist_convert.errors import ConversionError, InconsistentShards, raise_together
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import TIED, is_of_expert, normalise
from dist_convert.formats.megatron.parameters import Parameter
from dist_convert.formats.samples import ALIKE, ALL_BYTES, BLOCK_BYTES, SAMPLE_BYTES, reader_of, samples
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.models.catalog import Where
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.file_reader import TORCH_DTYPES, make_buffer
from dist_convert.records import DTYPE_BYTES, JsonObject, StoredTensor, View, local_name, names, row_major, tiles

#: Of what every rank has whole: norms and routers end before.
_SMALL_BYTES = 8 << 20

ACCEPT_ORDER = "--accept-shard-order"
#: Args that one run has once, for all its ranks.
_OF_RUN = ("seed", "world_size", "consumed_train_samples")
#: Of a file without checksums so many matrices of its experts are looked at, and of the rest.
_SAMPLED = 2


def _of_other_runs(model: TorchModel) -> Iterator[ConversionError]:
    first = min(model.shards)
    for file, shard in sorted(model.shards.items()):
        for name in _OF_RUN:
            expected, found = model.args.get(name), shard.args.get(name)
            if found != expected and None not in (found, expected):
                yield InconsistentShards(
                    f"two shards disagree about {name}, so they come from different runs",
                    model.directory / file,
                    expected=f"{expected!r} as in {model.directory / first}",
                    found=repr(found),
                    remedy=f"copy all shards again from one run; if they belong together, convert with {ACCEPT_ORDER}",
                )


def _swapped(model: TorchModel, catalog: TorchCatalog) -> Iterator[ConversionError]:
    """Directories whose name is not the place of the process that saved them.

    Tools write one rank into all shards, which says nothing.
    """
    ranks = [rank for shard in model.shards.values() if type(rank := shard.args.get("rank")) is int and rank >= 0]
    if len(set(ranks)) < len(model.shards):
        return
    grid, named = catalog.grid, dict[str, dict[str, int]]()
    for (pipeline, expert, tensor), held in catalog.files.items():
        for file in held:
            place = {"pipeline": pipeline, "tensor": tensor} if expert is None else {"expert": expert}
            named[file] = named.get(file, {}) | place
    for file, shard in sorted(model.shards.items()):
        for axis, said in _place_of(shard.args["rank"], shard.args, grid).items():
            if said != named[file][axis]:
                yield InconsistentShards(
                    f"a rank directory holds the shard of another {axis} parallel rank",
                    model.directory / file,
                    expected=f"{axis} parallel rank {named[file][axis]}, as the directory's name says",
                    found=f"args.rank {shard.args['rank']}, which is {axis} parallel rank {said}",
                    remedy="shards may have been swapped: copy them again from where they were saved; if the names are "
                    f"right, convert with {ACCEPT_ORDER}",
                )


def _place_of(rank: int, args: JsonObject, grid: Grid) -> dict[str, int]:
    """Where in the grid Megatron puts a process, as far as that is the same in all its versions.

    Tensor parallel ranks are numbered first and pipeline parallel ones last (docs/formats.md, "Rank directories").
    """
    place = {"tensor": rank % grid.tensor}
    in_stage, rest = divmod(args.get("world_size") or 1, grid.pipeline)
    if args.get("use_tp_pp_dp_mapping") or rest or in_stage % grid.tensor or rank >= in_stage * grid.pipeline:
        return place
    place["pipeline"] = rank // in_stage
    if grid.expert_tensor == grid.tensor and args.get("context_parallel_size") in (None, 1):
        place["expert"] = rank // grid.tensor % grid.expert
    return place


def _copied_twice(model: TorchModel, catalog: TorchCatalog, world: World) -> list[ConversionError]:
    """Files with the same matrices that should hold different ones; matrices of one value are alike in every shard."""
    dense, experts = (
        {file: shard for shard, files in catalog.files.items() if (shard[1] is None) is is_dense for file in files}
        for is_dense in (True, False)
    )
    matrices = {file: sorted(_matrices(catalog, file), key=lambda one: not is_of_expert(one.name)) for file in dense}
    holds = {
        file: (dense[file], experts[file] if any(is_of_expert(one.name) for one in found) else None)
        for file, found in matrices.items()
    }
    signatures: dict[str, tuple[object, ...]] = {
        file: tuple((one.name, one.checksum) for one in found) for file, found in matrices.items()
    }
    unknown = [file for file, found in matrices.items() if any(one.checksum is None for one in found)]
    of_unknown = [_spread(matrices[file]) for file in unknown]
    wanted = [(_memory(one), one.dtype) for found in of_unknown for one in found]
    digests = iter(samples(model.directory, model.found, wanted, world))
    signatures |= {f: tuple((one.name, next(digests)) for one in m) for f, m in zip(unknown, of_unknown, strict=True)}
    first_of: dict[object, str] = {}
    twins = [(first_of.setdefault(signatures[file], file), file) for file in sorted(matrices) if matrices[file]]
    twins = [
        (twin, file) for twin, file in twins if holds[twin] != holds[file] and local_name(twin) != local_name(file)
    ]
    wanted = [(_memory(matrices[file][0]), matrices[file][0].dtype) for _, file in twins]
    values = samples(model.directory, model.found, wanted, world)
    return [
        InconsistentShards(
            "two rank directories hold the same shard",
            model.directory / file,
            expected="matrices of its own",
            found=f"those of {model.directory / twin}",
            remedy="one of them was copied under the other's name: copy the right one again from where it was saved; "
            f"if layers or experts are meant to be alike, as in an upcycled model, convert with {ACCEPT_ORDER}",
        )
        for (twin, file), value in zip(twins, values, strict=True)
        if not value.startswith(ALIKE)
    ]


def _matrices(catalog: TorchCatalog, file: str) -> Iterator[StoredTensor]:
    """A file's matrices that lie in one piece."""
    for virtual in range(catalog.grid.virtual_pipeline):
        for tensor in catalog.stored[file, virtual].values():
            if len(tensor.shape) > 1 and tensor.strides == row_major(tensor.shape):
                yield tensor


def _spread(matrices: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Some of a file's matrices, of its experts and of the rest."""
    experts = [one for one in matrices if is_of_expert(one.name)]
    return [*experts[:_SAMPLED], *matrices[len(experts) :][:_SAMPLED]]


def _memory(tensor: StoredTensor) -> View:
    """A tensor of any dimensions as rows of its last one."""
    rows, columns = tensor.elements // max(1, tensor.shape[-1]), tensor.shape[-1]
    return View(tensor.file, tensor.name, tensor.dtype, tensor.offset_bytes, rows, columns, columns, 1)


ACCEPT_COPIES = "--accept-differing-copies"
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
        return self.parameter.name == TIED[0] and not self.views[-1].tensor.endswith(TIED[0])


def settle_copies(model: TorchModel, where: Where, world: World) -> TorchModel:
    """The model, after its copies were compared.

    A head beside args that do not say whether it is tied is so only if it is the embedding.

    Args:
        where: how it is to be read. Where copies differ and that is accepted, that of the lowest rank is taken, and a
            head that is not its embedding becomes one of its own. Of what is compared only such a head is looked at.

    Raises:
        InconsistentShards: copies differ, or rank directories hold others' shards, and that is not accepted.
    """
    asked, is_silent = where.asked, model.args.get("untie_embeddings_and_output_weights") is None
    stored = (name for shard in model.shards.values() for chunk in shard.chunks for name in chunk)
    if where.is_compared and not (is_silent and any(normalise(name) == TIED[1] for name in stored)):
        return model
    catalog, _ = model.catalog(with_tied_copies=True)
    notes = list(model.notes)
    if not where.is_compared:
        problems = [*_of_other_runs(model), *_swapped(model, catalog), *_copied_twice(model, catalog, world)]
        raise_together([] if asked.accept_shard_order else problems)
        notes += [f"warning: accepted: {one.what}: {one.file}" for one in problems]
    differing = _differing(catalog, model, world, are_accepted=asked.accept_differing_copies, is_silent=is_silent)
    is_untied = model.is_untied or any(pair.ends_in_head for pair in differing)
    if where.is_compared:
        return replace(model, is_untied=is_untied)
    wrong = [] if asked.accept_differing_copies else [one for one in differing if not (is_silent and one.ends_in_head)]
    raise_together([_problem(pair, model, world, is_measured=n < _MEASURED) for n, pair in enumerate(wrong)])
    pinned = frozenset(pair.parameter.name for pair in differing if not pair.ends_in_head)
    if pinned:
        notes.append(f"warning: copies differ; the lowest rank's are used: {names(sorted(pinned))}")
    if is_untied and not is_silent:
        notes.append("warning: the head is not the embedding that the args tie it to: it becomes a separate head")
    return replace(model, pinned=pinned, is_untied=is_untied, notes=tuple(notes))


def _copies(catalog: TorchCatalog) -> Iterator[_Copies]:
    """Everything of which there are several copies."""
    for parameter in {id(parameter): parameter for parameter, _ in catalog.parameters.values()}.values():
        for shard, found in enumerate(catalog.replicas[parameter.name]):
            for number in range(len(found[0]) if len(found) > 1 else 0):
                yield _Copies(parameter, shard, tuple(replica[number][2] for replica in found))


def _differing(
    catalog: TorchCatalog, model: TorchModel, world: World, *, are_accepted: bool, is_silent: bool
) -> list[_Copies]:
    """Pairs of copies that differ: by their checksums, which read nothing, else by samples of their values.

    Args:
        are_accepted: whether all values are compared, as copies that differ will be taken from the lowest rank.
        is_silent: whether all values of a head are, as nothing else says whether it is tied.
    """
    found: list[_Copies] = []
    unknown = []
    known = {(one.file, one.name): one.checksum for chunk in catalog.stored.values() for one in chunk.values()}
    for copies in _copies(catalog):
        checksums = [known.get((view.file, view.tensor)) for view in copies.views]
        if None not in checksums and len({view.dtype for view in copies.views}) == 1:
            found += _pairs(copies, checksums)
        else:
            unknown.append(copies)
    of_size: dict[int, list[_Copies]] = {}
    for copies in unknown:
        size = _SMALL_BYTES if copies.parameter.row.split == "replicated" else SAMPLE_BYTES
        is_whole = are_accepted or (is_silent and copies.ends_in_head)
        of_size.setdefault(ALL_BYTES if is_whole else size, []).append(copies)
    for sample_bytes, some in of_size.items():
        views = [(view, copies.dtype) for copies in some for view in copies.views]
        digests = iter(samples(model.directory, model.found, views, world, sample_bytes=sample_bytes))
        for copies in some:
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
    remedy = "one of them is damaged or from another run: copy the checkpoint again from where it was saved; or take "
    remedy += f"that of the lowest rank with {ACCEPT_COPIES}"
    if pair.ends_in_head:
        what = "the head on the last stage is not the embedding that the args tie it to"
        remedy = f"if the model was trained with a separate head, convert it with {ACCEPT_COPIES}"
    return InconsistentShards(
        what,
        f"{model.directory / other.file}",
        tensor=f"{pair.parameter.name}, shard {pair.shard}",
        expected=f"the values in {model.directory / first.file}",
        found=_largest_difference(first, other, model, world) if is_measured else "other values",
        remedy=remedy,
    )


def _largest_difference(first: View, other: View, model: TorchModel, world: World) -> str:
    """How far two copies are apart, as the first rank finds that sees both."""
    able = [rank for rank, files in enumerate(model.found.visible) if {first.file, other.file} <= files]
    if not able:
        return "other values, on different nodes"
    mine = ""
    if world.rank == able[0]:
        buffers = make_buffer(BLOCK_BYTES), make_buffer(BLOCK_BYTES)
        largest, row, column = 0.0, 0, 0
        columns = min(first.columns, 512)
        with reader_of(model.directory, model.found) as reader:
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
        mine = f"other values, at most {largest:.3g} apart, at row {row}, column {column} of the shard"
    told = gather_objects(world, mine)
    return told[able[0]]
