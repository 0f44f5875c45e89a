"""Pipes, devices and links in place of files: nothing waits or reads for ever, and no foreign text is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dist_convert
from dist_convert.errors import CorruptFile
from tests.attacks.harmless import MOST_MEMORY_BYTES, MOST_SECONDS, SECRET, assert_harmless, run
from tests.attacks.watched import Seen, Watcher
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, save, training_args
from tests.meta_checkpoints import make_meta
from tests.to_megatron import make_hf

TRACKER = "latest_checkpointed_iteration.txt"
SHARD = "iter_0000004/mp_rank_00/model_optim_rng.pt"
SHARD_OF_DCP = "shard-00001-model-00001-of-00001.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "vocab.txt")
MEGATRON_FILES = (TRACKER, SHARD, *(f"tokenizer/{name}" for name in TOKENIZER_FILES))
HF_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "generation_config.json", *TOKENIZER_FILES)  # fmt: skip


def make_pipe(path: Path) -> None:
    """Whose reader waits for a writer."""
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    """Which has no end."""
    path.symlink_to("/dev/zero")


def make_device(path: Path) -> None:
    """As the link, without one."""
    try:
        os.mknod(path, 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device needs root")


def make_hole(path: Path) -> None:
    """A file of a terabyte that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": make_pipe, "a link to a device": link_to_device, "a device": make_device, "a hole": make_hole,
}  # fmt: skip


def put(path: Path, special: str) -> None:
    """Put something special in a file's place."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    SPECIAL[special](path)


def assert_answered(seen: Seen) -> None:
    """It ended by itself, soon, with success or an error of ours."""
    assert seen.exit_code in (0, 1, 2), seen
    assert "Traceback" not in seen.printed, seen.printed
    assert "internal error" not in seen.printed
    assert seen.seconds < MOST_SECONDS
    assert seen.peak_bytes < MOST_MEMORY_BYTES


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("file", MEGATRON_FILES)
def test_a_special_file_in_a_megatron_checkpoint_keeps_nobody_waiting(
    file: str, special: str, watched: Watcher, tmp_path: Path
) -> None:
    make(tmp_path / "source", Model())
    put(tmp_path / "source" / file, special)
    for seen in (watched.run("inspect", str(tmp_path / "source")), run(watched, "megatron-to-hf", tmp_path)):
        assert_answered(seen)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("file", HF_FILES)
def test_a_special_file_in_a_hugging_face_directory_keeps_nobody_waiting(
    file: str, special: str, watched: Watcher, tmp_path: Path
) -> None:
    make_hf(tmp_path / "source", Model())
    put(tmp_path / "source" / file, special)
    for seen in (watched.run("inspect", str(tmp_path / "source")), run(watched, "hf-to-megatron", tmp_path)):
        assert_answered(seen)
        assert_harmless(seen, tmp_path)


@pytest.mark.parametrize("special", ["a pipe", "a link to a device"])
@pytest.mark.parametrize("file", ["consolidated.00.pth", "params.json", ".metadata", "__0_0.distcp", SHARD_OF_DCP])
def test_a_special_file_in_files_of_meta_or_of_torch_keeps_nobody_waiting(
    file: str, special: str, watched: Watcher, tmp_path: Path
) -> None:
    (make_meta if file in ("consolidated.00.pth", "params.json") else make_hf)(tmp_path / "source")
    put(tmp_path / "source" / file, special)
    (tmp_path / "source" / "model.safetensors").unlink(missing_ok=True)
    seen = watched.run("inspect", str(tmp_path / "source"))
    assert_answered(seen)
    assert seen.exit_code == 1


@pytest.mark.parametrize("file", [TRACKER, SHARD])
def test_what_a_link_in_a_megatron_checkpoint_leads_to_is_not_shown(
    file: str, watched: Watcher, tmp_path: Path
) -> None:
    make(tmp_path / "source", Model())
    (tmp_path / "private").write_text(f"{SECRET}\n" * 100)
    (tmp_path / "source" / file).unlink()
    (tmp_path / "source" / file).symlink_to(tmp_path / "private")
    for seen in (watched.run("inspect", str(tmp_path / "source")), run(watched, "megatron-to-hf", tmp_path)):
        assert_answered(seen)
        assert seen.exit_code in (1, 2)
        assert SECRET not in seen.printed
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("start", [b"IQ== 0\nIg== 1\n", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"])
def test_a_tokenizer_that_is_a_hole_behind_a_good_start_costs_little(
    start: bytes, watched: Watcher, tmp_path: Path
) -> None:
    make(tmp_path / "source", Model())
    put(tmp_path / "source" / "tokenizer" / "tokenizer.model", "a hole")
    with (tmp_path / "source" / "tokenizer" / "tokenizer.model").open("r+b") as file:
        file.write(start)
    seen = run(watched, "megatron-to-hf", tmp_path)
    assert_answered(seen)
    assert "too large for its kind" in seen.printed, seen.printed


@pytest.mark.parametrize("content", [f"{SECRET}\n" * 100, json.dumps({"a": SECRET})])
@pytest.mark.parametrize("argument", ["tokenizer_model", "vocab_file"])
def test_what_the_args_name_as_a_tokenizer_is_neither_shown_nor_copied_if_it_is_none(
    argument: str, content: str, watched: Watcher, tmp_path: Path
) -> None:
    (tmp_path / "private").write_text(content)
    args = training_args(Model(), **{argument: str(tmp_path / "private")})
    save(tmp_path / "source", megatron_shards(Model(), hf_tensors(Model())), args)
    seen = run(watched, "megatron-to-hf", tmp_path)
    assert_answered(seen)
    assert seen.exit_code == 0, seen.printed
    assert SECRET not in seen.printed
    for path in (tmp_path / "target").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_links_in_a_megatron_checkpoint_to_shards_elsewhere_are_followed(watched: Watcher, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", Model())
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mp_rank_00").symlink_to(tmp_path / "elsewhere" / SHARD.rpartition("/")[0])
    seen = run(watched, "megatron-to-hf", tmp_path)
    assert seen.exit_code == 0, seen.printed


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_named_and_not_copied(file: str, tmp_path: Path) -> None:
    make_hf(tmp_path / "source")
    (tmp_path / "source" / file).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    with pytest.raises(CorruptFile, match="a pointer of Git LFS") as raised:
        dist_convert.convert(tmp_path / "source", tmp_path / "target", "huggingface")
    assert raised.value.file == str(tmp_path / "source" / file)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_pointer_of_git_lfs_in_place_of_a_rank_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "source", Model())
    (tmp_path / "source" / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptFile, match="a pointer of Git LFS"):
        dist_convert.convert(tmp_path / "source", tmp_path / "target", "huggingface")
