"""When a conversion lets go of what it has read: where other files would have to leave the page cache for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_convert.read import source

MEMINFO = """MemTotal:       24683832 kB
MemFree:        22755100 kB
MemAvailable:   22963496 kB
"""
FREE_BYTES = 22755100 * 1024


@pytest.mark.parametrize(
    ("meminfo", "expected"), [(MEMINFO, [False, False, True]), ("MemTotal: 1 kB\n", [False] * 3), (None, [False] * 3)]
)
def test_more_than_nobody_uses_pushes_others_out_and_less_does_not(
    meminfo: str | None, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MEMORY", tmp_path / "meminfo")
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    amounts_bytes = (FREE_BYTES - 1, FREE_BYTES, FREE_BYTES + 1)
    assert [source.pushes_others_out(size_bytes) for size_bytes in amounts_bytes] == expected


def test_a_model_that_no_memory_holds_pushes_others_out_of_this_machines() -> None:
    assert source.pushes_others_out(1 << 50)
    assert not source.pushes_others_out(1)
