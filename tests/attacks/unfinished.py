"""A conversion that was stopped before its target got its name, and the same command once more."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import dist_convert.move.convert
from dist_convert.errors import Interrupted
from tests.checkpoints import Grid, Model, make
from tests.converting import convert

MODEL = Model(hidden=8, ffn=8, heads=2, groups=1, head_dim=4, layers=1, vocab=8, padded_vocab=8)


def stopped(root: Path) -> Path:
    """Make below a root a source `in`, and `place/out.partial`, which lacks nothing but its name."""
    make(root / "in", MODEL, Grid(tp=2))

    def stop(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dist_convert.move.convert, "commit", stop)
        assert convert(root / "in", root / "place" / "out") == 143
    return root


def go_on(unfinished: Path, left: Path, *flags: str) -> int:
    return convert(unfinished / "in", left.with_name("out"), *flags)
