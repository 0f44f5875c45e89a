"""A SentencePiece model, as Llama 2, Mistral and Mixtral have, and the Hugging Face tokenizer that it becomes.

The message is google/sentencepiece src/sentencepiece_model.proto; facts: docs/formats.md, "Tokenizer files".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.tokenizer.packages import require
from dist_convert.tokenizer.record import Tokenizer

_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_SPACE = "▁"


def is_sentencepiece(start: bytes) -> bool:
    """Whether a file that starts so may be a SentencePiece model: its first field is a piece, a message with text."""
    return len(start) > 3 and start[0] == 0x0A and start[2] == 0x0A


def read_sentencepiece(path: Path) -> Tokenizer:
    """Size and special ids.

    Raises:
        CorruptFile: not a SentencePiece model.
        UnsupportedModel: not of byte pair encoding.
        MissingPackage: protobuf is not installed.
    """
    proto = _read(path)
    trainer, size = proto.trainer_spec, len(proto.pieces)
    if trainer.model_type != _BPE:
        raise UnsupportedModel(
            "only SentencePiece models of byte pair encoding can be converted",
            file=str(path),
            expected=f"model_type {_BPE}, as Llama 2, Mistral and Mixtral have",
            found=f"model_type {trainer.model_type}",
            remedy="give the directory of a Hugging Face tokenizer with --tokenizer",
        )
    if any(piece.type == _UNUSED for piece in proto.pieces):
        raise UnsupportedModel(
            "SentencePiece cuts unused pieces up again, which Hugging Face's tokenizers do not",
            file=str(path),
            found="pieces of type UNUSED",
            remedy="give the directory of a Hugging Face tokenizer with --tokenizer",
        )
    bos, eos, pad = (number if 0 <= number < size else None for number in _roles(trainer))
    return Tokenizer("sentencepiece", path, size, bos, eos, pad)


def _roles(trainer: Any) -> tuple[int, int, int]:
    return trainer.bos_id, trainer.eos_id, trainer.pad_id


def _read(path: Path) -> Any:
    require("google.protobuf", path)
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    message: Any = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        message.ParseFromString(path.read_bytes())
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
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    for piece in pieces:
        added = AddedToken(piece.piece, normalized=False)
        if piece.type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([added])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([added])
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


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
