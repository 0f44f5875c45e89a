"""Opens a checkpoint of Megatron's `torch` format from the headers of its files, a source's or a target's.

Every parameter is found and every stored tensor accounted for. All that the headers show to be wrong is raised
together: missing, unknown and misshapen tensors, with their files.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dist_convert import errors
from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron import parameters as params
from dist_convert.formats.megatron.args import added_to_norms
from dist_convert.formats.megatron.grid import Chunk, Grid, ShardFiles, find_shards, grid_from_args, place_chunks
from dist_convert.formats.torch import catalog as catalogs
from dist_convert.formats.torch.shards import Shard
from dist_convert.models import FAMILIES
from dist_convert.models.blocks import MTP_REASON
from dist_convert.models.catalog import LeftBehind, by_reason
from dist_convert.models.neutral import NEUTRAL
from dist_convert.models.schema import Architecture, part_shape
from dist_convert.records import StoredTensor, TargetFile, names

#: Args that must be the same in every shard besides those of the families; they decide where bytes go. The padded
#: vocabulary is not among them: the embedding tells its rows, and Habana's importer writes others on other stages.
_SAME_IN_ALL = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "params_dtype", "use_rope_scaling", "apply_layernorm_1p", "group_query_attention",
    "moe_ffn_hidden_size",
)  # fmt: skip


def check_same_run(shards: Iterable[Shard], directory: Path) -> None:
    """Refuse shards of an iteration's directory whose iteration or sizes differ.

    Raises:
        InconsistentShards: naming the first file and the one that differs from it.
    """
    listed = sorted(shards, key=lambda shard: shard.file)
    first = listed[0]
    problems = []
    compared = dict.fromkeys(key.arg for family in FAMILIES.values() for key in family.keys if key.arg)
    compared |= dict.fromkeys(
        (*_SAME_IN_ALL, *(pin.arg for family in FAMILIES.values() for pin in (*NEUTRAL, *family.pins)))
    )
    for shard in listed[1:]:
        pairs = [("iteration", first.iteration, shard.iteration)]
        pairs += [(name, first.args.get(name), shard.args.get(name)) for name in compared]
        pairs += [("number of models", len(first.chunks), len(shard.chunks))]
        problems += [
            errors.InconsistentShards(
                f"two shards disagree about {name}",
                directory / shard.file,
                expected=f"{expected!r} as in {directory / first.file}",
                found=repr(found),
                remedy="shards of different runs or iterations were mixed; copy this one again",
            )
            for name, expected, found in pairs
            if expected != found
        ]
    errors.raise_together(problems)


def open_catalog(
    shards: Mapping[str, Shard],
    architecture: Architecture,
    *,
    imported_experts: bool = False,
    with_tied_copies: bool = False,
    pinned: frozenset[str] = frozenset(),
    drops_mtp: bool = False,
) -> tuple[catalogs.TorchCatalog, LeftBehind]:
    """A checkpoint from the headers of its files, and what of it holds no weights.

    Args:
        shards: the headers, by file. On the nodes' own disks a file may be on several of them, under `name_at` each.
        architecture: the model, with the true vocabulary size.
        imported_experts: the experts were written by an importer that did not interleave gate and up rows over
            tensor parallel ranks (docs/formats.md, "Known defects of earlier tools").
        with_tied_copies, pinned: see `TorchCatalog`.
        drops_mtp: layers of multi-token prediction are left out.

    Raises:
        Problems, or the one problem there is: all that the headers show to be wrong.
    """
    errors.raise_together(list(_no_tensors(shards.values())))
    first = shards[min(shards)]
    grid = grid_from_args(first.args, len(first.chunks), imported_experts=imported_experts)
    files = find_shards(grid, shards)
    stored = {
        (shard.file, virtual): {megatron_names.normalise(name): tensor for name, tensor in chunk.items()}
        for shard in shards.values()
        for virtual, chunk in enumerate(shard.chunks)
    }
    chunks = _place_layers(architecture, grid, files, stored)
    whole_latents = _latents_are_whole(architecture, stored)
    listed = params.parameters_of(architecture, grid, imported_experts=imported_experts, whole_latents=whole_latents)
    catalog = catalogs.TorchCatalog(
        architecture=architecture,
        title=f"{FAMILIES[architecture.family].hf_class}, {grid}",
        grid=grid,
        chunks=chunks,
        files=files,
        stored=stored,
        with_tied_copies=with_tied_copies,
        pinned=pinned,
    )
    permuted = _experts_are_permuted(catalog, listed, bool(first.args.get("moe_permuted_weights")))
    catalog = replace(catalog, permuted_experts=permuted)
    replicas, used, problems = _survey(catalog, listed)
    left_behind, unknown = _leftovers(catalog, shards, used, drops_mtp=drops_mtp)
    errors.raise_together([*problems, *unknown])
    surveyed = params.with_tensors(replace(catalog, replicas=replicas), listed)
    is_fused = any(megatron_names.has_fused_norm(name) for names_here in stored.values() for name in names_here)
    return replace(surveyed, add_to_norms=added_to_norms(first.args, min(shards), is_fused=is_fused)), left_behind


def _no_tensors(shards: Iterable[Shard]) -> Iterator[errors.UnsupportedModel]:
    """Errors about objects among the tensors, which else would be missed by their names."""
    for shard in shards:
        for name, kind in (entry for opaque in shard.opaque for entry in opaque.items()):
            if megatron_names.reason_to_drop(megatron_names.normalise(name)) is None:
                yield errors.UnsupportedModel(
                    f"an object of class {kind}, which is not imported, among the model's tensors",
                    shard.file,
                    tensor=name,
                    remedy="load the checkpoint with the program that saved it, and save plain tensors",
                )


def files_of_headers(shards: Mapping[str, Shard]) -> tuple[TargetFile, ...]:
    """Rank files that are to be written, by their headers."""
    return tuple(
        TargetFile(file, b"", shard.size_bytes, tuple(t for chunk in shard.chunks for t in chunk.values()))
        for file, shard in sorted(shards.items())
    )


def _place_layers(
    architecture: Architecture,
    grid: Grid,
    files: ShardFiles,
    stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]],
) -> tuple[Chunk, ...]:
    """Which layers each chunk holds, counted in the names of its tensors."""
    first_file = {pipeline: files[pipeline, None, 0][0] for pipeline in range(grid.pipeline)}
    layers_of = {
        (pipeline, virtual): count_layers(stored[file, virtual])
        for pipeline, file in first_file.items()
        for virtual in range(grid.virtual_pipeline)
    }
    found = sum(layers_of.values())
    if found != architecture.layers:
        listed = names(name for chunk in stored.values() for name in chunk)
        by_stage = ", ".join(f"stage {p} model{v}: {n}" for (p, v), n in layers_of.items())
        raise errors.UnsupportedModel(
            "the number of layers in the files differs from the args" if found else "the files hold no layers",
            min(first_file.values()),
            expected=f"num_layers={architecture.layers}",
            found=f"{found} ({by_stage})" if found else listed or "models without tensors",
            remedy="a pipeline stage is incomplete, or of another run or grid: copy it again from where it was saved"
            if found
            else "look for the weights elsewhere: a save failed here, or a tool has put them under other names",
        )
    stages = range(grid.virtual_pipeline)
    return place_chunks([[layers_of[p, v] for p in range(grid.pipeline)] for v in stages])


def count_layers(listed: Iterable[str]) -> int:
    """Layers in one chunk, from the normalised names of its tensors."""
    return max((layer + 1 for name in listed if (layer := megatron_names.layer_of(name)) is not None), default=0)


def _latents_are_whole(
    architecture: Architecture, stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
) -> bool:
    """Whether every rank has all of what Transformer Engine's modules do not cut: by the shape of any such tensor."""
    rows = [row for row in FAMILIES[architecture.family].layer if row.is_whole_in_te]
    for row in rows:
        whole = part_shape(row.parts[0], architecture.sizes())
        for chunk in stored.values():
            found = chunk.get(row.megatron.format(layer=0))
            if found is not None and row.applies_to(architecture):
                return found.shape == whole
    return False


def _experts_are_permuted(catalog: catalogs.TorchCatalog, listed: Iterable[params.Parameter], flag: bool) -> bool:
    """Whether Habana's dynamic experts are stored as rows x columns: by the shape of any that is not square."""
    for parameter in listed:
        if parameter.expert is not None:
            for file in catalogs.files_of(catalog, parameter, 0):
                dialects = [spelling.dialect for spelling, _ in catalogs.fitting_spellings(catalog, parameter, file)]
                if len(dialects) == 1 and dialects[0].startswith("habana-dynamic"):
                    return "transposed" not in dialects[0]
            if parameter.expert:
                break  # the first expert's two matrices have been seen
    return flag


def _survey(
    catalog: catalogs.TorchCatalog, listed: Iterable[params.Parameter]
) -> tuple[dict[str, list[Sequence[params.Replica]]], set[tuple[str, str]], list[errors.ConversionError]]:
    """Where each shard of each parameter is stored, file and tensor of all that was used for it, and what is wrong."""
    problems: list[errors.ConversionError] = []
    used = set[tuple[str, str]]()
    replicas: dict[str, list[Sequence[params.Replica]]] = {}
    for parameter in listed:
        of_shards = replicas[parameter.name] = []
        for shard in range(parameter.shards):
            own = catalogs.files_of(catalog, parameter, shard)
            try:
                found = catalogs.equal_replicas(catalog, parameter, shard)
            except (errors.MissingTensor, errors.WrongShape, errors.InconsistentShards, errors.PlanError) as problem:
                problems.append(problem)
                found = ()
            if not found or parameter.name in catalog.pinned:
                used |= {(file, one.name) for file in own for one in catalogs.stored_as(catalog, parameter, file)}
            of_shards += [found] if found else []
            # Behind those of its own files is the last stage's copy, which may have any dtype.
            for number, view in ((number, view) for number, replica in enumerate(found) for _, _, view in replica):
                used.add((view.file, view.tensor))
                problems += params.dtype_problems(
                    view, of_shards[0][0][0][2].dtype if number < len(own) else view.dtype
                )
    return replicas, used, problems


def _leftovers(
    catalog: catalogs.TorchCatalog, shards: Mapping[str, Shard], used: set[tuple[str, str]], *, drops_mtp: bool
) -> tuple[LeftBehind, list[errors.ConversionError]]:
    left: list[tuple[str, int, int]] = []
    unknown: list[errors.ConversionError] = []
    for shard in shards.values():
        left += [(name, count, size_bytes) for name, (count, size_bytes) in shard.others.items()]
        for chunk, opaque in zip(shard.chunks, shard.opaque, strict=True):
            unused = {name: tensor for name, tensor in chunk.items() if (shard.file, tensor.name) not in used}
            sizes = {name: tensor.size_bytes for name, tensor in unused.items()}
            for name, size_bytes in {**sizes, **dict.fromkeys(opaque, 0)}.items():
                reason = _reason_to_drop(catalog.architecture, megatron_names.normalise(name), drops_mtp=drops_mtp)
                if reason is None:
                    unknown.append(params.unknown_tensor(catalog.family, shard.file, name))
                elif reason == _TIED_HEAD and name in unused and unused[name].shape != _rows_of_embedding(catalog):
                    unknown.append(_other_head(catalog, unused[name]))
                else:
                    left.append((reason, 1, size_bytes))
    return by_reason(left), unknown


_TIED_HEAD = "output layer (equal to the embedding that it is tied to)"


def _rows_of_embedding(catalog: catalogs.TorchCatalog) -> tuple[int, int]:
    """The shape of the embedding on each tensor parallel rank."""
    return catalog.architecture.padded_vocab // catalog.grid.tensor, catalog.architecture.hidden


def _other_head(catalog: catalogs.TorchCatalog, head: StoredTensor) -> errors.WrongShape:
    return errors.WrongShape(
        "the args tie the head to the embedding, but their shapes differ",
        head.file,
        tensor=head.name,
        expected=list(_rows_of_embedding(catalog)),
        found=list(head.shape),
        remedy="the file or the args come from another run: copy both from one place",
    )


def _reason_to_drop(architecture: Architecture, name: str, *, drops_mtp: bool) -> str | None:
    has_mtp = bool(architecture.fact("mtp_layers"))
    if name == megatron_names.TIED[1] and architecture.tied:
        return "output layer (which nothing reads beside multi-token prediction)" if has_mtp else _TIED_HEAD
    if drops_mtp and megatron_names.is_of_mtp(name):
        return MTP_REASON
    if (drops_mtp or has_mtp) and name == megatron_names.TIED[0]:
        return "embedding (the copy that multi-token prediction reads)"
    return megatron_names.reason_to_drop(name)
