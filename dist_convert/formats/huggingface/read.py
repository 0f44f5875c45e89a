"""A Hugging Face directory: its config, its weights files, and where each of their tensors lies.

Only headers are read. Names come from files that anybody may have made, so they must not lead out of the directory.
Names of files and the index: docs/formats.md, "Shards and index"; headers: https://huggingface.co/docs/safetensors,
"Format".
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
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
from dist_convert.formats.megatron.iterations import is_checkpoint
from dist_convert.read.source import no_directory, read_json, reading
from dist_convert.read.torch_file import read_pickled_weights
from dist_convert.records import DTYPE_BYTES, StoredTensor

SAFETENSORS, PICKLED = ".safetensors", ".bin"
_MAX_NAME_BYTES = 255


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
            found=type(weight_map).__name__ if not weight_map else "an empty one",
            remedy="copy or download the file again",
        )
    for name in dict.fromkeys(map(str, weight_map.values())):
        check_weights_name(directory, name, index_file)
    wrong = next((tensor for tensor, name in weight_map.items() if not isinstance(name, str)), None)
    if wrong is not None:
        raise CorruptFile(
            "the index names no file for a tensor",
            tensor=wrong,
            file=index_file,
            remedy="copy or download the file again",
        )
    return dict(weight_map)


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
            remedy="copy or download the file again",
        )
    check_inside(directory, name)


def check_inside(directory: Path, name: str) -> None:
    """Refuse a file that is a link to somewhere else.

    Raises:
        CorruptFile: naming what it leads to.
    """
    if _leaves(directory, name):
        raise CorruptFile(
            f"{name} is a link to a file outside the directory",
            file=str(directory / name),
            expected="a file in this directory, or the hub cache's own links to its blobs",
            found=os.path.realpath(directory / name),
            remedy="give the directory in which the file lies, or copy the file here",
        )


def _leaves(directory: Path, name: str) -> bool:
    """Whether a link leads out of the directory, other than from a hub cache's snapshot to the cache's blobs."""
    root = os.path.realpath(directory)
    if Path(os.path.realpath(directory / name)).is_relative_to(root):
        return False
    inside = Path(os.path.realpath((directory / name).parent)) / PurePosixPath(name).name
    snapshots = Path(root).parent
    if snapshots.name != "snapshots" or not inside.is_relative_to(root) or not inside.is_symlink():
        return True
    blob = Path(os.path.normpath(inside.parent / os.readlink(inside)))
    return blob.parent != snapshots.parent / "blobs"


#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
_LIMIT = 1 << 62


def read_safetensors_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file by name.

    Args:
        path: the file on this machine.
        file: how messages and the tensors name it.

    Raises:
        CorruptFile: the header is too large, no JSON, or its tensors overlap, leave holes or lie outside the file.
        UnsupportedModel: a dtype that is not known.
        SourceError: the file cannot be read.
    """
    with reading(file), path.open("rb") as stream:
        size_bytes = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8) else b""
    if not text:
        raise CorruptFile(
            "no safetensors header",
            file=file,
            expected=f"a header of at most {max(0, min(MAX_HEADER_BYTES, size_bytes - 8))} bytes",
            found=f"{length} bytes",
            remedy="copy the file again; this one is cut short or no safetensors file",
        )
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        tensors = {
            name: _stored(name, entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
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
                remedy="copy the file again; this one is cut short or damaged",
            )
        position += tensor.size_bytes
    return tensors


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
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    if offsets[1] - offsets[0] != step * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), tuple(reversed(strides)), data_bytes + offsets[0])


CONFIG_FILE = "config.json"

#: Ways to store weights, the preferred one first: the index of several files, and the name of a single one.
WEIGHTS_KINDS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class HuggingFaceFiles:
    """A Hugging Face directory as one rank sees it.

    Attributes:
        config: the content of config.json.
        sizes_bytes: of the weights files that are here, by name.
    """

    config: dict[str, Any]
    sizes_bytes: dict[str, int]


def read_directory(directory: Path) -> HuggingFaceFiles:
    """Read the config, and list the weights files that this machine sees.

    Raises:
        CheckpointNotFound: no such directory, no config.json or no weights.
        CorruptFile: see `find_weights`; or a config that is no JSON object.
    """
    names = find_weights(directory)
    config = directory / CONFIG_FILE
    if not config.is_file():
        raise CheckpointNotFound(
            f"no {CONFIG_FILE} beside the weights",
            file=str(config),
            expected="the directory that save_pretrained made",
            found=_listing(directory),
            remedy="copy the model's config.json there",
        )
    check_inside(directory, CONFIG_FILE)
    paths = {name: directory / name for name in names}
    return HuggingFaceFiles(
        read_json(config), {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    )


def find_weights(directory: Path) -> tuple[str, ...]:
    """The names of the weights files, sorted; those that an index names may lie on other machines only.

    Raises:
        CheckpointNotFound: no such directory, or no weights in it.
        CorruptFile: the index is damaged, or names a file outside the directory.
        InconsistentShards: an index and a single file that it does not name.
    """
    index_file, single = _kind(directory)
    if index_file is None:
        return (single,)
    return tuple(sorted(set(read_index_file(directory, index_file).values())))


def read_index(directory: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index says; None where all are in a single file without one.

    Raises:
        CheckpointNotFound, CorruptFile, InconsistentShards: as `find_weights`.
    """
    index_file, _ = _kind(directory)
    return None if index_file is None else read_index_file(directory, index_file)


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


def _kind(directory: Path) -> tuple[str | None, str]:
    """Which of `WEIGHTS_KINDS` is here: (its index, or None without one; its single file)."""
    if not directory.is_dir():
        raise no_directory(directory, "Hugging Face")
    for index_file, single in WEIGHTS_KINDS:
        if (directory / index_file).is_file():
            _refuse_second_model(directory, index_file, single)
            return index_file, single
        if os.path.lexists(directory / single):
            check_weights_name(directory, single, single)
            if (directory / single).is_file():
                return None, single
    if is_checkpoint(directory):
        raise CheckpointNotFound(
            "a Megatron checkpoint, not a Hugging Face directory",
            file=str(directory),
            expected=CONFIG_FILE,
            found=_listing(directory),
            remedy="give the directory that save_pretrained made, or convert the other way with megatron-to-hf",
        )
    raise CheckpointNotFound(
        "no weights in the Hugging Face directory",
        file=str(directory),
        expected="one of " + ", ".join(name for kind in WEIGHTS_KINDS for name in kind),
        found=_listing(directory),
        remedy="give the directory that save_pretrained made",
    )


def _refuse_second_model(directory: Path, index_file: str, single: str) -> None:
    # transformers would load the single file, and the index is what a sharded save left: no guess is safe.
    if (directory / single).is_file() and single not in read_index_file(directory, index_file).values():
        raise InconsistentShards(
            f"two sets of weights: {single}, and the files that {index_file} names",
            file=str(directory),
            expected=f"{index_file} names {single}, or only one of them is here",
            found="both, of different saves",
            remedy="remove the one that is out of date",
        )


def _listing(directory: Path, shown: int = 8) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return (", ".join(names[:shown]) or "nothing") + (f" and {len(names) - shown} more" if len(names) > shown else "")


def read_weights_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of a weights file, by name.

    Args:
        path: the file on this machine.
        file: its name relative to the directory.

    Raises:
        CorruptFile, UnsafePickle, UnsupportedModel: see `read_safetensors_header` and `read_pickled_weights`.
    """
    if file.endswith(SAFETENSORS):
        return read_safetensors_header(path, file)
    return read_pickled_weights(path, file)


def check_index(index: Mapping[str, str], headers: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Compare an index with the files that it names.

    Args:
        index: tensor -> file.
        headers: file -> its tensors, of the files that some rank sees.

    Raises:
        Problems, or the one problem there is: MissingShard, MissingTensor, InconsistentShards, UnknownTensor.
    """
    problems: list[ConversionError] = []
    problems += [
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
    holders: dict[str, list[str]] = {}
    for file in sorted(headers):
        for name in headers[file]:
            holders.setdefault(name, []).append(file)
    for name, file in index.items():
        if file in headers and holders.get(name) != [file]:
            problems.append(_misplaced(name, file, holders.get(name, [])))
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


def _misplaced(name: str, file: str, found: list[str]) -> ConversionError:
    if not found:
        return MissingTensor(
            "the index names a tensor that no file holds", tensor=name, file=file, found="nothing", remedy=_AGAIN
        )
    return InconsistentShards(
        "a tensor lies elsewhere than the index says" if len(found) == 1 else "a tensor is stored twice",
        tensor=name,
        file=file,
        expected=f"in {file} only",
        found=f"in {', '.join(found)}",
        remedy="the files are of different saves; copy all of them again",
    )


def headers_to_json(headers: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, list[list[Any]]]:
    """A compact JSON form of file -> tensors, for sending headers between ranks."""
    return {
        file: [[name, t.dtype, t.shape, t.strides, t.offset_bytes] for name, t in tensors.items()]
        for file, tensors in headers.items()
    }


def headers_from_json(data: Mapping[str, list[list[Any]]]) -> dict[str, dict[str, StoredTensor]]:
    """The inverse of `headers_to_json`."""
    return {
        file: {
            name: StoredTensor(name, file, dtype, tuple(shape), tuple(strides), offset_bytes)
            for name, dtype, shape, strides, offset_bytes in tensors
        }
        for file, tensors in data.items()
    }
