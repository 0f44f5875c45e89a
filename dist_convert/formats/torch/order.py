"""Does every rank directory hold the shard that its name says? Headers show of some that were copied twice or swapped.

A directory's name is all that tells a shard's place, and a copy under a wrong name converts into a wrong model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_convert.errors import ConversionError, InconsistentShards
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import is_of_expert
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.formats.torch.samples import ALIKE, samples
from dist_convert.ranks.collectives import World
from dist_convert.records import StoredTensor, View, local_name, row_major

ACCEPT = "--accept-shard-order"
#: Args that one run has once, for all its ranks.
_OF_RUN = ("seed", "world_size", "consumed_train_samples")
#: Of a file without checksums so many matrices of its experts are looked at, and of the rest.
_SAMPLED = 2


def order_problems(model: TorchModel, catalog: TorchCatalog, world: World) -> list[ConversionError]:
    """Rank directories that hold another's shard, or one of another run; every rank gets the same.

    Args:
        model, catalog: whose headers are read.
        world: this rank.
    """
    return [*_of_other_runs(model), *_swapped(model, catalog), *_copied_twice(model, catalog, world)]


def _of_other_runs(model: TorchModel) -> Iterator[ConversionError]:
    first = min(model.shards)
    for file, shard in sorted(model.shards.items()):
        for name in _OF_RUN:
            expected, found = model.args.get(name), shard.args.get(name)
            if found != expected and None not in (found, expected):
                yield InconsistentShards(
                    f"two shards disagree about {name}, so they are of different runs",
                    file=str(model.directory / file),
                    expected=f"{expected!r} as in {model.directory / first}",
                    found=repr(found),
                    remedy=f"copy all shards again from one run; if they belong together, convert with {ACCEPT}",
                )


def _swapped(model: TorchModel, catalog: TorchCatalog) -> Iterator[ConversionError]:
    """Directories whose name is not the place of the process that saved them.

    Tools write one rank into all shards, which says nothing.
    """
    ranks = [rank for shard in model.shards.values() if type(rank := shard.args.get("rank")) is int and rank >= 0]
    if len(set(ranks)) < len(model.shards):
        return
    grid, files = catalog.grid, catalog.files
    named = {file: {"pipeline": p, "tensor": t} for (p, t), held in files.dense.items() for file in held}
    for (_, expert, _), held in files.experts.items():
        for file in held:
            named[file]["expert"] = expert
    for file, shard in sorted(model.shards.items()):
        for axis, said in _place_of(shard.args["rank"], shard.args, grid).items():
            if said != named[file][axis]:
                yield InconsistentShards(
                    f"a rank directory holds the shard of another {axis} parallel rank",
                    file=str(model.directory / file),
                    expected=f"{axis} parallel rank {named[file][axis]}, as the directory's name says",
                    found=f"args.rank {shard.args['rank']}, which is {axis} parallel rank {said}",
                    remedy="shards may have been swapped: copy them again from where they were saved; if the names are "
                    f"right, convert with {ACCEPT}",
                )


def _place_of(rank: int, args: Mapping[str, Any], grid: Grid) -> dict[str, int]:
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
        {file: shard for shard, files in held.items() for file in files}
        for held in (catalog.files.dense, catalog.files.experts)
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
    digests = iter(samples(model, [(_memory(one), one.dtype) for found in of_unknown for one in found], world))
    signatures |= {f: tuple((one.name, next(digests)) for one in m) for f, m in zip(unknown, of_unknown, strict=True)}
    first_of: dict[object, str] = {}
    twins = [(first_of.setdefault(signatures[file], file), file) for file in sorted(matrices) if matrices[file]]
    twins = [
        (twin, file) for twin, file in twins if holds[twin] != holds[file] and local_name(twin) != local_name(file)
    ]
    values = samples(model, [(_memory(matrices[file][0]), matrices[file][0].dtype) for _, file in twins], world)
    return [
        InconsistentShards(
            "two rank directories hold the same shard",
            file=str(model.directory / file),
            expected="matrices of its own",
            found=f"those of {model.directory / twin}",
            remedy="one of them was copied under the other's name: copy the right one again from where it was saved; "
            f"if layers or experts are meant to be alike, as in an upcycled model, convert with {ACCEPT}",
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
