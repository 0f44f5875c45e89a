"""SentencePiece models with other settings than Llama 2's, and directories that have nothing else to cut text with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from tests.checkpoints import Model, make
from tests.converting import convert
from tests.tokenizer import corpus
from tests.tokenizer.pieces import train
from tests.tokenizer.real import VERSIONS, load_and_encode

LINES = [line for line in corpus.lines()[::4] if not any(name in line for name in ("<unk>", "<s>", "</s>", "[INST]"))]


def convert_with(tokenizer: Path, tmp_path: Path, *flags: str) -> int:
    make(tmp_path / "in", Model(layers=1, vocab=400, padded_vocab=512), vocab_size=None)
    return convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(tokenizer), *flags)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"control_symbols": ["[INST]"], "pad_id": 3},
        {"user_defined_symbols": ["<extra_0>", "def", "=="]},
    ],
    ids=lambda options: " ".join(options) or "as Llama 2",
)
def test_what_the_model_says_of_spaces_and_bytes_is_followed(options: dict[str, Any], tmp_path: Path) -> None:
    witness = train(tmp_path / "any name", **options)
    assert convert_with(tmp_path / "any name", tmp_path) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [loaded(line, add_special_tokens=False)["input_ids"] for line in LINES]
    assert [line for line, found in zip(LINES, ids, strict=True) if found != witness.encode(line)] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400


def test_special_tokens_of_a_model_have_its_own_names_and_ids(tmp_path: Path) -> None:
    train(
        tmp_path / "m", pad_id=3, bos_id=2, eos_id=1, bos_piece="<B>", eos_piece="<E>", pad_piece="<P>", unk_piece="<U>"
    )
    assert convert_with(tmp_path / "m", tmp_path) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token] == ["<B>", "<E>", "<P>", "<U>"]
    assert [loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id] == [2, 1, 3, 0]
    assert loaded("")["input_ids"] == [2]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert [generation[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [2, 1, 3]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_type": "unigram"}, "a model other than byte pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a normalization of characters"),
        (
            {"user_defined_symbols": ["<extra_0>"], "remove_extra_whitespaces": True},
            "user-defined pieces with spaces in them or with spaces that are removed",
        ),
    ],
    ids=["unigram", "normalization", "user-defined pieces"],
)
def test_what_a_fast_tokenizer_would_cut_differently_is_refused(
    options: dict[str, Any], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "m", **options)
    assert convert_with(tmp_path / "m", tmp_path) == 1
    err = capsys.readouterr().err
    assert f"found:    {found}\n" in err
    assert f"file:     {tmp_path}/m\n" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [40, 4000])
def test_a_truncated_model_is_an_error_that_names_the_file(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:cut])
    assert convert_with(tmp_path / "m", tmp_path) == 1
    err = capsys.readouterr().err
    assert "not a SentencePiece model" in err
    assert f"file:     {tmp_path}/m" in err


def slow_directory(directory: Path, **config: Any) -> SentencePieceProcessor:
    """What transformers 4 saved of its class LlamaTokenizer, with two added tokens and a chat template."""
    witness = train(directory / "tokenizer.model")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", "400": "<|im_start|>", "401": "<|im_end|>"}
    settings = {
        "added_tokens_decoder": {number: {"content": token, **special} for number, token in added.items()},
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "chat_template": "{{ messages[0].content }}!",
        "legacy": True,
        "model_max_length": 1234,
        "tokenizer_class": "LlamaTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | config))
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    return witness


@pytest.mark.parametrize("version", VERSIONS)
def test_a_directory_without_tokenizer_json_gets_one_with_its_added_tokens(version: str, tmp_path: Path) -> None:
    witness = slow_directory(tmp_path / "slow")
    assert convert_with(tmp_path / "slow", tmp_path) == 0
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
    found = load_and_encode(version, {"it": tmp_path / "out"}, [*LINES, "a <|im_start|>b"], chats=[[{"content": "x"}]])[
        "it"
    ]
    ids = [[1, *witness.encode(line)] for line in LINES]
    assert [line for line, ours, theirs in zip(LINES, found["ids"], ids, strict=False) if ours != theirs] == []
    assert found["ids"][-1] == [1, *witness.encode("a "), 400, *witness.encode("b")]
    assert found["size"] == 402
    assert found["special"] == [1, 401, 0]
    assert found["chats"][0][0] == "x!"


def test_without_the_legacy_behaviour_only_the_start_of_a_text_gets_a_space(tmp_path: Path) -> None:
    witness = slow_directory(tmp_path / "slow", legacy=False)
    assert convert_with(tmp_path / "slow", tmp_path) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a<|im_start|>b")["input_ids"] == [1, *witness.encode("a"), 400, witness.piece_to_id("b")]


def test_bos_and_eos_are_added_as_the_settings_say(tmp_path: Path) -> None:
    witness = slow_directory(tmp_path / "slow", add_bos_token=False, add_eos_token=True)
    assert convert_with(tmp_path / "slow", tmp_path) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [*witness.encode("a"), 401]


def test_added_tokens_that_leave_ids_out_fail_in_a_dry_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_directory(tmp_path / "slow")
    (tmp_path / "slow" / "added_tokens.json").write_text(json.dumps({"<far>": 410}))
    assert convert_with(tmp_path / "slow", tmp_path, "--dry-run") == 1
    err = capsys.readouterr().err
    assert "added tokens of the tokenizer skip ids or repeat a token" in err
    assert "expected: id 402\n  found:    id 410: '<far>'" in err
