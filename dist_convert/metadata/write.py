"""Writes what describes the weights and the model; the tokenizer's files are `tokenizer`'s."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_convert.job import Job
from dist_convert.metadata.capacity_bins import Bin, write_bins
from dist_convert.metadata.hf_config import config_json, generation_config_json, samples, special_token_ids
from dist_convert.metadata.model_card import CARD_FILE, model_card
from dist_convert.plan.content import Content
from dist_convert.tokenizer.llama3 import padding_id
from dist_convert.tokenizer.record import Style, Tokenizer
from dist_convert.write.safetensors_files import INDEX_FILE, index_json

ARGS_FILE = "source_megatron_args.json"


def write_metadata(
    partial: Path,
    job: Job,
    content: Content,
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
        content: what was converted.
        checkpoint: directory of the iteration that it was read from.
        args: the checkpoint's training arguments.
        tokenizer: whose special ids the configs take over.
        style: of a tokenizer that is built.
        bins: of all ranks; written only where the job asks for them.
    """
    architecture = content.side.architecture
    bos, eos = special_token_ids(architecture.vocab, tokenizer, instruct=job.instruct)
    pad = padding_id(tokenizer, style, architecture.vocab)
    sampling = samples(style) and content.side.family.name == "llama"
    _write_json(
        partial / "config.json", config_json(architecture, content.side.family.hf_class, _main_dtype(content), bos, eos)
    )
    _write_json(partial / "generation_config.json", generation_config_json(bos, eos, pad, sampling=sampling))
    _write_json(partial / ARGS_FILE, dict(args))
    index = index_json(content.files)
    if index is not None:
        (partial / INDEX_FILE).write_text(index, encoding="utf-8")
    (partial / CARD_FILE).write_text(model_card(content, checkpoint, tokenizer), encoding="utf-8")
    if job.save_capacity_bins:
        write_bins(partial, content.side, bins)


def _main_dtype(content: Content) -> str:
    sizes: Counter[str] = Counter()
    for file in content.files:
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.size_bytes
    return sizes.most_common(1)[0][0]


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
