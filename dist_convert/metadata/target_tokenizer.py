"""Which tokenizer the args of a Megatron target name: the one that was asked for, else the model's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUGGING_FACE = "HuggingFaceTokenizer"
_OF_HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SENTENCEPIECE = "tokenizer.model"
#: Megatron's names of tokenizers that want a SentencePiece file.
_SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "GPTSentencePieceTokenizer", "SentencePieceTokenizer")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_name(text: str) -> bool:
    """Whether a name is that of a model on the hub, as far as it can be told from a path: org/name, or an old bare one.

    Not a file's name, nor what lies in a directory that is here.
    """
    path = Path(text)
    is_below = path.parent != Path() and path.parent.is_dir()
    return _HUB_NAME.fullmatch(text) is not None and path.suffix not in (".model", ".json") and not is_below


def target_tokenizer(
    asked: str | None, asked_type: str | None, load_dir: str, directory: Path, margs: Mapping[str, Any] | None
) -> tuple[str | None, str | None]:
    """`tokenizer_model` and `tokenizer_type` of the target, which go together.

    The model is a path that training finds from anywhere or a name on the hub; a type of None is left to the margs file
    or to the family.

    Args:
        asked: by `--tokenizer-model`.
        asked_type: by `--tokenizer-type`.
        load_dir: of the model as the user gave it, a directory or a hub id.
        directory: where its files are.
        margs: content of the margs file, if one was given.
    """
    kind = asked_type or (margs or {}).get("tokenizer_type") or _HUGGING_FACE
    place = Path(asked) if asked is not None else directory
    if asked is not None and not place.is_dir():
        return os.path.abspath(asked) if place.exists() else asked, asked_type
    if kind in _SENTENCEPIECE_TYPES and (place / _SENTENCEPIECE).is_file():
        return os.path.abspath(place / _SENTENCEPIECE), asked_type
    if kind in _SENTENCEPIECE_TYPES and asked_type is None:
        asked_type = kind = _HUGGING_FACE  # the margs file's type would look for a file that is not there
    if asked is not None:
        return os.path.abspath(asked), asked_type
    if kind == _HUGGING_FACE and any((directory / name).is_file() for name in _OF_HUGGING_FACE):
        return os.path.abspath(load_dir) if os.path.isdir(load_dir) else load_dir.partition("@")[0], asked_type
    return None, asked_type
