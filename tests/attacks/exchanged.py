"""Exchanges a conversion's directory for something else at chosen moments: `python -m tests.attacks.exchanged`.

A moment is the n-th call to the operating system that changes something, as in `tests.write.killed`: there what has the
name of the directory is renamed, and something of the user's own gets the name; where nothing has it yet, at the first
moment when something has. The job comes as JSON on the command line, and what became of each moment is a line of JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dist_convert.move.convert  # noqa: F401  imported once, before forking
from dist_convert.__main__ import main
from tests.write.killed import contents, counting, in_a_fork

rename, symlink = os.rename, os.symlink


def state(root: Path) -> dict[str, list[Any]]:
    """Mode, time of the last change and content of a directory and all below it."""
    found = {}
    for path in (root, *sorted(root.rglob("*"))):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[os.path.relpath(path, root)] = [path.lstat().st_mode, path.lstat().st_mtime_ns, digest]
    return found


def exchange(names: Sequence[Path], mine: Path, taken: Path, *, inside: str, by_link: bool) -> bool:
    """Take the first of some names that something has with a file inside; whether anything has one."""
    for name in names:
        if os.path.lexists(name / inside):
            rename(name, taken / name.name)
            (symlink if by_link else rename)(mine, name)
            return True
    return False


def exchange_and_go_on(job: dict[str, Any], moment: int) -> dict[str, Any]:
    """What two runs of a command said, what each left, and what became of the user's own.

    After the first run the user's own is moved away, and what was taken may get its name back.

    Args:
        job: command; root, where the target is made; old, what is there before, if anything; names, of which the first
            that is there is taken, and inside, what must be in it; mine, what gets the name; by_link, whether a link to
            it does; comes_back, whether what was taken does.
        moment: counted from 1; beyond the last one, nothing is exchanged.
    """
    root, place = Path(job["root"]), Path(job["root"]).with_name("place")
    for path in (root, place):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(job["old"], root) if job["old"] else root.mkdir()
    mine, taken = place / "mine", place / "taken"
    shutil.copytree(job["mine"], mine)
    taken.mkdir()
    names, before, inode = [root / name for name in job["names"]], state(mine), mine.stat().st_ino
    act = partial(exchange, names, mine, taken, inside=job["inside"], by_link=job["by_link"])
    code, said = in_a_fork(lambda: counting(job["command"], moment, act))
    everything = [*place.rglob("*"), *root.rglob("*")]
    kept = next(path for path in everything if path.lstat().st_ino == inode)
    after, left = state(kept), {name: contents(path) for name, path in (("root", root), ("taken", taken))}
    for path in everything:
        if path.is_symlink():
            path.unlink()
    rename(kept, place / "moved")
    for path in taken.iterdir() if job["comes_back"] else ():
        [name] = [name for name in names if name.name == path.name]
        rename(path, name)
    again, words = in_a_fork(lambda: main(job["command"]))
    return {
        "moment": moment, "moments": int(said.rpartition("moments: ")[2]), "exit_codes": [code, again],
        "before": before, "after": after, "left": left, "found": contents(root), "said": [said, words],
    }  # fmt: skip


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    gc.freeze()
    for moment in job["moments"]:
        print(json.dumps(exchange_and_go_on(job, moment)), flush=True)
