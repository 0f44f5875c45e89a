"""Collectives of `move.exchange` carry raw bytes, in the order of the members, within any team of the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import torchrun
from tests.distributed.programs.gather_patterns import SIZES_BYTES, TEAMS


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where three ranks left what they received."""
    directory = tmp_path_factory.mktemp("gathered")
    run = torchrun(3, str(directory), module="tests.distributed.programs.gather_patterns")
    assert run.returncode == 0, run.stderr
    return directory


@pytest.mark.parametrize(("team", "rank"), [(team, rank) for team, ranks in TEAMS.items() for rank in ranks])
def test_every_member_receives_every_members_bytes_unchanged_and_in_order(team: str, rank: int, gathered: Path) -> None:
    first_bytes = {0: 0, 1: 85, 2: 170}
    expected = b"".join(
        bytes((first_bytes[member] + i) % 256 for i in range(size_bytes))
        for size_bytes in SIZES_BYTES
        for member in TEAMS[team]
    )
    assert (gathered / f"{team}-{rank}").read_bytes() == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_knows_every_ranks_json_values_by_rank(rank: int, gathered: Path) -> None:
    values = [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}, {"rank": 2, "text": "üü"}]
    assert (gathered / f"objects-{rank}").read_text() == repr(values)
