"""Mistral's later SentencePiece models, in which [INST] and its like are control pieces and some are user-defined."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from tests.checkpoints import Model, make
from tests.converting import convert
from tests.tokenizer import corpus
from tests.tokenizer.real import PACKAGES, VERSIONS, load_and_encode, require_real_files

DATA = PACKAGES / "mistral_common" / "data"
FILES = {
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
}
TINY = Model(layers=1, hidden=4, ffn=4, heads=2, groups=2, head_dim=2, vocab=32768, padded_vocab=32768)
REFERENCES = [
    "a[REFERENCE_DOC_1]b",
    "[REFERENCE_DOC_19] b",
    " [REFERENCE_DOC_0][REFERENCE_DOC_2]  x",
    "\n[REFERENCE_DOC_3",
]
LINES = [line for line in corpus.lines()[::9] if not any(c in line for c in ("<unk>", "<s>", "</s>", "[INST]"))]

CHATS = [
    [{"role": "user", "content": " Hi there "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello "},
        {"role": "user", "content": "Bye"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
]
#: What MistralTokenizer.from_file(...).encode_chat_completion of mistral-common 1.8.5 returns for the first two.
IN_LAST = [1, 3, 16127, 4, 23325, 2, 3, 2507, 7585, 29491, 781, 781, 2698, 29474, 4]
IN_FRONT = [1, 16, 2507, 7585, 29491, 17, 3, 16127, 4, 23325, 2, 3, 3231, 29474, 4]
IDS = {name: [[1, 3, 29473, 16127, 1504, 29473, 4], IN_FRONT if name == "v7" else IN_LAST] for name in FILES}


@pytest.mark.parametrize("version", VERSIONS)
def test_they_give_the_ids_of_sentencepiece_and_mistral_common(version: str, tmp_path: Path) -> None:
    require_real_files()
    make(tmp_path / "in", TINY)
    for name, file in FILES.items():
        assert convert(tmp_path / "in", tmp_path / name, "--tokenizer", str(file), "--instruct") == 0
    found = load_and_encode(version, {name: tmp_path / name for name in FILES}, [*LINES, *REFERENCES], chats=CHATS)
    for name, file in FILES.items():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        expected = [[1, *pieces.encode(line)] for line in [*LINES, *REFERENCES]]
        assert [ids for ids, right in zip(found[name]["ids"], expected, strict=True) if ids != right] == []
        chats = found[name]["chats"]
        assert [ids for _, ids in chats[:2]] == IDS[name]
        assert found[name]["size"] == 32768
    assert found["v3"]["chats"][2] == ["<s>[INST]Hi[/INST]", [1, 3, 16127, 4]]


def test_the_note_says_whose_chat_format_it_is_and_nothing_is_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_real_files()
    make(tmp_path / "in", TINY)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(FILES["v3"]), "--instruct") == 0
    assert "; chat format of Mistral v3, by its control tokens\n" in capsys.readouterr().err
    assert "temperature" not in (tmp_path / "out" / "generation_config.json").read_text()
