"""What an earlier run left, damaged in any way: one error that names the file, and with --overwrite a new beginning."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dist_convert.write.resume
from dist_convert.errors import TargetError
from dist_convert.records import Window
from dist_convert.write.files import Directory
from dist_convert.write.journal import Journal, read_journal, resume_state_of, this_boot
from tests.attacks.unfinished import go_on
from tests.distributed.interrupting import hashes_below

JOURNAL = ".journal/run-00001-rank-00000"


def line(record: object) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def raw(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def appended(content: bytes) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        with (left / JOURNAL).open("ab") as file:
            file.write(content)

    return damage


def rewritten(content: bytes) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        (left / JOURNAL).write_bytes(content)

    return damage


def renamed(name: str) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        (left / JOURNAL).rename(left / ".journal" / name)

    return damage


def identity(text: str) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        (left / ".journal" / "identity.json").write_text(text)

    return damage


def changed_identity(**change: Any) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        path = left / ".journal" / "identity.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return damage


def directory_instead(name: str) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        (left / name).unlink(missing_ok=True)
        (left / name).mkdir()

    return damage


def pipe_instead(name: str) -> Callable[[Path], None]:
    def damage(left: Path) -> None:
        (left / name).unlink()
        os.mkfifo(left / name)

    return damage


#: What is damaged, and which file the error names.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an identity that is a list": (identity("[]"), ""),
    "a nested identity": (identity("[" * 200_000), ""),
    "an empty identity": (identity(""), ""),
    "an identity without parts": (identity('{"format": 2}'), ""),
    "an identity with a number as source": (changed_identity(source=5), ""),
    "an identity with a text as file": (changed_identity(source={"a": "b"}), ""),
    "an identity with a time of 10^30": (changed_identity(source={"a": [1, 10**30, ""]}), ""),
    "an identity with a list as flags": (changed_identity(plan="x", flags=[1]), ""),
    "a record that is a list": (appended(line([])), JOURNAL),
    "a record that is a number": (appended(line(5)), JOURNAL),
    "a record that nobody writes": (appended(line({"erased": 1})), JOURNAL),
    "a window that is a text": (appended(line({"wrote": ["x"]})), JOURNAL),
    "a window of three": (appended(line({"wrote": [["model.safetensors", 0, 1]]})), JOURNAL),
    "a window before the file": (appended(line({"wrote": [["model.safetensors", -5, 1, 0, 1, 1]]})), JOURNAL),
    "a window behind the file": (appended(line({"wrote": [["model.safetensors", 0, 10**15, 0, 1, 1]]})), JOURNAL),
    "a lost file that is a number": (appended(line({"lost": 5, "until": "x"})), JOURNAL),
    "a mark that is a text": (appended(line({"mark": "x"})), JOURNAL),
    "a change that is a number": (appended(line({"overflowed": 5})), JOURNAL),
    "a window of 10^30 bytes": (appended(2 * line({"wrote": [["model.safetensors", 0, 10**30, 0, 1, 1]]})), JOURNAL),
    "a checksum of 10^30": (
        appended(line({"wrote": [["x", 0, 1, 0, 1, 10**30], ["x", 1, 1, 0, 1, 10**30]]})), JOURNAL),
    "a mark that is a text, in a record of windows": (appended(line({"wrote": [], "mark": "x"})), JOURNAL),
    "a lost file without a run, in a record of windows": (appended(line({"wrote": [], "lost": "x"})), JOURNAL),
    "a machine without a name, in a record of windows": (rewritten(line({"wrote": [], "boot": "x"})), JOURNAL),
    "the last journal that can be": (renamed("run-999999999-rank-00000"), ".journal/run-999999999-rank-00000"),
    "an identity of 17 MiB": (lambda left: os.truncate(left / ".journal" / "identity.json", 17 << 20), ""),
    "an identity of 4,000,000 values": (identity("[" + "{}," * 4_000_000 + "{}]"), ""),
    "a line that is no JSON": (appended(raw(b"{")), JOURNAL),
    "a nested line": (appended(raw(b"[" * 100_000)), JOURNAL),
    "a pipe as journal": (pipe_instead(JOURNAL), JOURNAL),
    "a directory as journal": (directory_instead(JOURNAL), JOURNAL),
    "a pipe as config.json": (pipe_instead("config.json"), "config.json"),
    "a weights file that is longer": (lambda left: os.truncate(left / "model.safetensors", 10**6), "model.safetensors"),
    "a directory as weights file": (directory_instead("model.safetensors"), "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_what_was_damaged_is_named_and_left_and_overwrite_starts_anew(
    what: str, left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, named = DAMAGES[what]
    damage(left)
    before = hashes_below(left)
    assert go_on(unfinished, left) == 1
    error = capsys.readouterr().err
    assert "internal error" not in error
    assert f"  file:     {left / named if named else left}\n" in error
    assert "--overwrite" in error
    now = hashes_below(left)
    assert {name: now.get(name) for name in before if "lock" not in name and name != "resumable"} == {
        name: digest for name, digest in before.items() if "lock" not in name and name != "resumable"
    }
    assert go_on(unfinished, left, "--overwrite") == 0
    error = capsys.readouterr().err
    assert "there already" not in error
    assert sorted(path.name for path in left.parent.iterdir()) == ["out"]
    assert json.loads((left.with_name("out") / "conversion.json").read_text())["format"] == 2


def test_a_journal_of_3_gb_is_named_and_not_read(
    left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(left / JOURNAL, 3 << 30)
    began = time.monotonic()
    assert go_on(unfinished, left) == 1
    assert f"  file:     {left / JOURNAL}\n" in capsys.readouterr().err
    assert go_on(unfinished, left, "--overwrite") == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "one", [{"wrote": [["model.safetensors", 0, 1, 0, 1, 1]]}, {"lost": "x", "until": 0}], ids=list
)
def test_a_journal_of_more_than_the_target_can_need_is_named(
    one: dict[str, Any], left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dist_convert.write.journal, "FEW_WINDOWS", 4)
    monkeypatch.setattr(dist_convert.write.resume, "_FEW_BYTES", 0)
    shutil.copytree(left.parent, left.parent.parent / "second")
    assert go_on(unfinished, left) == 0
    assert "are written already" in capsys.readouterr().err
    second = left.parent.parent / "second" / "out.partial"
    appended(line(one) * 50)(second)
    assert go_on(unfinished, second) == 1
    assert f"  file:     {second / JOURNAL}\n" in capsys.readouterr().err


@pytest.mark.parametrize("make_other", [Path.mkdir, os.mkfifo], ids=["a directory", "a pipe"])
@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=str)
def test_what_is_in_the_lock_s_place_is_named_and_moved_away_lets_the_conversion_end(
    more: tuple[str, ...], make_other: Callable[[Path], None], left: Path, unfinished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lock = left / ".journal" / "lock"
    lock.unlink()
    make_other(lock)
    assert go_on(unfinished, left, *more) == 1
    error = capsys.readouterr().err
    assert f"  file:     {lock}\n" in error
    assert "  remedy:   move away what is there, then start the same command again;" in error
    lock.rename(left.parent / "moved")
    assert go_on(unfinished, left, *more) == 0
    assert "are written already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "conversion.json"])
def test_a_directory_in_place_of_a_small_file_is_named_and_the_next_overwrite_starts_anew(
    name: str, left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory_instead(name)(left)
    assert go_on(unfinished, left, "--overwrite") == 1
    assert f"  file:     {left / name}\n" in capsys.readouterr().err
    assert not (left / "resumable").exists()
    assert go_on(unfinished, left, "--overwrite") == 0


@pytest.mark.parametrize("name", ["run-x-rank-y", "run-00001-rank-00000.orig", "run-1-rank-0"])
def test_files_that_only_look_like_journals_are_in_nobody_s_way(
    name: str, left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(left / JOURNAL, left / ".journal" / name)
    assert go_on(unfinished, left) == 0
    assert "are written already" in capsys.readouterr().err


def test_overwrite_goes_on_where_starting_again_may_be_all_it_takes_and_only_there(
    left: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(left.parent, tmp_path / "second")
    assert go_on(unfinished, left, "--overwrite") == 0
    assert "are written already" in capsys.readouterr().err
    second = tmp_path / "second" / "out.partial"
    (second / "resumable").unlink()
    assert go_on(unfinished, second, "--overwrite") == 0
    assert "are written already" not in capsys.readouterr().err


def test_blocks_of_another_size_are_told_before_anything_moves(
    left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist_convert.write.resume, "BLOCK_BYTES", 1 << 20)
    assert go_on(unfinished, left) == 1
    assert "which plans differently" in capsys.readouterr().err
    assert go_on(unfinished, left, "--overwrite") == 0


def test_a_line_behind_one_that_was_cut_off_counts(
    tmp_path: Path, here: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".journal").mkdir()
    (tmp_path / "f").write_bytes(bytes(100))
    journal = Journal(here, 1, 0)
    journal.wrote([(Window("f", 0, 100), 1)])
    write, calls = os.write, iter([20])

    def full(descriptor: int, data: bytes) -> int:
        if size_bytes := next(calls, 0):
            return write(descriptor, data[:size_bytes])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patches:
        patches.setattr(os, "write", full)
        with pytest.raises(TargetError):
            journal.wrote([(Window("f", 50, 50), 1)])
    with pytest.raises(TargetError), journal.syncing("f"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    journal.close()
    record = read_journal(tmp_path, "run-00001-rank-00000", [this_boot()])
    assert record is not None
    assert record["lost"] == [["f", 1]]
    assert resume_state_of([record]).written == ()
