"""`--verify` of a conversion: a target that is not its source never gets its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.formats.megatron import geometry
from dist_convert.formats.megatron.geometry import CutRow, ShardBox, shard_boxes
from dist_convert.read.file_reader import FileReader
from dist_convert.records import View
from dist_convert.write.files import FileWriter, Written
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import convert
from tests.to_megatron import make_hf, to_megatron

MIXTRAL = Model(experts=4, groups=4, layers=2)


@pytest.mark.parametrize("how", ["--verify", "--verify=full", "--verify=sample"])
def test_a_right_conversion_is_verified_and_gets_its_name(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", MIXTRAL, Grid(tp=2, ep=2))
    assert convert(tmp_path / "megatron", tmp_path / "hf", how) == 0
    assert to_megatron(tmp_path / "hf", tmp_path / "back", how, grid=Grid(tp=4, pp=2)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if ": verified, " in line]
    ends = "1/16 of the blocks, and the first and last block of every tensor: 100 % of all elements"
    sample = f" (a sample: {ends})" if "sample" in how else ""
    assert said == [
        f"{tmp_path / name}: verified, 41 tensors with 12,400 elements and 22 config fields equal the source{sample}"
        for name in ("hf", "back/iter_0000001")
    ]


def test_a_tied_copy_in_a_dtype_of_its_own_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, grid = Model(tied=True), Grid(pp=2)
    shards = megatron_shards(model, hf_tensors(model), grid)
    [last] = [chunks[-1] for chunks in shards.values() if "output_layer.weight" in chunks[-1]]
    copy = last["output_layer.weight"]
    assert copy is not None
    last["output_layer.weight"] = copy.float()
    save(tmp_path / "megatron", shards, training_args(model, grid))
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--verify", "--target-params-dtype", "keep") == 0
    last["output_layer.weight"] = copy.float() * 1.5
    save(tmp_path / "other", shards, training_args(model, grid))
    assert convert(tmp_path / "other", tmp_path / "other-hf", "--verify", "--target-params-dtype", "keep") == 1
    assert "is not the embedding that the args tie it to" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "other"), str(tmp_path / "hf")]) == 1
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_without_the_flag_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "megatron")
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert "verified" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "keep"])
def test_rounded_values_are_right_in_both_directions(dtype: str, tmp_path: Path) -> None:
    make(tmp_path / "megatron", Model(), Grid(tp=2))
    flags = ("--target-params-dtype", dtype, "--verify")
    assert convert(tmp_path / "megatron", tmp_path / "hf", *flags) == 0
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *flags, grid=Grid(pp=2)) == 0


def test_a_job_file_has_the_flag_as_true_or_as_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "megatron")
    for name, value in (("full", "true"), ("share", "sample"), ("none", "false")):
        job = tmp_path / f"{name}.yaml"
        job.write_text(f"load-path: {tmp_path}/megatron\nsave-path: {tmp_path}/{name}\nverify: {value}\n")
        assert main(["megatron-to-hf", "--config", str(job), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert [f"{tmp_path}/{name}: verified" in said for name in ("full", "share", "none")] == [True, True, False]


def gate_and_up_exchanged(cut: CutRow, part: int) -> Iterator[ShardBox]:
    """A mistake of the catalog, which a conversion and both sides of its verification share."""
    return shard_boxes(cut, 1 - part if len(cut.row.parts) == 2 else part)


@pytest.mark.parametrize("direction", ["to hf", "to megatron"])
def test_a_mistake_in_the_plan_is_found_and_the_target_stays_without_its_name(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make(tmp_path / "megatron", Model(), Grid(tp=2))
    make_hf(tmp_path / "hf", Model(), tensors)
    monkeypatch.setattr(geometry, "shard_boxes", gate_and_up_exchanged)
    target = tmp_path / "out" if direction == "to hf" else tmp_path / "out" / "iter_0000001"
    if direction == "to hf":
        code = convert(tmp_path / "megatron", target, "--verify")
    else:
        code = to_megatron(tmp_path / "hf", tmp_path / "out", "--verify", grid=Grid(tp=2))
    error = capsys.readouterr().err
    assert code == 1
    assert "element [0, 0] was not taken from its place in Megatron's layout" in error
    assert "model.layers.0.mlp.gate_proj.weight" in error
    assert not target.exists()
    assert target.with_name(target.name + ".partial").is_dir()
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize("direction", ["to hf", "to megatron"])
def test_one_bit_that_was_written_wrong_is_found(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "megatron", Model(), Grid(tp=2))
    make_hf(tmp_path / "hf", Model())
    write, read_piece = FileWriter.write, FileReader.read_piece

    def is_meant(view: View) -> bool:
        return "layers.2." in view.tensor and ("o_proj" in view.tensor or "linear_proj" in view.tensor)

    def wrong(self: FileWriter, view: View, data: memoryview) -> Written:
        data[0] ^= is_meant(view)
        return write(self, view, data)

    def wrong_piece(self: FileReader, view: View, first_byte: int) -> tuple[memoryview, int | None]:
        piece, checksum = read_piece(self, view, first_byte)
        piece[0] ^= is_meant(view)
        return piece, checksum

    monkeypatch.setattr(FileWriter, "write", wrong)
    monkeypatch.setattr(FileReader, "read_piece", wrong_piece)
    if direction == "to hf":
        assert convert(tmp_path / "megatron", tmp_path / "out", "--verify") == 1
    else:
        assert to_megatron(tmp_path / "hf", tmp_path / "out", "--verify") == 1
    error = capsys.readouterr().err
    assert "model.layers.2.self_attn.o_proj.weight: A and B differ in 1 element, first at [0, 0]: " in error


def test_a_budget_that_holds_a_conversion_and_not_its_check_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    make(tmp_path / "megatron")
    assert convert(tmp_path / "megatron", tmp_path / "small", "--verify", "--max-memory-per-rank", "26MB") == 2
    assert not [path for path in tmp_path.iterdir() if "small" in path.name]
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--verify", "--max-memory-per-rank", "30MB") == 0
