"""A family's benchmark in one direction: the sources that it needs, and the ways to be timed."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.benchmarks.sources import (
    allocated_bytes,
    files_bytes,
    grid_flags,
    hand_out,
    make_megatron,
    model_near,
    parse_grid,
    weights_bytes,
)
from tests.benchmarks.ways import Ready, Way, convert, copy, load_and_save, pass_messages, read_through

DIRECTIONS = ("megatron-to-hf", "hf-to-megatron")
SOURCES = ("plain", "optimizer", "fp32")
BESIDE = ("transformers", "gloo", "torchrun")
ITERATION = "iter_0000004"


@dataclass(frozen=True)
class Case:
    """What is compared with one `cp`: a family, its grid and a direction."""

    family: str
    grid: str
    direction: str
    size_bytes: int

    @property
    def is_to_hf(self) -> bool:
        return self.direction == "megatron-to-hf"

    @property
    def title(self) -> str:
        """The heading of its table."""
        model = f"{self.family.capitalize()} {self.grid}"
        return f"{model}, {self.direction}, {self.size_bytes / 1e9:.2f} GB of weights in bf16"


@dataclass(frozen=True)
class Source:
    """Both forms of a model on the disk, and its weights' bytes."""

    megatron: Path
    hf: Path
    weights_bytes: int


@contextmanager
def scratch(directory: Path | None) -> Iterator[Path]:
    """The directory that is given, whose sources stay for the next time, or a temporary one."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="bench-") as made:
            yield Path(made)


def prepare(directory: Path, family: str, grid: str, kind: str, size_bytes: int) -> Source:
    """Make a source, or find it made by an earlier run.

    Args:
        directory: of all sources.
        family, grid: of the model.
        kind: of `SOURCES`.
        size_bytes: of its weights, nearly: fp32 sources have as many bytes, so half the layers.
    """
    dtype = "fp32" if kind == "fp32" else "bf16"
    parsed = parse_grid(grid)
    model = model_near(family, size_bytes, parsed, dtype)
    root = directory / f"{family}-{grid}-{kind}-{weights_bytes(model, dtype)}"
    source = Source(root / "megatron", root / "hf", weights_bytes(model, dtype))
    if not root.exists():
        making = root.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        make_megatron(making / "megatron", model, parsed, dtype, with_optimizer=kind == "optimizer")
        if kind != "optimizer":
            flags = ["--load-path", str(making / "megatron"), "--save-path", str(making / "hf")]
            flags += _file_size(source.weights_bytes)
            convert(1, ["megatron-to-hf", *flags, "--target-params-dtype", "keep", "--device", "cpu"])
        making.rename(root)
        sizes = [size / 1e9 for size in (source.weights_bytes, files_bytes(root), allocated_bytes(root))]
        made = "{:.2f} GB of weights in each form, files of {:.2f} GB, which take {:.2f} GB on the disk".format(*sizes)
        print(f"made {root.name}: {made}", file=sys.stderr, flush=True)
    return source


def ready_ways(given: argparse.Namespace, case: Case, directory: Path) -> list[Ready]:
    """The ways of a case; first `cp` of the same files as conversions of the plain source make.

    Args:
        given: the command line's choice of `placement`, `ranks`, `source` and `beside`.
        case: family, grid and direction.
        directory: for sources and targets.
    """
    sources = {
        kind: prepare(directory, case.family, case.grid, kind, int(given.size_gb * 1e9))
        for kind in SOURCES
        if kind == "plain" or kind in given.source
    }
    plain, copied = sources["plain"], directory / "copied"
    made = plain.hf if case.is_to_hf else plain.megatron / ITERATION
    copied_bytes = (files_bytes(made),) * 3
    ready = [
        Ready(
            Way("cp", "plain", "", 1, *copied_bytes), copied, partial(copy, made, copied), partial(read_through, made)
        )
    ]
    for kind in given.source:
        if kind == "optimizer" and not case.is_to_hf:
            continue  # a Hugging Face directory has none
        for placement in given.placement if kind == "plain" else given.placement[:1]:
            for ranks in given.ranks:
                ready += _conversions(
                    case, kind, sources[kind], directory / "converted", placement, ranks, given.beside, (made, copied)
                )
    if "transformers" in given.beside and case.is_to_hf:
        saved = directory / "saved"
        way = Way("transformers", "plain", "", 1, *copied_bytes)
        ready.append(Ready(way, saved, partial(load_and_save, plain.hf, saved), partial(read_through, plain.hf)))
    return ready


def _conversions(
    case: Case,
    kind: str,
    source: Source,
    target: Path,
    placement: str,
    ranks: int,
    beside: Sequence[str],
    copied: tuple[Path, Path],
) -> Iterator[Ready]:
    """A conversion, after something is copied untimed; the same under torchrun; and gloo alone where it gathers."""
    flags = _flags(case, source, target, placement, ranks)
    files = source.megatron if case.is_to_hf else source.hf
    written_bytes = _written_bytes(source, kind, to_hf=case.is_to_hf)
    way = Way("ours", kind, placement, ranks, source.weights_bytes, written_bytes, files_bytes(files))

    def convert_untimed() -> None:
        convert(ranks, flags)
        shutil.rmtree(target)

    # Of files that are mostly an optimizer's only a conversion knows what to read.
    warm = convert_untimed if kind == "optimizer" else partial(read_through, files)
    yield Ready(way, target, partial(convert, ranks, flags, copied), warm)
    if (placement, kind) == ("direct", "plain") and ranks > 1 and "torchrun" in beside:
        launched = partial(convert, ranks, flags, copied, by_torchrun=True)
        yield Ready(replace(way, tool="torchrun"), target, launched, warm)
    # All ranks see a Hugging Face directory, so nothing of it is gathered.
    if placement == "gather" and ranks > 1 and case.is_to_hf and "gloo" in beside:
        passed = target.with_name("passed")
        passing = partial(pass_messages, ranks, flags, passed)
        yield Ready(replace(way, tool="gloo"), passed, passing, lambda: None)


def _written_bytes(source: Source, kind: str, *, to_hf: bool) -> int:
    written_bytes = source.weights_bytes if to_hf else files_bytes(source.megatron / ITERATION)
    return written_bytes // 2 if kind == "fp32" else written_bytes


def _file_size(weights_bytes: int) -> tuple[str, str]:
    """A quarter of the model: ranks that write one file wait for each other, and a large model has files for each."""
    return "--max-shard-size", str(weights_bytes // 4)


def _flags(case: Case, source: Source, target: Path, placement: str, ranks: int) -> tuple[str, ...]:
    how = ("--placement", placement, "--device", "cpu", "--target-params-dtype", "bf16")
    if case.is_to_hf:
        seen = source.megatron
        if placement == "gather" and ranks > 1:
            seen = hand_out(source.megatron / ITERATION, ranks, source.megatron.parent / f"seen-by-{ranks}")
        files = _file_size(source.weights_bytes)
        return (case.direction, "--load-path", str(seen), "--save-path", str(target), *files, *how)
    grid = grid_flags(parse_grid(case.grid))
    return (case.direction, "--load-dir", str(source.hf), "--save-dir", str(target), *grid, *how)
