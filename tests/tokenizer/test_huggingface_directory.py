"""Tokenizer files of a Hugging Face directory are copied byte for byte; where there are none, a note says why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import AutoTokenizer, GenerationConfig

from tests.checkpoints import Model, make
from tests.converting import convert
from tests.tokenizer.pieces import train
from tests.tokenizer.real import VERSIONS, load_and_encode

LAYER = Model(layers=1)
FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
#: What transformers may find beside a model and read as a part of its tokenizer.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/rag.jinja",
)  # fmt: skip


def make_tokenizer(directory: Path, model: Any = None, **config: Any) -> Path:
    """A tokenizer of 29 tokens: 27 words, then <s> and </s>."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(model or WordLevel({f"w{number}": number for number in range(27)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert tokenizer.get_vocab_size() == 29
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def ids_of(target: Path, file: str = "config.json") -> tuple[Any, Any]:
    config = json.loads((target / file).read_text())
    return config["bos_token_id"], config["eos_token_id"]


def assert_copied(source: Path, target: Path) -> None:
    copied = files_of(target)
    for name, content in files_of(source).items():
        assert copied.get(name) == content, name


def test_every_kind_of_tokenizer_file_is_copied_byte_for_byte(tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER)
    source = make_tokenizer(tmp_path / "tokenizer")
    for name in FILES:
        if not (source / name).exists():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(b"{}" if name.endswith(".json") else b"bytes \x00\xff\r\n of " + name.encode())
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert_copied(source, tmp_path / "out")


def test_nothing_but_the_tokenizer_is_copied(tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER)
    source = make_tokenizer(tmp_path / "tokenizer")
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "README.md"):
        (source / name).write_text('{"hidden_size": 5}')
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert [name for name, content in files_of(tmp_path / "out").items() if content == b'{"hidden_size": 5}'] == []


def test_the_copied_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER)
    source = make_tokenizer(tmp_path / "tokenizer")
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(loaded) == 29
    assert (loaded.bos_token_id, loaded.eos_token_id) == (27, 28)


@pytest.mark.parametrize("named", ["", "tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("argument", ["tokenizer_model", "tokenizer_name_or_path"])
def test_the_tokenizer_that_the_args_name_is_found_by_directory_or_file(
    argument: str, named: str, tmp_path: Path
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    (source / "tokenizer.model").write_bytes(b"pieces")
    make(tmp_path / "in", LAYER, **{argument: str(source / named)})
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_copied(source, tmp_path / "out")


def test_the_flag_wins_over_the_args(tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", extra="other")
    source = make_tokenizer(tmp_path / "tokenizer", extra="right")
    make(tmp_path / "in", LAYER, tokenizer_model=str(other))
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert_copied(source, tmp_path / "out")


@pytest.mark.parametrize(
    "model",
    [
        WordLevel({f"w{number}": number for number in range(27)}, unk_token="w0"),
        BPE({chr(97 + number): number for number in range(26)} | {"ab": 26}, [("a", "b")]),
        Unigram([(f"w{number}", -float(number)) for number in range(27)]),
    ],
    ids=["WordLevel", "BPE", "Unigram"],
)
def test_its_size_and_its_ids_of_begin_and_end_are_read_from_its_files(model: Any, tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER, vocab_size=None)
    source = make_tokenizer(tmp_path / "tokenizer", model)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 29
    assert ids_of(tmp_path / "out") == (27, 28)
    assert ids_of(tmp_path / "out", "generation_config.json") == (27, 28)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id) == (27, 28)


def test_special_tokens_may_be_written_as_objects_or_be_absent(tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER)
    source = make_tokenizer(tmp_path / "tokenizer", bos_token=None, eos_token={"content": "</s>", "special": True})
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert ids_of(tmp_path / "out") == (None, 28)


@pytest.mark.parametrize("content", ['{"model": ', '{"added_tokens": [{}]}', "[]"])
def test_a_damaged_tokenizer_is_an_error_that_names_the_file(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER)
    source = make_tokenizer(tmp_path / "tokenizer")
    (source / "tokenizer.json").write_text(content)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 1
    err = capsys.readouterr().err
    assert f"{source}/tokenizer.json" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["fifo", "broken link"])
def test_a_model_beside_what_only_has_the_name_of_a_tokenizers_file_is_not_taken_alone(
    name: str, replace: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER)
    source = tmp_path / "tokenizer"
    train(source / "tokenizer.model")
    replace(source / name)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 1
    assert f"{name} is not a plain file, or links to something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "ids"), [("habana_llama3.1_tp2pp1", (504, 505)), ("habana_mixtral_tp1pp1ep4", (1, 2))]
)
def test_tokenizers_that_transformers_4_saved_are_copied_and_read(
    folder: str, ids: tuple[int, int], tmp_path: Path
) -> None:
    source = FIXTURES / folder / "hf"
    if not source.is_dir():
        pytest.skip(f"{folder} is absent")
    make(tmp_path / "in", Model(layers=1, vocab=512, padded_vocab=512))
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    copied = [name for name in files_of(source) if "token" in name]
    assert len(copied) >= 3
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert ids_of(tmp_path / "out") == ids
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 512


def directory_of_transformers_5(directory: Path) -> Path:
    """What transformers 5 saves of a tokenizer with a chat template and two more special tokens."""
    made = make_tokenizer(directory.with_name("made"))
    tokenizer: Any = AutoTokenizer.from_pretrained(made, extra_special_tokens=["<a>", "<b>"], pad_token="<a>")
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "TokenizersBackend"
    assert config["extra_special_tokens"] == ["<a>", "<b>"]
    assert (directory / "chat_template.jinja").is_file()
    return directory


@pytest.mark.parametrize("version", VERSIONS)
def test_a_directory_that_transformers_5_saved_also_loads_in_4(version: str, tmp_path: Path) -> None:
    source = directory_of_transformers_5(tmp_path / "tokenizer")
    make(tmp_path / "in", Model(layers=1, vocab=31))
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    lines = ["w1", "w3<a>w4<b></s>", ""]
    found = load_and_encode(version, {"it": tmp_path / "out"}, lines, chats=[[{"content": "x"}]])["it"]
    original: Any = AutoTokenizer.from_pretrained(source)
    assert found["ids"] == [original(line)["input_ids"] for line in lines]
    assert found["special"] == [original.bos_token_id, original.eos_token_id, original.pad_token_id] == [27, 28, 29]
    assert found["chats"][0][0] == "x!"
    assert found["inputs"] == ["attention_mask", "input_ids"]
    assert found["size"] == len(original) == 31


@pytest.mark.parametrize("version", VERSIONS)
def test_a_copied_tokenizer_gives_the_ids_of_its_source(version: str, tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    lines = ["w1", "<s>w3</s>", "unknown", ""]
    found = load_and_encode(version, {"source": source, "copy": tmp_path / "out"}, lines)
    assert found["copy"] == found["source"]
    assert found["copy"]["ids"][:2] == [[1], [27, 3, 28]]


@pytest.mark.parametrize("config", ["absent", "without a class"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_tokenizer_json_without_a_class_is_not_read_by_that_of_the_model(
    version: str, config: str, tmp_path: Path
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    (source / "tokenizer_config.json").unlink()
    if config == "without a class":
        (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    found = load_and_encode(version, {"it": tmp_path / "out"}, ["w1", "<s>w3</s>"])["it"]
    assert found["ids"] == [
        Tokenizer.from_file(str(source / "tokenizer.json")).encode(t).ids for t in ("w1", "<s>w3</s>")
    ]
    assert found["inputs"] == ["attention_mask", "input_ids"]
    assert ids_of(tmp_path / "out") == (27, 28)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("vocab.txt",)])
def test_vocabularies_that_a_class_reads_are_counted(names: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    words = [*(f"w{number}" for number in range(26)), "<end>"]
    (source / names[0]).write_text("\n".join(words) + "\n")
    if names[0] == "vocab.json":
        (source / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "added_tokens.json").write_text('{"<more>": 27}')
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "eos_token": "<end>", "pad_token": "<more>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    make(tmp_path / "in", LAYER, vocab_size=None)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert ids_of(tmp_path / "out") == (None, 26)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == 27
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 28


@pytest.mark.parametrize(
    ("config", "file", "flags", "words"),
    [
        ({"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "", (), "auto_map names Python code, which is not copied"),
        ({}, "tekken.json", (), "vocabulary files that are not copied: tekken.json"),
        (
            {},
            "qwen.tiktoken",
            (),
            "vocabulary files that are not copied: qwen.tiktoken",
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, "", (), "transformers 5 may cut leading spaces differently from 4"),
        ({}, "", ("--instruct",), "--instruct was given, but the tokenizer has no chat template, and none is written"),
    ],
)
def test_what_a_copy_leaves_out_is_a_warning(
    config: dict[str, Any],
    file: str,
    flags: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer", **config)
    if file:
        (source / file).write_text("{}")
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source), "--dry-run", *flags) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert words in warnings[0]


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_that_is_there_needs_no_warning(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer", **({"chat_template": "x"} if template.endswith("json") else {}))
    if template == "chat_template.jinja":
        (source / template).write_text("x")
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source), "--dry-run", "--instruct") == 0
    assert "warning" not in capsys.readouterr().err


def test_the_makers_generation_config_and_special_ids_beside_a_tokenizer_are_taken_over_whole(tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    ids = {"bos_token_id": 3, "eos_token_id": [27, 28], "pad_token_id": 5}
    generation = {**ids, "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.05, "transformers_version": "4.37.0"}
    (source / "config.json").write_text(json.dumps({**ids, "hidden_size": 4096, "model_type": "qwen2"}))
    (source / "generation_config.json").write_text(json.dumps(generation))
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {**config, **ids, "hidden_size": 16, "model_type": "llama"} == config
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [27, 28]


def test_the_special_ids_of_a_config_beside_a_tokenizer_are_those_of_generation_too(tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    ids = {"bos_token_id": 3, "eos_token_id": [27, 28], "pad_token_id": 5}
    (source / "config.json").write_text(json.dumps({**ids, "hidden_size": 4096, "model_type": "qwen2"}))
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {**config, **ids, "hidden_size": 16, "model_type": "llama"} == config
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [27, 28]


@pytest.mark.parametrize("eos", [29, [2, 29], "2", None], ids=str)
def test_special_ids_of_a_config_that_are_no_tokens_of_the_model_are_not_taken_over(eos: Any, tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "without", "--tokenizer", str(source)) == 0
    (source / "config.json").write_text(json.dumps({"eos_token_id": eos, "model_type": "qwen2"}))
    assert convert(tmp_path / "in", tmp_path / "with", "--tokenizer", str(source)) == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "with" / name).read_text() == (tmp_path / "without" / name).read_text()
