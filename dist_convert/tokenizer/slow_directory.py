"""A Hugging Face directory with a SentencePiece model and no tokenizer.json, as old Llama 2 models have.

transformers 4 read it with the class LlamaTokenizer; transformers 5 cuts text another way then and leaves out
begin-of-text, and servers want tokenizer.json. So that file is built, from the model and the directory's own settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import SourceError
from dist_convert.read.json_file import read_json
from dist_convert.tokenizer.huggingface import (
    CONFIG,
    INPUT_NAMES,
    files_of,
    has_template_file,
    is_huggingface,
    special_ids,
    warnings_on,
)
from dist_convert.tokenizer.llama2 import build_llama2, is_sentencepiece, read_sentencepiece
from dist_convert.tokenizer.record import Tokenizer

MODEL_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
#: Settings of the class LlamaTokenizer that the built tokenizer.json has taken over.
_TAKEN_OVER = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "tokenizer_file")


def is_slow(directory: Path) -> bool:
    """Whether the directory has a config of transformers, and nothing but a SentencePiece model to cut text with."""
    model = directory / MODEL_FILE
    if not os.path.isfile(model) or not os.path.isfile(directory / CONFIG) or is_huggingface(directory):
        return False
    with model.open("rb") as opened:
        return is_sentencepiece(opened.read(3))


def read_slow(directory: Path) -> Tokenizer:
    """Size and special ids, added tokens included.

    Raises:
        SourceError: the model or a file beside it cannot be understood.
        MissingPackage: protobuf is not installed.
    """
    files_of(directory)  # refuses links before any is read
    model = read_sentencepiece(directory / MODEL_FILE)
    added = _added(directory)
    after = sorted(number for number in added if number >= (model.size or 0))
    for expected, number in enumerate(after, start=model.size or 0):
        if number != expected:
            raise SourceError(
                "added tokens of the tokenizer leave ids out",
                file=str(directory),
                expected=f"id {expected}",
                found=f"id {number}: {added[number]['content']!r}",
            )
    ids = {token["content"]: number for number, token in added.items()}
    bos, eos, pad = special_ids(directory, ids)
    size = max([model.size or 0, *(number + 1 for number in added)])
    found = replace(model, kind="slow", path=directory, size=size, chat=None, warnings=warnings_on(directory))
    config = read_json(directory / CONFIG)
    return replace(
        found,
        bos=model.bos if bos is None else bos,
        eos=model.eos if eos is None else eos,
        pad=model.pad if pad is None else pad,
        has_template=bool(config.get("chat_template")) or has_template_file(directory),
    )


def build_slow(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A `tokenizers.Tokenizer` of a directory that `read_slow` has checked, and its tokenizer_config.json for it."""
    from tokenizers import AddedToken, pre_tokenizers, processors

    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    tokenizer, roles = build_llama2(directory / MODEL_FILE)
    for number, token in sorted(_added(directory).items()):
        if number < tokenizer.get_vocab_size():
            continue
        known = ("lstrip", "normalized", "rstrip", "single_word", "special")
        added = AddedToken(token["content"], **{key: bool(token[key]) for key in known if key in token})
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
    if config.get("legacy") is False:  # a space in front of the text only, not behind special tokens
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    roles |= {key: _content(config[key]) for key in roles if config.get(key)}
    begin = [roles["bos_token"]] if config.get("add_bos_token", True) and "bos_token" in roles else []
    end = [roles["eos_token"]] if config.get("add_eos_token", False) and "eos_token" in roles else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
    )
    kept = {key: value for key, value in config.items() if key not in _TAKEN_OVER}
    return tokenizer, {**roles, "model_input_names": INPUT_NAMES, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _added(directory: Path) -> dict[int, dict[str, Any]]:
    """The tokens that were added to the model's, by id, each with its text and flags."""
    found: dict[int, dict[str, Any]] = {}
    for name in (_ADDED_FILE, CONFIG):
        if not (directory / name).is_file():
            continue
        data = read_json(directory / name)
        try:
            if name == _ADDED_FILE:
                found |= {int(number): {"content": str(content)} for content, number in data.items()}
            else:
                listed = data.get("added_tokens_decoder", {})
                found |= {int(number): {**token, "content": str(token["content"])} for number, token in listed.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                "a file of the tokenizer is damaged",
                file=str(directory / name),
                found=f"{type(error).__name__}: {error}",
            ) from error
    return found
