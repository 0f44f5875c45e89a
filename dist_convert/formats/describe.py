"""One screen about a checkpoint of either kind, from its headers, and whether a conversion of it would start."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, below, shown_line
from dist_convert.formats.dcp.open import read_contents as read_dcp_contents
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.huggingface import read as hf
from dist_convert.formats.huggingface.open import HuggingFaceModel, check_tied, with_zero_biases
from dist_convert.formats.huggingface.quantised import QUANTISED_BY, parameters_in
from dist_convert.formats.megatron import grid as grids
from dist_convert.formats.megatron.args import architecture_from_args, dialect_of_args
from dist_convert.formats.megatron.names import dialect_of, normalise, reason_to_drop
from dist_convert.formats.megatron.parameters import parameters_of
from dist_convert.formats.meta.open import read_headers
from dist_convert.formats.meta.params import weights_files
from dist_convert.formats.open import find_iteration, open_checkpoint, open_iteration, read_like
from dist_convert.formats.tokenizer.find import find_tokenizer
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import read_shards
from dist_convert.formats.torch.shards import Shard, files_beside
from dist_convert.formats.torch_dist.contents import read_contents
from dist_convert.models.catalog import NOTHING_ASKED, Where
from dist_convert.models.schema import Architecture, is_size, part_shape
from dist_convert.options import DCP, HUGGINGFACE, META, TORCH, TORCH_DIST
from dist_convert.ranks.collectives import World, alone
from dist_convert.records import DTYPE_BYTES, JsonObject, StoredTensor, human_bytes, warnings_of
from dist_convert.write.partial import refuse_unfinished


def inspect_checkpoint(path: Path | str, ckpt_dir_name: str | None = None, like: Path | None = None) -> dict[str, Any]:
    """Describe a Megatron checkpoint, or the iteration of that name, or a Hugging Face directory in JSON values.

    Where a conversion of it would not start, `not_convertible` is what that would say: all that it checks is checked.

    Raises:
        CheckpointNotFound, CorruptFile, UnsafePickle, MissingArguments, UnsupportedModel
    """
    path, world = Path(path), alone()
    where = Where(path, replace(NOTHING_ASKED, ckpt_dir_name=ckpt_dir_name), read_like(like, world))
    refuse_unfinished(path, ckpt_dir_name)
    refuse_foreign(path)
    directory, headers = path, None
    if weights_files(path):
        kind, found = META, _describe_meta(path, world)
    elif hf.is_huggingface(path):
        kind, found = HUGGINGFACE, _describe_huggingface(path)
    else:
        directory, kind = find_iteration(where, world)
        if kind == TORCH:
            headers = read_shards(directory, world)
            found = _describe_torch(directory, headers[1])
        elif kind == TORCH_DIST:
            found = _describe_torch_dist(directory, like)
        else:
            found = _describe_dcp(directory, where.like)
    start = {"path": str(directory), "kind": _KINDS.get(kind, kind), "format": kind}
    description: dict[str, Any] = {**start, **dict.fromkeys(_FACTS), **found}
    try:
        model = open_iteration(where, directory, kind, world, headers) if headers else open_checkpoint(where, world)
        if isinstance(model, HuggingFaceModel):
            model = with_zero_biases(model, world)
        catalog, _ = model.catalog()
        if isinstance(model, HuggingFaceModel):
            check_tied(model, catalog, world)
        description |= _facts(catalog.architecture)
        if isinstance(catalog, TorchCatalog):
            name = "{0.pipeline}.{0.virtual}" if catalog.grid.virtual_pipeline > 1 else "{0.pipeline}"
            stages = sorted(catalog.chunks, key=lambda chunk: (chunk.pipeline, chunk.virtual))
            description["layers_per_stage"] = {name.format(chunk): chunk.layers for chunk in stages}
    except ConversionError as error:
        return description | {"not_convertible": str(error)}
    warnings = warnings_of(model.notes)
    return description | ({"warnings": warnings} if warnings else {})


#: What is told of every model that can be converted, and of others as far as args, config.json or params.json say it.
_FACTS = ("family", "parameters", "layers", "positions", "rope_theta", "rope_scaling")
#: What formats are called that are of one kind with others.
_KINDS = {TORCH: "megatron", TORCH_DIST: "megatron", DCP: "distributed"}


def _describe_torch_dist(directory: Path, like: Path | None) -> dict[str, Any]:
    contents = read_contents(directory, may_lack_args=like is not None)
    args = contents["args"]
    return {
        "format": contents["format"],
        **_trained(args, dialect_of_args(args), contents["iteration"], _saved_grid(args)),  # their keys are alike
        **_chunks(directory, contents),
        "tokenizer": args.get("tokenizer_model") or args.get("tokenizer_name_or_path"),
        **({"foreign_classes": contents["foreign_classes"]} if contents["foreign_classes"] else {}),
    }


def _describe_dcp(directory: Path, like: JsonObject | None) -> dict[str, Any]:
    contents = read_dcp_contents(directory)
    config = like or (hf.read_config(directory) if (directory / hf.CONFIG_FILE).is_file() else {})
    return {
        "family": config.get("model_type"),
        "parameters": sum(prod(shape) for _, shape, _ in contents["tensors"].values()),
        **_chunks(directory, contents),
    }


def _chunks(directory: Path, contents: JsonObject) -> JsonObject:
    """What the container of a distributed checkpoint holds."""
    tensors = contents["tensors"]
    places = {place[2] for _, _, chunks in tensors.values() for place in chunks}
    return {
        "dtypes": dict(Counter(dtype for dtype, _, _ in tensors.values())),
        "weights_bytes": sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape, _ in tensors.values()),
        "skipped_bytes": sum(size_bytes for _, _, size_bytes in contents["beside"]),
        "left_behind": {reason: human_bytes(size_bytes) for reason, _, size_bytes in contents["beside"]},
        "chunks": sum(len(chunks) for _, _, chunks in tensors.values()),
        "files": len(places),
        "missing_shards": [file for file in sorted(places) if not (directory / file).is_file()],
    }


def _saved_grid(args: JsonObject) -> grids.Grid | None:
    """The grid that training ran with; None where the args describe none."""
    layers = args.get("num_layers")
    try:
        return grids.grid_of_args(args, layers if layers and is_size(layers) else 0)[0]
    except ConversionError:
        return None


def _trained(args: JsonObject, dialect: tuple[str, str], iteration: int | None, grid: grids.Grid | None) -> JsonObject:
    """What model a Megatron checkpoint is of, where its args tell, and how it was made."""
    norms, experts = dialect
    try:
        facts = _facts(architecture_from_args(args, vocab=None, file=""))
    except ConversionError:
        facts = {}
    return {
        **facts,
        "dialect": f"{norms} norms" + (f", {experts} experts" if experts else ""),
        "iteration": iteration,
        "grid": dict(zip(("TP", "PP", "VPP", "EP", "ETP"), astuple(grid), strict=True)) if grid else {},
    }


def _describe_torch(directory: Path, shards: Mapping[str, Shard]) -> dict[str, Any]:
    first = shards[min(shards)]
    grid = grids.grid_from_args(first.args, len(first.chunks), imported_experts=False)
    chunks = [chunk for shard in shards.values() for chunk in shard.chunks]
    stored = [(normalise(name), tensor) for chunk in chunks for name, tensor in chunk.items()]
    weights_bytes = sum(tensor.size_bytes for name, tensor in stored if not reason_to_drop(name))
    all_bytes = sum(shard.size_bytes + sum(files_beside(directory, shard.file).values()) for shard in shards.values())
    directories = {file.partition("/")[0] for file in shards}
    classes = sorted({name for shard in shards.values() for name in shard.foreign_classes})
    return {
        **_trained(first.args, dialect_of(map(normalise, chain(*first.chunks))), first.iteration, grid),
        "dtypes": dict(Counter(tensor.dtype for _, tensor in stored)),
        "weights_bytes": weights_bytes,
        "skipped_bytes": all_bytes - weights_bytes,
        "files": len(shards),
        "tokenizer": first.args.get("tokenizer_model") or first.args.get("tokenizer_name_or_path"),
        "missing_shards": grids.missing_directories(grid, directories),
        **({"foreign_classes": classes} if classes else {}),
    }


def _facts(architecture: Architecture) -> JsonObject:
    sizes, rows = architecture.sizes(), [parameter.row for parameter in parameters_of(architecture, grids.Grid())]
    parameters = sum(prod(part_shape(part, sizes)) for row in rows for part in row.parts)
    scaling = architecture.rope_scaling and architecture.rope_scaling.rope_type
    told = architecture.layers, architecture.max_positions, architecture.rope_theta, scaling
    return dict(zip(_FACTS, (architecture.family, parameters, *told), strict=True))


def _describe_huggingface(path: Path) -> dict[str, Any]:
    with below(path):
        config, named = hf.read_config(path), hf.find_weights(path)
        present = [name for name in named if (path / name).is_file()]
        tensors = [tensor for name in present for tensor in hf.read_weights_header(path / name, name).values()]
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope |= config[key] if isinstance(config.get(key), dict) else {}
    scaling, quantised = rope.get("rope_type", rope.get("type")), config.get(QUANTISED_BY)
    return {
        "format": "safetensors" if named[0].endswith(hf.SAFETENSORS) else "pytorch",
        "family": config.get("model_type"),
        "parameters": sum(map(parameters_in, tensors)),
        "layers": config.get("num_hidden_layers"),
        "positions": config.get("max_position_embeddings"),
        "rope_theta": config.get("rope_theta", rope.get("rope_theta")),
        "rope_scaling": None if scaling == "default" else scaling,
        **_sizes(tensors),
        "files": len(present),
        "tokenizer": "tokenizer.json" if (path / "tokenizer.json").is_file() else None,
        "missing_shards": [name for name in named if name not in present],
        **({"quantised_by": quantised.get("quant_method")} if isinstance(quantised, dict) else {}),
    }


def _sizes(tensors: Sequence[StoredTensor]) -> JsonObject:
    """What plain files of tensors hold, which is the model alone."""
    dtypes, weights_bytes = Counter(one.dtype for one in tensors), sum(one.size_bytes for one in tensors)
    return {"dtypes": dict(dtypes), "weights_bytes": weights_bytes, "skipped_bytes": 0}


def _describe_meta(path: Path, world: World) -> JsonObject:
    _, headers, params = read_headers(path, world)
    return {
        "family": "mistral" if "hidden_dim" in params else "llama",
        "layers": params.get("n_layers"),
        "rope_theta": params.get("rope_theta"),
        "rope_scaling": "llama3" if params.get("use_scaled_rope") else None,
        **_sizes([tensor for found in headers.values() for tensor in found.values()]),
        "files": len(headers),
        "tokenizer": str(found.path) if (found := find_tokenizer(None, {}, path)).path else None,
        "missing_shards": [],
    }


def as_screen(description: JsonObject) -> str:
    """The description for people: a line each, sizes in decimal units."""
    lines = []
    for name, value in description.items():
        if name == "not_convertible":  # an error's text, of several lines
            continue
        if name.endswith("_bytes"):
            value = human_bytes(value)
        elif name == "grid":
            value = " ".join(f"{key}{size}" for key, size in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, int):
            value = f"{value:,}"
        value = shown_line("none" if value in (None, "") else value)
        lines.append(f"{name.removesuffix('_bytes').replace('_', ' '):18} {value}")
    return "\n".join(lines)
