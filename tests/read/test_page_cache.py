"""When a conversion lets go of what it has read: where other files would have to leave the page cache for it."""

from __future__ import annotations

import pytest

from dist_convert.read import source

MEMINFO = """MemTotal:       24683832 kB
MemFree:        22755100 kB
MemAvailable:   22963496 kB
"""


def test_memory_that_only_a_page_cache_uses_is_in_use() -> None:
    assert source.unused_bytes(MEMINFO) == 22755100 * 1024
    assert source.unused_bytes("MemTotal: 1 kB\n") is None


def test_more_than_is_free_pushes_others_out_and_less_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "unused_bytes", lambda _: 1000)
    assert [source.pushes_others_out(streamed_bytes) for streamed_bytes in (999, 1000, 1001)] == [
        False,
        False,
        True,
    ]


def test_a_model_that_no_memory_holds_pushes_others_out_of_this_machines() -> None:
    assert source.pushes_others_out(1 << 50)
    assert not source.pushes_others_out(1)
