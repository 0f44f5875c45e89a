"""A dry run says what each rank would do and writes nothing; it fails wherever the real run would not start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.converting import convert

SMALL = Model(layers=2)
#: Of SMALL's tensors: 2 x 29 x 16 in embedding and head, 1952 in each layer, 16 in the last norm; 2 bytes each.
WEIGHTS_BYTES = 2 * (2 * 29 * 16 + 2 * 1952 + 16)
REAL_AND_DRY = pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["real", "dry"])


def everything_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def small_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of 16 KiB: enough for the weights of SMALL (9.9 kB with header), not for those of four layers."""
    return make_disk("size=16k")


@pytest.fixture
def read_only_disk(make_disk: Callable[[str], Path]) -> Path:
    return make_disk("ro")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2, pp=2))
    before = everything_below(tmp_path)
    assert convert(tmp_path / "in", tmp_path / "new" / "out", "--dry-run", "--save-capacity-bins") == 0
    assert everything_below(tmp_path) == before


def test_a_dry_run_leaves_an_earlier_target_and_an_unfinished_one_as_they_are(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "out.partial" / ".journal").mkdir(parents=True)
    (tmp_path / "out.partial" / ".journal" / "identity.json").write_text("{}")
    (tmp_path / "out.partial" / "model.safetensors").write_text("half of a file")
    before = everything_below(tmp_path)
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run", "--overwrite") == 0
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_a_dry_run_lists_the_files_that_the_conversion_then_writes(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run", "--max-shard-size", size) == 0
    lines = capsys.readouterr().out.splitlines()
    assert convert(tmp_path / "in", tmp_path / "out", "--max-shard-size", size) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = {file.name: f"{file.stat().st_size / 1000:.3g} kB" for file in files}
    listed = {line.split()[-1]: " ".join(line.split()[:2]) for line in lines if line.endswith(".safetensors")}
    assert listed == sizes
    total = sum(file.stat().st_size for file in files) / 1000
    assert any(line.startswith(f"{total:.3g} kB to write to {tmp_path}/out, ") for line in lines)
    assert any(line.endswith(" free") for line in lines)


@pytest.mark.parametrize(
    ("to", "more"), [("torch_dist", ["--tp", "2", "--pp", "2"]), ("dcp", ["--max-shard-size", "3KB"])]
)
def test_a_dry_run_lists_the_files_of_a_distributed_checkpoint(
    to: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to, *more]
    assert main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert everything_below(tmp_path / "out") == []
    assert main(command) == 0
    files = (tmp_path / "out").rglob("*.distcp")
    sizes = {file.name: f"{file.stat().st_size / 1000:.3g} kB" for file in files}
    assert len(sizes) == 4
    assert {line.split()[-1]: " ".join(line.split()[:2]) for line in lines if line.endswith(".distcp")} == sizes


def test_a_dry_run_says_what_the_rank_reads_receives_writes_and_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make(tmp_path / "in", SMALL, Grid(tp=2))
    assert sum(tensor.numel() * 2 for tensor in expected.values()) == WEIGHTS_BYTES == 9696
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run", "--target-params-dtype", "fp32") == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:1] == ["rank"])
    assert lines[head].split()[:6] == ["rank", "group", "reads", "receives", "writes", "buffers"]
    cells = lines[head + 1].split()
    assert cells[:8] == ["0", "0", "9.7", "kB", "0", "B", "19.4", "kB"]
    assert "TP2 PP1" in lines[0]
    assert "LlamaForCausalLM" in lines[0]


def test_a_dry_run_ends_with_the_statement_that_nothing_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "dry run: the conversion would start; nothing was written"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-memory-per-rank", "1MB"), "the memory budget does not hold one step"),
        (("--ckpt-dir-name", "iter_0000099"), "the iteration does not exist"),
        (("--true-vocab-size", "33"), "the vocabulary size of --true-vocab-size does not fit the embedding"),
    ],
)
def test_a_dry_run_fails_where_the_conversion_would_not_start(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run", *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_a_dry_run_fails_on_a_checkpoint_that_lacks_a_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    (tmp_path / "in" / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run") == 1
    assert "mp_rank_01" in capsys.readouterr().err


def test_a_dry_run_fails_where_a_target_of_other_flags_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert convert(tmp_path / "in", tmp_path / "out", "--dry-run", "--instruct") == 1
    assert "--overwrite" in capsys.readouterr().err


@REAL_AND_DRY
def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    flags: tuple[str, ...], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=4))
    assert convert(tmp_path / "in", small_disk / "out", *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("not enough free space for the target\n")
    assert f"file:     {small_disk}/out" in err
    assert "found:    16.4 kB free (16,384 bytes)" in err
    assert "remedy:   free space" in err
    assert everything_below(small_disk) == []


def test_a_disk_that_fills_up_during_the_conversion_is_no_internal_error(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weights fit; the training arguments, as text, do not.
    make(tmp_path / "in", SMALL, notes_of_the_training_run="x" * 20_000)
    assert convert(tmp_path / "in", small_disk / "out") == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert not (small_disk / "out").exists()


@REAL_AND_DRY
def test_a_read_only_file_system_is_seen_before_anything_is_written(
    flags: tuple[str, ...], read_only_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", read_only_disk / "out", *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("the target cannot be made here\n")
    assert str(read_only_disk) in err


@REAL_AND_DRY
def test_a_directory_without_permission_is_seen_before_anything_is_written(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user (root) may write everywhere")
    assert convert(tmp_path / "in", tmp_path / "locked" / "out", *flags) == 1
    assert f"no permission to write in {tmp_path}/locked" in capsys.readouterr().err


@REAL_AND_DRY
def test_a_target_below_a_file_is_refused(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file").chmod(0o777)
    assert convert(tmp_path / "in", tmp_path / "file" / "out", *flags) == 1
    assert f"{tmp_path}/file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
