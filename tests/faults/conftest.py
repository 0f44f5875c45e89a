"""What every test of a failing disk starts from: ranks that are quick to start, sources, and the bytes to be had."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.interrupting import Run, Runs, hashes_below
from tests.faults.disks import FaultyDisk, faulty_disk, why_no_fuse
from tests.to_megatron import grid_flags, make_hf

MODEL = Model(hidden=64, ffn=192, heads=8, groups=4, head_dim=8, layers=3, vocab=200, padded_vocab=256)
DIRECTIONS = ("megatron-to-hf", "hf-to-megatron")
#: Of each direction, a file of weights of the source and one of the target.
SOURCE_FILES = {"megatron-to-hf": "mp_rank_01/model_optim_rng.pt", "hf-to-megatron": "model.safetensors"}
TARGET_FILES = {"megatron-to-hf": "model.safetensors", "hf-to-megatron": "mp_rank_01/model_optim_rng.pt"}


def make_source(direction: str, directory: Path) -> None:
    """A checkpoint that was saved an hour ago."""
    if direction == "megatron-to-hf":
        make(directory, MODEL, Grid(tp=2))
    else:
        make_hf(directory, MODEL)
    hour_ago = time.time() - 3600.0
    for path in directory.rglob("*"):
        os.utime(path, (hour_ago, hour_ago))


def command(direction: str, source: Path, target: Path, *more: str) -> list[str]:
    """The command line of a conversion on the CPU; `target` is the directory that appears when it is complete."""
    if direction == "megatron-to-hf":
        places = ["--load-path", str(source), "--save-path", str(target), "--target-params-dtype", "keep"]
    else:
        places = ["--load-dir", str(source), "--save-dir", str(target.parent), *grid_flags(Grid(tp=2))]
    return [direction, *places, "--device", "cpu", *more]


def target_below(direction: str, root: Path) -> Path:
    """The directory that a conversion gives its name to."""
    return root / ("hf" if direction == "megatron-to-hf" else "iter_0000001")


def has_mark(target: Path) -> bool:
    """Whether job scripts start the same command again by themselves."""
    return (target.with_name(f"{target.name}.partial") / "resumable").exists()


def assert_one_clear_error(run: Run, target: Path) -> None:
    """Every rank failed, one message was printed, and nothing has the target's name."""
    assert all(code in (1, 143) for code in run.exit_codes), run
    assert 1 in run.exit_codes
    assert "Traceback" not in run.printed
    assert run.printed.count("\n  found:") == 1, run.printed
    assert run.printed.count("\n  remedy:") == 1, run.printed
    assert not target.exists()


@dataclass(frozen=True)
class Undisturbed:
    """The sources of both directions, and what their conversions leave where nothing fails."""

    sources: dict[str, Path]
    targets: dict[str, dict[str, str]]
    written_bytes: dict[str, int]
    file_bytes: dict[str, int]


def undisturbed_runs(runs: Runs, sources: Path, scratch: Path) -> Undisturbed:
    """Convert both ways."""
    found = Undisturbed({}, {}, {}, {})
    for direction in DIRECTIONS:
        found.sources[direction] = sources / direction
        target = target_below(direction, scratch / direction)
        run = runs.do(command(direction, sources / direction, target))
        assert run.exit_codes == [0], run.printed
        found.targets[direction] = hashes_below(target)
        found.written_bytes[direction] = run.written_bytes
        weights = target.rglob(Path(TARGET_FILES[direction]).name)
        found.file_bytes[direction] = sum(path.stat().st_size for path in weights)
    return found


@pytest.fixture(scope="session")
def mounted_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    if why_no_fuse():
        pytest.skip(why_no_fuse())
    with faulty_disk(tmp_path_factory.mktemp("disk")) as made:
        yield made


@pytest.fixture
def disk(mounted_disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """A file system that fails where it is told to, until the test ends."""
    yield mounted_disk
    mounted_disk.heal()


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Of sources on a disk that does not fail."""
    root = tmp_path_factory.mktemp("undisturbed")
    for direction in DIRECTIONS:
        make_source(direction, root / "sources" / direction)
    return undisturbed_runs(runs, root / "sources", root)


@pytest.fixture(scope="session")
def undisturbed_on_disk(
    runs: Runs, undisturbed: Undisturbed, mounted_disk: FaultyDisk, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """Of the same sources on the disk that can fail."""
    for direction, source in undisturbed.sources.items():
        shutil.copytree(source, mounted_disk.behind / "sources" / direction)
    return undisturbed_runs(runs, mounted_disk.path / "sources", tmp_path_factory.mktemp("undisturbed_on_disk"))


def assert_goes_on(run: Run, direction: str, target: Path, undisturbed: Undisturbed) -> None:
    """The run ended well, with the same bytes as one that nothing disturbed."""
    assert set(run.exit_codes) == {0}, run.printed
    assert hashes_below(target) == undisturbed.targets[direction]
