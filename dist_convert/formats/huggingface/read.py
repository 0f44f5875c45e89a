"""A Hugging Face directory: its config, its weights files, and where each of their tensors lies.

Only headers are read. Names come from files that anybody may have made, so they must not lead out of the directory.
Names of files and the index: docs/formats.md, "Shards and index"; headers: https://huggingface.co/docs/safetensors,
"Format".
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dist_convert.errors import (
    CheckpointNotFound,
    ConversionError,
    CorruptFile,
    InconsistentShards,
    MissingShard,
    MissingTensor,
    UnknownTensor,
    UnsupportedModel,
    raise_together,
)
from dist_convert.formats.megatron.iterations import is_checkpoint, meant_below
from dist_convert.read.source import check_values, no_directory, opened_source, read_json
from dist_convert.read.torch_file import read_pickled_weights
from dist_convert.records import DTYPE_BYTES, StoredTensor, names, row_major

CONFIG_FILE, GENERATION_FILE, ARGS_FILE = "config.json", "generation_config.json", "source_megatron_args.json"
SAFETENSORS, PICKLED = ".safetensors", ".bin"
#: Ways to store weights, the preferred one first: the index of several files, and the name of a single one.
WEIGHTS_KINDS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_MAX_NAME_BYTES = 255
_MAX_CONFIG_BYTES = 8_000_000


def read_index_file(directory: Path, index_file: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor -> file, every file inside the directory.

    Raises:
        CorruptFile: no weight map, or one that names something else than weights files inside the directory.
    """
    check_inside(directory, index_file)
    weight_map = read_json(directory / index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(
            "the index has no weight_map",
            file=index_file,
            expected="an object: tensor -> file",
            found="an empty one" if weight_map == {} else type(weight_map).__name__,
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptFile("the index names no file for a tensor", tensor=tensor, file=index_file)
    for name in dict.fromkeys(weight_map.values()):
        check_weights_name(directory, name, index_file)
    return weight_map


def check_weights_name(directory: Path, name: str, named_by: str) -> None:
    """Refuse a name that is no weights file's, or leads out of the directory.

    Raises:
        CorruptFile: quoting the name, and the file `named_by` that has it.
    """
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    is_possible = name.isprintable() and len(os.fsencode(name)) <= _MAX_NAME_BYTES
    if not is_plain or not is_possible or path.suffix not in (SAFETENSORS, PICKLED):
        raise CorruptFile(
            "not the name of a weights file",
            file=named_by,
            expected=f"a relative path inside the directory, ending in {SAFETENSORS} or {PICKLED}",
            found=repr(name[:80]),
        )
    check_inside(directory, name)


def check_inside(directory: Path, name: str) -> None:
    """Refuse a file that is a link to somewhere else, other than from a hub cache's snapshot to the cache's blobs.

    Raises:
        CorruptFile: naming what it leads to.
    """
    root, found = Path(os.path.realpath(directory)), Path(os.path.realpath(directory / name))
    inside = Path(os.path.realpath((directory / name).parent)) / PurePosixPath(name).name
    if root.parent.name == "snapshots" and inside.is_relative_to(root) and inside.is_symlink():
        blob = Path(os.path.normpath(inside.parent / os.readlink(inside)))
        if blob.parent == root.parent.parent / "blobs":
            return
    if not found.is_relative_to(root):
        raise CorruptFile(
            f"{name} is a link to a file outside the directory",
            file=str(directory / name),
            expected="a file in this directory, or the hub cache's own links to its blobs",
            found=found,
            remedy="give the directory in which the file lies, or copy the file here",
        )


#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
_LIMIT = 1 << 62
#: Where torch.distributed.checkpoint says which box each tensor of a file is.
_METADATA, _SHARDING = "__metadata__", "DCP_SHARDING_INFO"


def read_safetensors_shard(path: Path, file: str) -> tuple[dict[str, StoredTensor], dict[str, tuple[int, ...]]]:
    """Every tensor of the file by name, and its first element in the one that it is a box of, where torch says that.

    Messages and the tensors call the file `file`.

    Raises:
        CorruptFile: the header is too large, no JSON, or its tensors overlap, leave holes or lie outside the file.
        UnsupportedModel: a dtype that is not known.
        SourceError: the file cannot be read.
    """
    with opened_source(path, file) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        most = min(MAX_HEADER_BYTES, size_bytes - 8)
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 2 <= length <= most else b""
    if not text:
        raise CorruptFile(
            "no safetensors header",
            file=file,
            expected=f"a header of at most {max(0, most)} bytes",
            found=f"{length} bytes",
        )
    try:
        header = _loads(text)
        metadata = header.pop(_METADATA, {})
        tensors = {name: _stored(name, entry, file, 8 + length) for name, entry in header.items()}
        boxes = _loads(metadata[_SHARDING].encode()) if _SHARDING in metadata else {}
        offsets = {name: _offsets(boxes[name]["saved_offsets"], tensors[name].shape) for name in tensors if boxes}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile("damaged safetensors header", file=file, found=f"{type(error).__name__}: {error}") from error
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes)):
        if tensor.offset_bytes != position or position + tensor.size_bytes > size_bytes:
            raise CorruptFile(
                "a tensor does not follow the one before it, or lies outside the file",
                tensor=tensor.name,
                file=file,
                expected=f"bytes from {position} on, up to {size_bytes} at most",
                found=f"{tensor.offset_bytes}..{tensor.offset_bytes + tensor.size_bytes}",
            )
        position += tensor.size_bytes
    return tensors, offsets


def _loads(text: bytes) -> dict[str, Any]:
    check_values(text)
    found: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    return found


def _offsets(numbers: list[Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(numbers) != len(shape) or any(type(number) is not int or not 0 <= number < _LIMIT for number in numbers):
        raise ValueError(f"saved_offsets {str(numbers)[:80]} of a tensor of shape {list(shape)}")
    return tuple(numbers)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def _stored(name: str, entry: dict[str, Any], file: str, data_bytes: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    whole = all(type(number) is int and 0 <= number < _LIMIT for number in numbers) and len(offsets) == 2
    if whole and isinstance(dtype, str) and dtype.isidentifier() and dtype not in DTYPE_BYTES:
        raise UnsupportedModel(
            "a dtype that no weight of these families has",
            tensor=name,
            file=file,
            expected=", ".join(DTYPE_BYTES),
            found=dtype,
            remedy="save the model dequantised, in bf16, fp16 or fp32",
        )
    if not whole or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has no known dtype, shape and data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), row_major(shape), data_bytes + offsets[0])


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        CheckpointNotFound: there is none.
        CorruptFile: it is a link to somewhere else, or no JSON object.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointNotFound(
            f"no {CONFIG_FILE} beside the weights",
            file=str(directory / CONFIG_FILE),
            expected="the directory that save_pretrained made",
            found=_listing(directory),
            remedy="copy the model's config.json there",
        )
    check_inside(directory, CONFIG_FILE)
    return read_json(directory / CONFIG_FILE, _MAX_CONFIG_BYTES)


def find_weights(directory: Path) -> tuple[str, ...]:
    """The names of the weights files, sorted; those that an index names may lie on other machines only."""
    single, index = read_index(directory)
    return tuple(sorted(set(index.values()))) if index else (single,)


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a Hugging Face model. A config.json beside a Megatron checkpoint does not make it one.

    Raises:
        CheckpointNotFound: it is both.
    """
    if not (path / CONFIG_FILE).is_file() or not is_checkpoint(path):
        return (path / CONFIG_FILE).is_file()
    weights = [name for kind in WEIGHTS_KINDS for name in kind if (path / name).is_file()]
    if weights:
        raise CheckpointNotFound(
            "a Megatron checkpoint and a Hugging Face model in one directory",
            file=str(path),
            expected="one of them",
            found=f"{weights[0]}, and a tracker file or rank directories",
            remedy="say which is meant with megatron-to-hf or hf-to-megatron, or give the iteration's directory",
        )
    return False


def read_index(directory: Path) -> tuple[str, dict[str, str] | None]:
    """The name of a single weights file of the kind that is here, and the index of several where there is one.

    Raises:
        CheckpointNotFound: no such directory, or no weights in it.
        CorruptFile: the index is damaged, or names a file outside the directory.
        InconsistentShards: an index and a single file that it does not name.
    """
    if not directory.is_dir():
        raise no_directory(directory, "Hugging Face")
    for index_file, single in WEIGHTS_KINDS:
        if (directory / index_file).is_file():
            index = read_index_file(directory, index_file)
            # transformers would load the single file, and the index is what a sharded save left: no guess is safe.
            if (directory / single).is_file() and single not in index.values():
                raise InconsistentShards(
                    f"two sets of weights: {single}, and the files that {index_file} names",
                    file=str(directory),
                    expected=f"{index_file} names {single}, or only one of them is here",
                    remedy="give a directory that has only the right ones",
                )
            return single, index
        if os.path.lexists(directory / single):
            check_weights_name(directory, single, single)
            if (directory / single).is_file():
                return single, None
    is_megatron = is_checkpoint(directory)
    remedy = "give the directory that save_pretrained made"
    if is_megatron:
        remedy += ", or convert the other way with megatron-to-hf"
    raise CheckpointNotFound(
        "a Megatron checkpoint, not a Hugging Face directory"
        if is_megatron
        else "no weights in the Hugging Face directory",
        file=str(directory),
        expected=CONFIG_FILE if is_megatron else "one of " + ", ".join(name for kind in WEIGHTS_KINDS for name in kind),
        found=_listing(directory),
        remedy=remedy if is_megatron else meant_below(directory) or remedy,
    )


def _listing(directory: Path) -> str:
    return names(sorted(path.name for path in directory.iterdir())) or "nothing"


def read_weights_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of a weights file, by name: see `read_safetensors_shard` and `read_pickled_weights`."""
    return read_safetensors_shard(path, file)[0] if file.endswith(SAFETENSORS) else read_pickled_weights(path, file)


def check_index(index: Mapping[str, str], headers: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Compare an index, tensor -> file, with the files that some rank sees, file -> its tensors.

    Raises:
        Problems, or the one problem there is: MissingShard, MissingTensor, InconsistentShards, UnknownTensor.
    """
    holders: dict[str, list[str]] = {}
    for file in sorted(headers):
        for name in headers[file]:
            holders.setdefault(name, []).append(file)
    problems: list[ConversionError] = [
        MissingShard(
            "a weights file is missing",
            file=file,
            expected=f"{count} tensors in it, by the index",
            found="no such file on any rank",
            remedy="download the model again, or copy the file beside the others",
        )
        for file, count in sorted(Counter(index.values()).items())
        if file not in headers
    ]
    for name, file in index.items():
        found = holders.get(name, [])
        if file in headers and not found:
            what, remedy = "the index names a tensor that no file holds", "copy or download both files again"
            problems.append(MissingTensor(what, tensor=name, file=file, found="nothing", remedy=remedy))
        elif file in headers and found != [file]:
            problems.append(
                InconsistentShards(
                    "a tensor is stored twice" if len(found) > 1 else "a tensor lies elsewhere than the index says",
                    tensor=name,
                    file=file,
                    expected=f"in {file} only",
                    found=f"in {', '.join(found)}",
                    remedy="the files are of different saves; copy all of them again",
                )
            )
    problems += [
        UnknownTensor(
            "a tensor that the index does not name",
            tensor=name,
            file=files[0],
            expected="only tensors in the index's weight_map",
            found=f"shape {list(headers[files[0]][name].shape)}",
            remedy="the file is of another save than the index; copy both again",
        )
        for name, files in holders.items()
        if name not in index
    ]
    raise_together(problems)


def header_to_json(tensors: Mapping[str, StoredTensor]) -> list[list[Any]]:
    """A compact JSON form of a file's tensors, for sending headers between ranks."""
    return [[name, t.dtype, t.shape, t.strides, t.offset_bytes, t.checksum] for name, t in tensors.items()]


def header_from_json(file: str, data: list[list[Any]]) -> dict[str, StoredTensor]:
    """The inverse of `header_to_json`."""
    return {
        name: StoredTensor(name, file, dtype, tuple(shape), tuple(strides), offset_bytes, checksum)
        for name, dtype, shape, strides, offset_bytes, checksum in data
    }
