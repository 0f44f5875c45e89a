"""Spellings of Hugging Face tensors: however transformers 5 stores a model, the tables' parts are the same numbers.

Witness: what transformers itself saves in each form, read with safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, UnknownTensor, WrongShape
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.huggingface.names import hf_view, leftovers
from dist_convert.formats.huggingface.read import find_weights, read_weights_header
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture, entries
from dist_convert.records import StoredTensor, View
from tests.oracle.families.models import MODELS

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
GATE, Q = "model.layers.{layer}.block_sparse_moe.gate.weight", "model.layers.{layer}.self_attn.q_proj.weight"
FUSED, FUSED_DOWN = "model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.down_proj"


def tensor(name: str, *shape: int, strides: tuple[int, ...] | None = None, dtype: str = "BF16") -> StoredTensor:
    """A stored tensor at byte 1000, row after row unless strides are given."""
    dense = tuple(torch.empty(shape, device="meta").stride())
    return StoredTensor(name, "model.safetensors", dtype, shape, strides or dense, 1000)


def by_name(*tensors: StoredTensor) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in tensors}


def load(path: Path, view: View) -> torch.Tensor:
    """A view's elements (float32), gathered by torch from the whole file's bytes."""
    assert view.dtype == "F32"
    data = path.read_bytes()[view.offset_bytes % 4 :]
    flat = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=torch.float32)
    return flat.as_strided((view.rows, view.columns), (view.row_stride, view.column_stride), view.offset_bytes // 4)


PARTS = {
    part.name: part
    for family in (FAMILIES["llama"], FAMILIES["mixtral"])
    for entry in (*family.before, *family.layer, *family.dense, *family.moe, *family.after)
    for part in entry.parts
}
#: Models whose experts transformers 5 has fused in memory, beside Mixtral, which has other names.
FUSED_MODELS = ("qwen3-moe", "qwen2-moe", "deepseek-v2-lite", "deepseek-v3", "glm45")
SIZES = {"experts": 4, "ffn": 6, "hidden": 8, "query": 6, "key_value": 2, "vocab": 30}


# Where a part lies: literal numbers, with E = 4 experts, F = 6, h = 8


@pytest.mark.parametrize(
    ("part", "rows", "columns", "stored", "elements_before", "strides"),
    [
        (f"{EXPERT}.w1.weight", 6, 8, tensor(FUSED, 4, 12, 8), 2 * 12 * 8, (8, 1)),
        (f"{EXPERT}.w3.weight", 6, 8, tensor(FUSED, 4, 12, 8), 2 * 12 * 8 + 6 * 8, (8, 1)),
        (f"{EXPERT}.w2.weight", 8, 6, tensor(FUSED_DOWN, 4, 8, 6), 2 * 8 * 6, (6, 1)),
        (f"{EXPERT}.w1.weight", 6, 8, tensor(FUSED, 4, 12, 8, strides=(1, 32, 4)), 2, (32, 4)),
        (f"{EXPERT}.w3.weight", 6, 8, tensor(FUSED, 4, 12, 8, strides=(1, 32, 4)), 2 + 6 * 32, (32, 4)),
        (f"{EXPERT}.w3.weight", 6, 8, tensor("model.layers.3.block_sparse_moe.experts.2.w3.weight", 6, 8), 0, (8, 1)),
        (GATE, 4, 8, tensor("model.layers.3.mlp.gate.weight", 4, 8), 0, (8, 1)),
        (GATE, 4, 8, tensor("layers.3.mlp.gate.weight", 4, 8), 0, (8, 1)),
        (Q, 6, 8, tensor("model.layers.3.self_attn.q_proj.weight", 6, 8, strides=(1, 6)), 0, (1, 6)),
        (Q, 6, 8, tensor("layers.3.self_attn.q_proj.weight", 6, 8), 0, (8, 1)),
        ("model.norm.weight", 8, 1, tensor("model.norm.weight", 8), 0, (1, 1)),
        ("model.norm.weight", 8, 1, tensor("norm.weight", 8), 0, (1, 1)),
        ("lm_head.weight", 30, 8, tensor("lm_head.weight", 30, 8), 0, (8, 1)),
    ],
    ids=["fused w1", "fused w3", "fused w2", "strided w1", "strided w3", "one expert", "router",
         "router of a base model", "transposed", "base model", "norm", "norm of a base model", "head"],
)  # fmt: skip
def test_a_part_is_a_window_on_what_is_stored(
    part: str, rows: int, columns: int, stored: StoredTensor, elements_before: int, strides: tuple[int, int]
) -> None:
    expert = 2 if "{expert}" in part else None
    found = hf_view(PARTS[part], 3, expert, by_name(stored), SIZES)
    offset_bytes = 1000 + 2 * elements_before
    assert found == View("model.safetensors", stored.name, "BF16", offset_bytes, rows, columns, *strides)


# What transformers saves


def tiny_model(name: str) -> Any:
    """One of the tiny models with two layers, of transformers' own class, with random weights."""
    pytest.importorskip("transformers", minversion="5")
    from tests.oracle.families.huggingface import build

    model = next(model for model in MODELS if model.name == name)
    return build(replace(model, config=model.config | {"num_hidden_layers": 2}))


def views(architecture: Architecture, stored: Mapping[str, StoredTensor], *, head: bool) -> Iterator[tuple[str, View]]:
    """The name and the view of every part of the family's table."""
    sizes = architecture.sizes()
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        for part in getattr(entry, "parts", ()):
            if part.name != "lm_head.weight" or head:
                name = part.name.format(layer=layer, expert=expert)
                yield name, hf_view(part, layer, expert, stored, sizes)


@pytest.mark.parametrize("base", [False, True], ids=["with a head", "base model"])
@pytest.mark.parametrize("original", [True, False], ids=["original format", "as in memory"])
@pytest.mark.parametrize("name", ["llama", "mixtral", *FUSED_MODELS])
def test_every_part_is_found_in_whatever_form_transformers_saves(
    name: str, original: bool, base: bool, tmp_path: Path
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "expected")
    config = json.loads((tmp_path / "expected" / "config.json").read_text())
    # transformers counts a layer of multi-token prediction that it does not save.
    architecture = architecture_from_config(config | {"num_nextn_predict_layers": 0})
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    (model.model if base else model).save_pretrained(tmp_path / "saved", save_original_format=original)
    [file] = find_weights(tmp_path / "saved")
    stored = read_weights_header(tmp_path / "saved" / file, file)
    used = set()
    for part, view in views(architecture, stored, head=not base):
        values = load(tmp_path / "saved" / file, view)
        assert torch.equal(values.reshape(expected[part].shape), expected[part]), part
        used.add(view.tensor)
        expected.pop(part)
    assert set(expected) == ({"lm_head.weight"} if base else set())
    assert any("gate_up_proj" in tensor for tensor in used) == (not original and name != "llama")
    assert leftovers(stored, used, hf_class="any", tied=False) == ((), [])


# What is wrong


@pytest.mark.parametrize("shape", [(3, 12, 8), (5, 12, 8), (4, 6, 8), (4, 8, 12), (4, 12, 7), (12, 8), (48, 8), ()])
def test_fused_experts_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WrongShape) as caught:
        hf_view(PARTS[f"{EXPERT}.w1.weight"], 3, 2, by_name(tensor(FUSED, *shape)), SIZES)
    error = caught.value
    assert (error.tensor, error.file) == (FUSED, "model.safetensors")
    assert (error.expected, error.found) == ("[4, 12, 8] from config.json", str(list(shape)))


@pytest.mark.parametrize(
    ("part", "stored", "expected"),
    [
        (Q, tensor("model.layers.3.self_attn.q_proj.weight", 8, 6), "[6, 8] from config.json"),
        (Q, tensor("layers.3.self_attn.q_proj.weight", 48), "[6, 8] from config.json"),
        ("model.norm.weight", tensor("model.norm.weight", 9), "[8] from config.json"),
        ("model.embed_tokens.weight", tensor("embed_tokens.weight", 32, 8), "[30, 8] from config.json"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(part: str, stored: StoredTensor, expected: str) -> None:
    with pytest.raises(WrongShape) as caught:
        hf_view(PARTS[part], 3, None, by_name(stored), SIZES)
    assert (caught.value.tensor, caught.value.expected) == (stored.name, expected)


def test_a_missing_tensor_is_named_with_all_its_spellings() -> None:
    other_layer = tensor("model.layers.2.mlp.experts.gate_up_proj", 4, 12, 8)
    with pytest.raises(MissingTensor) as caught:
        hf_view(PARTS[f"{EXPERT}.w1.weight"], 3, 2, by_name(other_layer), SIZES)
    assert caught.value.tensor == "model.layers.3.block_sparse_moe.experts.2.w1.weight"
    assert caught.value.expected == (
        "shape [6, 8], under one of model.layers.3.block_sparse_moe.experts.2.w1.weight, "
        "model.layers.3.mlp.experts.gate_up_proj, layers.3.block_sparse_moe.experts.2.w1.weight, "
        "layers.3.mlp.experts.gate_up_proj"
    )


def test_a_missing_head_says_that_a_base_model_may_have_been_saved() -> None:
    with pytest.raises(MissingTensor) as caught:
        hf_view(PARTS["lm_head.weight"], None, None, by_name(tensor("embed_tokens.weight", 30, 8)), SIZES)
    assert caught.value.remedy.startswith("a base model was saved without its head")


@pytest.mark.parametrize(
    ("part", "expert", "names"),
    [
        (Q, None, ["model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn.q_proj.weight"]),
        (f"{EXPERT}.w2.weight", 0, ["model.layers.3.block_sparse_moe.experts.0.w2.weight", FUSED_DOWN]),
        (GATE, None, ["model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate.weight"]),
    ],
)
def test_a_tensor_under_two_spellings_is_refused(part: str, expert: int | None, names: list[str]) -> None:
    with pytest.raises(InconsistentShards, match="stored twice") as caught:
        hf_view(PARTS[part], 3, expert, by_name(*(tensor(name, 6, 8) for name in names)), SIZES)
    assert caught.value.found == ", ".join(names)


# What no part used


def unused(
    *tensors: StoredTensor, tied: bool = False
) -> tuple[tuple[tuple[str, int, int], ...], list[ConversionError]]:
    return leftovers(by_name(*tensors), {"used"}, hf_class="LlamaForCausalLM", tied=tied)


def test_what_was_used_is_not_left_over() -> None:
    assert unused(tensor("used", 2, 3)) == ((), [])


def test_rotary_frequencies_are_left_behind_with_their_bytes() -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq"]
    left_behind, problems = unused(*(tensor(name, 4, dtype="F32") for name in names))
    assert left_behind == (("rotary_emb.inv_freq (computed from the config)", 3, 48),)
    assert problems == []


def test_the_head_of_a_tied_model_is_left_behind_by_name() -> None:
    left_behind, problems = unused(tensor("lm_head.weight", 30, 8), tied=True)
    assert left_behind == (("lm_head.weight (tied to the embedding by config.json)", 1, 480),)
    assert problems == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lm_head.weight", "an unknown tensor, shape [2, 3]"),
        ("model.layers.0.self_attn.q_norm.weight", "a norm of queries or keys, shape [2, 3]"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "quantisation, shape [2, 3]"),
        ("model.layers.0.mlp.down_proj.lora_A.default.weight", "an adapter that is not merged, shape [2, 3]"),
        ("model.layers.0.self_attn.q_proj.bias", "a bias, shape [2, 3]"),
        ("model.layers.0.block_sparse_moe.experts.8.w1.weight", "experts, shape [2, 3]"),
        ("model.layers.32.input_layernorm.weight", "an unknown tensor, shape [2, 3]"),
        ("score.weight", "a head that is not a language model's, shape [2, 3]"),
        ("inv_freq", "an unknown tensor, shape [2, 3]"),
        ("model.layers.0.other_rotary_emb.inv_freq", "an unknown tensor, shape [2, 3]"),
    ],
)
def test_anything_else_is_an_error_that_says_what_it_may_be(name: str, what: str) -> None:
    left_behind, [problem] = unused(tensor(name, 2, 3), tensor("used", 1))
    assert left_behind == ()
    assert isinstance(problem, UnknownTensor)
    assert (problem.tensor, problem.file, problem.found) == (name, "model.safetensors", what)
    assert "has no place in a LlamaForCausalLM" in problem.what
