"""What a Hugging Face model says of itself that Megatron has no place for, carried along in a checkpoint's iteration.

Special ids, sampling defaults and keys that only transformers reads come back when the checkpoint is converted again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError
from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.huggingface.read import CONFIG_FILE, GENERATION_FILE, check_inside
from dist_convert.formats.megatron.iterations import CARRIED_FILE
from dist_convert.models.prediction import MTP_KEY
from dist_convert.models.schema import Architecture
from dist_convert.read.source import read_json


def carried_configs(model: Model) -> dict[str, dict[str, Any]]:
    """File name to content: config.json and generation_config.json of a model, or of the one that it was made from.

    Raises:
        SourceError: a file of them is damaged.
    """
    if model.args is None:
        found: dict[str, Any] = {CONFIG_FILE: dict(model.config or {})}
        if (model.directory / GENERATION_FILE).is_file():
            check_inside(model.directory, GENERATION_FILE)
            found[GENERATION_FILE] = read_json(model.directory / GENERATION_FILE)
        return found
    return read_carried(model.directory)


def read_carried(directory: Path) -> dict[str, dict[str, Any]]:
    """The same of what lies beside an iteration's weights.

    Raises:
        SourceError: the file is damaged.
    """
    path = directory / CARRIED_FILE
    found = read_json(path) if path.is_file() else {}
    return {name: found[name] for name in (CONFIG_FILE, GENERATION_FILE) if isinstance(found.get(name), dict)}


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def describes(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether a config is of this model, but for what training and conversions may change.

    Those are the vocabulary, the rotary base, and layers of multi-token prediction, which configs count that have none.
    """
    try:
        theirs = architecture_from_config({**config, MTP_KEY.config: 0})
    except ConversionError:
        return False
    special_ids = [one for name in _IDS for one in _listed(config.get(name))]
    if any(type(one) is not int or one >= architecture.vocab for one in special_ids):
        return False
    predicted = {name: fact for name, fact in architecture.facts.items() if name == MTP_KEY.field}
    return architecture == replace(
        theirs,
        vocab=architecture.vocab,
        padded_vocab=architecture.padded_vocab,
        rope_theta=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling,
        facts=dict(theirs.facts) | predicted,
    )
