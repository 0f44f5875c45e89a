"""What version 0.1.0 left unfinished is refused by name, and not touched: `partials/` is what it had written.

Its sources are made anew by `cases`, and get the time of their last change that is recorded in its journal.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import Grid
from tests.converting import convert
from tests.golden.cases import LLAMA, TO_HF, make_huggingface, make_megatron, sums
from tests.golden.test_sums import RECORDED
from tests.to_megatron import to_megatron

PARTIALS = Path(__file__).parent / "partials"
REFUSAL = """another unfinished conversion is in the target's .partial directory
  file:     {}
  found:    made by another version (format 1, 2 now); only that version can resume it
  remedy:   to resume it, give the flags it was started with; or start over with --overwrite
"""
CHANGED_NS = 1_700_000_000_000_000_000


def set_time(source: Path) -> None:
    for file in source.rglob("*"):
        os.utime(file, ns=(CHANGED_NS, CHANGED_NS))


def test_an_unfinished_hugging_face_directory_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = TO_HF["llama-local-tp2-pp2"]
    make_megatron(tmp_path / "in", case)
    set_time(tmp_path / "in")
    shutil.copytree(PARTIALS / "to_hf", tmp_path / "out.partial")
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert REFUSAL.format(tmp_path / "out.partial") in capsys.readouterr().err
    assert sums(tmp_path / "out.partial", "*") == sums(PARTIALS / "to_hf", "*")
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert sums(tmp_path / "out", "*.safetensors") == RECORDED["to_hf"][case.name]


def test_an_unfinished_megatron_checkpoint_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_huggingface(tmp_path / "in", LLAMA)
    set_time(tmp_path / "in")
    shutil.copytree(PARTIALS / "to_megatron", tmp_path / "out" / "iter_0000001.partial")
    norms = ("--saver-transformer-impl", "local")
    partial = tmp_path / "out" / "iter_0000001.partial"
    assert to_megatron(tmp_path / "in", tmp_path / "out", *norms, grid=Grid(tp=2, pp=2)) == 1
    assert REFUSAL.format(partial) in capsys.readouterr().err
    assert sums(partial, "*") == sums(PARTIALS / "to_megatron", "*")
    assert to_megatron(tmp_path / "in", tmp_path / "out", *norms, "--overwrite", grid=Grid(tp=2, pp=2)) == 0
    assert sums(tmp_path / "out", "*.pt") == RECORDED["to_megatron"]["llama-local-tp2-pp2"]


def test_a_complete_target_of_another_format_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_megatron(tmp_path / "in", TO_HF["llama-local-tp2-pp2"])
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest.pop("format") == 2
    (tmp_path / "out" / "conversion.json").write_text(json.dumps(manifest))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "a conversion: complete, and made by another version (format 1, 2 now)" in capsys.readouterr().err
