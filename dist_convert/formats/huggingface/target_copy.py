"""A Hugging Face target made from another Hugging Face directory: all but the weights is taken over as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.formats.huggingface.config import TORCH_NAMES, config_json
from dist_convert.formats.huggingface.files import make_files, stored_dtype, write_index
from dist_convert.formats.huggingface.read import CONFIG_FILE, WEIGHTS_KINDS, check_inside, find_weights
from dist_convert.formats.tokenizer.huggingface import TEMPLATES
from dist_convert.models.schema import Architecture
from dist_convert.options import Options
from dist_convert.plan.content import Content
from dist_convert.read.source import MAX_BYTES, read_small_file, reading
from dist_convert.records import TargetFile
from dist_convert.write.checksums import KnownRange
from dist_convert.write.manifest import MANIFEST_FILE

#: What may lie beside the weights and belongs to the model: configs, tokenizer, card, license, code, templates.
_SUFFIXES = ("", ".json", ".jsonl", ".txt", ".md", ".model", ".tiktoken", ".jinja", ".py", ".yaml", ".yml")
_NOT_COPIED = (CONFIG_FILE, MANIFEST_FILE, *(index for index, _ in WEIGHTS_KINDS))
#: Keys of config.json that transformers 4 and 5 call differently; each reads its own.
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def files_to_copy(directory: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of a model that are copied, and the names of all else there that is not its weights.

    Raises:
        CorruptFile: one is a link to somewhere else.
        SourceError: the directory cannot be read.
    """
    copied, others = [], []
    weights = {*find_weights(directory), *_NOT_COPIED}
    with reading(directory):
        for path in sorted(directory.iterdir()):
            if path.name in weights or path.name.startswith("."):
                continue
            if path.name == TEMPLATES:
                copied += [f"{TEMPLATES}/{template.name}" for template in sorted(path.glob("*.jinja"))]
            elif path.is_file() and path.suffix in _SUFFIXES and path.stat().st_size <= MAX_BYTES:
                copied.append(path.name)
            else:
                others.append(path.name)
    for name in copied:
        check_inside(directory, name)
    return tuple(copied), tuple(others)


@dataclass(frozen=True)
class HuggingFaceCopy:
    """A Hugging Face directory that is made from another one; a `Target`.

    Attributes:
        job: what was asked for.
        content: what is converted.
        architecture: the model.
        source: the other directory.
        config: the content of its config.json.
        copied: its files that are copied.
        disks: how many hold a part of the target each.
    """

    job: Options
    content: Content
    architecture: Architecture
    source: Path
    config: Mapping[str, Any]
    copied: Sequence[str]
    disks: int = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """See `Target`."""
        make_files(partial, files)

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """Write config and index, and copy all else."""
        if not is_first:
            return
        for name in self.copied:
            content = read_small_file(self.source / name)
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        config = self._config()
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_index(partial, self.content.files)

    def _config(self) -> dict[str, Any]:
        """The source's, with the dtype that is stored, and what only one version of transformers would find in it."""
        dtype = stored_dtype(self.content.files)
        ours = config_json(self.architecture, dtype, None, None)
        rope = {name: ours[name] for name in _ROPE if name not in self.config}
        return {**self.config, **rope, "torch_dtype": TORCH_NAMES[dtype], "dtype": TORCH_NAMES[dtype]}

    def publish(self) -> None:
        """See `Target`."""

    def to_do(self) -> str:
        """See `Target`."""
        if self.disks == 1 or self.job.push_to_hub:
            return ""
        return f"{self.job.target} is a part of the model on each of {self.disks} disks: copy them into one directory"
