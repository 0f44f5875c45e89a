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
    INPUT_NAMES,
    SPECIAL_TOKENS,
    build_slow,
    copy_huggingface,
)
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.write.files import target_error

_FAST_FILE = "tokenizer.json"


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
    if tokenizer.path is None:
        return ()
    if tokenizer.kind == "huggingface":
        return copy_huggingface(tokenizer.path, target)
    if tokenizer.kind == "slow":
        names = copy_huggingface(tokenizer.path, target)
        built, config = build_slow(tokenizer.path)
        changed = {_FAST_FILE: _of(built), CONFIG: _json(config | _added_to(built))}
        return tuple(sorted({*names, *_write_files(target, changed)}))
    if tokenizer.kind == "tiktoken":
        built = build_llama3(tokenizer.path, style.model_type)
        return _write_built(built, roles(style.model_type, instruct=style.instruct), style, target, {})
    built, found_roles = build_llama2(tokenizer.path)
    original = {"tokenizer.model": tokenizer.path.read_bytes()}  # some readers prefer it
    return _write_built(built, found_roles, style, target, original)


def _write_built(
    built: Any, special: Mapping[str, str], style: Style, target: Path, more: Mapping[str, bytes]
) -> tuple[str, ...]:
    files = {_FAST_FILE: _of(built), CONFIG: _json(_config(built, special, style)), SPECIAL_TOKENS: _json(special)}
    return _write_files(target, files | dict(more))


def _write_files(target: Path, files: Mapping[str, bytes]) -> tuple[str, ...]:
    try:
        for name, content in files.items():
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
        "tokenizer_class": "PreTrainedTokenizerFast",
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
