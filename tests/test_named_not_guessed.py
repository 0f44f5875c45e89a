"""Inputs that are unusual and clear: each is read, or refused by its own name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, training_args
from tests.converting import assert_same, read_tensors
from tests.to_megatron import make_hf


@pytest.mark.parametrize("dtype", ["F4", "F6_E3M2", "F6_E2M3", "F8_E5M2FNUZ"])
def test_a_newer_dtype_is_named_and_no_damage(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "torch", "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "a dtype that no weight of these families has" in message
    assert dtype in message
    assert "model.norm.weight" in message


def test_complex_weights_are_named_by_their_dtype_and_no_damage(tmp_path: Path) -> None:
    tensors = make_hf(tmp_path / "hf")
    norm = tensors["model.norm.weight"].to(torch.complex64)
    save_file(tensors | {"model.norm.weight": norm}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(dist_convert.ConversionError, match="a weight of an unexpected dtype") as caught:
        dist_convert.convert(tmp_path / "hf", tmp_path / "out", to="torch")
    assert (caught.value.tensor, caught.value.found) == ("model.norm.weight", "C64")


def test_args_that_were_saved_as_a_dict_are_args(tmp_path: Path) -> None:
    hf = hf_tensors(Model())
    args = vars(training_args(Model()))
    for name, chunks in megatron_shards(Model(), hf).items():
        directory = tmp_path / "megatron" / "iter_0000004" / name
        directory.mkdir(parents=True)
        saved = {"args": args, "checkpoint_version": 3.0, "iteration": 4, "model": chunks[0]}
        torch.save(saved, directory / "model_optim_rng.pt")
    dist_convert.convert(tmp_path / "megatron" / "iter_0000004", tmp_path / "hf", to="huggingface")
    assert_same(read_tensors(tmp_path / "hf"), hf)


@pytest.mark.parametrize("words", [["", "/out"], ["/in", ""]])
def test_an_empty_path_is_called_empty(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *words, "--to", "torch"]) == 2
    assert "a path is empty" in capsys.readouterr().err
    with pytest.raises(dist_convert.errors.UsageError, match="a path is empty"):
        dist_convert.convert(words[0], words[1], to="torch")


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "megatron")
    assert main(["convert", "~/megatron", "~/hf", "--to", "huggingface", "--device", "cpu"]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    (tmp_path / "job.yaml").write_text("source: ~/megatron\ntarget: ~/second\nto: huggingface\ndevice: cpu\n")
    assert main(["convert", "--config", str(tmp_path / "job.yaml")]) == 0
    assert (tmp_path / "second" / "model.safetensors").is_file()
    assert dist_convert.convert("~/megatron", "~/third", to="huggingface").target == tmp_path / "third"


def test_a_job_file_may_give_source_and_target_and_the_command_line_wins(tmp_path: Path) -> None:
    make(tmp_path / "megatron")
    text = f"source: {tmp_path / 'nowhere'}\ntarget: {tmp_path / 'one'}\nto: huggingface\ndevice: cpu\n"
    (tmp_path / "job.yaml").write_text(text)
    words = [str(tmp_path / "megatron"), str(tmp_path / "two")]
    assert main(["convert", *words, "--config", str(tmp_path / "job.yaml")]) == 0
    assert (tmp_path / "two").is_dir()
    assert not (tmp_path / "one").exists()


def test_a_config_beside_a_megatron_checkpoint_does_not_hide_it(tmp_path: Path) -> None:
    hf = make(tmp_path / "megatron")
    make_hf(tmp_path / "hf")
    (tmp_path / "megatron" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    dist_convert.convert(tmp_path / "megatron", tmp_path / "out", to="huggingface")
    assert_same(read_tensors(tmp_path / "out"), hf)
    assert dist_convert.inspect(tmp_path / "megatron")["kind"] == "megatron"
    assert dist_convert.verify(tmp_path / "megatron", tmp_path / "out").is_same


def test_two_models_in_one_directory_are_no_guess(tmp_path: Path) -> None:
    make(tmp_path / "both")
    make_hf(tmp_path / "both")
    with pytest.raises(dist_convert.errors.CheckpointNotFound, match="in one directory"):
        dist_convert.convert(tmp_path / "both", tmp_path / "out", to="huggingface")
    with pytest.raises(dist_convert.errors.CheckpointNotFound, match="in one directory"):
        dist_convert.inspect(tmp_path / "both")


@pytest.mark.parametrize("order", ["{0} {1} --to torch", "{0} --to torch {1}", "--to torch {0} {1}"])
def test_the_two_arguments_may_stand_anywhere(order: str, tmp_path: Path) -> None:
    make(tmp_path / "megatron")
    words = order.format(tmp_path / "megatron", tmp_path / "out").split()
    assert main(["convert", *words, "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "iter_0000004").is_dir()


def test_what_convert_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert"]) == 2
    assert "SRC, DST and --to must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("megatron-to-hf", ("--load-path", "{megatron}", "--save-path", "{out}")),
        ("convert", ("{megatron}", "{out}", "--to", "huggingface")),
    ],
)
def test_the_old_command_is_a_front_of_the_new_one(command: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / "megatron")
    words = [word.format(megatron=tmp_path / "megatron", out=tmp_path / "out") for word in flags]
    assert main([command, *words, "--device", "cpu"]) == 0
    # What one has made, the other finds complete.
    other = dist_convert.convert(tmp_path / "megatron", tmp_path / "out", to="huggingface", device="cpu")
    assert other.was_complete


@pytest.mark.parametrize("place", ["the source", "around the source", "in the source", "the current directory"])
def test_nothing_is_advised_that_would_harm_a_source_or_where_the_user_is(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "models/megatron")
    target = {
        "the source": tmp_path / "models/megatron",
        "around the source": tmp_path / "models",
        "in the source": tmp_path / "models/megatron/iter_0000004/hf",
        "the current directory": tmp_path / "here",
    }[place]
    target.mkdir(exist_ok=True)
    (target / "conversion.json").write_text('{"files": {}, "flags": {}, "source": {"files": {}}}')
    monkeypatch.chdir(target if place == "the current directory" else tmp_path.parent)
    with pytest.raises(dist_convert.ConversionError) as caught:
        dist_convert.convert(tmp_path / "models/megatron", target, to="huggingface")
    assert "overwrite" not in str(caught.value)
    assert "remove" not in str(caught.value)
    assert "choose another target" in caught.value.remedy


def test_a_target_that_no_conversion_made_is_never_advised_to_be_removed(tmp_path: Path) -> None:
    make(tmp_path / "megatron")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(dist_convert.errors.TargetExists) as caught:
            dist_convert.convert(tmp_path / "megatron", tmp_path / "hf", to="huggingface", overwrite=overwrite)
        assert caught.value.remedy == "choose another target"


@pytest.mark.parametrize("function", ["open", "inspect", "verify"])
def test_every_function_takes_a_tilde_and_calls_an_empty_path_empty(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "megatron")
    called = getattr(dist_convert, function)
    called(*["~/megatron"] * (2 if function == "verify" else 1))
    with pytest.raises(dist_convert.errors.UsageError, match="a path is empty: is a variable unset"):
        called(*[""] * (2 if function == "verify" else 1))


@pytest.mark.parametrize("flag", ["--tokenizer", "--trace"])
def test_a_path_of_a_flag_may_begin_with_a_tilde_and_is_not_empty(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "megatron")
    words = ["convert", "~/megatron", "~/hf", "--to", "huggingface", "--device", "cpu"]
    assert main([*words, flag, ""]) == 2
    assert "empty: is a variable unset?" in capsys.readouterr().err
    main([*words, f"{flag}=~/absent/there"])
    assert f"{tmp_path}/absent/there" in capsys.readouterr().err
