"""Which files of a directory go to a hub, and which files of an earlier upload they replace."""

from __future__ import annotations

from pathlib import Path

from dist_convert.errors import UploadError
from dist_convert.read.directory import no_directory
from dist_convert.read.huggingface import CONFIG_FILE, find_weights
from dist_convert.tokenizer.huggingface import FILES, TEMPLATES, is_huggingface
from dist_convert.write.partial import PARTIAL_SUFFIX
from dist_convert.write.unfinished import refuse_unfinished

#: Hidden files, which file systems and file managers leave, and what is not finished.
IGNORED = (".*", "*/.*", f"*{PARTIAL_SUFFIX}", f"*{PARTIAL_SUFFIX}/*")

#: Weights of an earlier upload, which transformers may load instead of the new ones where those have other names.
_WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
#: Files of an earlier tokenizer, which transformers, or another reader, may take together with the new ones.
_TOKENIZER = (*FILES, f"{TEMPLATES}/*.jinja", "tokenizer.model.v*", "tekken.json", "spiece.model")


def replaced_patterns(directory: Path) -> list[str]:
    """Names on the hub that go if the directory has no such file; without a tokenizer the one on the hub stays."""
    return [*_WEIGHTS, *(_TOKENIZER if is_huggingface(directory) else ())]


def check_directory(directory: Path) -> int:
    """The size in bytes of what a complete directory sends.

    Raises:
        UploadError, CheckpointNotFound, CorruptFile, InconsistentShards: see `find_weights`.
    """
    refuse_unfinished(directory)
    if not directory.is_dir():
        raise no_directory(directory, "finished")
    missing = [name for name in (CONFIG_FILE, *find_weights(directory)) if not (directory / name).is_file()]
    if missing or directory.resolve().name.endswith(PARTIAL_SUFFIX):
        raise UploadError(
            "the directory to be uploaded is not complete",
            file=str(directory),
            found=f"without {', '.join(missing[:6])}" if missing else "what a conversion left that did not finish",
            remedy="convert again",
        )
    leftovers = sorted(path.name for path in directory.iterdir() if path.name.endswith(PARTIAL_SUFFIX))
    if leftovers:
        raise UploadError(
            "the directory to be uploaded holds what did not finish",
            file=str(directory),
            found=", ".join(leftovers[:6]),
            remedy="run again what was interrupted, such as dist-convert tokenizer, or remove it",
        )
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    paths = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    return sum((directory / path).stat().st_size for path in filter_repo_objects(paths, ignore_patterns=list(IGNORED)))
