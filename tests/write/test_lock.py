"""One conversion at a time: who holds a target is named to a second one; a holder that is gone is in nobody's way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_convert.errors import TargetBusy
from dist_convert.write.files import Directory, held
from dist_convert.write.lock import Lock, check_unlocked
from tests.distributed.launching import REPOSITORY
from tests.faults.disks import FaultyDisk, faulty_disk, why_no_fuse

LABEL = "/out/hf.partial"
#: How long these tests watch a holder on another machine, instead of half a minute.
WATCHED_SECONDS = 1.0
#: As the holder leaves it that was killed, or whose machine lost its power.
ELSEWHERE = {"host": "elsewhere", "boot": "b00t", "process": 4711, "started": "2024-05-01T12:00:00+02:00"}
HOLD = """
import sys
from pathlib import Path
from dist_convert.write.lock import Lock
from dist_convert.write.files import held
path = Path(sys.argv[1])
with held(path.parent) as directory:
    lock = Lock(directory, path.name, "target")
    print("held", flush=True)
    sys.stdin.read()
    lock.release()
"""


@contextmanager
def holder(path: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its input ends; `before` are words in front of its command line."""
    words = [*before, sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def end(process: subprocess.Popen[str]) -> None:
    """Let the holder release it."""
    process.communicate("")
    assert process.returncode == 0


def test_a_second_conversion_is_told_at_once_who_holds_the_target_and_since_when(
    tmp_path: Path, here: Directory
) -> None:
    with holder(tmp_path / "lock") as process:
        started = time.monotonic()
        with pytest.raises(TargetBusy) as caught:
            Lock(here, "lock", LABEL)
        assert time.monotonic() - started < 1
        since = json.loads((tmp_path / "lock").read_text())["started"]
        assert caught.value.file == LABEL
        assert caught.value.found == f"process {process.pid} on {socket.gethostname()}, since {since}"
        with pytest.raises(TargetBusy, match=str(process.pid)):
            check_unlocked(here, "lock", LABEL)
        end(process)
    check_unlocked(here, "lock", LABEL)
    Lock(here, "lock", LABEL).release()


def test_a_released_lock_is_free_though_a_process_was_forked_meanwhile(here: Directory) -> None:
    lock = Lock(here, "lock", LABEL)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        Lock(here, "lock", LABEL).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_in_one_process_are_two(here: Directory) -> None:
    first = Lock(here, "lock", LABEL)
    with pytest.raises(TargetBusy, match=f"process {os.getpid()} on "):
        Lock(here, "lock", LABEL)
    first.release()


def test_the_lock_of_a_process_that_was_killed_here_is_taken_over_at_once(tmp_path: Path, here: Directory) -> None:
    with holder(tmp_path / "lock") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((tmp_path / "lock").read_text())["process"] == process.pid
    started = time.monotonic()
    lock = Lock(here, "lock", LABEL)
    assert time.monotonic() - started < 1
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    lock.release()
    assert (tmp_path / "lock").read_text() == "{}\n"


@pytest.mark.parametrize("changed", ["host", "boot"])
def test_a_lock_of_another_machine_that_nobody_touches_is_taken_over_after_a_while(
    changed: str, tmp_path: Path, here: Directory
) -> None:
    lock = Lock(here, "lock", LABEL)
    holder = json.loads((tmp_path / "lock").read_text())
    lock.release()
    (tmp_path / "lock").write_text(json.dumps(holder | {changed: ELSEWHERE[changed]}))
    started = time.monotonic()
    lock = Lock(here, "lock", LABEL, WATCHED_SECONDS)
    assert WATCHED_SECONDS <= time.monotonic() - started < 3 * WATCHED_SECONDS
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    lock.release()


def test_a_lock_of_another_machine_that_is_touched_meanwhile_is_held_whatever_its_clock_says(
    tmp_path: Path, here: Directory
) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()

    def touch() -> None:
        for second in range(100):
            os.utime(path, (second, second))  # by a clock of the year 1970
            if ended.wait(WATCHED_SECONDS / 5):
                return

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(TargetBusy) as caught:
            Lock(here, "lock", LABEL, WATCHED_SECONDS)
    finally:
        ended.set()
        toucher.join()
    assert caught.value.found == "process 4711 on elsewhere, since 2024-05-01T12:00:00+02:00"
    assert json.loads(path.read_text()) == ELSEWHERE


@pytest.mark.parametrize("text", ["{}\n", "{", "[]", "\0" * 200, "[" * 4000])
def test_a_file_that_names_no_holder_is_taken_over_at_once(text: str, tmp_path: Path, here: Directory) -> None:
    (tmp_path / "lock").write_text(text)
    started = time.monotonic()
    Lock(here, "lock", LABEL).release()
    assert time.monotonic() - started < 1


def test_who_has_just_made_the_file_on_another_machine_is_waited_for_until_he_says_who_he_is(
    tmp_path: Path, here: Directory
) -> None:
    path = tmp_path / "lock"
    path.touch()
    started = time.monotonic()
    Lock(here, "lock", LABEL, fresh_seconds=0.2).release()
    assert 0.2 <= time.monotonic() - started < 1

    path.write_text("")
    other = threading.Timer(0.1, path.write_text, [json.dumps(ELSEWHERE)])
    beat = threading.Timer(0.6, os.utime, [path, (1, 1)])
    other.start()
    beat.start()
    with pytest.raises(TargetBusy, match="process 4711 on elsewhere"):
        Lock(here, "lock", LABEL, WATCHED_SECONDS, fresh_seconds=0.3)


def test_a_lock_that_is_removed_by_the_end_of_its_conversion_is_not_taken_over(
    tmp_path: Path, here: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").write_text("{}\n")
    flock = fcntl.flock

    def ended_meanwhile(descriptor: int, operation: int) -> None:
        (tmp_path / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ended_meanwhile)
    with pytest.raises(TargetBusy):
        Lock(here, "lock", LABEL)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    """A directory that is seen through a file system too, which keeps flock(2) to itself, as network ones may."""
    if why_no_fuse():
        pytest.skip(why_no_fuse())
    with faulty_disk(tmp_path) as disk:
        yield disk


def test_a_holder_on_another_machine_is_known_by_its_beats_and_given_up_when_it_is_killed(disk: FaultyDisk) -> None:
    elsewhere = ("unshare", "--uts", "bash", "-c", 'hostname elsewhere; exec "$@"', "_")
    with holder(disk.path / "lock", *elsewhere) as process, held(disk.behind) as behind:
        with pytest.raises(TargetBusy, match=rf"process {process.pid} on elsewhere, since "):
            Lock(behind, "lock", LABEL)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Lock(behind, "lock", LABEL, WATCHED_SECONDS).release()
