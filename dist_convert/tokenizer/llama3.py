"""Llama 3's tokenizer file, tiktoken's lines, and the Hugging Face tokenizer that it becomes.

Format and special tokens: docs/formats.md, "Tokenizer files".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.tokenizer.packages import require
from dist_convert.tokenizer.record import Tokenizer

BASE_TOKENS = 128000
_SPECIAL_TOKENS = 256
BEGIN, END, TURN_END, PADDING = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+")

#: The named special tokens by their number after the base tokens; the others are reserved, counted up in order.
_NAMED = {
    "llama3": {0: BEGIN, 1: END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: TURN_END},
    "llama3.1": {
        0: BEGIN, 1: END, 4: PADDING, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>",
        9: TURN_END, 10: "<|python_tag|>",
    },
}  # fmt: skip


def is_tiktoken(start: bytes) -> bool:
    """Whether a file that starts so holds tiktoken's lines: a token in base64, a space, its id."""
    return _LINE.fullmatch(start.split(b"\n", 1)[0].rstrip(b"\r")) is not None


def read_tiktoken(path: Path) -> Tokenizer:
    """Check the lines of the file; the special tokens, which it lacks, are counted.

    Raises:
        CorruptFile: lines that are not tiktoken's, or ids out of order.
        UnsupportedModel: another vocabulary than Llama 3's.
    """
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines):
        if not _LINE.fullmatch(line) or int(line.rsplit(b" ", 1)[1]) != number:
            raise CorruptFile(
                "the tokenizer file is damaged",
                file=str(path),
                expected=f"line {number + 1}: a token in base64 and its id, {number}",
                found=repr(line[:60]),
                remedy="copy it again, or give another one with --tokenizer",
            )
    if len(lines) != BASE_TOKENS:
        raise UnsupportedModel(
            "only Llama 3's tokenizer can be built from tiktoken's lines",
            file=str(path),
            expected=f"{BASE_TOKENS} lines",
            found=len(lines),
            remedy="give the directory of a Hugging Face tokenizer with --tokenizer",
        )
    require("tiktoken", path)
    return Tokenizer("tiktoken", path, BASE_TOKENS + _SPECIAL_TOKENS, bos=BASE_TOKENS, eos=BASE_TOKENS + 1)


def special_tokens(model_type: str) -> list[str]:
    """The 256 special tokens of "llama3" or "llama3.1" in the order of their ids."""
    named = _NAMED[model_type]
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_SPECIAL_TOKENS))
    return [named.get(number) or next(reserved) for number in range(_SPECIAL_TOKENS)]


def build_llama3(path: Path, model_type: str) -> Any:
    """A `tokenizers.Tokenizer` that puts begin-of-text in front."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = special_tokens(model_type)
    # transformers 4's name of the parameter and 5's; each version ignores the other one.
    names = {"additional_special_tokens": special, "extra_special_tokens": special}
    tokenizer: Any = TikTokenConverter(str(path), **names).converted()  # type: ignore[no-untyped-call]
    begin = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1", special_tokens=[(BEGIN, BASE_TOKENS)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def roles(model_type: str, *, instruct: bool) -> dict[str, str]:
    """Which special tokens begin, end and pad a text."""
    padding = {"pad_token": PADDING} if model_type == "llama3.1" else {}
    return {"bos_token": BEGIN, "eos_token": TURN_END if instruct else END} | padding
