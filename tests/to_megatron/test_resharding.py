"""`convert --to torch` of a Megatron checkpoint: another grid, spelling, dtype or padding, with its args taken over."""

from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make, megatron_shards, save, training_args
from tests.to_megatron import (
    FILE,
    TRACKER,
    assert_same_shards,
    expected_shards,
    grid_flags,
    load,
    make_hf,
    read_shards,
    same_bits,
)
from tests.warm import Process

LLAMA, MIXTRAL = Model(heads=4, groups=4), Model(experts=4, heads=4, groups=4)
WHOLE = {"make_vocab_size_divisible_by": 4}
ITERATION = "iter_0000004"


def reshard(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", str(source), str(target), "--to", "torch", "--device", "cpu", *flags])


def args_of(root: Path, iteration: str = ITERATION) -> Namespace:
    args: Namespace = load(next((root / iteration).glob(f"mp_rank_*/{FILE}")))["args"]
    return args


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        (LLAMA, Grid(tp=2, pp=2), Grid(tp=4)),
        (LLAMA, Grid(tp=4), Grid(tp=1, pp=4)),
        (LLAMA, Grid(tp=2), Grid(pp=2, vpp=2)),
        (LLAMA, Grid(pp=2, vpp=2), Grid(tp=2, pp=2)),
        (Model(tied=True), Grid(tp=2, pp=2), Grid(tp=2)),
        (Model(tied=True), Grid(), Grid(pp=4)),
        (Model(groups=1, qkv_bias=True), Grid(tp=2), Grid(tp=4)),
        (Model(linear_bias=True), Grid(tp=2), Grid(pp=2)),
        (MIXTRAL, Grid(tp=2, ep=2), Grid(tp=2, ep=4, etp=1)),
        (MIXTRAL, Grid(tp=2, ep=4, etp=1), Grid(tp=4)),
        (MIXTRAL, Grid(pp=2, ep=2), Grid(tp=2, pp=2, ep=2, etp=1)),
        (Model(ffn=2, experts=2), Grid(tp=2), Grid(tp=2, etp=1)),  # columns of one element, in two equal copies
    ],
    ids=str,
)
def test_a_checkpoint_at_another_grid_is_cut_as_training_would_cut_it(
    model: Model, source: Grid, target: Grid, tmp_path: Path
) -> None:
    hf = make(tmp_path / "source", model, source, **WHOLE)
    sizes = [f"--target-{axis}-parallel-size" for axis in ("tensor", "pipeline")]
    flags = [word for name, size in zip(sizes, (target.tp, target.pp), strict=True) for word in (name, str(size))]
    flags += grid_flags(Grid(vpp=target.vpp, etp=target.etp or target.tp if model.experts else None))
    flags += ["--target-expert-parallel-size", str(target.ep)] if model.experts else []
    assert reshard(tmp_path / "source", tmp_path / "target", *flags, "--verify") == 0
    expected = expected_shards(model, hf, target, norms="local")
    found = read_shards(tmp_path / "target", ITERATION)
    rows = dict.fromkeys(("embedding.word_embeddings.weight", "output_layer.weight"), model.vocab)
    for shards in (found, expected):
        for file, chunks in shards.items():
            first = int(file.split("_")[2])
            for chunk in chunks:
                for name in rows.keys() & chunk.keys():
                    chunk[name] = chunk[name][: max(0, rows[name] - first * len(chunk[name]))]
    assert_same_shards(found, expected)


@pytest.mark.parametrize("experts", ["sequential", "te-grouped", "grouped", "habana-dynamic"])
@pytest.mark.parametrize("source", ["sequential", "grouped", "dynamic"])
def test_experts_get_another_spelling(source: str, experts: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"moe_dynamic_hpu": True, "moe_permuted_weights": True} if source == "dynamic" else {}
    model = Model(experts=4, heads=4, groups=4, vocab=32)
    hf = make(tmp_path / "source", model, Grid(ep=2), experts=source, **flags, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", "--expert-layout", experts, "--verify") == 0
    expected = expected_shards(model, hf, Grid(ep=2), norms="local", experts=experts)
    assert_same_shards(read_shards(tmp_path / "target", ITERATION), expected)
    assert bool(args_of(tmp_path / "target").moe_dynamic_hpu if experts == "habana-dynamic" else 0) == (
        experts == "habana-dynamic"
    )


def test_a_kept_layout_says_in_which_variant_it_is_written(tmp_path: Path) -> None:
    theirs: dict[str, Any] = {
        "moe_dynamic_hpu": True, "moe_permuted_weights": False, "moe_fused_weights": False, **WHOLE
    }  # fmt: skip
    make(tmp_path / "source", MIXTRAL, Grid(ep=2), experts="dynamic-transposed-unfused", **theirs)
    assert reshard(tmp_path / "source", tmp_path / "target", "--target-expert-parallel-size", "1", "--verify") == 0
    args = args_of(tmp_path / "target")
    assert (args.moe_permuted_weights, args.moe_fused_weights, args.moe_dynamic_hpu) == (True, True, True)


@pytest.mark.parametrize(("norms", "flag"), [("local", "transformer_engine"), ("te", "local"), ("te", "habana")])
def test_norms_get_another_spelling(norms: str, flag: str, tmp_path: Path) -> None:
    model = Model(vocab=32)
    hf = make(tmp_path / "source", model, norms=norms, transformer_impl="theirs", **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", "--saver-transformer-impl", flag) == 0
    assert_same_shards(read_shards(tmp_path / "target", ITERATION), expected_shards(model, hf, norms=flag))
    assert args_of(tmp_path / "target").transformer_impl == ("local" if flag == "local" else "transformer_engine")


def test_without_flags_it_is_the_same_checkpoint_without_what_is_no_model(tmp_path: Path) -> None:
    hf = make(tmp_path / "source", MIXTRAL, Grid(tp=2, pp=2, ep=2, etp=1), norms="te", experts="te-grouped", **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target") == 0
    found = read_shards(tmp_path / "target", ITERATION)
    shards = megatron_shards(MIXTRAL, hf, Grid(tp=2, pp=2, ep=2, etp=1), norms="te", experts="te-grouped")
    expected = {
        file: [{name: x for name, x in chunk.items() if "_extra_state" not in name} for chunk in chunks]
        for file, chunks in shards.items()
    }
    assert_same_shards(found, expected)


def test_there_and_back_gives_every_byte_of_the_tensors(tmp_path: Path) -> None:
    make(tmp_path / "source", LLAMA, Grid(tp=2, pp=2), make_vocab_size_divisible_by=16)
    sizes = "--target-tensor-parallel-size", "--target-pipeline-parallel-size"
    assert reshard(tmp_path / "source", tmp_path / "there", sizes[0], "1", sizes[1], "4") == 0
    assert reshard(tmp_path / "there", tmp_path / "back", sizes[0], "2", sizes[1], "2") == 0
    source = read_shards(tmp_path / "source", ITERATION)
    for chunks in source.values():
        for chunk in chunks:
            for name in [name for name in chunk if "_extra_state" in name]:
                del chunk[name]
    assert_same_shards(read_shards(tmp_path / "back", ITERATION), source)


def test_padding_rows_are_copied_as_far_as_both_sides_have_them(tmp_path: Path) -> None:
    model = Model(vocab=29, padded_vocab=32)
    hf = make(tmp_path / "source", model, Grid(tp=2))
    shards = megatron_shards(model, hf, Grid(tp=2))
    shards["mp_rank_01"][0]["embedding.word_embeddings.weight"][13:] = 7
    save(tmp_path / "padded", shards, training_args(model, Grid(tp=2), make_vocab_size_divisible_by=1))
    flags = ("--target-tensor-parallel-size", "1", "--make-vocab-size-divisible-by")
    assert reshard(tmp_path / "padded", tmp_path / "shorter", *flags, "31") == 0
    assert reshard(tmp_path / "padded", tmp_path / "longer", *flags, "34", "--vocab-padding", "zeros") == 0
    shorter, longer = (
        read_shards(tmp_path / name, ITERATION)["mp_rank_00"][0]["embedding.word_embeddings.weight"]
        for name in ("shorter", "longer")
    )
    assert (len(shorter), len(longer)) == (31, 34)
    assert torch.equal(shorter[:29], hf["model.embed_tokens.weight"])
    assert torch.equal(longer[:29], hf["model.embed_tokens.weight"])
    assert shorter[29:].unique().tolist() == longer[29:32].unique().tolist() == [7]
    assert not longer[32:].any()


def test_the_args_are_the_sources_own_but_for_the_grid_and_the_padding(tmp_path: Path) -> None:
    theirs = {
        "lr": 3e-4, "consumed_train_samples": 1024, "iteration": 4, "tokenizer_model": "/theirs/tokenizer.model",
        "tokenizer_type": "Llama2Tokenizer", "sequence_parallel": True, "seq_length": 48, "world_size": 16,
        "data_parallel_size": 4, "make_vocab_size_divisible_by": 16, "ckpt_format": "torch", "bf16": True,
        "recompute_granularity": "selective",
    }  # fmt: skip
    make(tmp_path / "source", LLAMA, Grid(tp=2, pp=2), **theirs)
    assert reshard(tmp_path / "source", tmp_path / "target", "--target-tensor-parallel-size", "4") == 0
    source, target = vars(args_of(tmp_path / "source")), vars(args_of(tmp_path / "target"))
    changed = {name: target.get(name) for name in source if source[name] != target.get(name)}
    # A model on 4 x 2 ranks: one replica.
    assert changed == {
        "tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 4, "padded_vocab_size": 64, "world_size": 8,
        "data_parallel_size": 1,
    }  # fmt: skip
    assert (target["no_save_optim"], target["no_save_rng"]) == (True, True)
    assert load(next((tmp_path / "target").glob(f"*/mp_rank_00_000/{FILE}")))["iteration"] == 4


def test_a_pipeline_that_no_flag_changes_keeps_its_uneven_stages(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    hf = make_hf(tmp_path / "hf", LLAMA)
    layout = ["--pipeline-model-parallel-layout", "Et|ttt|L", "--target-pipeline-parallel-size", "3"]
    few = ["--make-vocab-size-divisible-by", "4"]
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "one"), "--to", "torch", *layout, *few]) == 0
    assert reshard(tmp_path / "one", tmp_path / "two", "--target-tensor-parallel-size", "2", "--verify") == 0
    found = read_shards(tmp_path / "two", "iter_0000001")
    layers = {
        name: len({key.split(".")[2] for key in chunk if key.startswith("decoder.layers.")})
        for name, [chunk] in found.items()
    }
    assert layers == {f"mp_rank_0{tp}_00{pp}": count for tp in (0, 1) for pp, count in enumerate((1, 3, 0))}
    head = torch.cat([found[f"mp_rank_0{tp}_002"][0]["output_layer.weight"] for tp in (0, 1)])
    assert same_bits(head[:29], hf["lm_head.weight"])
    args = args_of(tmp_path / "two", "iter_0000001")
    assert (args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size) == ("Et|ttt|L", 3)


@pytest.mark.parametrize(
    "args",
    [
        {"pipeline_model_parallel_layout": "Et|tttL"},
        {"decoder_first_pipeline_num_layers": 3},
        {"pipeline_model_parallel_layout": "Et|ttL"},
    ],
    ids=str,
)
def test_args_that_describe_other_stages_than_the_files_are_not_kept(
    args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "source", LLAMA, Grid(pp=2), **args, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target") == 1
    assert "the pipeline stages in the args differ from those in the files" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
    assert reshard(tmp_path / "source", tmp_path / "target", "--target-pipeline-parallel-size", "2") == 0
    kept = args_of(tmp_path / "target")
    assert (kept.pipeline_model_parallel_layout, kept.decoder_first_pipeline_num_layers) == (None, None)


def test_what_a_killed_rank_left_is_gone_on_with(tmp_path: Path) -> None:
    model = Model(hidden=512, ffn=2048, heads=8, groups=8, head_dim=64, layers=4, vocab=4000, padded_vocab=4000)
    make(tmp_path / "source", model, Grid(tp=2, pp=2), **WHOLE)
    words = ["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--to", "torch", "--ranks", "2"]
    words += ["--target-tensor-parallel-size", "4"]
    with Process(["-m", "dist_convert", *words], os.environ) as process:
        while process.poll() is None and not list((tmp_path / "target").glob("*.partial/mp_rank_*/*.pt")):
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert "was ended by SIGKILL" in process.finish().stderr
    assert (process.returncode, main([*words, "--verify"])) == (1, 0)


def test_another_pipeline_leaves_the_sources_layout_behind(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    layout = ["--pipeline-model-parallel-layout", "Et|ttt|L", "--target-pipeline-parallel-size", "3"]
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "one"), "--to", "torch", *layout]) == 0
    assert reshard(tmp_path / "one", tmp_path / "two", "--target-pipeline-parallel-size", "2") == 0
    args = args_of(tmp_path / "two", "iter_0000001")
    assert (args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size) == (None, 2)


def test_norms_that_are_stored_as_gamma_minus_one_stay_untouched(tmp_path: Path) -> None:
    model = Model(vocab=32)
    hf = make(tmp_path / "source", model, norms="te", apply_layernorm_1p=True, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", "--target-pipeline-parallel-size", "2") == 0
    expected = expected_shards(model, hf, Grid(pp=2))
    assert_same_shards(read_shards(tmp_path / "target", ITERATION), expected)
    assert args_of(tmp_path / "target").apply_layernorm_1p is True


def test_norms_of_another_class_are_stored_as_gamma(tmp_path: Path) -> None:
    make(tmp_path / "source", Model(vocab=32), norms="te", apply_layernorm_1p=True, dtype=torch.float32, **WHOLE)
    flags = ("--saver-transformer-impl", "local", "--target-params-dtype", "fp32", "--verify")
    assert reshard(tmp_path / "source", tmp_path / "target", *flags) == 0
    name, fused = (
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    )
    [before] = read_shards(tmp_path / "source", ITERATION)["mp_rank_00"]
    [after] = read_shards(tmp_path / "target", ITERATION)["mp_rank_00"]
    assert torch.equal(after[name], before[fused].float() + 1)
    assert args_of(tmp_path / "target").apply_layernorm_1p is False


@pytest.mark.parametrize(
    ("dtype", "expected"), [((), torch.bfloat16), (("--target-params-dtype", "fp32"), torch.float32)]
)
def test_the_dtype_stays_unless_a_flag_changes_it(
    dtype: tuple[str, ...], expected: torch.dtype, tmp_path: Path
) -> None:
    make(tmp_path / "source", LLAMA, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", *dtype) == 0
    [chunk] = read_shards(tmp_path / "target", ITERATION)["mp_rank_00"]
    assert {tensor.dtype for tensor in chunk.values()} == {expected}
    assert args_of(tmp_path / "target").params_dtype == expected


def test_a_release_stays_a_release_and_an_iteration_gets_the_number_that_is_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "source", LLAMA, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", "--release") == 0
    assert reshard(tmp_path / "target", tmp_path / "again") == 0
    assert (tmp_path / "again" / TRACKER).read_text() == "release"
    assert reshard(tmp_path / "again", tmp_path / "last", "--iteration", "9") == 0
    assert (tmp_path / "last" / TRACKER).read_text() == "9"


def test_what_is_left_behind_is_said_with_its_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make(tmp_path / "unused", LLAMA)
    shards = megatron_shards(LLAMA, hf)
    args = training_args(LLAMA, **WHOLE)
    save(tmp_path / "source", shards, args, optimizer={"state": torch.zeros(1000)}, rng_state=[b"x"])
    assert reshard(tmp_path / "source", tmp_path / "target", "--target-pipeline-parallel-size", "2") == 0
    said = capsys.readouterr().err
    assert said.count("optimizer") == 1
    assert "not converted: 1 x optimizer, 4 kB\n" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--source-margs-file", "x.json"), "no effect in a conversion from torch to torch"),
        (("--max-shard-size", "1GB"), "no effect in a conversion from torch to torch"),
        (("--instruct",), "no effect in a conversion from torch to torch"),
        (("--tp", "3"), "cannot be divided over the tensor parallel ranks"),
    ],
)
def test_a_flag_that_means_nothing_here_is_refused_by_name(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "source", LLAMA, **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "target", *flags) == 2
    message = capsys.readouterr().err
    assert said in message
    assert flags[0] in message
    assert not (tmp_path / "target").exists()


def test_a_checkpoint_is_never_made_over_its_own_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "source", LLAMA, Grid(tp=2), **WHOLE)
    before = {path: path.read_bytes() for path in (tmp_path / "source").rglob("*") if path.is_file()}
    flags = ("--target-tensor-parallel-size", "1", "--overwrite")
    assert reshard(tmp_path / "source", tmp_path / "source", *flags) in (1, 2)
    assert "so it is not replaced" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "source").rglob("*") if path.is_file()} == before


def test_what_was_stopped_goes_on_with_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "source", LLAMA, Grid(tp=2), **WHOLE)
    assert reshard(tmp_path / "source", tmp_path / "whole", "--target-tensor-parallel-size", "1") == 0
    assert reshard(tmp_path / "source", tmp_path / "again", "--target-tensor-parallel-size", "1") == 0
    assert reshard(tmp_path / "source", tmp_path / "again", "--target-tensor-parallel-size", "1") == 0
    assert "is complete already" in capsys.readouterr().err
    file = f"{ITERATION}/mp_rank_00/{FILE}"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
