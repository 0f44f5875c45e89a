"""Whatever goes wrong on any rank: one message, once, every rank ends with an error, and no target under its name."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dist_convert.read.source import sample_digest
from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import Answer, flags, run_jobs

SHARD = "model_optim_rng.pt"
ITERATION = "iter_0000004"


@dataclass(frozen=True)
class Case:
    """How a conversion by two ranks is made to fail.

    Attributes:
        message: its first line.
        spoil: gets the case's directory, which holds the TP2 checkpoint `both` and, as `rank0` and `rank1`, that
            checkpoint with one shard each.
        load_path, save_path: in that directory.
        more: flags.
        exit_code: of every rank.
    """

    message: str
    spoil: Callable[[Path], object] = lambda root: None
    load_path: str = "both"
    save_path: str = "hf"
    more: tuple[str, ...] = ()
    exit_code: int = 1


def shard(root: Path, copy: str, rank: int) -> Path:
    return root / copy / ITERATION / f"mp_rank_0{rank}" / SHARD


def cut(file: Path, size_bytes: int) -> None:
    whole = file.read_bytes()
    file.unlink()  # other copies are links to it
    file.write_bytes(whole[:size_bytes])


def make_other(root: Path, **args: str) -> None:
    """For rank 0 the checkpoint `both`, for rank 1 another with files of the same names."""
    make(root / "other1", Model(), Grid(tp=2), seed=1, **args)
    (root / "other0").symlink_to(root / "both")


def make_almost(root: Path) -> None:
    """For each rank a checkpoint, one of them with another norm and its checksum, which no sample of the file meets."""
    for rank in range(2):
        hf = make(root / f"other{rank}", Model(hidden=128, ffn=256, heads=8, head_dim=16, layers=24))
    norm = hf["model.layers.2.input_layernorm.weight"].view(torch.uint8).numpy().tobytes()
    changed = bytes([norm[0] ^ 1]) + norm[1:]
    first, file = (root / f"other{rank}" / ITERATION / "mp_rank_00" / SHARD for rank in range(2))
    sums = (zlib.crc32(values).to_bytes(4, "little") for values in (norm, changed))
    file.write_bytes(file.read_bytes().replace(norm, changed).replace(*sums))
    assert sample_digest(first, "") == sample_digest(file, "")
    assert first.read_bytes() != file.read_bytes()


def make_iterations(root: Path) -> None:
    """For each rank a checkpoint of one file, of the same size but another iteration."""
    for rank, iteration in enumerate((4, 8)):
        other = root / f"other{rank}"
        make(other, Model(), seed=rank)
        (other / ITERATION).rename(other / f"iter_{iteration:07d}")
        (other / "latest_checkpointed_iteration.txt").write_text(str(iteration))


CASES = {
    "a shard that no rank has": Case(
        "1 rank directory of TP2 PP1 VPP1 EP1 ETP2 missing",
        lambda root: shutil.rmtree(shard(root, "both", 1).parent),
    ),
    "a shard that its only rank lacks": Case(
        "1 rank directory of TP2 PP1 VPP1 EP1 ETP2 missing",
        lambda root: shutil.rmtree(shard(root, "rank1", 1).parent),
        load_path="rank{rank}",
        more=("--ckpt-dir-name", ITERATION),
    ),
    "a file that is cut short where one rank sees it": Case(
        "not a complete torch checkpoint file", lambda root: cut(shard(root, "rank1", 1), 5000), load_path="rank{rank}"
    ),
    "an empty file on rank 0 alone": Case(
        "not a complete torch checkpoint file", lambda root: cut(shard(root, "rank0", 0), 0), load_path="rank{rank}"
    ),
    "a target that is not empty": Case(
        "the target directory is not empty", lambda root: (root / "hf" / "notes").mkdir(parents=True)
    ),
    "no checkpoint for any rank": Case("the checkpoint directory does not exist", load_path="nowhere", exit_code=2),
    "no checkpoint for one rank": Case(
        "1 rank directory of TP2 PP1 VPP1 EP1 ETP2 missing",
        lambda root: shutil.rmtree(root / "rank1"),
        load_path="rank{rank}",
    ),
    "too small a budget": Case(
        "the memory budget does not hold one step", more=("--max-memory-per-rank", "1MB"), exit_code=2
    ),
    "direct placement of scattered shards": Case(
        "use --placement gather", load_path="rank{rank}", more=("--placement", "direct"), exit_code=2
    ),
    "different files under one name": Case(
        "two ranks see different files under one name",
        lambda root: make_other(root, a_long_argument=1000 * "long "),
        load_path="other{rank}",
    ),
    "different files of one size under one name": Case("two ranks see different", make_other, load_path="other{rank}"),
    "copies that differ in a norm": Case("two ranks see different", make_almost, load_path="other{rank}"),
    "different iterations of one size": Case(
        "tracker files of different nodes name different iterations", make_iterations, load_path="other{rank}"
    ),
    "different flags that change the plan": Case(
        "ranks made different plans", more=("--max-shard-size", "1{RANK}KB", "--placement", "gather")
    ),
    "different targets": Case("ranks of one node have different targets", save_path="hf{RANK}", exit_code=2),
    "an unknown flag": Case(
        "dist-convert megatron-to-hf: unrecognized arguments: --fast", more=("--fast",), exit_code=2
    ),
    "a wrong value": Case("not a size", more=("--max-memory-per-rank", "plenty"), exit_code=2),
    "a job file that one rank lacks": Case(
        "cannot read the job file",
        lambda root: (root / "job0.yaml").write_text("{}"),
        more=("--config", "{ROOT}/job{RANK}.yaml"),
        exit_code=2,
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Path]]:
    """What became of each case, and its directory."""
    root = tmp_path_factory.mktemp("cases")
    jobs = {}
    for name, case in CASES.items():
        place = root / name
        make(place / "both", Model(), Grid(tp=2))
        for rank in (0, 1):
            shard(place, f"rank{rank}", rank).parent.mkdir(parents=True)
            os.link(shard(place, "both", rank), shard(place, f"rank{rank}", rank))
        case.spoil(place)
        iteration = () if case.load_path in ("both", "nowhere", "other{rank}") else ("--ckpt-dir-name", ITERATION)
        more = [flag.replace("{ROOT}", str(place)) for flag in (*iteration, *case.more)]
        jobs[name] = flags(place / case.load_path, place / case.save_path, *more)
    found = run_jobs(2, jobs, root)
    return {name: (found[name], root / name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_ends_with_the_errors_exit_code(name: str, answers: dict[str, tuple[Answer, Path]]) -> None:
    answer, _ = answers[name]
    assert answer.exit_codes == [CASES[name].exit_code] * 2, answer.stderr


@pytest.mark.parametrize("name", CASES)
def test_one_message_is_printed_once(name: str, answers: dict[str, tuple[Answer, Path]]) -> None:
    answer, _ = answers[name]
    printed = "".join(answer.stderr)
    assert printed.count(CASES[name].message) == 1, printed
    assert printed.count("remedy:") == 1, printed
    assert "Traceback" not in printed
    assert "lost contact" not in printed


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_under_the_final_name(name: str, answers: dict[str, tuple[Answer, Path]]) -> None:
    _, place = answers[name]
    targets = [path.name for path in place.glob("hf*") if not path.name.endswith(".partial")]
    assert targets == (["hf"] if name == "a target that is not empty" else [])
    assert not list(place.glob("hf/*.safetensors"))
