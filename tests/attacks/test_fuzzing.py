"""Damaged files of every format end in an error of ours or in a value, and in nothing else.

For `DIST_CONVERT_FUZZ_SECONDS` seconds, 60 unless it is set; see `fuzzing` for hours. In a file of its own, so that
other tests can run beside it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.attacks.fuzzing import fuzz, targets

SECONDS = float(os.environ.get("DIST_CONVERT_FUZZ_SECONDS", "60"))
NAMES = ("data.pkl", "shard.pt", "model.bin", "model.safetensors", "model.safetensors.index.json", "config.json",
         "args.json", ".metadata", "__0_0.distcp")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_ends_in_a_value_or_in_an_error_of_ours(name: str, tmp_path: Path) -> None:
    made = {target.name: target for target in targets(tmp_path)}
    assert set(made) == set(NAMES)
    made[name].read(tmp_path / name)  # undamaged
    chance, answers = random.Random(name), Counter[str]()
    ends_at = time.monotonic() + SECONDS / len(NAMES)
    while time.monotonic() < ends_at:
        answers += fuzz(made[name], tmp_path, 100, chance.randrange(1 << 32))
    assert answers["read"] > 0
    assert answers.total() > answers["read"]
    assert answers["no text"] == 0
