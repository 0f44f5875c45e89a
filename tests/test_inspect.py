"""`inspect` describes a checkpoint of either kind from headers: a line each for people, --json for programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import convert
from tests.to_megatron import make_hf

ROOT = Path(__file__).parents[1]
SHARD = "model_optim_rng.pt"


def described(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_llama_is_described_by_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2, pp=2), tokenizer_model="/tokenizers/llama")
    files = list((tmp_path / "in").rglob(SHARD))
    # Parameters: 2 x 29 x 16 in embedding and head, 1952 in each of 4 layers, 16 in the last norm. In the files, the
    # vocabulary has 32 rows, and both tensor ranks have a copy of the norms: 2 x 32 x 16 + 4 x 1920 + 2 x 9 x 16.
    weights_bytes = 2 * (1024 + 7680 + 288)
    assert described(capsys, tmp_path / "in") == {
        "path": f"{tmp_path}/in/iter_0000004",
        "kind": "megatron",
        "format": "torch",
        "family": "llama",
        "parameters": 8752,
        "layers": 4,
        "positions": 64,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "dialect": "local norms",
        "iteration": 4,
        "grid": {"TP": 2, "PP": 2, "VPP": 1, "EP": 1, "ETP": 2},
        "dtypes": {"BF16": 54},
        "weights_bytes": weights_bytes,
        "skipped_bytes": sum(file.stat().st_size for file in files) - weights_bytes,
        "files": 4,
        "tokenizer": "/tokenizers/llama",
        "missing_shards": [],
        "layers_per_stage": {"0": 2, "1": 2},
    }


def test_a_mixtral_shows_all_five_parallel_sizes_and_its_dialect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, grid = Model(experts=4, layers=8), Grid(tp=2, pp=2, vpp=2, ep=4, etp=1)
    hf = hf_tensors(model)
    shards = megatron_shards(model, hf, grid, norms="te", experts="dynamic")
    save(tmp_path / "in", shards, training_args(model, grid))
    found = described(capsys, tmp_path / "in")
    stored = [t for chunks in shards.values() for chunk in chunks for t in chunk.values() if t is not None]
    assert found["family"] == "mixtral"
    assert found["grid"] == {"TP": 2, "PP": 2, "VPP": 2, "EP": 4, "ETP": 1}
    assert found["dialect"] == "transformer_engine norms, habana-dynamic experts"
    assert found["layers_per_stage"] == {"0.0": 2, "0.1": 2, "1.0": 2, "1.1": 2}
    assert found["parameters"] == sum(tensor.numel() for tensor in hf.values())
    assert found["weights_bytes"] == sum(tensor.numel() * 2 for tensor in stored)
    assert found["dtypes"] == {"BF16": len(stored)}
    assert found["files"] == 8


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ("sequential", "sequential"),
        ("te-grouped", "te-grouped"),
        ("te-single", "te-grouped"),
        ("grouped", "grouped"),
        ("dynamic", "habana-dynamic"),
        ("dynamic-unfused", "habana-dynamic"),
    ],
)
def test_the_layout_of_experts_is_named(
    experts: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1, experts=2), experts=experts)
    assert described(capsys, tmp_path / "in")["dialect"] == f"local norms, {said} experts"


def test_what_config_json_says_is_told_of_a_model_that_cannot_be_converted(tmp_path: Path) -> None:
    make_hf(tmp_path / "in", Model(layers=1))
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    found = dist_convert.inspect(tmp_path / "in")
    assert "dynamic" in found["not_convertible"]
    told = [found[name] for name in ("family", "layers", "positions", "rope_theta", "rope_scaling")]
    assert told == ["llama", 1, 64, 5000.0, "dynamic"]
    assert found["parameters"] > 0


def test_stages_may_be_uneven_though_the_args_do_not_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=4)
    whole = megatron_shards(model, hf_tensors(model))["mp_rank_00"][0]
    late = {name: value for name, value in whole.items() if name.startswith(("decoder.layers.3", "decoder.final"))}
    first = {name: value for name, value in whole.items() if name not in late}
    second = {name.replace("layers.3", "layers.0"): value for name, value in late.items()}
    save(tmp_path / "in", {"mp_rank_00_000": [first], "mp_rank_00_001": [second]}, training_args(model, Grid(pp=2)))
    assert described(capsys, tmp_path / "in")["layers_per_stage"] == {"0": 3, "1": 1}


def test_the_optimizer_is_skipped_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=1)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(250_000)}}}
    save(tmp_path / "in", megatron_shards(model, hf_tensors(model)), training_args(model), optimizer=optimizer)
    found = described(capsys, tmp_path / "in")
    assert found["weights_bytes"] == 2 * (2 * 32 * 16 + 1952 + 16)
    assert found["skipped_bytes"] > 1_000_000
    assert found["dtypes"] == {"BF16": 9}


def test_a_distributed_optimizers_own_file_is_skipped_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1))
    before = described(capsys, tmp_path / "in")["skipped_bytes"]
    (tmp_path / "in" / "iter_0000004" / "mp_rank_00" / "distrib_optim.pt").write_bytes(bytes(12_345))
    assert described(capsys, tmp_path / "in")["skipped_bytes"] == before + 12_345


def test_directories_that_the_args_do_not_name_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2))
    (tmp_path / "in" / "iter_0000004" / "mp_rank_01").rename(tmp_path / "in" / "iter_0000004" / "mp_rank_07")
    assert main(["inspect", str(tmp_path / "in"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["missing_shards"] == ["mp_rank_01"]
    assert "found:    mp_rank_07\n" in found["not_convertible"]


def test_a_directory_of_pickled_weights_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    torch.save(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "pytorch_model.bin")
    (tmp_path / "out" / "model.safetensors").unlink()
    capsys.readouterr()
    found = described(capsys, tmp_path / "out")
    assert (found["format"], found["weights_bytes"]) == ("pytorch", 2 * (2 * 29 * 16 + 1952 + 16))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["megatron-to-hf", "--load-path", "out", "--save-path", "x"], "a Hugging Face directory, not a Megatron"),
        (["hf-to-megatron", "--load-dir", "in", "--save-dir", "x"], "a Megatron checkpoint, not a Hugging Face"),
    ],
)
def test_the_wrong_direction_is_named(
    command: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*command, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_mixed_dtypes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=2, experts=2)
    router = "model.layers.{}.block_sparse_moe.gate.weight"
    hf = hf_tensors(model) | {router.format(layer): torch.zeros(2, 16) for layer in range(2)}
    save(tmp_path / "in", megatron_shards(model, hf), training_args(model))
    assert described(capsys, tmp_path / "in")["dtypes"] == {"BF16": 19, "F32": 2}


def test_missing_shards_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2, pp=2))
    for name in ("mp_rank_00_000", "mp_rank_01_001"):
        (tmp_path / "in" / "iter_0000004" / name / SHARD).unlink()
    assert main(["inspect", str(tmp_path / "in"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["missing_shards"] == ["mp_rank_00_000", "mp_rank_01_001"]
    assert json.loads(out)["files"] == 2
    wrong = json.loads(out)["not_convertible"]
    file = tmp_path / "in" / "iter_0000004"
    assert wrong.startswith(
        f"2 rank directories of TP2 PP2 VPP1 EP1 ETP2 missing\n  file:     {file}\n  expected: model"
    )
    assert err == f"a conversion would not start:\n{wrong}\n"


def test_the_iteration_may_be_named_or_be_the_path_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=1)
    shards = megatron_shards(model, hf_tensors(model))
    for iteration in (4, 8):
        save(tmp_path / "in", shards, training_args(model), iteration=iteration)
    assert described(capsys, tmp_path / "in")["iteration"] == 8
    assert described(capsys, tmp_path / "in", "--ckpt-dir-name", "iter_0000004")["iteration"] == 4
    assert described(capsys, tmp_path / "in" / "iter_0000004")["iteration"] == 4


def test_a_model_that_cannot_be_converted_is_described_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1), Grid(tp=2), normalization="LayerNorm")
    assert main(["inspect", str(tmp_path / "in"), "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["family"] is None
    assert "--normalization" in err
    assert "--normalization" in found["not_convertible"]
    assert found["grid"] == {"TP": 2, "PP": 1, "VPP": 1, "EP": 1, "ETP": 2}


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_a_hugging_face_directory_is_described(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model())
    assert convert(tmp_path / "in", tmp_path / "out", "--max-shard-size", size) == 0
    capsys.readouterr()
    assert described(capsys, tmp_path / "out") == {
        "path": f"{tmp_path}/out",
        "kind": "huggingface",
        "format": "safetensors",
        "family": "llama",
        "parameters": 8752,
        "layers": 4,
        "positions": 64,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "dtypes": {"BF16": 39},
        "weights_bytes": 2 * 8752,
        "skipped_bytes": 0,
        "files": len(list((tmp_path / "out").glob("*.safetensors"))),
        "tokenizer": None,
        "missing_shards": [],
    }


YARN = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 16, "yarn_correction_range_round_to_int": True}  # fmt: skip


@pytest.mark.parametrize("kind", ["in", "out"])
@pytest.mark.parametrize(("args", "scaling"), [({"use_rope_scaling": True}, "llama3"), (YARN, "yarn")])
def test_the_scaling_of_rotary_frequencies_is_told_of_either_kind(
    args: dict[str, Any], scaling: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1), **args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    capsys.readouterr()
    found = described(capsys, tmp_path / kind)
    assert (found["rope_theta"], found["rope_scaling"]) == (500000.0, scaling)


def test_missing_files_of_a_hugging_face_directory_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out", "--max-shard-size", "4KB") == 0
    capsys.readouterr()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    files[0].unlink()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["missing_shards"] == [files[0].name]
    assert json.loads(out)["files"] == len(files) - 1
    assert err.startswith("a conversion would not start:\na weights file is missing\n")
    assert files[0].name in err


@pytest.mark.parametrize("named", ["out.partial", "out", "."], ids=["itself", "its final name", "the root"])
def test_an_unfinished_conversion_is_called_so(named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished(tmp_path / "iter_0000001.partial" if named == "." else tmp_path / "out.partial")
    assert main(["inspect", str(tmp_path / named)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("an unfinished conversion, which is no checkpoint yet\n  file: ")
    assert "found:    what a conversion of /models/llama has made so far\n" in err


@pytest.mark.parametrize(
    "command",
    [
        ["megatron-to-hf", "--load-path", "iter_0000001.partial", "--save-path", "out"],
        ["megatron-to-hf", "--load-path", ".", "--ckpt-dir-name", "iter_0000001.partial", "--save-path", "out"],
        ["megatron-to-hf", "--load-path", "renamed", "--save-path", "out"],
        ["hf-to-megatron", "--load-dir", "iter_0000001.partial", "--save-dir", "out"],
        ["verify", "complete", "iter_0000001.partial"],
        ["push", "iter_0000001.partial", "org/name"],
        ["tokenizer", "complete", "iter_0000001.partial"],
    ],
    ids=" ".join,
)
def test_an_unfinished_conversion_is_read_by_no_command(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("iter_0000001.partial", "renamed"):
        unfinished(tmp_path / name)
    make(tmp_path / "complete", Model(layers=1))
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    message = capsys.readouterr().err.removeprefix("B (iter_0000001.partial): ")
    assert message.startswith("an unfinished conversion, which is no checkpoint yet\n")
    assert not (tmp_path / "out").exists()


def unfinished(directory: Path) -> None:
    """What a conversion to Megatron leaves that was killed: whole files, some of their bytes not written."""
    make(directory.with_name("x"), Model(layers=1))
    (directory.with_name("x") / "iter_0000004").rename(directory)
    shutil.rmtree(directory.with_name("x"))
    (directory / "resumable").touch()
    (directory / ".journal").mkdir()
    (directory / ".journal" / "identity.json").write_text('{"flags": {"source": "/models/llama"}}')


def test_people_get_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2, pp=2))
    assert main(["inspect", str(tmp_path / "in")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25
    found = {line[:18].strip(): line[18:].strip() for line in lines}
    assert found["family"] == "llama"
    assert found["grid"] == "TP2 PP2 VPP1 EP1 ETP2"
    assert found["parameters"] == "8,752"
    assert found["layers"] == "4"
    assert found["weights"] == "18 kB"
    assert found["missing shards"] == "none"


def test_nothing_is_imported_that_takes_seconds(tmp_path: Path) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    code = (
        "import sys; from dist_convert.__main__ import main\n"
        "assert [main(['inspect', path]) for path in sys.argv[1:]] == [0, 0]\n"
        "print(sorted({'transformers', 'megatron'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "what",
    ["absent", "a file", "empty", "cut short", "cut short HF"],
)
def test_what_cannot_be_described_is_one_message(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "empty").mkdir()
    os.truncate(tmp_path / "in" / "iter_0000004" / "mp_rank_00" / SHARD, 500)
    os.truncate(tmp_path / "out" / "model.safetensors", 500)
    capsys.readouterr()
    path, named = {
        "absent": (tmp_path / "absent", f"{tmp_path}/absent"),
        "a file": (tmp_path / "out" / "config.json", "a file, not a checkpoint directory\n"),
        "empty": (tmp_path / "empty", f"{tmp_path}/empty"),
        "cut short": (tmp_path / "in", f"mp_rank_00/{SHARD}"),
        "cut short HF": (tmp_path / "out", "model.safetensors"),
    }[what]
    assert main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    if path.is_dir():
        main(["convert", str(path), str(tmp_path / "new"), "--to", "torch", "--device", "cpu"])
        assert capsys.readouterr().err == err
    assert "Traceback" not in err
