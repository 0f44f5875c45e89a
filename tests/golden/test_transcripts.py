"""Commands print what they printed when it was recorded, and leave the same small files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.transcripts import TRANSCRIPTS, transcript


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_is_the_recorded_one(name: str, tmp_path: Path) -> None:
    assert transcript(name, tmp_path / "root") == (Path(__file__).parent / f"{name}.txt").read_text()
