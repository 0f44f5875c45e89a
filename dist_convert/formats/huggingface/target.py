"""A Hugging Face target, and what lies beside its weights: config, index, args of the source, bins, model card.

The card's front matter is what the Hugging Face Hub reads (https://huggingface.co/docs/hub/model-cards). It holds no
date and no path, so that the same checkpoint gives the same card on every machine; a license is not known, so none is
named. The tokenizer's files are `tokenizer`'s.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_convert.formats.huggingface.config import (
    TORCH_NAMES,
    config_json,
    generation_config_json,
    samples,
    special_token_ids,
)
from dist_convert.formats.huggingface.files import make_files, stored_dtype, write_index
from dist_convert.formats.tokenizer.build import padding_id
from dist_convert.formats.tokenizer.huggingface import is_huggingface
from dist_convert.formats.tokenizer.record import Style, Tokenizer, how_to_add_tokenizer
from dist_convert.formats.tokenizer.write import write_tokenizer
from dist_convert.formats.torch.capacity_bins import Bin, write_bins
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Catalog
from dist_convert.models.schema import Architecture
from dist_convert.options import Options
from dist_convert.plan.content import Content
from dist_convert.records import TargetFile, __version__
from dist_convert.write.checksums import KnownRange

CARD_FILE = "README.md"


def model_card(content: Content, source: Catalog, checkpoint: Path, tokenizer: Tokenizer) -> str:
    """The text of the card.

    Args:
        content, source: what was converted.
        checkpoint: directory of the iteration that was read; only its name and its parent's are told.
        tokenizer: as this rank found it; only its name is told.
    """
    hf_class, family = FAMILIES[source.architecture.family].hf_class, source.architecture.family
    grid = source.title.removeprefix(f"{hf_class}, ")
    checkpoint = Path(os.path.abspath(checkpoint))  # a relative path has no parent; a link keeps its name
    elements: Counter[str] = Counter()
    for file in content.files:
        for tensor in file.tensors:
            elements[tensor.dtype] += tensor.elements
    stored = ", ".join(f"{TORCH_NAMES[dtype]} ({count:,})" for dtype, count in elements.most_common())
    conversion = [
        ("Checkpoint", f"{_code(checkpoint.parent.name)}, {_code(checkpoint.name)}"),
        ("Format", f"Megatron-LM `torch`, {grid}, {TORCH_NAMES[source.params_dtype]}"),
        ("Converted by", f"dist_convert {__version__} with torch {torch.__version__}"),
        ("Weights load with", "transformers 4.49 and later"),
        ("Tokenizer at conversion", _origin(tokenizer)),
        ("Plan digest", f"`{content.digest}`"),
    ]
    model = [*_sizes(source.architecture), ("Parameters", f"{elements.total():,}"), ("Stored as", stored)]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {family}
- megatron-lm
- dist_convert
---

# {hf_class} of {elements.total():,} parameters

Converted from a Megatron-LM checkpoint. The sizes are those of the checkpoint's own training arguments.

{_table("Model", model)}

{_table("Conversion", conversion)}

The plan digest is a SHA-256 of the model's sizes and of the place of every tensor in the checkpoint and here. It tells
how the bytes were moved, not which bytes: checksums of the files are in `conversion.json`. The license is that of the
checkpoint; this card does not know it.
"""


def _origin(tokenizer: Tokenizer) -> str:
    """Where the tokenizer came from, and by which packages it was built."""
    if tokenizer.path is None:
        return "none"
    name = _code(Path(os.path.abspath(tokenizer.path)).name)
    if tokenizer.kind == "huggingface":
        return f"copied from the directory {name}"
    versions = " and ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers"))
    if tokenizer.kind == "slow":
        return f"copied from the directory {name}, `tokenizer.json` built with {versions}"
    kind = {"tiktoken": "tiktoken", "sentencepiece": "SentencePiece"}[tokenizer.kind]
    return f"built from {name} ({kind}) with {versions}"


def _sizes(architecture: Architecture) -> list[tuple[str, str]]:
    a = architecture
    rows = [
        ("Layers", f"{a.layers:,}"),
        ("Hidden size", f"{a.hidden:,}"),
        ("Feed-forward size", f"{a.ffn:,}" + (" of each expert" if a.experts else "")),
        ("Attention heads", f"{a.heads:,}, each of {a.head_dim:,}"),
        ("Key and value heads", f"{a.query_groups:,}"),
        ("Vocabulary", f"{a.vocab:,}" + (", tied embeddings" if a.tied else "")),
        ("Positions", f"{a.max_positions:,}"),
    ]
    return rows + ([("Experts", f"{a.experts:,}, {a.experts_per_token:,} for each token")] if a.experts else [])


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(name: str) -> str:
    """A file's name as Markdown shows it unchanged in a table."""
    plain = "".join(letter if letter.isprintable() and letter not in "`|" else "_" for letter in name)
    return f"`{plain}`"


ARGS_FILE = "source_megatron_args.json"


@dataclass(frozen=True)
class HuggingFaceTarget:
    """A Hugging Face directory that is to be made; a `Target`.

    Attributes:
        job: what was asked for.
        content, source: what is converted.
        checkpoint: directory of the iteration that it is read from.
        args: the checkpoint's training arguments.
        tokenizer: whose files are copied, or of which it is built; the configs take over its special ids.
        style: of a tokenizer that is built.
        bins: capacity bins of all ranks, where the job asks for them, and the catalog that they are of.
        disks: how many hold a part of the target each.
    """

    job: Options
    content: Content
    source: Catalog
    checkpoint: Path
    args: Mapping[str, object]
    tokenizer: Tokenizer
    style: Style
    bins: tuple[TorchCatalog, Sequence[Bin]] | None = None
    disks: int = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """See `Target`."""
        if is_first:
            write_tokenizer(self.tokenizer, self.style, partial)  # first, so that what fails here fails early
        make_files(partial, files)

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """Write configs, index, model card, training arguments and capacity bins into the partial directory."""
        if not is_first:
            return
        architecture = self.source.architecture
        bos, eos = special_token_ids(architecture.vocab, self.tokenizer, instruct=self.job.instruct)
        pad = padding_id(self.tokenizer, self.style, architecture.vocab)
        sampling = samples(self.style) and architecture.family == "llama"
        _write_json(partial / "config.json", config_json(architecture, stored_dtype(self.content.files), bos, eos))
        _write_json(partial / "generation_config.json", generation_config_json(bos, eos, pad, sampling=sampling))
        _write_json(partial / ARGS_FILE, dict(self.args))
        write_index(partial, self.content.files)
        card = model_card(self.content, self.source, self.checkpoint, self.tokenizer)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        if self.bins is not None:
            write_bins(partial, *self.bins)

    def publish(self) -> None:
        """See `Target`."""

    def to_do(self) -> str:
        """See `Target`; after an upload it is said there."""
        job, lines = self.job, []
        if job.push_to_hub:
            return ""
        if self.disks > 1:
            lines.append(
                f"{job.target} is a part of the model on each of {self.disks} disks: copy them into one directory"
            )
        if not is_huggingface(job.target):
            model_type = job.source_model_type
            how = how_to_add_tokenizer(self.tokenizer, job.target, instruct=job.instruct, model_type=model_type)
            lines.append(how)
        return "\n".join(filter(None, lines))


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
