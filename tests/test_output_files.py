"""The target directory: what save_pretrained's users expect, complete under its name or not there at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

SMALL = Model(layers=2)
ALWAYS = [
    "README.md", "config.json", "conversion.json", "generation_config.json", "model.safetensors",
    "source_megatron_args.json",
]  # fmt: skip


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def header(file: Path) -> dict[str, Any]:
    """The header as the format's description says: its length in 8 bytes, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found: dict[str, Any] = json.loads(stream.read(length))
    return found


def names_by_offset(file: Path) -> list[str]:
    tensors = {name: entry for name, entry in header(file).items() if name != "__metadata__"}
    return sorted(tensors, key=lambda name: tensors[name]["data_offsets"])


def test_a_small_model_is_one_file_with_its_metadata_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2, pp=2))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert listing(tmp_path / "out") == ALWAYS
    assert listing(tmp_path) == ["in", "out"]


def test_every_file_says_that_it_holds_torch_tensors(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out", "--max-shard-size", "3KB") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("experts", [0, 2])
def test_tensors_are_in_the_order_of_the_layers(experts: int, tmp_path: Path) -> None:
    make(tmp_path / "in", Model(layers=2, experts=experts))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    one_expert = ["w1.weight", "w3.weight", "w2.weight"]
    moe = [f"block_sparse_moe.experts.{expert}.{name}" for expert in range(2) for name in one_expert]
    mlp = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    rest = ["block_sparse_moe.gate.weight", *moe] if experts else mlp
    layer = ["input_layernorm.weight", *attention, "post_attention_layernorm.weight", *rest]
    names = [f"model.layers.{number}.{name}" for number in range(2) for name in layer]
    expected = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    file = tmp_path / "out" / "model.safetensors"
    assert names_by_offset(file) == expected
    assert [name for name in header(file) if name != "__metadata__"] == expected


@pytest.mark.parametrize("size", ["0.5KB", "0.9KB", "1500", "3KB", "7KB", "5GB"])
@pytest.mark.parametrize(
    "model",
    [SMALL, Model(layers=2, experts=2), Model(layers=1, hidden=8, ffn=64)],
    ids=["llama", "mixtral", "wide"],
)
def test_files_and_index_are_those_of_save_pretrained(model: Model, size: str, tmp_path: Path) -> None:
    expected = make(tmp_path / "in", model)
    assert convert(tmp_path / "in", tmp_path / "out", "--max-shard-size", size) == 0
    whole_order = {name: expected[name] for name in _whole_order(tmp_path)}
    limit = size if size.endswith("B") else int(size)
    split = split_torch_state_dict_into_shards(
        whole_order, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(split.filename_to_tensors)
    for file, names in split.filename_to_tensors.items():
        assert names_by_offset(tmp_path / "out" / file) == names
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == split.is_sharded
    if split.is_sharded:
        found = json.loads(index.read_text())
        assert found["weight_map"] == split.tensor_to_filename
        assert found["metadata"]["total_size"] == split.metadata["total_size"]
        assert found["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert_same(read_tensors(tmp_path / "out"), expected)


def _whole_order(tmp_path: Path) -> list[str]:
    """The tensors of one file, in their order."""
    assert convert(tmp_path / "in", tmp_path / "whole") == 0
    return names_by_offset(tmp_path / "whole" / "model.safetensors")


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, pp=2)], ids=str)
def test_a_tied_head_is_left_out_and_no_rotary_frequencies_are_written(grid: Grid, tmp_path: Path) -> None:
    model = Model(layers=2, tied=True)
    shards = megatron_shards(model, hf_tensors(model), grid)
    shards[min(shards)][0]["rotary_pos_emb.inv_freq"] = torch.ones(2)
    save(tmp_path / "in", shards, training_args(model, grid))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    names = names_by_offset(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in names
    assert [name for name in names if "inv_freq" in name] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_new_target_in_a_new_folder_and_an_empty_one_need_no_flag(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "in", tmp_path / "empty") == 0
    assert convert(tmp_path / "in", tmp_path / "a" / "b" / "new") == 0
    assert listing(tmp_path / "empty") == listing(tmp_path / "a" / "b" / "new") == ALWAYS


def test_a_link_to_an_empty_directory_is_filled(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert listing(tmp_path / "out") == ALWAYS


def test_the_working_directory_itself_can_be_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert convert(tmp_path / "in", Path()) == 0
    assert listing(tmp_path / "out") == ALWAYS


def test_a_relative_target_is_made_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", SMALL)
    monkeypatch.chdir(tmp_path)
    assert convert(Path("in"), Path("out")) == 0
    assert listing(tmp_path / "out") == ALWAYS


def test_overwriting_replaces_every_file_of_an_earlier_target(tmp_path: Path) -> None:
    make(tmp_path / "first", SMALL, seed=1)
    expected = make(tmp_path / "second", SMALL, seed=2)
    assert convert(tmp_path / "first", tmp_path / "out", "--max-shard-size", "3KB") == 0
    assert convert(tmp_path / "second", tmp_path / "out", "--overwrite") == 0
    assert listing(tmp_path / "out") == ALWAYS
    assert_same(read_tensors(tmp_path / "out"), expected)
    assert listing(tmp_path) == ["first", "out", "second"]


def test_overwriting_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert listing(tmp_path) == ["in", "out"]


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=str)
def test_a_directory_of_the_users_own_where_the_target_is_made_is_refused_and_kept(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 1
    assert f"{tmp_path}/out.partial" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years of work"
    assert listing(tmp_path) == ["in", "out.partial"]


def test_a_conversion_that_fails_leaves_the_earlier_target_as_it_was(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", SMALL)
    large = megatron_shards(SMALL, {name: tensor * 1e9 for name, tensor in expected.items()})
    save(tmp_path / "large", large, training_args(SMALL))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert convert(tmp_path / "large", tmp_path / "out", "--overwrite", "--target-params-dtype", "fp16") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "out.replaced").exists()


def test_a_target_that_holds_something_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "the target directory is not empty" in message
    assert f"{tmp_path}/out" in message
    assert "choose another target" in message
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert listing(tmp_path / "out") == ["notes.txt"]


def test_a_model_that_no_conversion_made_is_not_even_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "out" / "conversion.json").unlink()
    before = listing(tmp_path / "out")
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite") == 1
    assert "the target directory was not made by a conversion, so it is not replaced" in capsys.readouterr().err
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_target_that_holds_files_of_others_is_not_overwritten(
    dry_run: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "out" / "evaluation.json").write_text("mine")
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite", *["--dry-run"] * dry_run) == 1
    printed = capsys.readouterr().err
    assert "the target holds files that no conversion has made, so it is not replaced" in printed
    assert "found:    evaluation.json\n" in printed
    assert (tmp_path / "out" / "evaluation.json").read_text() == "mine"
    (tmp_path / "out" / "evaluation.json").unlink()
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite", *["--dry-run"] * dry_run) == 0
    assert f"warning: {tmp_path}/out will be replaced; an earlier conversion made it\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a link", "a pipe", "runs/logs", "resumable", ".journal/notes"])
def test_nor_is_one_that_holds_anything_else_of_others(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    path = tmp_path / "out" / name
    if name == "a link":
        path.symlink_to(tmp_path / "nowhere")
    elif name == "a pipe":
        os.mkfifo(path)
    else:
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "runs/logs" else path.write_text("mine")
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite") == 1
    assert f"found:    {name.split('/')[0]}" in capsys.readouterr().err
    assert os.path.lexists(path)


def test_a_directory_that_is_no_model_is_not_even_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert convert(tmp_path / "in", tmp_path / "out", "--overwrite") == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_target_that_is_a_file_is_refused_and_kept(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", SMALL)
    (tmp_path / "out").write_text("mine")
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 1
    assert "the target is a file or a link" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("target", ["in", "in/iter_0000004", "."], ids=["root", "iteration", "parent"])
def test_a_target_that_holds_the_source_is_never_overwritten(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make(tmp_path / "all" / "in", SMALL)
    for directory in ("all", "all/in", "all/in/iter_0000004"):
        (tmp_path / directory / "config.json").write_text("{}")
    source = tmp_path / "all" / "in"
    assert convert(source, tmp_path / "all" / target, "--overwrite") != 0
    assert "Traceback" not in capsys.readouterr().err
    assert convert(source, tmp_path / "out") == 0
    assert_same(read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("ending", [".partial", ".replaced"])
def test_a_source_under_a_name_that_the_conversion_uses_itself_is_never_removed(ending: str, tmp_path: Path) -> None:
    source = tmp_path / f"out{ending}"
    expected = make(source, SMALL)
    assert convert(source, tmp_path / "out") in (0, 2)
    assert convert(source, tmp_path / "out", "--overwrite") in (0, 2)
    assert convert(source, tmp_path / "elsewhere") == 0
    assert_same(read_tensors(tmp_path / "elsewhere"), expected)
