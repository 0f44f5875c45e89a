"""Small SentencePiece models, trained by the sentencepiece library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

from tests.tokenizer import corpus


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Write a model of 400 pieces, with the settings of Llama 2's unless options say otherwise, and open it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "minloglevel": 2,
    }
    text = [line for line in corpus.lines() if "\n" not in line and "\r" not in line and line.isascii()]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, **settings | options)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
