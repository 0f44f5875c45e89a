"""Ranks are killed at random moments, in any phase; the same command ends with the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checkpoints import Grid
from tests.distributed.interrupting import Runs, hashes_below
from tests.distributed.small_sources import make_small_sources
from tests.to_megatron import grid_flags

PLACEMENTS = ("direct", "gather")
STEP_BYTES = 16384
KILLS = 17


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_sources(tmp_path_factory.mktemp("sources"))


def flags(direction: str, sources: Path, target: Path) -> list[str]:
    if direction == "megatron-to-hf":
        kept = ["--target-params-dtype", "keep", "--max-shard-size", "100KB"]
        return [direction, "--load-path", str(sources / "megatron"), "--save-path", str(target / "hf"), *kept]
    model, _, layout = direction.partition(", ")
    grid = (
        grid_flags(Grid(tp=2, pp=3)) if model == "llama" else [*grid_flags(Grid(tp=2, ep=2)), "--expert-layout", layout]
    )
    return ["hf-to-megatron", "--load-dir", str(sources / model), "--save-dir", str(target / "megatron"), *grid]


def named(hashes: Mapping[str, str]) -> dict[str, str]:
    """What lies under the target's own name, but for the journal, which leaves it last."""
    names = ("hf/", "megatron/iter_0000001/")
    return {file: value for file, value in hashes.items() if file.startswith(names) and "/.journal/" not in file}


@pytest.mark.parametrize("direction", ["megatron-to-hf", "llama", "mixtral, grouped"])
def test_a_conversion_that_is_killed_again_and_again_ends_with_the_same_bytes(
    direction: str, runs: Runs, sources: Path, tmp_path: Path
) -> None:
    chance = random.Random(direction)
    undisturbed = runs.do([*flags(direction, sources, tmp_path / "expected"), "--device", "cpu"])
    assert undisturbed.exit_codes == [0], undisturbed.printed
    expected = hashes_below(tmp_path / "expected")
    target = tmp_path / "target"
    kills = written_bytes = in_flight_bytes = 0
    while kills < KILLS or target.exists():
        ranks, is_last = chance.choice([1, 1, 2, 3]), kills >= KILLS
        rank = chance.randrange(ranks)
        moment = 0 if is_last else chance.randrange(1, undisturbed.calls[0] * 3 // 2 // (ranks + kills % 3))
        run = runs.do(
            [*flags(direction, sources, target), "--device", "cpu", "--placement", chance.choice(PLACEMENTS)],
            ranks=ranks, rank=rank, moment=moment, signals=["SIGKILL"], all=rank == 0 or chance.random() < 0.3,
        )  # fmt: skip
        assert run.seconds < 50, run.printed  # else it hung
        written_bytes += run.written_bytes
        if -9 in run.exit_codes:
            kills += 1
            in_flight_bytes += ranks * 3 * STEP_BYTES
            assert set(run.exit_codes) <= {-9, 0, 1, 143}, run.printed
            assert named(hashes_below(target)) in ({}, named(expected))
        else:
            assert set(run.exit_codes) == {0}, (run, sorted(target.rglob("*")))
            assert hashes_below(target) == expected
            assert undisturbed.written_bytes <= written_bytes <= undisturbed.written_bytes + in_flight_bytes
            shutil.rmtree(target)
            written_bytes = in_flight_bytes = 0
