"""Commands print what they printed when it was recorded, and leave the same small files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden.transcripts import TRANSCRIPTS, transcript


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_is_the_recorded_one(name: str, tmp_path: Path) -> None:
    assert transcript(name, tmp_path / "root") == (Path(__file__).parent / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_nothing_that_is_one_is_told_as_several_and_large_sizes_have_larger_units(name: str) -> None:
    printed = (Path(__file__).parent / f"{name}.txt").read_text()
    said = "\n".join(line for line in printed.splitlines() if not line.startswith("==="))
    assert re.findall(r"(?<![\w.,])1 (?:[a-z]+ )?[a-z]+s\b", said) == []
    assert re.findall(r"(?<!\()\b[\d,]{5,} ?(?:bytes|B)\b", said) == []
