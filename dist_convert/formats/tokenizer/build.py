"""Hugging Face tokenizers, built from what the model's makers publish: a SentencePiece model, or tiktoken's lines.

Llama 2, Mistral and Mixtral have the former (the message is google/sentencepiece src/sentencepiece_model.proto), Llama
3 the latter. Formats and special tokens: docs/formats.md, "Tokenizer files".
"""

import base64
import binascii
import re
from collections.abc import Container, Iterable, Sequence
from math import isnan
from pathlib import Path
from typing import Any, AnyStr

from dist_convert.errors import CorruptFile, MissingPackage, UnsupportedModel
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.read.source import read_small_file

_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_SPACE = "▁"
#: Twice the largest model file that is published, and what its tokens' squared lengths add up to for each byte.
_MOST_BYTES, _MOST_WORK = 8_000_000, 8
_ANOTHER = "copy it again, or give another one with --tokenizer"


def is_sentencepiece(start: bytes) -> bool:
    """Whether a file that starts so may be a SentencePiece model: its first field is a piece, a message with text."""
    return len(start) > 2 and start[0] == 0x0A and start[2] == 0x0A


def read_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Size and special ids of a model, and its pieces with their ids.

    Raises:
        CorruptFile: not a SentencePiece model.
        UnsupportedModel: of another kind than Llama 2's.
        MissingPackage: protobuf is not installed.
    """
    proto = _read(path)
    control, chat = _pieces(proto, _CONTROL), None
    if {"[INST]", "[/INST]"} <= set(control):  # as in Mistral's models from the second version on
        chat = "mistral v7" if {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"} <= set(control) else "mistral v3"
    bos, eos, pad = _roles(proto)
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return Tokenizer("sentencepiece", path, len(ids), bos, eos, pad, chat=chat), ids


def _pieces(proto: Any, *types: int) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type in types]


def _roles(proto: Any) -> list[int | None]:
    """Ids of the pieces that begin, end and pad a text."""
    ids = (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.pad_id)
    return [number if 0 <= number < len(proto.pieces) else None for number in ids]


def _read(path: Path) -> Any:
    """The message, of a model that sentencepiece loads and tokenizer.json expresses exactly."""
    try:
        from google.protobuf.message import DecodeError
    except ImportError as error:
        what = "building a tokenizer from this file needs the package protobuf"
        remedy = "pip install protobuf, or give the directory of a Hugging Face tokenizer"
        raise MissingPackage(what, path, remedy=remedy) from error
    from transformers.convert_slow_tokenizer import import_protobuf

    message: Any = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        message.ParseFromString(read_small_file(path, _MOST_BYTES))
        damage = _damage(message)
    except DecodeError as error:
        damage = str(error)
    if damage:
        raise CorruptFile("not a SentencePiece model", path, found=damage, remedy=_ANOTHER)
    _refuse_others(message, path)
    _refuse_long(_pieces(message, _NORMAL), message.ByteSize(), path)
    return message


def _damage(proto: Any) -> str:
    """Why sentencepiece itself does not load a model (`InitializePieces` in its src/model_interface.cc)."""
    ids: dict[str, int] = {}
    for number, piece in enumerate(proto.pieces):
        text = piece.piece
        if not isinstance(text, str) or not text or "\0" in text:
            return f"piece {number} is not text: {text[:60]!r}"
        if ids.setdefault(text, number) != number:
            return f"pieces {ids[text]} and {number} are both {text[:60]!r}"
    if (unknown := len(_pieces(proto, _UNKNOWN))) != 1:
        return f"{unknown} pieces for unknown text, not 1"
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if proto.trainer_spec.byte_fallback else set()
    if set(_pieces(proto, _BYTE)) != expected:
        return f"its pieces for bytes are not the expected {len(expected)}"
    return ""


def _refuse_others(proto: Any, path: Path) -> None:
    """Refuse what tokenizer.json cannot express exactly; Llama 2, Mistral and Mixtral have none of it."""
    user_defined, ids = _pieces(proto, _USER_DEFINED), _roles(proto)[:2]
    moves_spaces = proto.normalizer_spec.remove_extra_whitespaces or any(_SPACE in text for text in user_defined)
    ends = [proto.pieces[number].piece for number in ids if number is not None]
    faults = {
        "a model other than byte pair encoding": proto.trainer_spec.model_type != _BPE,
        "a normalization of characters": proto.normalizer_spec.precompiled_charsmap,
        "unused pieces": _pieces(proto, _UNUSED),
        "user-defined pieces with spaces in them or with spaces that are removed": user_defined and moves_spaces,
        "scores that are not numbers": any(isnan(piece.score) for piece in proto.pieces),
        "colons in begin or end": not all(map(can_begin, ends)),
    }
    if found := ", ".join(what for what, is_there in faults.items() if is_there):
        what = "only SentencePiece models like those of Llama 2, Mistral and Mixtral are converted"
        raise UnsupportedModel(what, path, found=found, remedy="give the directory of a Hugging Face tokenizer")


def _refuse_long(tokens: Iterable[str | bytes], size_bytes: int, path: Path) -> None:
    """Refuse tokens so long that to try all cuts takes time, and the merges memory, beyond a file's size."""
    lengths = [len(token) for token in tokens]
    if sum(length**2 for length in lengths) > _MOST_WORK * size_bytes:
        what, found = "the tokens of the tokenizer are too long", f"{len(lengths)} tokens of up to {max(lengths)}"
        expected = f"squared token lengths that add up to at most {_MOST_WORK} times the file's size"
        found += f" in {size_bytes} bytes"
        raise CorruptFile(what, path, expected, found, remedy=_ANOTHER)


def build_llama2(path: Path) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer` that puts begin-of-text in front, and which tokens begin, end and pad a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    proto = _read(path)
    pieces, user_defined = proto.pieces, _pieces(proto, _USER_DEFINED)
    bos, eos, pad = (None if number is None else pieces[number].piece for number in _roles(proto))
    (unknown,) = _pieces(proto, _UNKNOWN)
    model = models.BPE(
        {piece.piece: number for number, piece in enumerate(pieces)},
        _merges_by_score({piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, user_defined)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(steps)
    special = _pieces(proto, _UNKNOWN, _CONTROL)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in user_defined])
    if bos is not None:
        tokenizer.post_processor = around_texts(tokenizer, [bos])
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
    return tokenizer, {role: token for role, token in named.items() if token is not None}


def can_begin(token: str) -> bool:
    """Whether a template of `tokenizers` can name a token, as one that begins or ends a text."""
    return ":" not in token and not token.startswith("$")


def around_texts(tokenizer: Any, begin: Sequence[str], end: Sequence[str] = ()) -> Any:
    """A post-processor that puts tokens in front of and behind each text."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
    )


def _cut(token: AnyStr, known: Container[AnyStr]) -> list[tuple[AnyStr, AnyStr]]:
    """All ways to cut a token in two that are known."""
    ways = ((token[:at], token[at:]) for at in range(1, len(token)))
    return [(left, right) for left, right in ways if left in known and right in known]


def _merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Which pairs become which piece, in the order of the pieces' scores.

    A piece has one score, however it is put together: where its ways overlap, SentencePiece takes the leftmost. Longer
    left parts first, so that runs of one character are cut alike (transformers' own converter has that order too).
    """
    ways = [(-score, -len(left), left, right) for piece, score in scores.items() for left, right in _cut(piece, scores)]
    return [(left, right) for _, _, left, right in sorted(ways)]


def _normalizer(spec: Any, user_defined: list[str]) -> Any:
    """Spaces as SentencePiece writes them.

    User-defined pieces are looked for in text that is normalized, where no further space goes in front of what follows
    them. `tokenizers` normalizes the pieces themselves, too: a text that is one of them must stay as it is.
    """
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        if user_defined:
            alone = "|".join(map(re.escape, user_defined))
            steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}(?=(?:{alone})\z)"), ""))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{_SPACE}+\\z"), ""))
    return normalizers.Sequence(steps)


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
    content = read_small_file(path, _MOST_BYTES)
    for number, line in enumerate(content.splitlines()):
        text, _, id_ = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True) if id_ == b"%d" % number else b""
        except binascii.Error:
            token = b""
        if not token or token in ids:
            expected = f"line {number + 1}: a token in base64 and its id, {number}"
            found = repr(line[:60]) + (f", the token of id {ids[token]}" if token in ids else "")
            raise CorruptFile("the tokenizer file is damaged", path, expected, found, remedy=_ANOTHER)
        ids[token] = number
    if len(ids) != BASE_TOKENS:
        what = "only Llama 3's tokenizer can be built from tiktoken's lines"
        remedy = "give the directory of a Hugging Face tokenizer with --tokenizer"
        raise UnsupportedModel(what, path, expected=f"{BASE_TOKENS} lines", found=len(ids), remedy=remedy)
    _refuse_long(ids, len(content), path)
    return ids


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
    # All ways to cut each token in two tokens, by its id; ways of one token by the ids of the parts.
    ways = (way for token in ids for way in sorted(_cut(token, ids), key=lambda way: (ids[way[0]], ids[way[1]])))
    merges = [(text[left], text[right]) for left, right in ways]
    # A piece of text that is a token is that token, whichever merges lead to it: so does tiktoken.
    model = models.BPE({text[token]: number for token, number in ids.items()}, merges, ignore_merges=True)
    tokenizer: Any = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens(model_type)])
    by_letter = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([by_letter, around_texts(tokenizer, [BEGIN])])
    return tokenizer


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves (GPT-2's)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def roles(model_type: str, *, instruct: bool) -> dict[str, str]:
    """Which special tokens begin, end and pad a text."""
    padding = {"pad_token": PADDING} if model_type == "llama3.1" else {}
    return {"bos_token": BEGIN, "eos_token": TURN_END if instruct else END} | padding
