"""Finds a Megatron checkpoint on disk: the iteration's directory and the rank files in it that this machine sees.

Facts: docs/formats.md, "Rank directories" and "The tracker file".
"""

from __future__ import annotations

from pathlib import Path

from dist_convert.errors import CheckpointNotFound, CorruptFile, UnsupportedModel
from dist_convert.layout import SHARD_FILE, is_rank_directory
from dist_convert.read.directory import no_directory
from dist_convert.read.source_file import reading

#: The flag that names an iteration, in most commands.
NAME_FLAG = "--ckpt-dir-name"

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_MAX_DIGITS = 18
_MAX_TRACKER_CHARACTERS = 1024


def iteration_directory(root: Path, name: str | None, name_flag: str = NAME_FLAG) -> Path:
    """The directory of one iteration.

    Args:
        root: the checkpoint's root, or the iteration's directory itself.
        name: such as "iter_0000004" or "release"; None asks the tracker file.
        name_flag: that gives the name, for messages.

    Raises:
        CheckpointNotFound: no such directory, or no tracker.
        CorruptFile: a tracker that names no iteration.
        UnsupportedModel: a distributed checkpoint (`torch_dist` and its relatives).
    """
    if not root.is_dir():
        raise no_directory(root, "checkpoint")
    directory = root / (name or _tracked(root, name_flag))
    if not directory.is_dir():
        raise CheckpointNotFound(
            "the iteration does not exist",
            file=str(directory),
            expected="one of: " + (", ".join(_iterations(root)) or "no iteration is here at all"),
            found="nothing",
            remedy=f"name an existing iteration with {name_flag}",
        )
    if not rank_files(directory) and _is_distributed(directory):
        raise UnsupportedModel(
            "a distributed checkpoint (torch_dist, torch_dcp or a relative)",
            file=str(directory),
            expected=f"Megatron's `torch` format, mp_rank_*/{SHARD_FILE}",
            found="metadata.json or .metadata",
            remedy="load it with Megatron-LM and save it with --ckpt-format torch (--ckpt-convert-format torch)",
        )
    return directory


def tracked_name(root: Path, name_flag: str) -> str | None:
    """The iteration that a tracker file here names; None where there is none, as on all nodes but the first."""
    has_tracker = root.is_dir() and ((root / TRACKER_FILE).is_file() or rank_files(root))
    return _tracked(root, name_flag) if has_tracker else None


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint's root or like one of its iterations, of any format."""
    return (path / TRACKER_FILE).is_file() or bool(rank_files(path)) or _is_distributed(path)


def rank_directory_bytes(directory: Path, file: str) -> int:
    """Bytes of all files in a rank file's directory, a distributed optimizer's own file among them."""
    return sum(path.stat().st_size for path in (directory / file).parent.iterdir() if path.is_file())


def _is_distributed(directory: Path) -> bool:
    return (directory / "metadata.json").exists() or (directory / ".metadata").exists()


def _tracked(root: Path, name_flag: str) -> str:
    if rank_files(root) or _is_distributed(root):
        return "."
    tracker = root / TRACKER_FILE
    if not tracker.is_file() and (root / "config.json").is_file():
        raise CheckpointNotFound(
            "a Hugging Face directory, not a Megatron checkpoint",
            file=str(root),
            expected=f"{TRACKER_FILE} or mp_rank_* directories",
            found="config.json",
            remedy="give the Megatron checkpoint's root, or convert the other way with hf-to-megatron",
        )
    if not tracker.is_file():
        raise CheckpointNotFound(
            f"no {TRACKER_FILE}",
            file=str(root),
            expected="a Megatron checkpoint's root directory",
            found=", ".join(_iterations(root)) or "no iteration",
            remedy=f"check the path, or name the iteration with {name_flag}",
        )
    with reading(tracker), tracker.open(encoding="utf-8", errors="replace") as opened:
        text = opened.read(_MAX_TRACKER_CHARACTERS).strip()
    if text == "release":
        return text
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise CorruptFile(
            "the tracker file names no iteration",
            file=str(tracker),
            expected="a number, or the word release",
            found="a link to something else" if _is_link_out(tracker) else repr(text[:40]),
            remedy=f"name the iteration with {name_flag}",
        )
    return f"iter_{int(text):07d}"


def _is_link_out(tracker: Path) -> bool:
    """Whether a link leads out of the checkpoint, to a file that may be nobody's business."""
    return not tracker.resolve().is_relative_to(tracker.parent.resolve())


def _iterations(root: Path) -> list[str]:
    names = (path.name for path in root.iterdir() if path.is_dir())
    return sorted(name for name in names if name == "release" or name.startswith("iter_"))


def rank_files(directory: Path) -> dict[str, int]:
    """The rank files of an iteration that this machine sees, with their sizes in bytes."""
    found = {}
    with reading(directory):
        for path in sorted(directory.iterdir()):
            if is_rank_directory(path.name) and (path / SHARD_FILE).is_file():
                found[f"{path.name}/{SHARD_FILE}"] = (path / SHARD_FILE).stat().st_size
    return found
