"""A SentencePiece model, as Llama 2, Mistral and Mixtral have, and the Hugging Face tokenizer that it becomes.

The message is google/sentencepiece src/sentencepiece_model.proto; facts: docs/formats.md, "Tokenizer files".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.small_file import read_small_file
from dist_convert.tokenizer.packages import require
from dist_convert.tokenizer.record import Tokenizer

_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_SPACE = "▁"


def is_sentencepiece(start: bytes) -> bool:
    """Whether a file that starts so may be a SentencePiece model: its first field is a piece, a message with text."""
    return len(start) > 2 and start[0] == 0x0A and start[2] == 0x0A


def read_sentencepiece(path: Path) -> Tokenizer:
    """Size and special ids.

    Raises:
        CorruptFile: not a SentencePiece model.
        UnsupportedModel: of another kind than Llama 2's.
        MissingPackage: protobuf is not installed.
    """
    proto = _read(path)
    trainer, size = proto.trainer_spec, len(proto.pieces)
    _refuse_others(proto, path)
    bos, eos, pad = (number if 0 <= number < size else None for number in _roles(trainer))
    return Tokenizer("sentencepiece", path, size, bos, eos, pad, chat=_chat_of(proto))


def _chat_of(proto: Any) -> str | None:
    """Mistral's chat format where its tokens are control pieces, as they are from the second version on."""
    control = {piece.piece for piece in proto.pieces if piece.type == _CONTROL}
    if not {"[INST]", "[/INST]"} <= control:
        return None
    return "mistral v7" if {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"} <= control else "mistral v3"


def _refuse_others(proto: Any, path: Path) -> None:
    """Refuse what tokenizer.json cannot express exactly; Llama 2, Mistral and Mixtral have none of it."""
    types = {piece.type for piece in proto.pieces}
    user_defined = _user_defined(proto)
    moves_spaces = proto.normalizer_spec.remove_extra_whitespaces or any(_SPACE in text for text in user_defined)
    faults = (
        (proto.trainer_spec.model_type != _BPE, "another model than byte pair encoding"),
        (bool(proto.normalizer_spec.precompiled_charsmap), "a normalization of characters"),
        (_UNUSED in types, "unused pieces"),
        (bool(user_defined) and moves_spaces, "user-defined pieces and spaces that are removed, or in them"),
    )
    found = [what for is_there, what in faults if is_there]
    if found:
        raise UnsupportedModel(
            "only SentencePiece models like those of Llama 2, Mistral and Mixtral are converted",
            file=str(path),
            found=", ".join(found),
            remedy="give the directory of a Hugging Face tokenizer",
        )


def _user_defined(proto: Any) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]


def _roles(trainer: Any) -> tuple[int, int, int]:
    return trainer.bos_id, trainer.eos_id, trainer.pad_id


def _read(path: Path) -> Any:
    require("google.protobuf", path)
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    message: Any = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        message.ParseFromString(read_small_file(path))
    except DecodeError as error:
        raise CorruptFile(
            "not a SentencePiece model",
            file=str(path),
            found=str(error),
            remedy="copy it again, or give another one with --tokenizer",
        ) from error
    return message


def build_llama2(path: Path) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer` that puts begin-of-text in front, and which tokens begin, end and pad a text."""
    from tokenizers import AddedToken, Tokenizer, models, processors

    proto = _read(path)
    trainer, pieces = proto.trainer_spec, proto.pieces
    bos, eos, pad = (pieces[n].piece if 0 <= n < len(pieces) else None for n in _roles(trainer))
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    model = models.BPE(
        {piece.piece: number for number, piece in enumerate(pieces)},
        _merges({piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.type == _BYTE for piece in pieces),
    )
    tokenizer: Any = Tokenizer(model)
    user_defined = _user_defined(proto)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, user_defined)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    special = (piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in user_defined])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, trainer.bos_id)]
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
    return tokenizer, {role: token for role, token in named.items() if token is not None}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Which pairs become which piece, in the order of the pieces' scores.

    A piece has one score, however it is put together: where its ways overlap, SentencePiece takes the leftmost. Longer
    left parts first, so that runs of one character are cut alike (transformers' own converter has that order too).
    """
    ways = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(ways)]


def _normalizer(spec: Any, user_defined: list[str]) -> Any:
    """Spaces as SentencePiece writes them.

    User-defined pieces are looked for in text that is normalized, where no further space goes in front of what follows
    them. `tokenizers` normalizes the pieces themselves, too: a text that is one of them must stay as it is.
    """
    from tokenizers import Regex, normalizers

    leading = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    trailing = [normalizers.Replace(Regex(f"{_SPACE}+\\z"), "")]
    steps: list[Any] = leading if spec.remove_extra_whitespaces else []
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        if user_defined:
            alone = "|".join(map(re.escape, user_defined))
            steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}(?=(?:{alone})\z)"), ""))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps + (trailing if spec.remove_extra_whitespaces else []))


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
