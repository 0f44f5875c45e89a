"""A conversion that is killed before any call to the operating system: the same command then ends in the same bytes.

A dozen moments of each kind of target here; with `-m slow`, all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Grid, Model, make
from tests.to_megatron import make_hf
from tests.warm import Process

MODEL = Model(hidden=8, ffn=8, heads=2, groups=1, head_dim=4, layers=1, vocab=8, padded_vocab=8)
CASES = ("to_hf", "to_hf --overwrite", "to_megatron", "to_megatron --overwrite")
DISTRIBUTED = ("to_torch_dist", "to_torch_dist --overwrite", "to_dcp", "to_dcp --overwrite")
#: Of each case, this many moments in the fast selection.
SHARE = 11


def command_of(case: str, directory: Path, source: str) -> list[str]:
    below = directory / "target"
    if case.startswith("to_hf"):
        words = ["megatron-to-hf", "--load-path", str(directory / f"mg{source}"), "--save-path", str(below / "hf")]
    elif case.startswith(("to_torch_dist", "to_dcp")):
        form = case.split()[0].removeprefix("to_")
        words = ["convert", str(directory / f"mg{source}"), str(below / "hf"), "--to", form]
    else:
        words = ["hf-to-megatron", "--load-dir", str(directory / f"hf{source}"), "--save-dir", str(below / "mg")]
    return [*words, "--device", "cpu", *case.split()[1:]]


def sweep(job: dict[str, Any], moments: Sequence[int]) -> list[dict[str, Any]]:
    words = ["-m", "tests.write.killed", json.dumps(job | {"moments": list(moments)})]
    run = Process(words, dict(os.environ)).finish(3600.0)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def prepared(case: str, directory: Path) -> dict[str, Any]:
    """Sources, and what the target is to replace, if anything."""
    make(directory / "mg", MODEL, Grid(tp=2))
    make_hf(directory / "hf", MODEL)
    old = ""
    if "--overwrite" in case:
        make(directory / "mg-old", MODEL, seed=1)
        make_hf(directory / "hf-old", MODEL)
        (directory / "target").mkdir()
        words = command_of(case.split()[0], directory, "-old")
        assert Process(["-m", "dist_convert", *words], dict(os.environ)).finish().returncode == 0
        (directory / "target").rename(directory / "old")
        old = str(directory / "old")
    return {"command": command_of(case, directory, ""), "root": str(directory / "target"), "old": old}


def assert_always_ends_alike(job: dict[str, Any], step: int) -> None:
    """Kill at every so many moments, and compare with an undisturbed run."""
    [undisturbed] = sweep(job, [1 << 30])
    assert undisturbed["exit_codes"] == [0, 0], undisturbed["said"]
    assert "is complete already" in undisturbed["said"] or job["old"]
    count = undisturbed["moments"]
    moments = range(1, count + 1) if not step else range(1 + count // (2 * step), count + 1, max(1, count // step))
    for run in sweep(job, moments):
        assert run["exit_codes"] == [-9, 0], run
        assert run["found"] == undisturbed["found"], run
        names = {name.partition("/")[0] for name in run["left"]}
        assert not job["old"] or names & {"hf", "hf.replaced", "mg"}, run


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_that_is_killed_ends_in_the_same_bytes_when_it_is_started_again(case: str, tmp_path: Path) -> None:
    assert_always_ends_alike(prepared(case, tmp_path), SHARE)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *DISTRIBUTED])
def test_a_conversion_may_be_killed_before_any_call_to_the_operating_system(case: str, tmp_path: Path) -> None:
    assert_always_ends_alike(prepared(case, tmp_path), 0)
