"""Do the tests notice? Twenty-two faults, one after the other, in a copy of the repository; each must make a test fail.

    python -m tests.mutations [NAME...]     a few minutes; needs the environment of launch/test.sh

A fault is a line of the package and what it is changed to. Where the line is not there any more, this says so: whoever
changed the code puts the same mistake into the new code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A fault: its name, a piece of code that stands once in the package, what replaces it, and who should notice."""

    name: str
    code: str
    fault: str
    tests: str


GOLDEN = "tests/golden"
MUTATIONS = (
    Mutation(
        "qkv-taken-in-the-order-of-parts",
        'return self.sizes["query_groups"]',
        "return 1",
        GOLDEN,
    ),
    Mutation(
        "gate-and-up-not-per-shard",
        "return self.shards if self.is_per_shard",
        "return 1 if self.is_per_shard",
        GOLDEN,
    ),
    Mutation(
        "row-parallel-columns-shifted",
        "box = Box(0, shard * shard_columns, rows, shard_columns)\n            yield ShardBox",
        "box = Box(0, (cut.shards - 1 - shard) * shard_columns, rows, shard_columns)\n            yield ShardBox",
        GOLDEN,
    ),
    Mutation(
        "padding-begins-a-row-late",
        "first = min(rows, max(0, real_rows - shard * rows))",
        "first = min(rows, max(0, real_rows - shard * rows) + 1)",
        GOLDEN,
    ),
    Mutation(
        "padding-repeats-the-first-row",
        "last = max(region.box.row_end for region in one.source) - 1",
        "last = 0",
        GOLDEN,
    ),
    Mutation(
        "norms-keep-what-is-stored",
        "self.target.window(box), self.source.add - self.target.add)",
        "self.target.window(box))",
        GOLDEN,
    ),
    Mutation(
        "layers-of-stages-in-the-order-of-pipeline",
        "for virtual, stage in enumerate(stages):\n        for pipeline, layers in enumerate(stage):",
        "for pipeline, stage in enumerate(zip(*stages)):\n        for virtual, layers in enumerate(stage):",
        GOLDEN,
    ),
    Mutation(
        "experts-of-the-wrong-rank",
        "(rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor)",
        "(rank.pipeline, rank.expert, rank.tensor // grid.expert_tensor)",
        GOLDEN,
    ),
    Mutation(
        "grouped-experts-not-transposed",
        "numbers.local * rows * columns, (1, rows)\n",
        "numbers.local * rows * columns, (columns, 1)\n",
        GOLDEN,
    ),
    Mutation(
        "what-lies-in-a-shard-is-not-checked",
        "cover_fault((one.inside for one in every if one.shard == shard), *self.shard_size)",
        "None",
        "tests/plan/test_coverage.py",
    ),
    Mutation("cover-check-sees-nothing", "if row != next_row:", "if False:", "tests/test_boxes.py"),
    Mutation(
        "a-block-forgets-its-last-row",
        "Box(tile.row, 0, tile.rows, copy.columns)",
        "Box(tile.row, 0, max(1, tile.rows - 1), copy.columns)",
        "tests/golden tests/plan/test_coverage.py",
    ),
    Mutation(
        "a-group-gets-less-than-its-share",
        "end = start + byte_range.size_bytes\n        begun",
        "end = start + byte_range.size_bytes - 1\n        begun",
        "tests/plan/test_gather_groups.py",
    ),
    Mutation(
        "a-step-overfills-its-buffer",
        "if any(self._filled.get(reader, 0) + size > self._limit_bytes",
        "if any(self._filled.get(reader, 0) > self._limit_bytes",
        "tests/plan/test_steps.py",
    ),
    Mutation(
        "messages-are-cut-short",
        "size_bytes = aligned(size_bytes)  # up to where",
        "size_bytes = size_bytes // 128 * 64  # up to where",
        "tests/plan/test_crossings.py",
    ),
    Mutation(
        "done-bytes-cover-one-more",
        "stretches[before - 1][1] >= window.offset_bytes + window.run_bytes",
        "stretches[before - 1][1] >= window.offset_bytes",
        "tests/plan/test_written_ranges.py",
    ),
    Mutation(
        "received-bytes-taken-from-the-wrong-member",
        "(slot.received, read.reader * step.send_bytes + read.offset_bytes)",
        "(slot.received, wanted.writer * step.send_bytes + read.offset_bytes)",
        "tests/move tests/distributed/test_gather.py",
    ),
    Mutation(
        "parts-placed-from-their-first-column",
        "packed[:, part.column : part.column + part.columns]",
        "packed[:, : part.columns]",
        "tests/move tests/golden tests/distributed/test_gather.py",
    ),
    Mutation(
        "scales-of-blocks-transposed",
        "*place, 1, 1, shape[-1], 1",
        "*place, 1, 1, 1, shape[-2]",
        "tests/formats/test_quantised.py",
    ),
    Mutation(
        "upper-four-bits-first",
        "[_E2M1[_BYTES % 16], _E2M1[_BYTES // 16]]",
        "[_E2M1[_BYTES // 16], _E2M1[_BYTES % 16]]",
        "tests/formats/test_quantised.py",
    ),
    Mutation(
        "checksums-without-the-gaps",
        "whole = _read_checksum(descriptor, label, position, offset, whole)",
        "pass",
        "tests/write/test_checksums.py",
    ),
    Mutation(
        "marks-count-what-came-later",
        "safe_bytes = os.fstat(self._descriptor).st_size",
        "safe_bytes = 1 << 40",
        "tests/write/test_resume_state.py",
    ),
    Mutation(
        "a-target-is-replaced-unasked",
        "if look(place) != replaces:",
        "if False:",
        "tests/write/test_commit.py",
    ),
)


def survivors(names: set[str]) -> list[str]:
    """The faults that no test notices, or that cannot be made."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "repository"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".venv", ".git", ".cache", "__pycache__"))
        for mutation in MUTATIONS:
            if names and mutation.name not in names:
                continue
            holders = [path for path in (copy / "dist_convert").rglob("*.py") if mutation.code in path.read_text()]
            if len(holders) != 1 or holders[0].read_text().count(mutation.code) != 1:
                found.append(f"{mutation.name}: the code stands in {len(holders)} files")
            else:
                original = holders[0].read_text()
                holders[0].write_text(original.replace(mutation.code, mutation.fault))
                if _passes(copy, mutation.tests.split()):
                    found.append(f"{mutation.name}: {mutation.tests} pass")
                holders[0].write_text(original)
            print(
                found[-1] if found and found[-1].startswith(mutation.name) else f"{mutation.name}: noticed", flush=True
            )
    return found


def _passes(copy: Path, tests: list[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 2 and more: the tests did not run
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


if __name__ == "__main__":
    left = survivors(set(sys.argv[1:]))
    sys.exit("\n".join(["", "not noticed:", *left]) if left else 0)
