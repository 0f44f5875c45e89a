"""When a target may be made, what is made before any value is written, and how the result gets its name."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dist_convert.errors import NotEnoughSpace, TargetError, TargetExists, UsageError
from dist_convert.write.commit import check_target, commit, remove_leftovers
from dist_convert.write.files import held
from dist_convert.write.manifest import manifest_of
from dist_convert.write.partial import look


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


@pytest.fixture
def partial(target: Path) -> Path:
    """A finished conversion that has no name yet."""
    path = target.with_name("model.partial")
    write(path, "config.json", "new")
    write(path / ".journal", "identity.json", "{}")
    return path


def write(directory: Path, name: str, text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def write_model(directory: Path) -> None:
    """What says that a conversion has made a directory."""
    write(directory, "conversion.json", json.dumps({"files": {"config.json": {}}}))


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def name_it(partial: Path, target: Path, replaces: str = "") -> None:
    """Give a finished conversion its name, and do what is left then."""
    with held(target.absolute().parent) as parent, held(partial, parent) as directory:
        commit(directory, parent, target, replaces=replaces)
        remove_leftovers(replace(directory, path=target), parent, {})


def check(target: Path, source: Path, *, overwrite: bool = False, needed_bytes: int = 1) -> int:
    return check_target(
        target,
        source,
        manifest_of(target),
        overwrite=overwrite,
        needed_bytes=needed_bytes,
    )


def test_a_new_target_is_free_to_be_made_and_checking_makes_nothing(target: Path, source: Path) -> None:
    space = os.statvfs(source)
    free_bytes = check(target, source)
    assert abs(free_bytes - space.f_bavail * space.f_frsize) < 10 << 30  # others write here too
    assert not target.parent.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_directory_may_become_the_target(target: Path, source: Path, overwrite: bool) -> None:
    target.mkdir(parents=True)
    assert check(target, source, overwrite=overwrite) > 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(target: Path, source: Path, overwrite: bool) -> None:
    write(target.parent, "model", "a file")
    with pytest.raises(TargetExists) as caught:
        check(target, source, overwrite=overwrite)
    assert caught.value.file == str(target)


def test_a_directory_with_something_in_it_needs_overwrite(target: Path, source: Path) -> None:
    write(target, "config.json", "{}")
    write_model(target)
    with pytest.raises(TargetExists) as caught:
        check(target, source)
    assert (caught.value.file, caught.value.found) == (str(target), "2 files and directories")
    assert check(target, source, overwrite=True) > 0


def test_a_directory_that_holds_no_model_is_not_replaced_even_with_overwrite(target: Path, source: Path) -> None:
    write(target, "thesis.tex", "")
    write(target, "data.csv", "")
    with pytest.raises(TargetExists) as caught:
        check(target, source, overwrite=True)
    assert caught.value.found == "data.csv, thesis.tex"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}'])
def test_a_file_that_only_has_the_name_of_a_manifest_does_not_make_a_directory_replaceable(
    text: str, target: Path, source: Path
) -> None:
    write(target, "conversion.json", text)
    with pytest.raises(TargetExists, match="the target directory was not made by a conversion"):
        check(target, source, overwrite=True)


@pytest.mark.parametrize("inside", [".", "iter_0000100", "deep/iter_0000100"])
def test_a_target_that_holds_the_checkpoint_is_refused(target: Path, inside: str) -> None:
    write_model(target)
    checkpoint = target / inside
    checkpoint.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError) as caught:
        check(target, checkpoint, overwrite=True)
    assert caught.value.found == str(checkpoint)


def test_a_link_to_the_checkpoint_s_directory_is_seen_through(target: Path, source: Path) -> None:
    write_model(source)
    target.parent.mkdir()
    target.symlink_to(source)
    with pytest.raises(UsageError, match="source lies where"):
        check(target, source / "iter_0000100", overwrite=True)


@pytest.mark.parametrize("inside", ["iter_0000001", "deep/hf"])
def test_a_target_inside_its_source_is_refused(inside: str, source: Path) -> None:
    with pytest.raises(UsageError, match="the target lies in its own source") as caught:
        check(source / inside, source, overwrite=True)
    assert caught.value.file == str(source / inside)


def test_a_directory_beside_the_checkpoint_with_a_longer_name_is_no_part_of_it(source: Path) -> None:
    assert check(source.with_name("checkpoint-hf"), source) > 0


def test_a_file_system_that_is_too_small_is_told_with_both_sizes(target: Path, source: Path) -> None:
    with pytest.raises(NotEnoughSpace) as caught:
        check(target, source, needed_bytes=1 << 60)
    assert caught.value.expected == "1.15e+06 TB (1,152,921,504,606,846,976 bytes)"
    assert caught.value.found.endswith(" bytes)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_named(target: Path, source: Path) -> None:
    target.parent.mkdir(mode=0o500)
    with pytest.raises(TargetError) as caught:
        check(target, source)
    assert caught.value.found == f"{target.parent} is not a directory, or is write-protected"


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty directory"])
def test_the_partial_directory_becomes_the_target(target: Path, partial: Path, there: bool) -> None:
    if there:
        target.mkdir()
    name_it(partial, target)
    assert (target / "config.json").read_text() == "new"
    assert beside(target) == ["model"]


def test_with_overwrite_nothing_of_the_old_target_is_left(target: Path, partial: Path) -> None:
    write(target, "config.json", "old")
    write(target, "model-00001-of-00002.safetensors", "old")
    name_it(partial, target, look(target))
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert beside(target) == ["model"]


def test_what_an_interrupted_replacement_left_aside_is_never_removed(target: Path, source: Path) -> None:
    write(target.with_name("model.replaced"), "config.json", "perhaps the only copy")
    with pytest.raises(TargetExists) as caught:
        check(target, source, overwrite=True)
    assert caught.value.file == str(target.with_name("model.replaced"))


@pytest.mark.parametrize("name", ["model.partial", "model.replaced"])
def test_a_source_where_the_target_is_made_is_refused(target: Path, name: str) -> None:
    inside = target.with_name(name) / "iter_0000100"
    inside.mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        check(target, inside, overwrite=True)
    assert caught.value.file == str(target.with_name(name))


def test_a_target_that_appeared_meanwhile_is_left_alone_without_overwrite(target: Path, partial: Path) -> None:
    write(target, "config.json", "someone else's")
    with pytest.raises(TargetExists) as caught:
        name_it(partial, target)
    assert caught.value.file == str(target)
    assert (target / "config.json").read_text() == "someone else's"
    assert (partial / "config.json").read_text() == "new"
    assert beside(target) == ["model", "model.partial"]


def test_a_target_may_be_named_relative_to_the_working_directory(
    target: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)
    name_it(Path("model.partial"), Path("model"))
    assert (target / "config.json").read_text() == "new"


def test_a_link_to_a_model_is_replaced_and_the_model_it_leads_to_is_kept(target: Path, partial: Path) -> None:
    elsewhere = target.parent / "elsewhere"
    write(elsewhere, "config.json", "old")
    target.symlink_to(elsewhere)
    name_it(partial, target, look(target))
    assert (target / "config.json").read_text() == "new"
    assert (elsewhere / "config.json").read_text() == "old"
    assert beside(target) == ["elsewhere", "model"]
