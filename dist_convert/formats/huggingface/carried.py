"""What a Hugging Face model says of itself that Megatron has no place for, carried along in a checkpoint's iteration.

Special ids, sampling defaults and keys that only transformers reads come back when the checkpoint is converted again.
"""

from pathlib import Path
from typing import Any

from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.config import (
    config_json,
    config_like,
    config_of_copy,
    describes,
    with_special_ids,
)
from dist_convert.formats.huggingface.open import HuggingFaceModel
from dist_convert.formats.huggingface.read import CONFIG_FILE, GENERATION_FILE, check_inside
from dist_convert.formats.megatron.iterations import CARRIED_FILE
from dist_convert.formats.tokenizer.record import style_of
from dist_convert.models.prediction import MTP_KEY
from dist_convert.models.schema import Architecture
from dist_convert.options import Options
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


def configs_of(model: Model, architecture: Architecture, dtype: str, job: Options) -> dict[str, dict[str, Any]]:
    """File name to content: config.json of what a model becomes and, but for a copy, generation_config.json.

    Args:
        model, architecture: the source.
        dtype: safetensors name of most weights of the target.
        job: says what the model is like, and of which style its tokenizer is.

    Raises:
        SourceError: a file that the model carries along is damaged.
    """
    if isinstance(model, HuggingFaceModel):
        counts = {MTP_KEY.config, *MTP_KEY.aliases} & model.config.keys() if model.drops_mtp else ()
        return {CONFIG_FILE: config_of_copy({**model.config, **dict.fromkeys(counts, 0)}, architecture, dtype)}
    carried, tokenizer = read_carried(model.directory), model.tokenizer
    is_carried = model.config is None and describes(carried.get(CONFIG_FILE, {}), architecture)
    given = carried[CONFIG_FILE] if is_carried else model.config
    config = config_like(given, architecture, dtype) if given else config_json(architecture, dtype)
    path = job.like or tokenizer.path
    if is_carried and path is None and GENERATION_FILE in carried:
        return {CONFIG_FILE: config, GENERATION_FILE: carried[GENERATION_FILE]}
    return with_special_ids(config, {}, tokenizer, style_of(tokenizer, config, job), path)
