"""Which tokenizer the args of a Megatron target name: the one that was asked for, else the model's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SENTENCEPIECE = "tokenizer.model"
#: Megatron's names of tokenizers that want a SentencePiece file.
_SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "GPTSentencePieceTokenizer", "SentencePieceTokenizer")


def target_tokenizer(
    asked: str | None, tokenizer_type: str | None, load_dir: str, directory: Path, margs: Mapping[str, Any] | None
) -> str | None:
    """The `tokenizer_model` of the target, a path that training finds from anywhere or a name on the hub.

    Args:
        asked: by `--tokenizer-model`.
        tokenizer_type: by `--tokenizer-type`; otherwise the margs file's, otherwise Hugging Face's.
        load_dir: of the model as the user gave it, a directory or a hub id.
        directory: where its files are.
        margs: content of the margs file, if one was given.
    """
    if asked is not None:
        return os.path.abspath(asked) if os.path.exists(asked) else asked
    kind = tokenizer_type or (margs or {}).get("tokenizer_type") or "HuggingFaceTokenizer"
    if kind in _SENTENCEPIECE_TYPES and (directory / _SENTENCEPIECE).is_file():
        return os.path.abspath(directory / _SENTENCEPIECE)
    if kind == "HuggingFaceTokenizer" and any((directory / name).is_file() for name in _OF_HUGGING_FACE):
        return os.path.abspath(load_dir) if os.path.isdir(load_dir) else load_dir.partition("@")[0]
    return None
