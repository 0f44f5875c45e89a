"""Megatron checkpoints and tokenizers made to do harm, converted under watch: nothing runs, all is refused cheaply."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attacks.harmless import ABSURD, SECRET, assert_harmless, assert_refused, assert_shown_without_harm, run
from tests.attacks.watched import Seen, Watcher
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, save, training_args

SHARD = "iter_0000004/mp_rank_00/model_optim_rng.pt"


def rewrite_zip(
    source: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write the file's records anew."""
    with zipfile.ZipFile(source / SHARD) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(source / SHARD, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zip_of_zeros(source: Path) -> None:
    """Compressed: 400 MB of zeros as the pickle, in 400 kB."""
    with (
        zipfile.ZipFile(source / SHARD, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(400):
            file.write(bytes(1 << 20))


def patch_all_sizes(source: Path, offset: int, value: int) -> None:
    """Overwrite a field of every entry of the zip's directory."""
    data = bytearray((source / SHARD).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", data, at + offset, value)
        at = data.find(b"PK\x01\x02", at + 4)
    (source / SHARD).write_bytes(data)


def args(**changes: Any) -> Callable[[Path], None]:
    def build(source: Path) -> None:
        model = Model()
        made = training_args(model)
        for name, value in changes.items():
            setattr(made, name, value)
        shutil.rmtree(source)
        save(source, megatron_shards(model, hf_tensors(model)), made)

    return build


MEGATRON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a zip that unpacks to a thousand times its size": (zip_of_zeros, "is not one that torch writes"),
    "compressed records": (
        lambda source: rewrite_zip(source, lambda _: None, zipfile.ZIP_DEFLATED), "is not one that torch writes"),
    "records that all lie in one place": (
        lambda source: patch_all_sizes(source, 42, 0), "is not one that torch writes"),
    "records that say they are 4 GB": (
        lambda source: patch_all_sizes(source, 24, 0xFFFFFFF0), "is not one that torch writes"),
    "records that lie past the end": (lambda source: patch_all_sizes(source, 42, 0x7FFFFFFF), "torch"),
    "a record that leads out": (
        lambda source: rewrite_zip(source, lambda r: r.update({"archive/../../evil": b"x"})), ""),
    "10^18 layers": (args(num_layers=ABSURD), "num_layers"),
    "layers that are a text": (args(num_layers="four"), "num_layers"),
    "a grid of 10^18": (args(tensor_model_parallel_size=ABSURD), f"tensor_model_parallel_size {ABSURD}"),
    "a pipeline of 10^18": (
        args(pipeline_model_parallel_size=ABSURD, num_layers=8), f"pipeline_model_parallel_size {ABSURD}"),
    "10000 layers of 10000 experts": (args(num_layers=10_000, num_experts=10_000), "impossible sizes"),
    "10^18 experts": (args(num_experts=ABSURD), "num_experts"),
    "a width of 10^30": (args(hidden_size=10**30), "hidden_size"),
    "a tracker of a gigabyte": (
        lambda source: os.truncate(source / "latest_checkpointed_iteration.txt", 1 << 30), "names no iteration"),
    "a tracker that leads out": (
        lambda source: (source / "latest_checkpointed_iteration.txt").write_text("../../outside"), "no iteration"),
}  # fmt: skip


@pytest.mark.parametrize("attack", MEGATRON)
def test_a_hostile_megatron_checkpoint_is_refused_at_little_cost(attack: str, watched: Watcher, tmp_path: Path) -> None:
    build, shown = MEGATRON[attack]
    make(tmp_path / "source", Model())
    build(tmp_path / "source")
    assert_shown_without_harm(watched.run("inspect", str(tmp_path / "source")), tmp_path)
    seen = run(watched, "megatron-to-hf", tmp_path)
    if attack == "a record that leads out":
        assert_harmless(seen, tmp_path)
        assert not (tmp_path / "evil").exists()
    else:
        assert_refused(seen, tmp_path, shown)


def test_a_pickle_that_imports_a_module_beside_it_does_not_find_it(watched: Watcher, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, Model())
    (source / "canary_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    saved = torch.load(source / SHARD, weights_only=False)
    torch.save(saved, source / SHARD)
    rewrite_zip(
        source,
        lambda records: records.update({name: b"ccanary_module\nrun\n." for name in records if "data.pkl" in name}),
    )
    assert_refused(run(watched, "megatron-to-hf", tmp_path), tmp_path, "not a checkpoint file")


def tokenizer_of(source: Path) -> Path:
    """A tokenizer inside a checkpoint's directory, with code that it asks to be run."""
    directory = source / "tokenizer"
    directory.mkdir()
    code = f"open({str(source.parent / 'canary')!r}, 'w').close()\nclass Evil: pass\n"
    (directory / "tokenization_evil.py").write_text(code)
    model = {"type": "WordLevel", "vocab": {str(number): number for number in range(29)}, "unk_token": "0"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def convert_with_tokenizer(watched: Watcher, root: Path) -> Seen:
    paths = ["--load-path", str(root / "source"), "--tokenizer", str(root / "source" / "tokenizer")]
    return watched.run("megatron-to-hf", *paths, "--save-path", str(root / "target" / "hf"), "--device", "cpu")


def test_remote_code_of_a_tokenizer_is_neither_run_nor_copied(watched: Watcher, tmp_path: Path) -> None:
    make(tmp_path / "source", Model())
    tokenizer_of(tmp_path / "source")
    seen = convert_with_tokenizer(watched, tmp_path)
    assert_harmless(seen, tmp_path)
    assert seen.exit_code == 0, seen.printed
    assert (tmp_path / "target" / "hf" / "tokenizer.json").is_file()
    assert [path for path in seen.opened if path.endswith(".py")] == []
    assert list((tmp_path / "target").rglob("*.py")) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/a.jinja"])
def test_a_tokenizer_file_that_links_out_is_not_copied_into_the_target(
    name: str, watched: Watcher, tmp_path: Path
) -> None:
    make(tmp_path / "source", Model())
    file = tokenizer_of(tmp_path / "source") / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "private").write_text(json.dumps({"a": SECRET}))
    file.symlink_to(tmp_path / "private")
    assert_refused(convert_with_tokenizer(watched, tmp_path), tmp_path, "outside the directory")
