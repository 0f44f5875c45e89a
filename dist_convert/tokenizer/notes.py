"""What a conversion says about the tokenizer: before it starts, and at its end where one is missing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from dist_convert.tokenizer.record import Style, Tokenizer

_NAMES = {
    "llama2": "Llama 2", "llama3": "Llama 3", "llama3.1": "Llama 3.1", "mistral": "Mistral", "mixtral": "Mixtral",
    "mistral v3": "Mistral v3", "mistral v7": "Mistral v7",
}  # fmt: skip


def notes_on_tokenizer(tokenizer: Tokenizer, style: Style, said: str | None) -> list[str]:
    """Which tokenizer is written, or why none is.

    Args:
        tokenizer: as found.
        style: for a tokenizer that is built.
        said: `--source-model-type`.
    """
    if tokenizer.kind == "none":
        return [f"no tokenizer files are written: {tokenizer.note}"]
    if tokenizer.kind in ("huggingface", "slow"):
        built = ", with a tokenizer.json built from its tokenizer.model" if tokenizer.kind == "slow" else ""
        warnings = list(tokenizer.warnings)
        if style.instruct and not tokenizer.has_template:
            warnings.append("--instruct was given, but the tokenizer has no chat template, and none is written")
        return [f"tokenizer: {tokenizer.note}, copied{built}", *(f"warning: {text}" for text in warnings)]
    details = ["special tokens"] if tokenizer.kind == "tiktoken" else []
    details += ["chat format"] if style.instruct else []
    if not details:
        return [f"tokenizer: built from {tokenizer.note}"]
    why = "" if said == style.model_type else ", as its config suggests; --source-model-type decides"
    why = ", as its control tokens tell" if tokenizer.chat is not None else why
    return [f"tokenizer: built from {tokenizer.note}; {' and '.join(details)} of {_NAMES[style.model_type]}{why}"]


def how_to_add_tokenizer(tokenizer: Tokenizer, target: Path, *, instruct: bool, model_type: str | None) -> str:
    """The line that ends a conversion without a tokenizer; empty where one is written."""
    if tokenizer.kind != "none":
        return ""
    flags = " --instruct" if instruct else ""
    flags += f" --source-model-type {model_type}" if model_type else ""
    command = f"dist-convert tokenizer PATH {shlex.quote(str(target))}{flags}"
    what = "the target has no tokenizer, and its family's special ids"
    return f"{what}; add one, a directory or a tokenizer.model, with: {command}"


def vocabulary_warnings(claims: Mapping[str, int | None], rows: int, kept: int) -> list[str]:
    """What to say where sizes of the vocabulary disagree, and where the tokenizer has tokens without a row.

    Args:
        claims: who says how many tokens there are, such as {"tokenizer": 128256, "args": None}.
        rows: of the embedding, padding included.
        kept: rows that the target has.
    """
    known = {size for size in claims.values() if size is not None}
    tokens = claims.get("tokenizer")
    if len(known) < 2 and (tokens is None or tokens <= kept):
        return []
    said = ", ".join(f"{who} {size if size is not None else 'unknown'}" for who, size in claims.items())
    warning = f"warning: the vocabulary's sizes disagree: {said}, embedding {rows} rows; {kept} are written"
    if tokens is not None and tokens > kept:
        warning += f". The tokenizer's ids from {kept} on have no row"
        warning += f"; --true-vocab-size {tokens} keeps theirs" if tokens <= rows else ""
    return [warning]
