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
         "args.json", "params.json", ".metadata", "__0_0.distcp", "run_config.yaml", "codes.safetensors", "codes.json",
         "boxes.safetensors", "huggingface_configs.json", "tokenizer.json", "tokenizer_config.json", "journal.json",
         "conversion.json")  # fmt: skip
CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzing")


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, Target]:
    return {target.name: target for target in targets(place)}


@pytest.fixture(autouse=True)
def undamaged(made: dict[str, Target], place: Path) -> None:
    for name, target in made.items():
        (place / name).write_bytes(target.data)


def test_undamaged_files_are_read(made: dict[str, Target], place: Path) -> None:
    assert set(made) == set(NAMES)
    for name, target in made.items():
        target.read(place / name)


@pytest.mark.parametrize("found", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_once_found_ends_in_an_error_with_a_text(found: Path, made: dict[str, Target], place: Path) -> None:
    name = found.parent.name
    assert answer(made[name], place / name, found.read_bytes()) not in ("no text", "read")


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_damage_ends_in_a_value_or_in_an_error_of_ours(
    name: str, made: dict[str, Target], place: Path
) -> None:
    target = made[name]
    damaged = [case for way in dict.fromkeys(target.ways) for case in each_kind(way, target.data)]
    answers = Counter(answer(target, place / name, case) for case in damaged)
    assert answers["no text"] == 0
    assert 0 < answers["read"] < answers.total()


@pytest.mark.parametrize("name", NAMES)
def test_random_damage_ends_in_a_value_or_in_an_error_of_ours(name: str, made: dict[str, Target], place: Path) -> None:
    answers, chance = Counter[str](), random.Random()
    ends_at = time.monotonic() + SECONDS / len(NAMES)
    while time.monotonic() < ends_at:
        answers += fuzz(made[name], place, 100, chance.randrange(1 << 32))
    assert answers["read"] > 0
    assert answers.total() > answers["read"]
    assert answers["no text"] == 0
