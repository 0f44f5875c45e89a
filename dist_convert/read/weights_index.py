"""The index of a Hugging Face directory, and which names of weights files are accepted.

Names come from files that anybody may have made, so they must not lead out of the directory. Format: docs/formats.md,
"Shards and index".
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from dist_convert.errors import CorruptFile
from dist_convert.read.json_file import read_json

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
