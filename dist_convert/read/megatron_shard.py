"""One `model_optim_rng.pt` of Megatron's `torch` format: its args, and where each of its tensors lies.

Only headers are read: the pickle and the zip's directory. The optimizer's bytes are counted, not touched.
Keys of the file: docs/formats.md, "Keys of the file".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, MissingArguments, UnsupportedModel
from dist_convert.read.pickle_records import Inert, Tensor
from dist_convert.read.plain_values import plain_dict
from dist_convert.read.saved_tensors import open_saved, place_tensors
from dist_convert.read.zip_container import Container
from dist_convert.records import StoredTensor


@dataclass(frozen=True)
class Shard:
    """The header of one rank's file.

    Attributes:
        file: relative to the iteration's directory, `mp_rank_00/model_optim_rng.pt`.
        size_bytes: of the whole file.
        weights_bytes: of the model's tensors.
        iteration: training step, or None.
        args: the training arguments as JSON values.
        chunks: per virtual pipeline stage, the stored tensors by their name in its model.
        opaque: per virtual pipeline stage, the entries that are no tensors: name -> what they are.
    """

    file: str
    size_bytes: int
    weights_bytes: int
    iteration: int | None
    args: dict[str, Any]
    chunks: tuple[dict[str, StoredTensor], ...]
    opaque: tuple[dict[str, str], ...]


def read_shard(path: Path, file: str) -> Shard:
    """Read the header of one rank's file.

    Args:
        path: the file on this machine.
        file: its name relative to the iteration's directory.

    Raises:
        CorruptFile, UnsafePickle: see `zip_container` and `restricted_pickle`.
        MissingArguments: it holds no `args`.
        UnsupportedModel: it is of a format or version that is not read.
    """
    container, saved = open_saved(path, file)
    args = saved.get("args")
    if not isinstance(args, Inert) or not isinstance(args.state, Mapping):
        raise MissingArguments(
            "the checkpoint has no args",
            file=file,
            expected="an argparse.Namespace under the key 'args'",
            found=", ".join(map(str, saved)) or "an empty dict",
            remedy="convert a checkpoint that Megatron-LM's training saved; bare state dicts lack the model's sizes",
        )
    _refuse_old_version(saved.get("checkpoint_version"), file)
    models = _models(saved, file)
    chunks = tuple(_stored_tensors(models, virtual, container) for virtual in range(len(models)))
    iteration = saved.get("iteration")
    return Shard(
        file=file,
        size_bytes=container.size_bytes,
        weights_bytes=sum(tensor.size_bytes for chunk in chunks for tensor in chunk.values()),
        iteration=iteration if isinstance(iteration, int) else None,
        args=plain_dict(args.state),
        chunks=chunks,
        opaque=tuple({n: _kind(v) for n, v in model.items() if not isinstance(v, Tensor)} for model in models),
    )


def _refuse_old_version(version: object, file: str) -> None:
    number = version if isinstance(version, int | float) else 0
    if number < 2:
        raise UnsupportedModel(
            "a checkpoint older than version 2 orders the rows of QKV differently",
            file=file,
            expected="checkpoint_version 2.0 or newer",
            found=version,
            remedy="load and save it once with a Megatron-LM of 2021 or later",
        )


def _models(saved: Mapping[str, Any], file: str) -> tuple[dict[str, Any], ...]:
    keys = ["model"] if "model" in saved else []
    while keys[:1] != ["model"] and f"model{len(keys)}" in saved:
        keys.append(f"model{len(keys)}")
    models = [saved[key] for key in keys]
    if not models or not all(isinstance(model, Mapping) for model in models):
        raise CorruptFile(
            "the file holds no model",
            file=file,
            expected="a dict under 'model', or under 'model0', 'model1', ... with virtual pipeline stages",
            found=", ".join(map(str, saved)),
        )
    if any("language_model" in model for model in models):
        raise UnsupportedModel(
            "a checkpoint of Megatron's legacy model classes",
            file=file,
            expected='a flat dict of Megatron-Core\'s names (docs/formats.md, "Parameter names")',
            found="language_model",
            remedy="convert it to Megatron-Core first (tools/checkpoint/convert.py of Megatron-LM)",
        )
    return tuple({str(name): value for name, value in model.items()} for model in models)


def _label(name: str, virtual: int, chunks: int) -> str:
    """A name that is unique in its file: virtual stages repeat each other's names."""
    return name if chunks == 1 else f"model{virtual}.{name}"


def _stored_tensors(models: Sequence[Mapping[str, Any]], virtual: int, container: Container) -> dict[str, StoredTensor]:
    tensors = {name: value for name, value in models[virtual].items() if isinstance(value, Tensor)}
    labels = {name: _label(name, virtual, len(models)) for name in tensors}
    placed = place_tensors({labels[name]: tensor for name, tensor in tensors.items()}, container)
    return {name: placed[label] for name, label in labels.items()}


def _kind(value: object) -> str:
    return value.class_name if isinstance(value, Inert) else type(value).__name__


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """A compact JSON form, for sending headers between ranks."""
    return {
        "file": shard.file,
        "size_bytes": shard.size_bytes,
        "weights_bytes": shard.weights_bytes,
        "iteration": shard.iteration,
        "args": shard.args,
        "chunks": [
            [[name, t.dtype, t.shape, t.strides, t.offset_bytes] for name, t in chunk.items()] for chunk in shard.chunks
        ],
        "opaque": shard.opaque,
    }


def shard_from_json(data: dict[str, Any]) -> Shard:
    """The inverse of `shard_to_json`."""
    count = len(data["chunks"])
    chunks = tuple(
        {
            name: StoredTensor(
                _label(name, virtual, count), data["file"], dtype, tuple(shape), tuple(strides), offset_bytes
            )
            for name, dtype, shape, strides, offset_bytes in chunk
        }
        for virtual, chunk in enumerate(data["chunks"])
    )
    return Shard(
        data["file"], data["size_bytes"], data["weights_bytes"], data["iteration"], data["args"], chunks,
        tuple(data["opaque"]),
    )  # fmt: skip
