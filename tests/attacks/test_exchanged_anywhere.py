"""A conversion's directory is exchanged before any call to the operating system: what gets its name stays as it is.

Ten moments of each kind of target here; with `-m slow`, all of them. What gets the name is, in turn, a directory of the
user's own, another unfinished conversion, and a link; a directory gets the name of an old target that waits aside, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.warm import Process
from tests.write.test_killed_anywhere import CASES, prepared

TEXT = "the only copy\n"
#: Of each case, this many moments in the fast selection.
SHARE = 10


def make_own(directory: Path) -> Path:
    """A directory of the user's own, with the names of what a conversion makes and removes."""
    names = (
        "config.json", "conversion.json", "model.safetensors", "resumable", "diary", "mp_rank_00/model_optim_rng.pt",
        ".journal/void", ".journal/run-00001-rank-00000",
    )  # fmt: skip
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(TEXT)
    return directory


def sweep(job: dict[str, Any], moments: Sequence[int]) -> list[dict[str, Any]]:
    words = ["-m", "tests.attacks.exchanged", json.dumps(job | {"moments": list(moments)})]
    run = Process(words, dict(os.environ)).finish(3600.0)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def make_unfinished(job: dict[str, Any], directory: Path) -> Path:
    """What another conversion leaves that is killed on its way."""
    command = [*job["command"], "--target-params-dtype", "fp16"]
    words = ["-c", f"from tests.write.killed import counting; counting({command}, 60)"]
    assert Process(words, dict(os.environ)).finish().returncode == -9
    return (Path(job["root"]) / job["names"][0]).rename(directory)


def assert_what_gets_the_name_stays(case: str, tmp_path: Path, share: int) -> None:
    job = prepared(case, tmp_path) | {"inside": ".", "by_link": False, "comes_back": True}
    name = "hf" if case.startswith("to_hf") else "mg/iter_0000001"
    job |= {"names": [f"{name}.partial", name]}
    own = str(make_own(tmp_path / "own"))
    [undisturbed] = sweep(job | {"mine": own}, [1 << 30])
    assert undisturbed["exit_codes"] == [0, 0], undisturbed["said"]
    Path(job["root"]).rename(tmp_path / "complete")
    Path(job["root"]).mkdir()
    unfinished = str(make_unfinished(job, tmp_path / "unfinished"))
    # An unfinished conversion that is there before the directory is held is the one to go on with, or to empty.
    begun = {"mine": unfinished, "inside": ".journal/identity.json"}
    aside = {"mine": own, "names": [f"{name}.replaced"], "comes_back": False}
    kinds = [{"mine": own}, begun, {"mine": own, "by_link": True}, *([aside] if "--overwrite" in case else [])]
    count = undisturbed["moments"]
    step = max(1, count // share) if share else 1
    for number, kind in enumerate(kinds):
        for run in sweep(job | kind, range(1 + number * step, count + 1, step * len(kinds))):
            first, _ = run["said"]
            assert run["after"] == run["before"], run
            assert "Traceback" not in first, first
            assert first.count("  file: ") == (1 if run["exit_codes"][0] else 0), first
            assert run["exit_codes"] in ([0, 0], [1, 0]), run
            assert run["found"] == undisturbed["found"], run


@pytest.mark.parametrize("case", CASES)
def test_what_gets_the_name_of_a_conversion_s_directory_stays_as_it_is(case: str, tmp_path: Path) -> None:
    assert_what_gets_the_name_stays(case, tmp_path, SHARE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_directory_may_be_exchanged_before_any_call_to_the_operating_system(case: str, tmp_path: Path) -> None:
    assert_what_gets_the_name_stays(case, tmp_path, 0)
