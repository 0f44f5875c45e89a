"""The header of one rank's file of Megatron's `torch` format.

Only headers are read: the pickle and the zip's directory. The optimizer's bytes are counted, not touched. Facts:
docs/formats.md, "Keys of the file".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, MissingArguments, UnsupportedModel
from dist_convert.formats.huggingface.read import header_from_json, header_to_json
from dist_convert.formats.megatron.args import in_megatrons_words
from dist_convert.formats.megatron.grid import SHARD_FILE
from dist_convert.formats.megatron.names import reason_to_drop
from dist_convert.read.restricted_pickle import Inert, Tensor, class_of, foreign_classes, inside, plain_dict
from dist_convert.read.source import opened_source, reading
from dist_convert.read.torch_file import open_dict, place_tensors
from dist_convert.records import DTYPE_BYTES, JsonObject, StoredTensor, human_bytes


def files_beside(directory: Path, file: str) -> dict[str, int]:
    """The other files in a rank file's directory, with their bytes: a distributed optimizer's own file."""
    with reading(file):
        return {
            path.name: path.stat().st_size
            for path in (directory / file).parent.iterdir()
            if path.is_file() and path.name != SHARD_FILE
        }


@dataclass(frozen=True)
class Shard:
    """The header of one rank's file.

    Attributes:
        file: relative to the iteration's directory, `mp_rank_00/model_optim_rng.pt`.
        size_bytes: of the whole file.
        iteration: training step, or None.
        args: the training arguments as JSON values.
        chunks: per virtual pipeline stage, the stored tensors by their name in its model.
        opaque: per virtual pipeline stage, the entries that are no tensors: name -> what they are.
        others: what training keeps beside the model: key of the file -> its tensors, and their bytes.
        foreign_classes: of packages that no checkpoint needs; they were not imported.
    """

    file: str
    size_bytes: int
    iteration: int | None
    args: JsonObject
    chunks: tuple[dict[str, StoredTensor], ...]
    opaque: tuple[dict[str, str], ...]
    others: Mapping[str, Sequence[int]] = field(default_factory=dict)
    foreign_classes: Sequence[str] = ()


def read_shard(path: Path, file: str) -> Shard:
    """Read the header of one rank's file, which is called `file` from the iteration's directory.

    Raises:
        CorruptFile, UnsafePickle: see `torch_file` and `restricted_pickle`.
        MissingArguments: it holds no `args`.
        UnsupportedModel: it is of a format or version that is not read.
    """
    with opened_source(path, file) as opened:
        container, saved = open_dict(opened, file)
        args = saved.get("args")
        values = args.state if isinstance(args, Inert) else args
        if not isinstance(values, Mapping):
            what, expected = "the checkpoint has no args", "an argparse.Namespace or a dict under the key 'args'"
            remedy = "convert a checkpoint that Megatron-LM's training saved; bare state dicts lack the sizes"
            raise MissingArguments(what, file, expected, found=_listed(saved) or "an empty dict", remedy=remedy)
        models = _models(saved, file)
        if any("query_key_value" in name for model in models for name in model):
            _refuse_old_version(saved.get("checkpoint_version"), file)
        prefixes = model_prefixes(len(models))
        chunks = []
        for prefix, model in zip(prefixes, models, strict=True):
            tensors = {prefix + name: value for name, value in model.items() if isinstance(value, Tensor)}
            placed = place_tensors(tensors, container)
            chunks.append({name.removeprefix(prefix): tensor for name, tensor in placed.items()})
        iteration = saved.get("iteration")
        return Shard(
            file=file,
            size_bytes=container.size_bytes,
            iteration=iteration if isinstance(iteration, int) else None,
            args=in_megatrons_words(plain_dict(values)),
            chunks=tuple(chunks),
            opaque=tuple(
                {name: class_of(value) for name, value in model.items() if not isinstance(value, Tensor)}
                for model in models
            ),
            others={
                name: _amount(value)
                for name, value in ((str(key), value) for key, value in saved.items())
                if name not in _OF_MODEL and not name.removeprefix("model").isdecimal()
            },
            foreign_classes=foreign_classes(saved),
        )


#: Keys of a file that describe its model or hold it; with virtual stages there is model0, model1 and so on.
_OF_MODEL = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "model")


def _listed(saved: Mapping[Any, Any]) -> str:
    return ", ".join(f"{str(name)[:200]}: {class_of(value)}" for name, value in islice(saved.items(), 100))


def _amount(saved: Any) -> tuple[int, int]:
    """How many tensors a value holds, at any depth, and the bytes of their storages."""
    tensors = [value for value in inside(saved) if isinstance(value, Tensor)]
    storages = {one.storage.key: one.storage.elements * DTYPE_BYTES.get(one.storage.dtype, 1) for one in tensors}
    return len(tensors), sum(storages.values())


def _refuse_old_version(version: object, file: str) -> None:
    if not isinstance(version, int | float) or version < 2:
        what = "a checkpoint older than version 2 orders the rows of QKV differently"
        remedy = "load and save it once with a Megatron-LM of 2021 or later"
        raise UnsupportedModel(what, file, expected="checkpoint_version 2.0 or newer", found=version, remedy=remedy)


def _models(saved: Mapping[str, Any], file: str) -> tuple[dict[str, Any], ...]:
    keys = ["model"] if "model" in saved else []
    while keys[:1] != ["model"] and f"model{len(keys)}" in saved:
        keys.append(f"model{len(keys)}")
    models = [saved[key] for key in keys]
    if not models or not all(isinstance(model, Mapping) for model in models):
        expected = "a dict under 'model', or under 'model0', 'model1', ... with virtual pipeline stages"
        raise CorruptFile("the file holds no model", file, expected, found=_listed(saved))
    return tuple(_flat(model, file) for model in models)


#: Dicts within a model before Megatron-Core: language_model, embedding, word_embeddings.
_LEVELS = 3
#: Of the names of a model's entries: a pickle can have one dict at a million places.
_MOST_NAMES_BYTES = 64_000_000
#: Of an entry's name, besides its characters.
_NAME_BYTES = 100


def _flat(model: Mapping[Any, Any], file: str) -> dict[str, Any]:
    """The entries of a model, which before Megatron-Core was a dict of dicts, by names with dots."""
    pairs = [(str(name), value) for name, value in model.items()]
    for _ in range(_LEVELS):
        opened, names_bytes = list[tuple[str, Any]](), 0
        for name, value in pairs:
            is_nested = isinstance(value, Mapping) and value and not reason_to_drop(name)
            for inner in value if is_nested else ("",):
                opened.append((f"{name}.{inner}", value[inner]) if is_nested else (name, value))
                names_bytes += len(opened[-1][0]) + _NAME_BYTES
                if names_bytes > _MOST_NAMES_BYTES:
                    expected = f"names of at most {human_bytes(_MOST_NAMES_BYTES)} in all"
                    raise CorruptFile("a model has too many entries, or names that are too long", file, expected)
        pairs = opened
    found = dict(pairs)
    if len(found) < len(pairs):
        raise CorruptFile("two entries of a model have one name", file)
    return found


def model_prefixes(count: int) -> list[str]:
    """What makes names unique in a file of so many models: virtual stages repeat each other's names."""
    return [""] if count == 1 else [f"model{virtual}." for virtual in range(count)]


def stored_names(shard: Shard) -> list[str]:
    """The names of all that a file's models hold, tensors or not."""
    models: list[Mapping[str, object]] = [*shard.chunks, *shard.opaque]
    return [name for model in models for name in model]


def shard_to_json(shard: Shard) -> JsonObject:
    """A compact JSON form, for sending headers between ranks."""
    return vars(shard) | {"chunks": [header_to_json(chunk) for chunk in shard.chunks]}


def shard_from_json(data: JsonObject) -> Shard:
    """The inverse of `shard_to_json`."""
    headers = [header_from_json(data["file"], chunk) for chunk in data["chunks"]]
    chunks = tuple(
        {name: replace(tensor, name=prefix + name) for name, tensor in header.items()}
        for prefix, header in zip(model_prefixes(len(headers)), headers, strict=True)
    )
    return Shard(**{**data, "chunks": chunks, "opaque": tuple(data["opaque"])})
