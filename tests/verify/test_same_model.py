"""`verify` says "the same" of one model in every spelling, at every grid and in rounded dtypes, and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.to_megatron import make_hf
from tests.verify import edit_args, edit_hf, edit_shard, flip, verify

LLAMA = Model()
MIXTRAL = Model(experts=4, groups=4, layers=2)


@pytest.mark.parametrize("norms", ["local", "te", "habana-fused"])
@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (LLAMA, Grid(tp=2, pp=2)),
        (LLAMA, Grid(tp=4, pp=2, vpp=2)),
        (Model(groups=4, vocab=32), Grid(tp=2)),
        (Model(tied=True), Grid(pp=4)),
        (Model(qkv_bias=True, linear_bias=True), Grid(tp=2)),
        (Model(dtype=torch.float16), Grid(tp=2)),
        (Model(dtype=torch.float32), Grid(tp=2)),
    ],
    ids=str,
)
def test_a_llama_in_every_spelling_and_at_every_grid_is_the_same(
    model: Model, grid: Grid, norms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = make(tmp_path / "megatron", model, grid, norms=norms)
    make_hf(tmp_path / "hf", model, tensors)
    code, report = verify(tmp_path / "hf", tmp_path / "megatron", capsys)
    assert (code, report["same"]) == (0, True)
    assert report["compared"]["tensors"] == len(tensors)
    assert report["compared"]["elements"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["compared"]["bytes_a"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "experts",
    [
        "sequential", "te-grouped", "te-single", "grouped", "dynamic", "dynamic-transposed", "dynamic-unfused",
        "dynamic-transposed-unfused",
    ],
)  # fmt: skip
@pytest.mark.parametrize("grid", [Grid(tp=2, ep=2), Grid(tp=2, ep=4, etp=1, pp=2)], ids=str)
def test_a_mixtral_in_every_spelling_of_its_experts_is_the_same(
    experts: str, grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = make(tmp_path / "megatron", MIXTRAL, grid, experts=experts, moe_dynamic_hpu="dynamic" in experts)
    make(tmp_path / "other", MIXTRAL, Grid(pp=2), experts="te-grouped")
    make_hf(tmp_path / "hf", MIXTRAL, tensors)
    for other in ("hf", "other"):
        code, report = verify(tmp_path / "megatron", tmp_path / other, capsys)
        assert (code, report["same"], report["compared"]["tensors"]) == (0, True, len(tensors))


def test_the_fused_experts_that_transformers_5_can_save_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    make(tmp_path / "megatron", MIXTRAL, Grid(tp=2, ep=2))
    for other in ("hf", "megatron"):
        assert verify(tmp_path / "fused", tmp_path / other, capsys)[0] == 0


def test_a_tied_head_that_is_stored_nonetheless_is_a_copy_of_the_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(tied=True)
    make(tmp_path / "megatron", model)
    tensors = hf_tensors(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    make_hf(tmp_path / "hf", model, tensors)
    assert verify(tmp_path / "megatron", tmp_path / "hf", capsys)[0] == 0
    edit_hf(tmp_path / "hf", flip("lm_head.weight", (28, 3)))
    code, report = verify(tmp_path / "megatron", tmp_path / "hf", capsys)
    assert code == 1
    assert [(f["between"], f["index"]) for f in report["values"]] == [("two copies in B", [28, 3])]


def test_norms_that_are_stored_as_gamma_minus_one_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = hf_tensors(LLAMA)
    whole = {name: (t.double() + 1).to(t.dtype) if "norm" in name else t for name, t in stored.items()}
    shards = megatron_shards(LLAMA, stored, Grid(tp=2), norms="te")
    save(tmp_path / "megatron", shards, training_args(LLAMA, Grid(tp=2), apply_layernorm_1p=True))
    make_hf(tmp_path / "hf", LLAMA, whole)
    for pair in (("megatron", "hf"), ("hf", "megatron")):
        assert verify(*(tmp_path / name for name in pair), capsys)[0] == 0


def test_output_biases_that_megatron_has_no_place_for_must_be_zeros(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(qkv_bias=True)
    tensors = make(tmp_path / "megatron", model, Grid(tp=2))
    zeros = {f"model.layers.{n}.self_attn.o_proj.bias": torch.zeros(16, dtype=torch.bfloat16) for n in range(4)}
    make_hf(tmp_path / "hf", model, tensors | zeros, attention_bias=True, mlp_bias=False)
    assert verify(tmp_path / "megatron", tmp_path / "hf", capsys)[0] == 0
    edit_hf(tmp_path / "hf", flip("model.layers.1.self_attn.o_proj.bias", (3,)))
    code, report = verify(tmp_path / "megatron", tmp_path / "hf", capsys)
    assert code == 1
    assert [(f["tensor"], f["index"]) for f in report["values"]] == [("model.layers.1.self_attn.o_proj.bias", [3])]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_values_that_were_rounded_to_another_dtype_are_the_same(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(dtype=torch.float16 if dtype == "fp32" else torch.float32)
    tensors = make(tmp_path / "megatron", model, Grid(tp=2))
    name = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    make_hf(tmp_path / "hf", model, {key: tensor.to(name) for key, tensor in tensors.items()})
    code, report = verify(tmp_path / "megatron", tmp_path / "hf", capsys)
    assert code == 0
    [(how, count)] = report["compared"]["tensors_by_dtype"].items()
    short = {"bf16": "F32 to BF16", "fp16": "F32 to F16", "fp32": "F16 to F32"}
    assert (how, count) == (short[dtype], len(tensors))


def test_a_rounded_model_is_not_the_one_that_it_was_made_from_and_the_report_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(dtype=torch.float32)
    tensors = make(tmp_path / "megatron", model)
    make_hf(tmp_path / "hf", model, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    code, report = verify(tmp_path / "hf", tmp_path / "megatron", capsys)
    assert code == 1
    assert report["notes"] == ["A has the narrower dtype: if A was made from B, swap them"]


def test_experts_of_habanas_importer_are_the_same_with_their_flag_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_hf(tmp_path / "hf", MIXTRAL)
    grid = Grid(tp=2)
    shards = megatron_shards(MIXTRAL, hf, grid)
    for rank, name in enumerate(sorted(shards)):
        for layer in range(2):
            for expert in range(4):
                moe = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                fc1 = torch.cat([hf[f"{moe}.w1.weight"], hf[f"{moe}.w3.weight"]]).chunk(2)[rank]
                to = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"
                shards[name][0][to] = fc1.clone()
    save(tmp_path / "megatron", shards, training_args(MIXTRAL, grid, expert_tensor_parallel_size=1))
    imported = ("--habana-imported-experts-b",)
    assert verify(tmp_path / "hf", tmp_path / "megatron", capsys, *imported)[0] == 0
    edit_args(tmp_path / "megatron", expert_tensor_parallel_size=2)
    assert verify(tmp_path / "hf", tmp_path / "megatron", capsys)[0] == 1


def test_padding_rows_are_counted_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", LLAMA, Grid(tp=2))
    make(tmp_path / "b", Model(padded_vocab=40), Grid(tp=4))
    edit_shard(tmp_path / "a", "mp_rank_01", flip("embedding.word_embeddings.weight", (13, 0), 14))  # row 29 of 29
    code, report = verify(tmp_path / "a", tmp_path / "b", capsys)
    assert code == 0
    assert report["padding_rows"] == {"a": 2 * 3, "b": 2 * 11}


def test_copies_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", LLAMA, Grid(tp=4))
    make_hf(tmp_path / "hf", LLAMA)
    _, report = verify(tmp_path / "a", tmp_path / "hf", capsys)
    norms = 2 * LLAMA.layers + 1
    assert report["compared"]["copies_a_bytes"] == 3 * norms * LLAMA.hidden * 2
    assert report["compared"]["copies_b_bytes"] == 0


def test_a_vocabulary_that_one_does_not_say_is_taken_from_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", LLAMA, vocab_size=None)
    make_hf(tmp_path / "hf", LLAMA)
    code, report = verify(tmp_path / "megatron", tmp_path / "hf", capsys)
    assert code == 0
    assert report["notes"] == [
        "A does not say how many tokens its vocabulary has: that of the other is used (or give --true-vocab-size)"
    ]


def test_two_that_do_not_say_their_vocabulary_can_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", LLAMA, vocab_size=None)
    make(tmp_path / "b", Model(padded_vocab=40), vocab_size=None)
    code, report = verify(tmp_path / "a", tmp_path / "b", capsys)
    assert code == 1
    assert report["config"] == {"vocab": {"a": 32, "b": 40}}
    assert verify(tmp_path / "a", tmp_path / "b", capsys, "--true-vocab-size", "29")[0] == 0


def test_an_iteration_can_be_named_on_either_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "m", LLAMA)
    save(tmp_path / "m", megatron_shards(LLAMA, hf_tensors(LLAMA, 1)), training_args(LLAMA), iteration=5)
    first, second = ("--ckpt-dir-name-a", "iter_0000004"), ("--ckpt-dir-name-b", "iter_0000004")
    assert verify(tmp_path / "m", tmp_path / "m", capsys)[0] == 0
    assert verify(tmp_path / "m", tmp_path / "m", capsys, *first)[0] == 1
    assert verify(tmp_path / "m", tmp_path / "m", capsys, *second)[0] == 1
    assert verify(tmp_path / "m", tmp_path / "m", capsys, *first, *second)[0] == 0


def test_the_report_for_people_says_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "megatron", LLAMA, Grid(tp=2, pp=2))
    make_hf(tmp_path / "hf", LLAMA)
    assert main(["verify", str(tmp_path / "megatron"), str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"A  {tmp_path}/megatron/iter_0000004  Megatron TP2 PP2 VPP1 EP1 ETP2, iteration 4",
        f"B  {tmp_path}/hf  Hugging Face",
        "config   22 fields compared",
        "tensors  39 compared, bit for bit in BF16",
        "values   8,752 elements, 17.8 kB of A, 17.5 kB of B",
        "copies   288 B of A and 0 B of B are further copies of the same tensors, compared with the first",
        "padding  6 rows of A and 0 rows of B, not part of the model",
        "the same model",
    ]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("nowhere", "megatron", "A ({0}/nowhere): the checkpoint directory does not exist\n"),
        ("megatron", "file", "B ({0}/file): a file, not a checkpoint directory\n"),
        ("root", "megatron", "remedy:   name the iteration with --ckpt-dir-name-a, or give its path\n"),
        ("megatron", "gone", "remedy:   name an existing iteration with --ckpt-dir-name-b\n"),
    ],
)
def test_what_is_not_there_is_named_with_the_flag_of_its_side(
    a: str, b: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", LLAMA)
    make(tmp_path / "root", LLAMA)
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").unlink()
    make(tmp_path / "gone", LLAMA)
    (tmp_path / "gone" / "latest_checkpointed_iteration.txt").write_text("9")
    (tmp_path / "file").touch()
    assert main(["verify", str(tmp_path / a), str(tmp_path / b)]) == 2
    assert said.format(tmp_path) in capsys.readouterr().err


def test_what_is_compared_is_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "hf"), "--json", "--sample"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sample"] == 0.0625
    assert report["compared"]["all_elements"] == report["compared"]["elements"]
    assert report["a"] == report["b"] == {"path": str(tmp_path / "hf"), "kind": "Hugging Face"}
    assert report["compared"]["config_fields"] == 22
