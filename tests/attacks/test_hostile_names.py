"""Names that want to move a terminal's cursor, or to look like a line of ours: each is printed within one, escaped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_convert.__main__ import main
from tests.attacks.harmless import change_json
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, save, training_args
from tests.to_megatron import make_hf

#: Sets a terminal's title and deletes the line; forges the line that job scripts look for; turns the text around.
HOSTILE = "x\x1b]0;owned\x07\x1b[2K\r\n  resume:   now\n\u202etxt\u2028"
#: The same as the name of a file.
DIRECTORY = HOSTILE + "z" * 50
SMALL = Model(layers=1)


def megatron(root: Path, *, name: str | None = None, **args: Any) -> Path:
    shards = megatron_shards(SMALL, hf_tensors(SMALL))
    if name:
        shards["mp_rank_00"][0][name] = torch.ones(3)
    save(root / "in", shards, training_args(SMALL, **args))
    return root / "in"


def hugging_face(root: Path, *, name: str | None = None, **config: Any) -> Path:
    make_hf(root / "in", SMALL)
    change_json(root / "in" / "config.json", **config)
    if name:
        file = root / "in" / "model.safetensors"
        save_file({**load_file(file), name: torch.ones(3)}, file, metadata={"format": "pt"})
    return root / "in"


def to_hf(source: Path, target: Path, *flags: str) -> list[str]:
    return ["convert", str(source), str(target), "--to", "huggingface", "--device", "cpu", *flags]


def to_torch(source: Path, target: Path, *flags: str) -> list[str]:
    return ["convert", str(source), str(target), "--to", "torch", "--device", "cpu", *flags]


def job_file(root: Path, job: dict[str, Any]) -> list[str]:
    paths = {"source": str(root / "in"), "target": str(root / "out"), "to": "torch"}
    (root / "job.yaml").write_text(json.dumps({**paths, **job}), encoding="utf-8")
    return ["convert", "--config", str(root / "job.yaml")]


def index(root: Path) -> Path:
    source = hugging_face(root)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{HOSTILE}.safetensors"}}))
    return source


def in_hostile(root: Path) -> Path:
    (root / DIRECTORY).mkdir()
    return root / DIRECTORY


#: Where a name comes from, and what is printed -> the command line, and its exit code.
PLACES: dict[str, tuple[Callable[[Path], list[str]], int]] = {
    "a tensor of a shard": (lambda root: to_hf(megatron(root, name=HOSTILE), root / "out"), 1),
    "a tensor of 2 MB": (lambda root: to_hf(megatron(root, name="z" * 2_000_000), root / "out"), 1),
    "a tensor, inspected": (lambda root: ["inspect", str(megatron(root, name=HOSTILE))], 1),
    "a tensor of a safetensors file": (lambda root: to_torch(hugging_face(root, name=HOSTILE), root / "out"), 1),
    "an argument, inspected": (lambda root: ["inspect", str(megatron(root, tokenizer_model=HOSTILE))], 0),
    "an argument, in a note": (lambda root: to_hf(megatron(root, tokenizer_model=HOSTILE), root / "out"), 0),
    "an argument, refused": (lambda root: to_hf(megatron(root, normalization=HOSTILE), root / "out"), 1),
    "a config": (lambda root: to_torch(hugging_face(root, model_type=HOSTILE), root / "out"), 1),
    "a config, inspected": (lambda root: ["inspect", str(hugging_face(root, model_type=HOSTILE))], 1),
    "an index": (lambda root: to_torch(index(root), root / "out"), 1),
    "a source's path": (lambda root: to_hf(megatron(in_hostile(root)), root / "out"), 0),
    "a target's path": (lambda root: to_hf(megatron(root), root / DIRECTORY), 0),
    "a target's path, in a dry run": (lambda root: to_hf(megatron(root), root / DIRECTORY, "--dry-run"), 0),
    "a path that is not there": (lambda root: ["inspect", str(root / DIRECTORY)], 1),
    "an inspected path": (lambda root: ["inspect", str(megatron(in_hostile(root)))], 0),
    "a verified path": (lambda root: ["verify", str(megatron(in_hostile(root))), str(root / DIRECTORY / "in")], 0),
    "a flag": (lambda root: ["inspect", str(root), f"--{HOSTILE}"], 2),
    "a flag's value": (lambda root: to_hf(megatron(root), root / "out", "--max-shard-size", HOSTILE), 2),
    "a tokenizer's path": (lambda root: ["tokenizer", str(root / DIRECTORY), str(hugging_face(root))], 2),
    "a repository": (lambda root: ["push", str(root), HOSTILE], 2),
    "a hub id": (lambda root: to_torch(Path(f"org/{DIRECTORY}"), root / "out"), 2),
    "a job file's key": (lambda root: job_file(root, {HOSTILE: 1}), 2),
    "a job file's value": (lambda root: job_file(root, {"to": HOSTILE}), 2),
}


def assert_plain(printed: str) -> None:
    """No terminal obeys it, no line of it is one of ours by another's hand, and it is short."""
    assert "Traceback" not in printed
    assert [repr(line) for line in printed.split("\n") if not line.isprintable()] == []
    assert [line for line in printed.split("\n") if line.lstrip().startswith("resume:")] == []
    assert len(printed) < 10_000


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_name_is_printed_within_a_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, exit_code = PLACES[place]
    assert main(build(tmp_path)) == exit_code, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert_plain(out)
    assert_plain(err)
    assert "owned" in out + err or "zzz" in out + err or exit_code == 0


def test_an_unfinished_target_is_gone_on_with_under_a_hostile_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which errors and notes say the name."""
    source = megatron(tmp_path)
    make(tmp_path / "other", SMALL)
    assert main(to_hf(source, tmp_path / DIRECTORY)) == 0
    assert main(to_hf(tmp_path / "other", tmp_path / DIRECTORY)) == 1  # another model is there
    out, err = capsys.readouterr()
    assert_plain(out)
    assert_plain(err)
    assert r"\x1b]0;owned" in err


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["real", "dry"])
def test_what_programs_read_is_json_whatever_the_names(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / (DIRECTORY + "hf")
    assert main(to_hf(megatron(in_hostile(tmp_path)), target, "--log-format", "json", *flags)) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    [report] = [event["report"] for event in events if "report" in event]
    assert report["source"] == str(tmp_path / DIRECTORY / "in" / "iter_0000004")  # as it is
    assert main(["inspect", str(tmp_path / DIRECTORY / "in"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == report["source"]
