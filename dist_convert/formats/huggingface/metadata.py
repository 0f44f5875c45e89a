"""What lies beside the weights of a Hugging Face target: config, index, args of the source, capacity bins, model card.

The card's front matter is what the Hugging Face Hub reads (https://huggingface.co/docs/hub/model-cards). It holds no
date and no path, so that the same checkpoint gives the same card on every machine; a license is not known, so none is
named. The tokenizer's files are `tokenizer`'s.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dist_convert.formats.huggingface.config import (
    TORCH_NAMES,
    config_json,
    generation_config_json,
    samples,
    special_token_ids,
)
from dist_convert.formats.torch.capacity_bins import Bin, write_bins
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.job import Job
from dist_convert.models.schema import Architecture
from dist_convert.plan.content import Content
from dist_convert.tokenizer.build import padding_id
from dist_convert.tokenizer.record import Style, Tokenizer
from dist_convert.version import __version__
from dist_convert.write.safetensors_files import INDEX_FILE, index_json

CARD_FILE = "README.md"


def model_card(content: Content, source: TorchCatalog, checkpoint: Path, tokenizer: Tokenizer) -> str:
    """The text of the card.

    Args:
        content, source: what was converted.
        checkpoint: directory of the iteration that was read; only its name and its parent's are told.
        tokenizer: as this rank found it; only its name is told.
    """
    hf_class = source.family.hf_class
    checkpoint = Path(os.path.abspath(checkpoint))  # a relative path has no parent; a link keeps its name
    elements: Counter[str] = Counter()
    for file in content.files:
        for tensor in file.tensors:
            elements[tensor.dtype] += tensor.elements
    stored = ", ".join(f"{TORCH_NAMES[dtype]} ({count:,})" for dtype, count in elements.most_common())
    conversion = [
        ("Checkpoint", f"{_code(checkpoint.parent.name)}, {_code(checkpoint.name)}"),
        ("Format", f"Megatron-LM `torch`, {source.grid}, {TORCH_NAMES[content.params_dtype]}"),
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
- {source.family.name}
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


def write_metadata(
    partial: Path,
    job: Job,
    content: Content,
    source: TorchCatalog,
    checkpoint: Path,
    args: Mapping[str, object],
    tokenizer: Tokenizer,
    style: Style,
    bins: Sequence[Bin],
) -> None:
    """Write configs, index, model card, training arguments and capacity bins into the partial directory.

    Args:
        partial: the directory.
        job: what was asked for.
        content, source: what was converted.
        checkpoint: directory of the iteration that it was read from.
        args: the checkpoint's training arguments.
        tokenizer: whose special ids the configs take over.
        style: of a tokenizer that is built.
        bins: of all ranks; written only where the job asks for them.
    """
    architecture = source.architecture
    bos, eos = special_token_ids(architecture.vocab, tokenizer, instruct=job.instruct)
    pad = padding_id(tokenizer, style, architecture.vocab)
    sampling = samples(style) and source.family.name == "llama"
    _write_json(
        partial / "config.json", config_json(architecture, source.family.hf_class, _main_dtype(content), bos, eos)
    )
    _write_json(partial / "generation_config.json", generation_config_json(bos, eos, pad, sampling=sampling))
    _write_json(partial / ARGS_FILE, dict(args))
    index = index_json(content.files)
    if index is not None:
        (partial / INDEX_FILE).write_text(index, encoding="utf-8")
    (partial / CARD_FILE).write_text(model_card(content, source, checkpoint, tokenizer), encoding="utf-8")
    if job.save_capacity_bins:
        write_bins(partial, source, bins)


def _main_dtype(content: Content) -> str:
    sizes: Counter[str] = Counter()
    for file in content.files:
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.size_bytes
    return sizes.most_common(1)[0][0]


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
