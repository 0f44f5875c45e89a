"""What lies beside, below or in place of a target and is not of this tool: it stays, and no link is written through."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

import dist_convert.move.convert
import dist_convert.write.commit
import dist_convert.write.resume
from dist_convert.__main__ import main
from dist_convert.write.commit import publish
from dist_convert.write.files import Beside, Directory, held
from dist_convert.write.trees import remove
from tests.attacks.unfinished import MODEL, go_on
from tests.checkpoints import Grid, make
from tests.converting import bytes_read, convert
from tests.distributed.interrupting import hashes_below
from tests.file_systems import mounted
from tests.to_megatron import TRACKER, make_hf, to_megatron

NOBODY = 65534
TEXT = "the only copy\n"
ARGS = "target_megatron_args.json"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user needs root")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make(tmp_path / "in", MODEL, Grid(tp=2))
    return tmp_path / "in"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text(TEXT)
    return tmp_path / "victim"


def own(directory: Path) -> None:
    """Something of the user's own."""
    directory.mkdir()
    (directory / "diary").write_text(TEXT)


@pytest.mark.parametrize("name", ["out", "model[a]", "m*", "m?"])
def test_directories_with_names_like_those_of_this_tool_stay(name: str, source: Path, target: Path) -> None:
    beside = (
        f".{name}.journal",
        f".{name}.partial-notes",
        f".{name}.partial-0000abcd",
        ".modela.partial-x",
        ".mx.partial-x",
    )
    for other in beside:
        own(target.with_name(other))
    assert convert(source, target.with_name(name)) == 0
    assert convert(source, target.with_name(name), "--overwrite", "--target-params-dtype", "fp32") == 0
    assert sorted(path.name for path in target.parent.iterdir()) == sorted([*beside, name])
    for other in beside:
        assert (target.with_name(other) / "diary").read_text() == TEXT


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_partial_directory_of_the_user_s_own_stays(
    more: tuple[str, ...], source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for inside in ("", ".journal"):
        partial = target.with_name("out.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / inside).mkdir(parents=True)
        (partial / inside / "diary").write_text(TEXT)
        before = hashes_below(target.parent)
        assert convert(source, target, *more) == 1
        assert "was not left by a conversion" in capsys.readouterr().err
        assert hashes_below(target.parent) == before


@needs_root
@pytest.mark.parametrize("link", ["lock", "identity.json", ".identity.json.new", "run-00001-rank-00000"])
def test_what_another_user_has_prepared_is_refused_by_name_and_not_written_through(
    link: str, source: Path, target: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = target.with_name("out.partial")
    (partial / ".journal").mkdir(parents=True)
    (partial / ".journal" / "identity.json").write_text("{}")
    (partial / ".journal" / link).unlink(missing_ok=True)
    (partial / ".journal" / link).symlink_to(victim)
    for path in (partial, *partial.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    assert convert(source, target, "--overwrite") == 1
    error = capsys.readouterr().err
    assert f"file:     {partial}\n" in error
    assert f"found:    a directory of user {NOBODY}, mode 755\n" in error
    assert victim.read_text() == TEXT


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_partial_directory_that_others_can_write_is_refused_by_name(
    more: tuple[str, ...], left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left.chmod(0o777)
    before = hashes_below(left)
    assert go_on(unfinished, left, *more) == 1
    assert "may belong to somebody else" in (error := capsys.readouterr().err)
    assert "mode 777" in error
    assert hashes_below(left) == before


def as_nobody(convert_it: Callable[[], int]) -> tuple[int, str]:
    """The exit code and the standard error of a conversion by another user."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with os.fdopen(writes, "w") as error, redirect_stderr(error):
            code = convert_it()
        os._exit(code)
    os.close(writes)
    with os.fdopen(reads) as error:
        printed = error.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


@needs_root
@pytest.mark.parametrize("is_sticky", [False, True])
def test_a_target_of_another_user_is_not_replaced_though_others_may_write_beside_it(is_sticky: bool) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's are for their owner alone
        os.chmod(root, 0o755)
        make(source := Path(root, "in"), MODEL, Grid(tp=2))
        (place := Path(root, "place")).mkdir()
        place.chmod(0o1777 if is_sticky else 0o777)
        target = place / "out"
        assert convert(source, target) == 0
        if is_sticky:
            target.chmod(0o777)
        before = hashes_below(place)
        code, printed = as_nobody(lambda: convert(source, target, "--overwrite", "--target-params-dtype", "fp32"))
        assert (code, hashes_below(place)) == (1, before)
        assert "this user cannot replace the target" in printed
        assert as_nobody(lambda: convert(source, place / "other"))[0] == 0


def test_a_link_in_place_of_the_partial_directory_is_refused_by_name(
    left: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left.rename(left.with_name("elsewhere"))
    left.symlink_to("elsewhere")
    before = hashes_below(left.parent)
    assert go_on(unfinished, left, "--overwrite") == 1
    assert "found:    a link\n" in capsys.readouterr().err
    assert hashes_below(left.parent) == before


def symbolic(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def to_directory(path: Path, victim: Path) -> None:
    path.symlink_to(victim.parent)


@pytest.mark.parametrize(
    "name", [".journal/lock", ".journal/run-00007-rank-00000", "model.safetensors", "config.json", "x"]
)
@pytest.mark.parametrize("link", [symbolic, hard, to_directory])
def test_links_in_a_partial_directory_are_refused_by_name_and_overwrite_starts_anew(
    link: Callable[[Path, Path], None], name: str, left: Path, unfinished: Path, victim: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (left / name).unlink(missing_ok=True)
    link(left / name, victim)
    assert go_on(unfinished, left) == 1
    assert str(left / name) in capsys.readouterr().err
    code = go_on(unfinished, left, "--overwrite")
    assert victim.read_text() == TEXT
    if name != ".journal/lock":
        assert code == 0
        assert "there already" not in capsys.readouterr().err
        assert sorted(path.name for path in left.parent.iterdir()) == ["out"]


def test_names_of_temporary_files_cannot_be_prepared(source: Path, target: Path, victim: Path, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MODEL)
    (target / "x").mkdir(parents=True)
    for name in (TRACKER, ARGS):
        (target / f"{name}.new").symlink_to(victim)
    assert to_megatron(tmp_path / "hf", target) == 0
    assert victim.read_text() == TEXT
    assert (target / TRACKER).read_text() == "1"


def make_text(path: Path, victim: Path) -> None:
    path.write_text(TEXT)


def make_json(path: Path, victim: Path) -> None:
    path.write_text('{"tensor_model_parallel_size": 1}')


def make_pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path, victim: Path) -> None:
    own(path)


def make_large(path: Path, victim: Path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


def make_second_name(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


@pytest.mark.parametrize(
    ("name", "make_other", "found"),
    [
        (TRACKER, make_text, "something else"), (ARGS, make_json, "something else"),
        (TRACKER, make_pipe, "a pipe, a device or something similar"), (ARGS, make_directory, "Is a directory"),
        (TRACKER, make_large, "3.22 GB"), (ARGS, symbolic, "a link"), (ARGS, make_second_name, "something else"),
    ],
)  # fmt: skip
def test_what_no_conversion_has_made_beside_a_target_stays(
    name: str, make_other: Callable[[Path, Path], None], found: str, target: Path, victim: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_hf(tmp_path / "hf", MODEL)
    target.mkdir()
    make_other(target / name, victim)
    assert to_megatron(tmp_path / "hf", target, "--overwrite") == 1
    error = capsys.readouterr().err
    assert f"  file:     {target / name}\n" in error
    assert f"  found:    {found}\n" in error
    assert os.listdir(target) == [name]
    assert victim.read_text() == TEXT


def test_what_gets_a_name_beside_a_target_during_the_run_stays_and_moved_away_lets_it_end(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(tmp_path / "hf", MODEL)
    commit = dist_convert.move.convert.commit

    def hours_later(*words: Any, **more: Any) -> None:
        commit(*words, **more)
        (target / ARGS).write_text(TEXT)

    monkeypatch.setattr(dist_convert.move.convert, "commit", hours_later)
    assert to_megatron(tmp_path / "hf", target) == 1
    assert f"  file:     {target / ARGS}\n" in capsys.readouterr().err
    assert (target / ARGS).read_text() == TEXT
    monkeypatch.undo()
    (target / ARGS).rename(target / "mine")
    assert to_megatron(tmp_path / "hf", target) == 0
    assert sorted(os.listdir(target)) == ["iter_0000001", TRACKER, "mine", ARGS]
    assert (target / "mine").read_text() == TEXT
    assert not (target / "iter_0000001" / ".journal").exists()


@pytest.mark.parametrize("text", ["500\n", "release", ""])
def test_a_tracker_of_training_is_replaced(text: str, target: Path, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MODEL)
    target.mkdir()
    (target / TRACKER).write_text(text)
    assert to_megatron(tmp_path / "hf", target, "--iteration", "2") == 0
    assert (target / TRACKER).read_text() == "2"


def name_in(iteration: Path, tracker: bytes) -> None:
    """Give a complete iteration its tracker file."""
    with held(iteration.parent) as root, held(iteration) as directory:
        publish(directory, root, {"tracker": Beside(tracker, rb"[0-9]+")})


def test_two_conversions_into_one_root_name_their_iterations_without_meeting(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"iter_000000{number}" / ".journal").mkdir(parents=True)
        (tmp_path / f"iter_000000{number}" / ".journal" / "identity.json").touch()
    child = os.fork()
    if not child:
        for _ in range(100):
            name_in(tmp_path / "iter_0000001", b"1")
        os._exit(0)
    found = set()
    for _ in range(100):
        name_in(tmp_path / "iter_0000002", b"1234567")
        found.add((tmp_path / "tracker").read_bytes())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert found <= {b"1", b"1234567"}
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "iter_0000002", "tracker"]


def list_files(target: Path, count: int) -> int:
    """Have a target's manifest list so many more files; its size in bytes."""
    path = target / "conversion.json"
    more = b",".join(b'"%06d":{"size_bytes":1,"crc32":"0"}' % number for number in range(count))
    path.write_bytes(path.read_bytes().replace(b'"files": {\n    "README', b'"files": {%b, "README' % more))
    return path.stat().st_size


def test_the_manifest_of_what_is_replaced_is_read_once(source: Path, target: Path) -> None:
    assert convert(source, target) == 0
    size_bytes, before_bytes = list_files(target, 60_000), bytes_read()
    assert convert(source, target, "--overwrite") == 0
    assert size_bytes > 2_000_000
    assert bytes_read() - before_bytes < 2 * size_bytes
    assert (target / "conversion.json").stat().st_size < 10_000


def test_an_empty_journal_that_a_killed_run_was_about_to_remove_is_in_nobody_s_way(source: Path, target: Path) -> None:
    assert convert(source, target) == 0
    (target / ".journal").mkdir()
    assert convert(source, target, "--overwrite") == 0
    assert not (target / ".journal").exists()


@pytest.mark.parametrize("number", [-(10**400), 10**30], ids=["as large as none", "a time after all calendars"])
@pytest.mark.parametrize("key", ["size_bytes", "modified_ns"])
def test_a_manifest_with_numbers_that_cannot_be_is_another_s(
    key: str, number: int, source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, target) == 0
    manifest = json.loads((target / "conversion.json").read_text())
    for known in manifest["source"]["files"].values():
        known[key] = number
    (target / "conversion.json").write_text(json.dumps(manifest))
    assert convert(source, target) == 1
    assert "the target directory is not empty\n" in capsys.readouterr().err
    assert convert(source, target, "--overwrite") == 0


def test_a_manifest_of_more_files_than_any_has_is_none(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, target) == 0
    list_files(target, 170_000)
    assert convert(source, target, "--overwrite") == 1
    assert "found:    another conversion.json\n" in capsys.readouterr().err


def replaced(target: Path) -> None:
    target.rename(target.with_name("moved"))
    own(target)


def added_to(target: Path) -> None:
    (target / "diary").write_text(TEXT)


def changed(target: Path) -> None:
    with (target / "config.json").open("a") as file:
        file.write("\n")


@pytest.mark.parametrize("change", [replaced, added_to, changed])
def test_a_target_that_is_changed_during_its_replacement_is_kept_beside_the_new_one(
    change: Callable[[Path], None], source: Path, target: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert convert(source, target) == 0
    commit = dist_convert.move.convert.commit

    def hours_later(*words: Any, **more: Any) -> None:
        change(target)
        commit(*words, **more)

    monkeypatch.setattr(dist_convert.move.convert, "commit", hours_later)
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 1
    assert "the target was changed during the conversion, so it is not replaced" in capsys.readouterr().err
    assert (target / ("config.json" if change is changed else "diary")).exists()
    assert (target.with_name("out.partial") / "conversion.json").exists()

    monkeypatch.undo()
    target.rename(target.with_name("kept"))
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 0
    assert (target / "conversion.json").exists()
    assert not target.with_name("out.replaced").exists()


def test_what_takes_the_targets_place_while_it_is_checked_stays(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, target) == 0
    check_target = dist_convert.write.resume.check_target

    def then_exchanged(*words: Any, **more: Any) -> int:
        free_bytes = check_target(*words, **more)
        replaced(target)
        return free_bytes

    monkeypatch.setattr(dist_convert.write.resume, "check_target", then_exchanged)
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 1
    assert "the target was changed during the conversion, so it is not replaced" in capsys.readouterr().err
    assert (target / "diary").read_text() == TEXT


def by_a_link(partial: Path, mine: Path) -> None:
    partial.symlink_to(mine)


def by_a_directory(partial: Path, mine: Path) -> None:
    shutil.copytree(mine, partial)


@pytest.mark.parametrize(
    "step",
    [
        "write.resume.begin",
        *(f"move.convert.{step}" for step in ("move", "known_ranges", "commit")),
        "write.partial.Lock",
        "write.partial._start_anew",
    ],
)
@pytest.mark.parametrize("exchange", [by_a_link, by_a_directory])
def test_what_takes_the_place_of_a_partial_directory_during_the_run_stays_and_moved_away_lets_it_be_made(
    exchange: Callable[[Path, Path], None], step: str, source: Path, target: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mine, partial = tmp_path / "mine", target.with_name("out.partial")
    (mine / ".journal").mkdir(parents=True)
    for name in ("config.json", "conversion.json", "resumable", "model.safetensors", ".journal/void", "diary"):
        (mine / name).write_text(TEXT)
    before = hashes_below(mine)
    module, name = step.rsplit(".", 1)
    original = getattr(importlib.import_module(f"dist_convert.{module}"), name)

    def hours_later(*words: Any, **more: Any) -> Any:
        partial.rename(tmp_path / "taken")
        exchange(partial, mine)
        return original(*words, **more)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(f"dist_convert.{step}", hours_later)
        assert convert(source, target) == 1
    assert str(partial) in capsys.readouterr().err
    assert hashes_below(mine) == before
    partial.rename(tmp_path / "moved")
    assert {name: known for name, known in hashes_below(tmp_path / "moved").items() if name in before} == before
    assert convert(source, target) == 0
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("step", ["write.resume.begin", "move.convert.known_ranges", "move.convert.commit"])
def test_another_unfinished_conversion_in_place_of_a_partial_directory_stays(
    step: str, left: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name = step.rsplit(".", 1)
    other, original = left.rename(tmp_path / "other"), getattr(importlib.import_module(f"dist_convert.{module}"), name)
    before = hashes_below(other)

    def hours_later(*words: Any, **more: Any) -> Any:
        left.rename(tmp_path / "taken")
        other.rename(left)
        return original(*words, **more)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(f"dist_convert.{step}", hours_later)
        assert go_on(unfinished, left, "--target-params-dtype", "fp32") == 1
    assert "is not the one that this conversion began with" in capsys.readouterr().err
    assert hashes_below(left) == before
    assert os.listdir(left.parent) == ["out.partial"]


@pytest.mark.parametrize("step", ["move.convert.publish", "write.commit.remove_journal"])
@pytest.mark.parametrize("exchange", [by_a_link, by_a_directory])
def test_what_takes_the_name_of_a_target_is_told_and_the_target_given_its_name_back_is_complete(
    exchange: Callable[[Path, Path], None], step: str, source: Path, target: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own(mine := tmp_path / "mine")

    def exchanged(*_: Any) -> None:
        target.rename(tmp_path / "taken")
        exchange(target, mine)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(f"dist_convert.{step}", exchanged)
        assert convert(source, target) == 1
    error = capsys.readouterr().err
    assert "something else has taken the name of the finished target" in error
    assert f"  file:     {target}\n" in error
    assert (mine / "diary").read_text() == (target / "diary").read_text() == TEXT
    target.rename(tmp_path / "moved")
    (tmp_path / "taken").rename(target)
    assert convert(source, target) == 0
    assert "is complete already" in capsys.readouterr().err
    assert os.listdir(target.parent) == ["out"]


def test_a_directory_above_the_target_that_is_renamed_is_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "above").mkdir()

    def renamed(*_: Any) -> None:
        (tmp_path / "above").rename(tmp_path / "taken")

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("dist_convert.move.convert.publish", renamed)
        assert convert(source, tmp_path / "above" / "out") == 1
    error = capsys.readouterr().err
    assert "something else has taken the name of the finished target" in error
    assert "  found:    nothing\n" in error
    (tmp_path / "taken").rename(tmp_path / "above")
    assert convert(source, tmp_path / "above" / "out") == 0
    assert "is complete already" in capsys.readouterr().err


@pytest.mark.parametrize("name", [TRACKER, ARGS])
def test_a_link_that_takes_the_name_of_a_file_beside_a_target_is_told(
    name: str, target: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MODEL)

    def exchanged(_: Path) -> None:
        (target / name).unlink()
        (target / name).symlink_to(victim)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dist_convert.write.commit, "remove_journal", exchanged)
        assert to_megatron(tmp_path / "hf", target) == 1
    assert f"  file:     {target / name}\n" in capsys.readouterr().err
    assert victim.read_text() == TEXT


def test_an_empty_directory_that_gets_the_name_of_what_waits_aside_stays(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(source, target) == 0
    before, set_note = hashes_below(target), dist_convert.write.commit.set_note
    aside = target.with_name("out.replaced")

    def at_last(*words: Any) -> None:
        set_note(*words)
        aside.mkdir(mode=0o711)

    monkeypatch.setattr(dist_convert.write.commit, "set_note", at_last)
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 1
    assert "found:    File exists\n" in capsys.readouterr().err
    assert hashes_below(target) == before
    assert aside.stat().st_mode & 0o777 == 0o711


def test_what_takes_the_targets_place_at_the_end_keeps_its_mode(
    source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine := tmp_path / "mine").mkdir(mode=0o700)
    remove = dist_convert.write.commit.remove

    def then_exchanged(root: Directory, name: str) -> None:
        remove(root, name)
        if os.listdir(root / ".journal") == ["identity.json"]:
            root.path.rename(tmp_path / "taken")
            target.symlink_to(mine)

    monkeypatch.setattr(dist_convert.write.commit, "remove", then_exchanged)
    convert(source, target)
    assert (tmp_path / "taken" / "conversion.json").exists()
    assert mine.stat().st_mode & 0o777 == 0o700


def test_what_waits_aside_and_is_changed_there_is_kept_and_named(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(source, target) == 0
    remove_leftovers = dist_convert.move.convert.remove_leftovers

    def after_a_change(*words: Any) -> str:
        added_to(target.with_name("out.replaced"))
        return remove_leftovers(*words)

    monkeypatch.setattr(dist_convert.move.convert, "remove_leftovers", after_a_change)
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 0
    assert f"warning: {target}.replaced was changed since it was moved aside, and is kept" in capsys.readouterr().err
    assert (target.with_name("out.replaced") / "diary").read_text() == TEXT
    assert not (target / ".journal").exists()


def test_what_takes_the_name_of_what_waits_aside_before_that_is_removed_is_kept_and_named(
    source: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(source, target) == 0
    own(mine := tmp_path / "mine")
    aside, is_moved_aside = target.with_name("out.replaced"), dist_convert.write.commit.is_moved_aside

    def then_exchanged(*words: Any) -> bool:
        answer = is_moved_aside(*words)
        if aside.exists():
            aside.rename(tmp_path / "taken")
            mine.rename(aside)
        return answer

    monkeypatch.setattr(dist_convert.write.commit, "is_moved_aside", then_exchanged)
    assert convert(source, target, "--overwrite", "--target-params-dtype", "fp32") == 0
    assert f"warning: {aside} was changed since it was moved aside, and is kept" in capsys.readouterr().err
    assert (aside / "diary").read_text() == TEXT
    assert (tmp_path / "taken" / "conversion.json").exists()
    assert not (target / ".journal").exists()


def test_no_directory_stays_open_whether_a_conversion_ends_or_is_refused(source: Path, target: Path) -> None:
    def opened() -> list[str]:
        links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        return [path for path in map(os.path.realpath, links) if path.startswith(str(target.parent))]

    own(target.with_name("out.partial"))
    assert (convert(source, target), opened()) == (1, [])
    target.with_name("out.partial").rename(target.with_name("moved"))
    for more in ((), (), ("--overwrite",)):
        assert (convert(source, target, *more), opened()) == (0, [])


def test_a_target_that_is_a_file_system_of_its_own_is_told_before_the_first_byte(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.mkdir()
    for words in (["-t", "tmpfs", "dist-convert-test"], ["--bind", str(target.parent)]):
        with mounted(*words, str(target)):
            for more in ([], ["--dry-run"]):
                assert convert(source, target, *more) == 1
                assert "found:    a mount point" in capsys.readouterr().err
        assert os.listdir(target.parent) == ["out"]
    with mounted("-t", "tmpfs", "dist-convert-test", str(target)):
        assert convert(source, target / "model") == 0


@pytest.mark.parametrize("to", ["huggingface", "torch"])
def test_a_source_under_another_name_of_a_bind_mount_is_not_replaced(
    to: str, source: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(target), "--to", to, "--device", "cpu"]) == 0
    before = hashes_below(target)
    (tmp_path / "alias").mkdir()
    with mounted("--bind", str(target.parent), str(tmp_path / "alias")):
        again = ["convert", str(target), str(tmp_path / "alias/out"), "--to", to, "--overwrite", "--device", "cpu"]
        assert main([*again, "--target-params-dtype", "fp32"]) == 2
        assert "the source lies where the target is made" in capsys.readouterr().err
        inside = ["convert", str(target), str(tmp_path / "alias/out/new"), "--to", "huggingface", "--device", "cpu"]
        if to == "huggingface":
            assert main(inside) == 2
            assert "the target lies in its own source" in capsys.readouterr().err
    assert hashes_below(target) == before


def test_a_target_that_an_overlay_does_not_rename_is_moved_away_and_the_same_command_ends(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "dist-convert-test", str(tmp_path / "disk")):
        layers = {name: tmp_path / "disk" / name for name in ("lower", "upper", "work", "merged")}
        for layer in layers.values():
            layer.mkdir()
        assert convert(source, layers["lower"] / "out") == 0
        options = ",".join(f"{name}dir={layers[name]}" for name in ("lower", "upper", "work"))
        target, capture = layers["merged"] / "out", ["--overwrite", "--target-params-dtype", "fp32"]
        with mounted("-t", "overlay", "overlay", "-o", f"{options},redirect_dir=off", str(layers["merged"])):
            assert convert(source, target, *capture) == 1
            assert "remedy:   move away what is there, then start the same command again" in capsys.readouterr().err
            shutil.copytree(target, layers["merged"] / "old")
            shutil.rmtree(target)
            assert convert(source, target, *capture) == 0
            assert sorted(os.listdir(layers["merged"])) == ["old", "out"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_is_mounted_inside_of_what_would_be_replaced_stays_and_unmounted_lets_it_be_replaced(
    name: str, left: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own(tmp_path / "mine")
    assert go_on(unfinished, left) == 0
    shutil.copytree(unfinished / "place" / "out.partial", left)
    (left / "resumable").unlink()
    inside = left.with_name(name) / "config.json"
    inside.unlink()
    inside.mkdir()
    with mounted("--bind", str(tmp_path / "mine"), str(inside)):
        for more in ([], ["--dry-run"]):
            assert go_on(unfinished, left, "--overwrite", "--target-params-dtype", "fp32", *more) == 1
            error = capsys.readouterr().err
            assert f"  file:     {inside}\n" in error
            assert "  remedy:   unmount it, then start the same command again" in error
        with held(left.parent) as directory, pytest.raises(OSError, match="is mounted there"):
            remove(directory, name)
    assert (tmp_path / "mine" / "diary").read_text() == TEXT
    assert go_on(unfinished, left, "--overwrite", "--target-params-dtype", "fp32") == 0
    assert os.listdir(left.parent) == ["out"]


@pytest.mark.parametrize("leads_to", ["nothing", "an empty directory"])
def test_a_link_is_no_iteration_s_directory(
    leads_to: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MODEL)
    target.mkdir()
    if leads_to != "nothing":
        (target / "elsewhere").mkdir()
    (target / "iter_0000001").symlink_to("elsewhere")
    assert to_megatron(tmp_path / "hf", target) == 1
    assert "the target is a file or a link" in capsys.readouterr().err
    assert not (target / "iter_0000001.partial").exists()


def test_a_target_is_its_owner_s_alone_until_it_is_complete(
    left: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert left.stat().st_mode & 0o777 == 0o700
    old = os.umask(0o027)
    try:
        left.rename(left.with_name("first.partial"))
        assert go_on(unfinished, left) == 0
    finally:
        os.umask(old)
    out = left.with_name("out")
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert json.loads((out / "conversion.json").read_text())["format"] == 2
