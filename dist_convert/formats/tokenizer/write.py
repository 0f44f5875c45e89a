"""Writes a tokenizer into the directory of a converted model: copied, or built so that transformers 4 and 5 agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.formats.tokenizer.build import build_llama2, build_llama3, roles
from dist_convert.formats.tokenizer.chat import CHAT_TEMPLATES
from dist_convert.formats.tokenizer.huggingface import (
    CONFIG,
    FAST_CLASS,
    FAST_FILE,
    INPUT_NAMES,
    MODEL_FILE,
    SPECIAL_TOKENS,
    build_slow,
    contents_of,
)
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.read.source import read_small_file
from dist_convert.write.files import target_error


def write_tokenizer(tokenizer: Tokenizer, style: Style, target: Path) -> tuple[str, ...]:
    """Write the tokenizer's files; returns their names.

    Args:
        tokenizer: as found on this machine.
        style: for a tokenizer that is built; a copied one stays as it is.
        target: an existing directory.

    Raises:
        SourceError: a file of the tokenizer cannot be read.
        MissingPackage: what building one needs is not installed.
        TargetError, NotEnoughSpace: the target's file system refuses.
    """
    path = tokenizer.path
    if path is None:
        return ()
    if tokenizer.kind == "huggingface":
        files = contents_of(path)
    elif tokenizer.kind == "slow":
        built, config = build_slow(path)
        files = contents_of(path) | {FAST_FILE: _of(built), CONFIG: _json(config | _added_to(built))}
    else:
        if tokenizer.kind == "tiktoken":
            built, special = build_llama3(path, style.model_type), roles(style.model_type, instruct=style.instruct)
        else:
            built, special = build_llama2(path)
        files = {FAST_FILE: _of(built), CONFIG: _json(_config(built, special, style)), SPECIAL_TOKENS: _json(special)}
        if tokenizer.kind == "sentencepiece":
            files[MODEL_FILE] = read_small_file(path)  # some readers prefer it
    try:
        for name, content in files.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
    except OSError as error:
        raise target_error(error, str(error.filename or target)) from error
    return tuple(files)


def _config(built: Any, special: Mapping[str, str], style: Style) -> dict[str, Any]:
    """tokenizer_config.json in transformers 4's keys, which 5 reads too.

    With the class LlamaTokenizer, transformers 5 would replace the normalizer and cut leading spaces another way.
    """
    config = {
        **_added_to(built),
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": INPUT_NAMES,
        "model_max_length": style.max_positions,
        "tokenizer_class": FAST_CLASS,
    }
    return config | ({"chat_template": CHAT_TEMPLATES[style.model_type]} if style.instruct else {})


def _of(built: Any) -> bytes:
    text: str = built.to_str(pretty=True)
    return text.encode()


def _added_to(built: Any) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(built.get_added_tokens_decoder().items())
    return {"added_tokens_decoder": {str(n): {flag: getattr(token, flag) for flag in flags} for n, token in added}}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
