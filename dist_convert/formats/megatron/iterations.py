"""A Megatron checkpoint on disk: its root, the tracker file, its iterations, and the files of one.

Facts: docs/formats.md, "Rank directories" and "The tracker file".
"""

from pathlib import Path

from dist_convert.errors import CheckpointNotFound, CorruptFile
from dist_convert.formats.megatron.grid import SHARD_FILE, is_rank_directory
from dist_convert.read.dcp import METADATA_FILE, SHARDS, SUFFIX
from dist_convert.read.source import no_directory, read_json, reading
from dist_convert.records import names

#: In the root of a checkpoint: which of its iterations is the newest.
TRACKER_FILE = "latest_checkpointed_iteration.txt"
#: In an iteration: what the Hugging Face model that it was made from says of itself, file name to content.
CARRIED_FILE = "huggingface_configs.json"
#: Names the kind of a distributed checkpoint.
KIND_FILE = "metadata.json"

_MAX_DIGITS = 18
_MAX_TRACKER_CHARACTERS = 1024


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint's root or like one of its iterations, of any format."""
    return (path / TRACKER_FILE).is_file() or bool(rank_files(path)) or is_distributed(path)


def is_distributed(directory: Path) -> bool:
    """Whether a directory holds a distributed checkpoint (`torch_dist` and its relatives), or some of its files."""
    if not directory.is_dir():
        return False
    names_file = (path.suffix == SUFFIX or path.match(SHARDS) for path in directory.iterdir())
    return (directory / METADATA_FILE).is_file() or any(names_file) or _has_kind(directory / KIND_FILE)


def has_rank_directories(directory: Path) -> bool:
    """Whether a directory holds some of the `torch` format; no file is looked at."""
    return directory.is_dir() and any(is_rank_directory(path.name) for path in directory.iterdir())


def _has_kind(path: Path) -> bool:
    """Whether a metadata.json is Megatron's."""
    try:
        return path.is_file() and "sharded_backend" in read_json(path)
    except CorruptFile:
        return False


def tracked_name(root: Path, name_flag: str) -> str | None:
    """The iteration that a tracker file here names; None where there is none, as on all nodes but the first.

    "." where the directory is an iteration itself.

    Raises:
        CorruptFile: a tracker that names no iteration.
    """
    if root.is_dir() and (rank_files(root) or is_distributed(root)):
        return "."
    tracker = root / TRACKER_FILE
    if not tracker.is_file():
        return None
    with reading(tracker), tracker.open(encoding="utf-8", errors="replace") as opened:
        text = opened.read(_MAX_TRACKER_CHARACTERS).strip()
    if text == "release":
        return text
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        what, remedy = "the tracker file names no iteration", f"name the iteration with {name_flag}"
        # A link that leads out of the checkpoint may lead to a file that is nobody's business.
        found = repr(text[:40]) if tracker.resolve().is_relative_to(root.resolve()) else "a link to something else"
        raise CorruptFile(what, tracker, expected="a number, or the word release", found=found, remedy=remedy)
    return f"iter_{int(text):07d}"


def no_iteration(root: Path, name: str | None, name_flag: str) -> CheckpointNotFound:
    """The error about a directory that has no iteration of that name, or no tracker file that names one."""
    if not root.is_dir():
        return no_directory(root, "checkpoint")
    directories = (path.name for path in root.iterdir() if path.is_dir())
    here = sorted(one for one in directories if one == "release" or one.startswith("iter_"))
    below = meant_below(root)
    if name is not None:
        remedy = f"name an existing iteration with {name_flag}" if here else "copy it here from where it was saved"
        if rank_files(root) or is_distributed(root):
            remedy = f"leave {name_flag} out: {root} is an iteration itself"
        expected = f"one of: {names(here)}" if here else "an iteration, but there is none here"
        return CheckpointNotFound("the iteration does not exist", root / name, expected, found="nothing", remedy=remedy)
    what, remedy = "no checkpoint", "check the path on every node"
    expected = f"{TRACKER_FILE}, mp_rank_* directories, *{SUFFIX} files, or a config.json with its weights"
    if here:
        what, remedy = f"no {TRACKER_FILE}", f"name the iteration with {name_flag}, or give its path"
    elif (root / "config.json").is_file():
        what, expected = "a Hugging Face directory, not a Megatron checkpoint", expected.partition(", or")[0]
        remedy = "give the Megatron checkpoint's root, or convert the other way with hf-to-megatron"
    elif below:
        what, remedy = "not a checkpoint, but a directory of checkpoints", below
    elif any(root.glob("*.safetensors")):
        what, remedy = "weights without their config.json", "copy the config.json of the model beside them"
    found = names(here or sorted(one.name for one in root.iterdir())) or "nothing"
    return CheckpointNotFound(what, root, expected, found, remedy)


def meant_below(path: Path) -> str:
    """A question for whoever gave a directory of checkpoints, of either kind; "" where it is none."""
    # accelerate saves the optimizer as a checkpoint of its own beside the model.
    below = [one for one in sorted(path.iterdir()) if one.is_dir() and not one.name.startswith("optim")]
    found = [str(one) for one in below if is_checkpoint(one) or (one / "config.json").is_file()]
    return f"did you mean {' or '.join(found[:4])}?" if found else ""


def notes_on_iteration(directory: Path, iteration: int | None) -> tuple[str, ...]:
    """A warning where a directory's name says another iteration than its files, as after a renaming."""
    prefix, _, number = directory.resolve().name.partition("_")
    if prefix != "iter" or not number.isdecimal() or iteration is None or int(number) == iteration:
        return ()
    return (f"warning: {prefix}_{number} holds files of iteration {iteration}; the files are right",)


def rank_files(directory: Path) -> dict[str, int]:
    """The rank files of an iteration that this machine sees, with their sizes in bytes."""
    found = {}
    with reading(directory):
        for path in sorted(directory.iterdir()):
            if is_rank_directory(path.name) and (path / SHARD_FILE).is_file():
                found[f"{path.name}/{SHARD_FILE}"] = (path / SHARD_FILE).stat().st_size
    return found
