"""Llama 3's tokenizer file, tiktoken's lines, and the Hugging Face tokenizer that it becomes.

Format and special tokens: docs/formats.md, "Tokenizer files".
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.small_file import read_small_file
from dist_convert.tokenizer.record import Style, Tokenizer

BASE_TOKENS = 128000
_SPECIAL_TOKENS = 256
BEGIN, END, TURN_END, PADDING = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+")

#: How text is cut before it is encoded (`models/llama3/tokenizer.py` in meta-llama/llama-models).
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

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
    _ids_of(path)
    size, bos, eos = BASE_TOKENS + _SPECIAL_TOKENS, BASE_TOKENS, BASE_TOKENS + 1
    return Tokenizer("tiktoken", path, size, bos, eos, is_llama3=True)


def _ids_of(path: Path) -> dict[bytes, int]:
    """The tokens and their ids. tiktoken's own reader keeps a copy by path, which may be of another file by now."""
    ids: dict[bytes, int] = {}
    for number, line in enumerate(read_small_file(path).splitlines()):
        token = _token(line, number)
        if not token or token in ids:
            raise CorruptFile(
                "the tokenizer file is damaged",
                file=str(path),
                expected=f"line {number + 1}: a token in base64 and its id, {number}",
                found=repr(line[:60]) + (f", the token of id {ids[token]}" if token in ids else ""),
                remedy="copy it again, or give another one with --tokenizer",
            )
        ids[token] = number
    if len(ids) != BASE_TOKENS:
        raise UnsupportedModel(
            "only Llama 3's tokenizer can be built from tiktoken's lines",
            file=str(path),
            expected=f"{BASE_TOKENS} lines",
            found=len(ids),
            remedy="give the directory of a Hugging Face tokenizer with --tokenizer",
        )
    return ids


def _token(line: bytes, number: int) -> bytes:
    """The token of a line; nothing where the line is damaged."""
    if not _LINE.fullmatch(line):
        return b""
    token, id_ = line.split(b" ")
    try:
        return base64.b64decode(token, validate=True) if int(id_) == number else b""
    except binascii.Error:
        return b""


def padding_id(tokenizer: Tokenizer, style: Style, vocab: int) -> int | None:
    """The id that pads a text: a bare file leaves it to the model type; None beyond the vocabulary."""
    has_padding = tokenizer.kind == "tiktoken" and style.model_type == "llama3.1"
    pad = BASE_TOKENS + special_tokens("llama3.1").index(PADDING) if has_padding else tokenizer.pad
    return pad if pad is not None and pad < vocab else None


def special_tokens(model_type: str) -> list[str]:
    """The 256 special tokens of "llama3" or "llama3.1" in the order of their ids."""
    named = _NAMED[model_type]
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_SPECIAL_TOKENS))
    return [named.get(number) or next(reserved) for number in range(_SPECIAL_TOKENS)]


def build_llama3(path: Path, model_type: str) -> Any:
    """A `tokenizers.Tokenizer` that puts begin-of-text in front: what transformers' `TikTokenConverter` makes of it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ids = _ids_of(path)
    letters = _letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ids}
    merges = [(text[left], text[right]) for left, right in _merges(ids)]
    # A piece of text that is a token is that token, whichever merges lead to it: so does tiktoken.
    model = models.BPE({text[token]: number for token, number in ids.items()}, merges, ignore_merges=True)
    tokenizer: Any = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens(model_type)])
    begin = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1", special_tokens=[(BEGIN, BASE_TOKENS)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def _merges(ids: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All ways to cut each token in two tokens, by its id; ways of one token by the ids of the parts."""
    merges = []
    for token in ids:
        ways = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [(left, right) for left, right in ways if left in ids and right in ids]
        merges += sorted(found, key=lambda way: (ids[way[0]], ids[way[1]]))
    return merges


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves (GPT-2's)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def roles(model_type: str, *, instruct: bool) -> dict[str, str]:
    """Which special tokens begin, end and pad a text."""
    padding = {"pad_token": PADDING} if model_type == "llama3.1" else {}
    return {"bos_token": BEGIN, "eos_token": TURN_END if instruct else END} | padding
