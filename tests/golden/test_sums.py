"""Every weights file has the bytes that it had when they were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.cases import TO_HF, TO_MEGATRON, WHOLE, sums_to_hf, sums_to_megatron, whole_sums

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "sums.json").read_text())


def test_all_conversions_and_no_others_are_recorded() -> None:
    assert RECORDED["to_hf"].keys() == TO_HF.keys()
    assert RECORDED["to_megatron"].keys() == TO_MEGATRON.keys()
    assert RECORDED["whole"].keys() == WHOLE.keys()


@pytest.mark.parametrize("name", TO_HF)
def test_a_hugging_face_directory_has_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    assert sums_to_hf(TO_HF[name], tmp_path) == RECORDED["to_hf"][name]


@pytest.mark.parametrize("name", TO_MEGATRON)
def test_a_megatron_checkpoint_has_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    assert sums_to_megatron(TO_MEGATRON[name], tmp_path) == RECORDED["to_megatron"][name]


@pytest.mark.parametrize("name", WHOLE)
def test_every_file_of_a_target_but_the_record_of_its_run_has_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    assert whole_sums(WHOLE[name], tmp_path) == RECORDED["whole"][name]
