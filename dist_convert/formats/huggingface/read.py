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

from dist_convert import errors
from dist_convert.formats.megatron.iterations import is_checkpoint, meant_below
from dist_convert.read.source import MOST_VALUES, check_values, no_directory, opened_source, read_json
from dist_convert.read.torch_file import read_pickled_weights
from dist_convert.records import DTYPE_BYTES, JsonObject, StoredTensor, names, row_major

CONFIG_FILE, GENERATION_FILE, ARGS_FILE = "config.json", "generation_config.json", "source_megatron_args.json"
SAFETENSORS, PICKLED = ".safetensors", ".bin"
#: Ways to store weights, the preferred one first: the index of several files, and the name of a single one.
WEIGHTS_KINDS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_MAX_NAME_BYTES = 255
#: Files of an index; and what is told at once of an index, as each error takes far more memory than a name in the file.
_MOST_FILES, _MOST_PROBLEMS = 20_000, 10_000
_MAX_CONFIG_BYTES = 8_000_000


def read_index_file(directory: Path, index_file: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor -> file, every file inside the directory.

    Raises:
        CorruptFile: no weight map, or one that names something else than weights files inside the directory.
    """
    check_inside(directory, index_file)
    weight_map = read_json(directory / index_file, most_values=MOST_VALUES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "an empty weight_map" if weight_map == {} else type(weight_map).__name__
        raise errors.CorruptFile("the index has no weight_map", index_file, expected="tensor -> file", found=found)
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise errors.CorruptFile("the index names no file for a tensor", index_file, tensor=tensor)
    files = dict.fromkeys(weight_map.values())
    if len(files) > _MOST_FILES:  # each is looked up
        found = f"{len(files):,}"
        raise errors.CorruptFile("the index names too many files", index_file, expected=f"{_MOST_FILES:,}", found=found)
    for name in files:
        check_weights_name(directory, name, index_file)
    return weight_map


def check_weights_name(directory: Path, name: str, named_by: str) -> None:
    """Refuse by a CorruptFile a name, had from `named_by`, that is no weights file's or leads out of the directory."""
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    is_possible = name.isprintable() and len(os.fsencode(name)) <= _MAX_NAME_BYTES
    if not is_plain or not is_possible or path.suffix not in (SAFETENSORS, PICKLED):
        expected = f"a relative path inside the directory, ending in {SAFETENSORS} or {PICKLED}"
        raise errors.CorruptFile("not the name of a weights file", named_by, expected, found=repr(name[:80]))
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
        what = f"{name} is a link to a file outside the directory"
        expected = "a file in this directory, or the hub cache's own links to its blobs"
        remedy = "give the directory that holds the file, or copy the file here"
        raise errors.CorruptFile(what, directory / name, expected, found, remedy)


#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
_LIMIT, _MOST_DIMENSIONS = 1 << 62, 8
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
        expected = f"a header of at most {max(0, most)} bytes"
        raise errors.CorruptFile("no safetensors header", file, expected, found=f"{length} bytes")
    try:
        header = _loads(text)
        metadata = header.pop(_METADATA, {})
        tensors = {name: _stored(name, entry, file, 8 + length) for name, entry in header.items()}
        boxes = _loads(metadata[_SHARDING].encode()) if _SHARDING in metadata else {}
        offsets = {name: _offsets(boxes[name]["saved_offsets"], tensors[name].shape) for name in tensors if boxes}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.CorruptFile(
            "damaged safetensors header", file, found=f"{type(error).__name__}: {error}"
        ) from error
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes)):
        if tensor.offset_bytes != position or position + tensor.size_bytes > size_bytes:
            what = "a tensor does not follow the one before it, or lies outside the file"
            expected = f"bytes from {position} on, up to {size_bytes} at most"
            found = f"{tensor.offset_bytes}..{tensor.offset_bytes + tensor.size_bytes}"
            raise errors.CorruptFile(what, file, expected, found, tensor=tensor.name)
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that occurs twice")
    return found


def _stored(name: str, entry: JsonObject, file: str, data_bytes: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    whole = all(type(number) is int and 0 <= number < _LIMIT for number in numbers) and len(offsets) == 2
    whole = whole and len(shape) <= _MOST_DIMENSIONS  # of a million the product alone would take hours
    if whole and isinstance(dtype, str) and dtype.isidentifier() and dtype not in DTYPE_BYTES:
        what, expected = "a dtype that no weight of these families has", ", ".join(DTYPE_BYTES)
        remedy = "save the model dequantised, in bf16, fp16 or fp32"
        raise errors.UnsupportedModel(what, file, expected, tensor=name, found=dtype, remedy=remedy)
    if not whole or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has no known dtype, shape and data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), row_major(shape), data_bytes + offsets[0])


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json; a CheckpointNotFound where there is none, a CorruptFile where it is no JSON."""
    if not (directory / CONFIG_FILE).is_file():
        what, file = f"no {CONFIG_FILE} beside the weights", str(directory / CONFIG_FILE)
        expected, remedy = "the directory that save_pretrained made", "copy the model's config.json there"
        raise errors.CheckpointNotFound(what, file, expected, found=_listing(directory), remedy=remedy)
    check_inside(directory, CONFIG_FILE)
    return read_json(directory / CONFIG_FILE, _MAX_CONFIG_BYTES)


def find_weights(directory: Path) -> tuple[str, ...]:
    """The names of the weights files, sorted; those that an index names may lie on other machines only."""
    single, index = read_index(directory)
    return tuple(sorted(set(index.values()))) if index else (single,)


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a Hugging Face model and no Megatron checkpoint; a CheckpointNotFound where it is both."""
    if not (path / CONFIG_FILE).is_file() or not is_checkpoint(path):
        return (path / CONFIG_FILE).is_file()
    weights = [name for kind in WEIGHTS_KINDS for name in kind if (path / name).is_file()]
    if weights:
        what = "a Megatron checkpoint and a Hugging Face model in one directory"
        found = f"{weights[0]}, and a tracker file or rank directories"
        remedy = "say which one you mean: megatron-to-hf or hf-to-megatron; or give the iteration's directory"
        raise errors.CheckpointNotFound(what, path, expected="one of them", found=found, remedy=remedy)
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
                raise errors.InconsistentShards(
                    f"two sets of weights: {single}, and the files that {index_file} names",
                    directory,
                    expected=f"{index_file} names {single}, or only one of them is here",
                    remedy="give a directory that has only the right ones",
                )
            return single, index
        if os.path.lexists(directory / single):
            check_weights_name(directory, single, single)
            if (directory / single).is_file():
                return single, None
    remedy = "give the directory that save_pretrained made"
    what = "no weights in the Hugging Face directory"
    expected = ", ".join(name for kind in WEIGHTS_KINDS for name in kind)
    if is_checkpoint(directory):
        what, expected = "a Megatron checkpoint, not a Hugging Face directory", CONFIG_FILE
        remedy += ", or convert the other way with megatron-to-hf"
    else:
        expected, remedy = f"one of {expected}", meant_below(directory) or remedy
    raise errors.CheckpointNotFound(what, directory, expected, found=_listing(directory), remedy=remedy)


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
    problems = []

    def add(kind: type[errors.ConversionError], what: str, tensor: str, file: str, expected: str, found: str) -> None:
        remedy = "the index and the files come from different saves: download all again, or copy them from one place"
        problems.append(kind(what, file, expected, found, remedy, tensor=tensor))
        if len(problems) == _MOST_PROBLEMS:
            errors.raise_together(problems)

    for file, count in sorted(Counter(index.values()).items()):
        if file not in headers:
            expected = f"{count} tensors in it, according to the index"
            add(errors.MissingShard, "a weights file is missing", "", file, expected, "no such file on any rank")
    for name, file in index.items():
        others = holders.get(name, [])
        if file in headers and not others:
            add(errors.MissingTensor, "the index names a tensor that no file holds", name, file, "", "nothing")
        elif file in headers and others != [file]:
            what = "a tensor is stored twice" if len(others) > 1 else "a tensor lies elsewhere than the index says"
            add(errors.InconsistentShards, what, name, file, f"in {file} only", f"in {', '.join(others)}")
    for name, (file, *_) in holders.items():
        if name not in index:
            what, found = "a tensor that the index does not name", f"shape {list(headers[file][name].shape)}"
            add(errors.UnknownTensor, what, name, file, "only tensors in the index's weight_map", found)
    errors.raise_together(problems)


def header_to_json(tensors: Mapping[str, StoredTensor]) -> list[list[Any]]:
    """A compact JSON form of a file's tensors, for sending headers between ranks."""
    return [[name, t.dtype, t.shape, t.strides, t.offset_bytes, t.checksum] for name, t in tensors.items()]


def header_from_json(file: str, data: list[list[Any]]) -> dict[str, StoredTensor]:
    """The inverse of `header_to_json`."""
    return {
        name: StoredTensor(name, file, dtype, tuple(shape), tuple(strides), offset_bytes, checksum)
        for name, dtype, shape, strides, offset_bytes, checksum in data
    }
