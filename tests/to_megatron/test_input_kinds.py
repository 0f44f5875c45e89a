"""Every kind of Hugging Face input gives the same shards; what is wrong with one is named before data moves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, MixtralForCausalLM

from tests.checkpoints import Grid, Model, hf_tensors
from tests.hub_stand_in import Hub, Repository, serving
from tests.to_megatron import (
    DIVISIBLE_BY,
    assert_same_shards,
    config_of,
    expected_shards,
    make_hf,
    read_shards,
    to_megatron,
)
from tests.warm import Process

REPOSITORY = Path(__file__).resolve().parents[2]
MIXTRAL = Model(experts=4, groups=4, layers=2)
GRID = Grid(tp=2, ep=2)
TENSORS = hf_tensors(MIXTRAL)
SHARDS = expected_shards(MIXTRAL, TENSORS, GRID)


def save_files(directory: Path, files: Mapping[str, Mapping[str, torch.Tensor]], index: str) -> None:
    """Save weights in several files, by safetensors or as pickles, with an index and the config."""
    directory.mkdir()
    config_of(MIXTRAL).save_pretrained(directory)
    for file, tensors in files.items():
        if file.endswith(".bin"):
            torch.save(dict(tensors), directory / file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / index).write_text(json.dumps({"weight_map": weight_map}))


def halves() -> list[dict[str, torch.Tensor]]:
    """Two files, between which layers, and the parts of one parameter, are torn apart."""
    names = sorted(TENSORS)
    return [{name: TENSORS[name] for name in names[start::2]} for start in (0, 1)]


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_weights_in_several_files_with_an_index(stem: str, suffix: str, tmp_path: Path) -> None:
    files = {f"{stem}-{number:05d}-of-00002.{suffix}": half for number, half in enumerate(halves(), 1)}
    save_files(tmp_path / "hf", files, f"{stem}.{suffix}.index.json")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


def test_a_single_pickle_of_weights(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config_of(MIXTRAL).save_pretrained(tmp_path / "hf")
    torch.save(TENSORS, tmp_path / "hf" / "pytorch_model.bin")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


def test_a_pickle_of_views_that_are_transposed_and_share_a_storage(tmp_path: Path) -> None:
    views = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in TENSORS.items()}
    flat = torch.cat([TENSORS["model.norm.weight"], TENSORS["model.layers.1.input_layernorm.weight"]])
    views |= {"model.norm.weight": flat[:16], "model.layers.1.input_layernorm.weight": flat[16:]}
    (tmp_path / "hf").mkdir()
    config_of(MIXTRAL).save_pretrained(tmp_path / "hf")
    torch.save(views, tmp_path / "hf" / "pytorch_model.bin")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


@pytest.mark.parametrize("is_fused", [False, True], ids=["one entry per expert", "experts fused as in memory"])
def test_a_mixtral_that_transformers_saved(is_fused: bool, tmp_path: Path) -> None:
    make_hf(tmp_path / "made", MIXTRAL)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", **({"save_original_format": False} if is_fused else {}))
    if is_fused:
        assert b"mlp.experts.gate_up_proj" in (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


def test_a_tied_llama_that_transformers_saved(tmp_path: Path) -> None:
    model = Model(tied=True)
    tensors = make_hf(tmp_path / "made", model)
    LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=Grid(tp=2, pp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(model, tensors, Grid(tp=2, pp=2)))


def test_a_config_of_transformers_4_says_the_same(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    args = json.loads((tmp_path / "megatron" / "target_megatron_args.json").read_text())
    assert args["rotary_base"] == 500000
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


def test_rotary_frequencies_are_left_behind_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    make_hf(tmp_path / "hf", MIXTRAL, TENSORS | more)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 0
    assert "not converted: 2 x rotary_emb.inv_freq" in capsys.readouterr().err
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)


def test_a_head_beside_a_tied_embedding_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(tied=True)
    tensors = hf_tensors(model)
    make_hf(tmp_path / "hf", model, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=Grid(pp=2)) == 0
    assert "not converted: 1 x lm_head.weight (tied to the embedding" in capsys.readouterr().err
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(model, tensors, Grid(pp=2)))


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(tied=True)
    tensors = hf_tensors(model)
    head = tensors["model.embed_tokens.weight"].clone()
    head[17, 3] += 1
    make_hf(tmp_path / "hf", model, tensors | {"lm_head.weight": head})
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 1
    message = capsys.readouterr().err
    assert "the model stores a head that differs" in message
    assert "found:    other values\n" in message
    assert not (tmp_path / "megatron").exists()


def biased(model: Model, output_bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A Llama of transformers with attention_bias: queries, keys and values have biases, and so has the output."""
    tensors = hf_tensors(model)
    rows = {"q": model.heads * model.head_dim, "k": model.groups * model.head_dim, "v": model.groups * model.head_dim}
    for layer in range(model.layers):
        at = f"model.layers.{layer}.self_attn."
        tensors |= {f"{at}{name}_proj.bias": torch.ones(size).bfloat16() for name, size in rows.items()}
        tensors[f"{at}o_proj.bias"] = output_bias.clone()
    return tensors


def test_output_biases_of_zeros_are_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=2)
    make_hf(tmp_path / "hf", model, biased(model, torch.zeros(16).bfloat16()), attention_bias=True)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 0
    assert "not converted: 2 x output bias of attention (all zeros)" in capsys.readouterr().err


def test_output_biases_of_zeros_have_no_say_in_the_dtype_of_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Model(hidden=16, ffn=24, layers=1, tied=True, qkv_bias=True)
    rest_bytes = sum(2 * value.numel() for name, value in hf_tensors(plain).items() if "embed" not in name)
    rows = rest_bytes // (4 * plain.hidden)  # as F32 the embedding has a few bytes less than the rest in BF16
    model = replace(plain, vocab=rows, padded_vocab=rows)
    tensors = biased(model, torch.zeros(16))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    make_hf(tmp_path / "hf", model, tensors, attention_bias=True)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--target-params-dtype", "fp16") == 0
    [chunks] = read_shards(tmp_path / "megatron").values()
    assert {str(value.dtype) for name, value in chunks[0].items() if "embedding" not in name} == {"torch.float16"}
    assert chunks[0]["embedding.word_embeddings.weight"].dtype == torch.float32
    said = capsys.readouterr().err
    assert "1 tensor kept in a dtype other than BF16: model.embed_tokens.weight\n" in said


def test_output_biases_that_are_not_zeros_are_not_taken_for_zeros_however_they_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(layers=2)
    tensors = biased(model, torch.zeros(16).bfloat16())
    make_hf(tmp_path / "hf", model, tensors, attention_bias=True)
    (tmp_path / "hf" / "model.safetensors").unlink()
    spread = torch.zeros(32).bfloat16()
    spread[16:] = 1  # beyond as many bytes as the bias has elements
    tensors["model.layers.1.self_attn.o_proj.bias"] = spread[::2]
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 1
    assert "Megatron has biases in all linear layers" in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("flag", "target"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_values_are_cast_as_torch_casts_them(
    flag: str, target: torch.dtype, source: torch.dtype, tmp_path: Path
) -> None:
    tensors = {name: (tensor.float() * 1.0001).to(source) for name, tensor in TENSORS.items()}
    make_hf(tmp_path / "hf", MIXTRAL, tensors)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--target-params-dtype", flag, grid=GRID) == 0
    cast = {name: tensor.to(target) for name, tensor in tensors.items()}
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(MIXTRAL, cast, GRID))


WRONG: dict[str, tuple[dict[str, torch.Tensor | None], list[str]]] = {
    "missing": ({"model.layers.1.self_attn.k_proj.weight": None}, ["no tensor for model.layers.1.self_attn.k_proj"]),
    "unknown": ({"model.layers.1.mlp.gate.scale": torch.ones(1)}, ["model.layers.1.mlp.gate.scale has no place"]),
    "a layer too many": ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, ["model.layers.2.input_layernorm"]),
    "misshapen": (
        {"model.norm.weight": torch.ones(15).bfloat16()}, ["wrong shape for model.norm.weight", "[15]", "[16]"]
    ),
    "missing and unknown": (
        {"model.norm.weight": None, "model.norm.wieght": torch.ones(16).bfloat16()},
        ["no tensor for model.norm.weight", "model.norm.wieght has no place"],
    ),
    "parts of two dtypes": (
        {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 16)}, ["need one dtype", "BF16, F32"]
    ),
    "integers": ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, ["an unexpected dtype", "I8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_make_up_the_model_are_named_together(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = WRONG[name]
    make_hf(tmp_path / "hf", MIXTRAL, {key: value for key, value in (TENSORS | changes).items() if value is not None})
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=GRID) == 1
    message = capsys.readouterr().err
    assert [words for words in expected if words not in message] == []
    assert not (tmp_path / "megatron").exists()


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"model-{number:05d}-of-00002.safetensors": half for number, half in enumerate(halves(), 1)}
    save_files(tmp_path / "hf", files, "model.safetensors.index.json")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.norm.weight"] = next(file for file in files if file != weight_map["model.norm.weight"])
    weight_map.pop("lm_head.weight")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 1
    message = capsys.readouterr().err
    assert "a tensor lies elsewhere than the index says" in message
    assert "a tensor that the index does not name" in message
    assert not (tmp_path / "megatron").exists()


def test_values_that_fp16_cannot_hold_are_an_error_unless_they_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = TENSORS | {"model.norm.weight": torch.full((16,), 1e6).bfloat16()}
    make_hf(tmp_path / "hf", MIXTRAL, tensors)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--fp16") == 1
    assert "finite values become infinite in fp16" in capsys.readouterr().err
    assert not (tmp_path / "megatron" / "iter_0000001").exists()
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--fp16", "--allow-overflow") == 0
    norm = read_shards(tmp_path / "megatron")["mp_rank_00"][0]["decoder.final_layernorm.weight"]
    assert norm.tolist() == [float("inf")] * 16


def test_a_model_of_the_hub_is_fetched_into_its_cache(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    content = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    target = ["--save-dir", str(tmp_path / "megatron"), "--make-vocab-size-divisible-by", str(DIVISIBLE_BY)]
    grid = ["--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "2", "--device", "cpu"]
    command = ["-m", "dist_convert", "hf-to-megatron", "--load-dir", "org/model", *target, *grid]
    with serving(Hub({"org/model": Repository(content, token="secret")})) as hub:
        ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_TOKEN": "secret", "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = Process(command, kept | ours, tmp_path).finish()
        assert done.returncode == 0, done.stderr
        assert hub.downloaded() == ["config.json", "model.safetensors"]
    assert_same_shards(read_shards(tmp_path / "megatron"), SHARDS)
    again = Process([*command, "--overwrite"], kept | ours | {"HF_HUB_OFFLINE": "1"}, tmp_path).finish()
    assert again.returncode == 0, again.stderr
