"""Damaged files of every format end in an error of ours or in a value, and in nothing else.

First what was ever found, then one case of each kind of damage, then at random for `DIST_CONVERT_FUZZ_SECONDS` seconds,
8 unless it is set; see `fuzzing` for hours. What that finds is to be kept: `corpus/NAME/WHAT` is read as the file NAME.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.attacks.damage import each_kind
from tests.attacks.fuzzing import Target, answer, fuzz, targets

SECONDS = float(os.environ.get("DIST_CONVERT_FUZZ_SECONDS", "8"))
NAMES = ("data.pkl", "shard.pt", "model.bin", "model.safetensors", "model.safetensors.index.json", "config.json",
         "args.json", "params.json", ".metadata", "__0_0.distcp", "run_config.yaml")  # fmt: skip
CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path)}


def test_undamaged_files_are_read(made: dict[str, Target], tmp_path: Path) -> None:
    assert set(made) == set(NAMES)
    for name, target in made.items():
        target.read(tmp_path / name)


@pytest.mark.parametrize("found", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_once_found_ends_in_an_error_with_a_text(found: Path, made: dict[str, Target], tmp_path: Path) -> None:
    name = found.parent.name
    assert answer(made[name], tmp_path / name, found.read_bytes()) not in ("no text", "read")


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_damage_ends_in_a_value_or_in_an_error_of_ours(
    name: str, made: dict[str, Target], tmp_path: Path
) -> None:
    target = made[name]
    damaged = [case for way in dict.fromkeys(target.ways) for case in each_kind(way, target.data)]
    answers = Counter(answer(target, tmp_path / name, case) for case in damaged)
    assert answers["no text"] == 0
    assert 0 < answers["read"] < answers.total()


@pytest.mark.parametrize("name", NAMES)
def test_random_damage_ends_in_a_value_or_in_an_error_of_ours(
    name: str, made: dict[str, Target], tmp_path: Path
) -> None:
    answers, chance = Counter[str](), random.Random()
    ends_at = time.monotonic() + SECONDS / len(NAMES)
    while time.monotonic() < ends_at:
        answers += fuzz(made[name], tmp_path, 100, chance.randrange(1 << 32))
    assert answers["read"] > 0
    assert answers.total() > answers["read"]
    assert answers["no text"] == 0
