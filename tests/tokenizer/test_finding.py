"""Which tokenizer is taken: --tokenizer, else what the args name, here or beside the checkpoint."""

from __future__ import annotations

import base64
import os
from itertools import product
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.formats.tokenizer.build import build_llama3
from tests.checkpoints import Model, make
from tests.converting import convert
from tests.tokenizer.pieces import train
from tests.tokenizer.test_huggingface_directory import files_of, make_tokenizer
from tests.warm import Process

LAYER = Model(layers=1)
NAMED = "/of/the/machine/that/trained"


def tiktoken_lines(path: Path, count: int = 128000) -> Path:
    """A file in Llama 3's format: all bytes, all pairs of bytes, and some of three."""
    words = (bytes(word) for length in (1, 2, 3) for word in product(range(256), repeat=length))
    lines = (f"{base64.b64encode(next(words)).decode()} {number}\n" for number in range(count))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("named", "place"),
    [
        (f"{NAMED}/llama3", "in/iter_0000004/llama3"),
        (f"{NAMED}/llama3", "in/llama3"),
        (f"{NAMED}/llama3", "llama3"),
        (f"{NAMED}/llama3", "in/tokenizer"),
        (f"{NAMED}/llama3/tokenizer.json", "in"),
        (None, "in"),
        (None, "in/tokenizer"),
    ],
)
def test_what_is_not_where_the_args_say_is_looked_for_beside_the_checkpoint(
    named: str | None, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, tokenizer_model=named)
    source = make_tokenizer(tmp_path / "made")
    (tmp_path / place).mkdir(exist_ok=True)
    for file in source.iterdir():
        file.rename(tmp_path / place / file.name)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert f"tokenizer: {tmp_path / place} (beside the checkpoint), copied\n" in capsys.readouterr().err
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_another_tokenizer_in_the_folder_of_checkpoints_is_not_taken(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other")
    make_tokenizer(tmp_path / "tokenizer")
    make(tmp_path / "in", LAYER, tokenizer_model=f"{NAMED}/llama3")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert [name for name in files_of(tmp_path / "out") if "tokenizer" in name] == []


@pytest.mark.parametrize(
    ("flags", "more"),
    [((), ""), (("--instruct", "--source-model-type", "llama2"), " --instruct --source-model-type llama2")],
)
def test_a_conversion_without_a_tokenizer_ends_with_the_command_that_adds_one(
    flags: tuple[str, ...], more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, tokenizer_model=f"{NAMED}/llama3")
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 0
    err = capsys.readouterr().err
    why = f"{NAMED}/llama3, which the checkpoint's args name, is not on this machine"
    command = f"dist-convert tokenizer PATH {tmp_path}/out{more}"
    assert [line for line in err.splitlines() if "tokenizer" in line] == [
        f"no tokenizer files are written: {why}; special ids in config.json: bos_token_id 1, eos_token_id 2; "
        f"add one (a directory or a tokenizer.model) with: {command}"
    ]
    source = make_tokenizer(tmp_path / "made")
    assert main([str(source) if word == "PATH" else word for word in command.split()[1:]]) == 0
    assert files_of(source).items() <= files_of(tmp_path / "out").items()


def test_a_conversion_with_a_tokenizer_ends_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(make_tokenizer(tmp_path / "made"))) == 0
    assert "dist-convert tokenizer" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["absent", "empty directory", "other file"])
def test_a_wrong_flag_is_an_error_before_anything_is_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, tokenizer_model=str(make_tokenizer(tmp_path / "made")))
    wrong = tmp_path / "wrong"
    if kind == "empty directory":
        wrong.mkdir()
    elif kind == "other file":
        wrong.write_text("merges of another tokenizer\n")
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(wrong)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"--tokenizer names no tokenizer\n  file:     {wrong}\n  expected: ")
    assert ("nothing at this path" if kind == "absent" else "something else") in err
    assert "remedy:   correct --tokenizer" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "made", "wrong"}


def test_a_file_that_the_args_name_and_nobody_understands_is_said_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    make(tmp_path / "in", LAYER, tokenizer_model=str(tmp_path / "vocab.bpe"))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert (
        "vocab.bpe, which the checkpoint's args name, is not a tokenizer that can be converted"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "inside", ["tokenizer.model", "original/tokenizer.model", "tokenizer.model.v1", "weights/../tokenizer.model"]
)
def test_a_folder_of_an_original_checkpoint_will_do(
    inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Meta"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "params.json").write_text("{}")
    train(folder / inside)
    make(tmp_path / "in", Model(layers=1, vocab=400, padded_vocab=512))
    given = folder / "weights" if ".." in inside else folder
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(given)) == 0
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    assert "tokenizer: built from " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "flags", "family", "guessed"),
    [
        ({"max_position_embeddings": 8192}, (), "Llama 3", True),
        ({"max_position_embeddings": 131072}, (), "Llama 3.1", True),
        ({"max_position_embeddings": 8192, "use_rope_scaling": True}, (), "Llama 3.1", True),
        ({"max_position_embeddings": 8192}, ("--source-model-type", "llama3.1"), "Llama 3.1", False),
        ({"max_position_embeddings": 131072}, ("--source-model-type", "llama3"), "Llama 3", False),
    ],
)
def test_the_flag_then_the_args_tell_llama_3_from_3_1(
    args: dict[str, object],
    flags: tuple[str, ...],
    family: str,
    guessed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tiktoken_lines(tmp_path / "any name")
    make(tmp_path / "in", Model(layers=1, vocab=128256, padded_vocab=128256, hidden=4, ffn=4), **args)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(file), "--dry-run", *flags) == 0
    why = ", as its config suggests; --source-model-type overrides it" if guessed else ""
    assert (
        f"tokenizer: built from {file} (from --tokenizer); special tokens of {family}{why}\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("short", ("only Llama 3's tokenizer", "128000 lines", "found:    1000")),
        ("order", ("is damaged", "line 3: a token in base64 and its id, 2", "file:     ")),
        ("binary", ("is damaged", "line 3:")),
        ("base64", ("is damaged", "line 1: ", "found:    b'AAAAA 0'")),
        ("twice", ("is damaged", "line 3:", "the token of id 1")),
    ],
)
def test_lines_that_are_not_llama_3s_are_an_error(
    fault: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiktoken_lines(tmp_path / "tokenizer.model", 1000)
    lines = file.read_bytes().splitlines()
    if fault != "short":
        lines[2] = {"order": lines[3], "twice": lines[1].split()[0] + b" 2"}.get(fault, b"\x00\xff 2")
    if fault == "base64":
        lines[:3] = b"AAAAA 0", b"AQ== 1", b"Ag== 2"
    file.write_bytes(b"\n".join(lines))
    make(tmp_path / "in", LAYER)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(file)) == 1
    err = capsys.readouterr().err
    assert [word for word in words if word not in err] == []


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's own reader keeps what it once read from a path."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/dev/null/nowhere")
    monkeypatch.chdir(tmp_path)
    file = tiktoken_lines(Path("tokenizer.model"))
    lines = file.read_text().splitlines()
    assert build_llama3(file, "llama3").encode("!", add_special_tokens=False).ids == [33]
    lines[33], lines[34] = f"{lines[34].split()[0]} 33", f"{lines[33].split()[0]} 34"
    file.write_text("\n".join(lines))
    assert build_llama3(file, "llama3").encode("!", add_special_tokens=False).ids == [34]


@pytest.mark.parametrize("kind", ["unigram", "damaged"])
def test_a_tokenizer_that_cannot_be_converted_stops_the_weights_only_if_it_was_asked_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "unigram":
        file = tmp_path / "tokenizer.model"
        train(file, model_type="unigram")
        words = "no tokenizer files are written: only SentencePiece models like those of Llama 2, Mistral and Mixtral "
        words += f"are converted: {file} (a model other than byte pair encoding); "
    else:
        file = make_tokenizer(tmp_path / "made")
        (file / "tokenizer.json").write_text("{")
        words = "no tokenizer files are written: "
    make(tmp_path / "in", LAYER, tokenizer_model=str(file))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert words in err
    assert f"with: dist-convert tokenizer PATH {tmp_path / 'out'}\n" in err
    assert convert(tmp_path / "in", tmp_path / "other", "--tokenizer", str(file)) == 1


@pytest.mark.parametrize("argument", ["vocab_file", "merge_file"])
def test_the_vocabulary_that_args_of_a_gpt_2_tokenizer_name_is_searched(
    argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, **{argument: f"{NAMED}/vocabulary"})
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    words = f"{NAMED}/vocabulary, which the checkpoint's args name, is not on this machine"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("beside", ["", "tokenizer.model", "spiece.model", "vocab.json"])
def test_a_config_without_a_vocabulary_is_no_tokenizer(
    beside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tokenizer(tmp_path / "tokenizer")
    (source / "tokenizer.json").unlink()
    if beside:
        (source / beside).write_text("version https://git-lfs.github.com/spec/v1\n")
    make(tmp_path / "in", LAYER, tokenizer_model=str(source))
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(source)) == 2
    err = capsys.readouterr().err
    assert "found:    tokenizer_config.json, but no vocabulary that matches it" in err
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def cached(home: Path, name: str, revision: str = "0" * 40) -> Path:
    """A directory of the hub's cache, as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return make_tokenizer(repository / "snapshots" / revision)


#: huggingface_hub reads its environment once, when it is imported.
CLI = ["-m", "dist_convert", "megatron-to-hf", "--device", "cpu"]


def test_a_name_on_the_hub_is_looked_up_in_the_cache_alone(tmp_path: Path) -> None:
    cached(tmp_path / "home", "meta/some-llama")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    for name, found in (("meta/some-llama", True), ("meta/other-llama", False)):
        model = name.split("/")[1]
        make(tmp_path / model, LAYER, tokenizer_model=name)
        command = [*CLI, "--load-path", str(tmp_path / model), "--save-path", str(tmp_path / f"{model}-hf")]
        done = Process(command, environment).finish()
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{model}-hf" / "tokenizer.json").is_file() is found
        assert ("nor in the cache of the Hugging Face Hub" in done.stderr) is not found


@pytest.mark.parametrize("revision", ["../../../../elsewhere", "{}/elsewhere", "branches"])
def test_a_revision_in_the_args_leads_to_no_file_outside_of_the_cache(revision: str, tmp_path: Path) -> None:
    cached(tmp_path / "home", "meta/some-llama")
    (tmp_path / "home" / "hub" / "models--meta--some-llama" / "refs" / "branches").mkdir()
    make_tokenizer(tmp_path / "private")
    (tmp_path / "elsewhere").write_text(str(tmp_path / "private"))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    make(tmp_path / "in", LAYER, tokenizer_model=f"meta/some-llama@{revision.format(tmp_path)}")
    command = [*CLI, "--load-path", str(tmp_path / "in"), "--save-path", str(tmp_path / "out")]
    done = Process(command, environment).finish()
    assert done.returncode == 0, done.stderr
    assert "which the checkpoint's args name, is not on this machine" in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_missing_package_is_named_and_only_the_flag_makes_it_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    train(file)
    make(tmp_path / "in", Model(layers=1, vocab=400, padded_vocab=512), tokenizer_model=str(file))
    program = "import sys; sys.modules['google'] = None; from dist_convert.__main__ import main; sys.exit(main())"
    for number, flags in enumerate(([], ["--tokenizer", str(file)])):
        command = ["--load-path", str(tmp_path / "in"), "--save-path", str(tmp_path / f"out{number}"), *flags]
        done = Process(["-c", program, *CLI[2:], *command], os.environ).finish()
        assert done.returncode == number
        assert "building a tokenizer from this file needs the package protobuf" in done.stderr
        assert "pip install protobuf" in done.stderr
        assert (tmp_path / f"out{number}").exists() is (number == 0)
