"""Tokenizers built from the real files give the ids of tiktoken and of sentencepiece, in transformers 4 and 5."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from tests.checkpoints import Model, make
from tests.converting import convert
from tests.distributed.launching import environment
from tests.tokenizer import corpus
from tests.tokenizer.real import LLAMA3, MIXTRAL, VERSIONS, load_and_encode, require_real_files
from tests.warm import Process

LINES = corpus.lines()
every_version = pytest.mark.parametrize("version", VERSIONS)

TINY = {"layers": 1, "hidden": 4, "ffn": 4, "heads": 2, "groups": 2, "head_dim": 2}
OF_LLAMA3 = Model(**TINY, vocab=128256, padded_vocab=128256)  # type: ignore[arg-type]
OF_LLAMA2 = Model(**TINY, vocab=32000, padded_vocab=32000)  # type: ignore[arg-type]
OF_MIXTRAL = Model(**TINY, vocab=32000, padded_vocab=32000, experts=2)  # type: ignore[arg-type]
#: Name -> model, args, tokenizer, flags.
CASES: dict[str, tuple[Model, dict[str, Any], Path, tuple[str, ...]]] = {
    "llama3": (OF_LLAMA3, {"max_position_embeddings": 8192}, LLAMA3, ()),
    "llama3 instruct": (OF_LLAMA3, {"max_position_embeddings": 8192}, LLAMA3, ("--instruct",)),
    "llama3.1 instruct": (OF_LLAMA3, {"use_rope_scaling": True}, LLAMA3, ("--instruct",)),
    "llama2 instruct": (OF_LLAMA2, {}, MIXTRAL, ("--instruct",)),
    "mistral instruct": (OF_LLAMA2, {}, MIXTRAL, ("--instruct", "--source-model-type", "mistral")),
    "mixtral instruct": (OF_MIXTRAL, {}, MIXTRAL, ("--instruct",)),
}
LLAMA3S = [name for name in CASES if name.startswith("llama3")]
PIECES = [name for name in CASES if not name.startswith("llama3")]

CHATS = [
    [{"role": "user", "content": " Hi there "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ],
]
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
RENDERED = {
    "llama2 instruct": [
        "<s>[INST] Hi there [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    ],
    "mistral instruct": [
        "<s>[INST]  Hi there  [/INST]",
        "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    ],
    "llama3 instruct": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "llama3.1 instruct": [
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}Be brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
}
RENDERED["mixtral instruct"] = RENDERED["mistral instruct"]

#: Some ids of Llama 3's special tokens; the file lacks them all.
SPECIAL = {
    "llama3": {
        128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128002: "<|reserved_special_token_0|>",
        128003: "<|reserved_special_token_1|>", 128004: "<|reserved_special_token_2|>",
        128005: "<|reserved_special_token_3|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>",
        128008: "<|reserved_special_token_4|>", 128009: "<|eot_id|>", 128010: "<|reserved_special_token_5|>",
        128011: "<|reserved_special_token_6|>", 128255: "<|reserved_special_token_250|>",
    },
    "llama3.1": {
        128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128002: "<|reserved_special_token_0|>",
        128003: "<|reserved_special_token_1|>", 128004: "<|finetune_right_pad_id|>",
        128005: "<|reserved_special_token_2|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>",
        128008: "<|eom_id|>", 128009: "<|eot_id|>", 128010: "<|python_tag|>",
        128011: "<|reserved_special_token_3|>", 128255: "<|reserved_special_token_247|>",
    },
}  # fmt: skip
#: How Meta's code cuts text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    require_real_files()
    directory = tmp_path_factory.mktemp("real")
    for name, (model, args, tokenizer, flags) in CASES.items():
        make(directory / name, model, **args)
        assert convert(directory / name, directory / f"{name} hf", "--tokenizer", str(tokenizer), *flags) == 0
    return {name: directory / f"{name} hf" for name in CASES}


@pytest.fixture(scope="module")
def loaded(converted: dict[str, Path]) -> dict[str, dict[str, Any]]:
    numbers = sorted(SPECIAL["llama3"])
    return {
        version: load_and_encode(version, converted, LINES, chats=CHATS, numbers=numbers)
        for version, python in VERSIONS.items()
        if python
    }


def found_in(loaded: dict[str, dict[str, Any]], version: str, name: str) -> dict[str, Any]:
    if version not in loaded:
        pytest.skip("DIST_CONVERT_TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    found: dict[str, Any] = loaded[version][name]
    return found


def differing(found: list[Any], expected: list[Any]) -> list[str]:
    """The lines on which the two differ."""
    return [line for line, ours, theirs in zip(LINES, found, expected, strict=True) if ours != theirs]


@cache
def encoding_of(name: str) -> tiktoken.Encoding:
    special = {token: number for number, token in SPECIAL[name.split()[0]].items()}
    missing = (number for number in range(128256) if number >= 128000 and number not in special.values())
    special |= {
        f"<|reserved_special_token_{number - (128008 if '.' in name else 128005)}|>": number for number in missing
    }
    assert len(special) == 256
    return tiktoken.Encoding(
        name, pat_str=WORDS, mergeable_ranks=load_tiktoken_bpe(str(LLAMA3)), special_tokens=special
    )


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    require_real_files()
    return sentencepiece.SentencePieceProcessor(model_file=str(MIXTRAL))


def test_the_corpus_is_large_and_diverse() -> None:
    assert len(LINES) == len(set(LINES)) > 2000
    assert len(set("".join(LINES))) > 3000


@every_version
@pytest.mark.parametrize("name", LLAMA3S)
def test_llama_3_gives_the_ids_of_tiktoken(name: str, version: str, loaded: dict[str, dict[str, Any]]) -> None:
    found, encoding = found_in(loaded, version, name), encoding_of(name)
    expected = [[128000, *encoding.encode(line, allowed_special="all")] for line in LINES]
    assert differing(found["ids"], expected) == []
    expected = [encoding.encode(line, disallowed_special=()) for line in LINES]
    assert differing(found["as text"], expected) == []


@every_version
@pytest.mark.parametrize("name", LLAMA3S)
def test_llama_3_decodes_what_it_encoded(name: str, version: str, loaded: dict[str, dict[str, Any]]) -> None:
    special = re.compile("|".join(map(re.escape, encoding_of(name).special_tokens_set)))
    expected = [special.sub("", line) for line in LINES]
    assert differing(found_in(loaded, version, name)["decoded"], expected) == []


@every_version
@pytest.mark.parametrize("name", LLAMA3S)
def test_llama_3_has_its_256_special_tokens(name: str, version: str, loaded: dict[str, dict[str, Any]]) -> None:
    found, expected = found_in(loaded, version, name), SPECIAL[name.split()[0]]
    assert found["size"] == 128256
    assert dict(zip(expected, found["tokens"], strict=True)) == expected
    ends = 128009 if "instruct" in name else 128001
    assert found["special"] == [128000, ends, 128004 if "3.1" in name else None]
    assert found["pair"] == [128000, 606, 128000, 20375]


@every_version
@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(
    name: str, version: str, loaded: dict[str, dict[str, Any]], pieces: sentencepiece.SentencePieceProcessor
) -> None:
    found = found_in(loaded, version, name)
    assert differing(found["as text"], [pieces.encode(line) for line in LINES]) == []
    control = {"<unk>": [0], "<s>": [1], "</s>": [2]}
    parts = [re.split("(<unk>|<s>|</s>)", line) for line in LINES]
    expected = [[1, *(n for part in of_line for n in control.get(part) or pieces.encode(part))] for of_line in parts]
    assert differing(found["ids"], expected) == []


@every_version
@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_model_decodes_as_sentencepiece_does(
    name: str, version: str, loaded: dict[str, dict[str, Any]], pieces: sentencepiece.SentencePieceProcessor
) -> None:
    found = found_in(loaded, version, name)
    assert found["size"] == 32000
    assert found["special"] == [1, 2, None]
    assert found["pair"] == [1, 624, 1, 989]
    expected = [pieces.decode(pieces.encode(line)) for line in LINES]
    differ = differing(found["decoded"], expected)
    assert [line for line in differ if not re.search("<unk>|<s>|</s>", line)] == []


@every_version
@pytest.mark.parametrize("name", CASES)
def test_models_get_no_inputs_that_they_refuse(name: str, version: str, loaded: dict[str, dict[str, Any]]) -> None:
    assert found_in(loaded, version, name)["inputs"] == ["attention_mask", "input_ids"]


@every_version
@pytest.mark.parametrize("name", CASES)
def test_instruct_models_get_the_chat_format_of_their_makers(
    name: str, version: str, loaded: dict[str, dict[str, Any]]
) -> None:
    assert [text for text, _ in found_in(loaded, version, name)["chats"]] == RENDERED.get(name, [])


@every_version
@pytest.mark.parametrize("name", ["mistral instruct", "mixtral instruct"])
def test_a_chat_of_mixtral_has_the_ids_that_mistral_common_gives(
    name: str, version: str, loaded: dict[str, dict[str, Any]]
) -> None:
    """The ids are what MistralTokenizer.v1().encode_chat_completion of mistral-common 1.13 returns for the chats."""
    assert [ids for _, ids in found_in(loaded, version, name)["chats"]] == [
        [1, 733, 16289, 28793, 28705, 15359, 736, 28705, 733, 28748, 16289, 28793],
        [
            1, 733, 16289, 28793, 1739, 6817, 28723, 13, 13, 23809, 733, 28748, 16289, 28793, 22557, 2,
            733, 16289, 28793, 2463, 28706, 733, 28748, 16289, 28793,
        ],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llama3.1 instruct", "mixtral instruct"])
def test_a_converter_on_transformers_4_builds_the_same_bytes(
    name: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    python = VERSIONS["transformers 4"]
    if not python:
        pytest.skip("DIST_CONVERT_TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    shutil.copy(converted[name] / "config.json", tmp_path)
    command = ["-m", "dist_convert", "tokenizer", str(CASES[name][2]), str(tmp_path), "--instruct"]
    done = Process(command, environment(), python=python).finish()
    assert done.returncode == 0, done.stderr
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (converted[name] / file.name).read_bytes(), file.name
    assert (tmp_path / "tokenizer.json").is_file()


def test_the_sentencepiece_model_is_copied_along(converted: dict[str, Path]) -> None:
    assert (converted["mixtral instruct"] / "tokenizer.model").read_bytes() == MIXTRAL.read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", {"bos_token_id": 128000, "eos_token_id": 128001}),
        (
            "llama3.1 instruct",
            {
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128008, 128009],
                "pad_token_id": 128004,
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
            },
        ),
        ("mixtral instruct", {"bos_token_id": 1, "eos_token_id": 2}),
        ("mistral instruct", {"bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_generation_follows_the_tokenizer(name: str, expected: dict[str, Any], converted: dict[str, Path]) -> None:
    written = json.loads((converted[name] / "generation_config.json").read_text())
    del written["_from_model_config"]
    assert written == expected
    config = json.loads((converted[name] / "config.json").read_text())
    assert {key: config[key] for key in ("bos_token_id", "eos_token_id")} == {
        key: expected[key] for key in ("bos_token_id", "eos_token_id")
    }
