"""The whole tensor of every Megatron parameter, from the Hugging Face tensors, by short naive rules."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

PADDING_VALUE = 7.0
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_ATTENTION = {
    "linear_proj.weight": "o_proj.weight",
    "linear_proj.bias": "o_proj.bias",
    "core_attention.softmax_offset": "sinks",
    "linear_q_proj.weight": "q_proj.weight",
    "linear_q_down_proj.weight": "q_a_proj.weight",
    "linear_q_up_proj.weight": "q_b_proj.weight",
    "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
    "linear_kv_up_proj.weight": "kv_b_proj.weight",
    "kv_layernorm.weight": "kv_a_layernorm.weight",
    "q_layernorm.weight": "q_norm.weight",
    "k_layernorm.weight": "k_norm.weight",
}


def whole(hf: Tensors, name: str, args: Namespace) -> torch.Tensor:
    """A parameter of the whole model.

    Args:
        hf: the Hugging Face tensors.
        name: in the spelling of the local modules, with global numbers of layers and experts.
        args: of the training.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        is_embedding = name.startswith("embedding") or not args.untie_embeddings_and_output_weights
        rows = hf["model.embed_tokens.weight" if is_embedding else "lm_head.weight"]
        return torch.cat([rows, torch.full((args.padded_vocab_size - len(rows), rows.shape[1]), PADDING_VALUE)])
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    found = _LAYER.fullmatch(name)
    assert found, name
    block, layer, rest = found[1], int(found[2]), found[3]
    if block == "decoder":
        return _of_layer(hf, f"model.layers.{layer}.", rest, args)
    at = f"model.layers.{args.num_layers + layer}."
    inner, _, below = rest.partition(".")
    if inner in ("transformer_layer", "mtp_model_layer"):
        return _of_layer(hf, at, below, args)
    return hf[at + {"final_layernorm.weight": "shared_head.norm.weight"}.get(rest, rest)]


def _of_layer(hf: Tensors, at: str, rest: str, args: Namespace) -> torch.Tensor:
    if rest == "input_layernorm.weight":
        return hf[f"{at}input_layernorm.weight"]
    if rest == "pre_mlp_layernorm.weight":
        return hf[f"{at}post_attention_layernorm.weight"]
    if rest.startswith("self_attention."):
        return _attention(hf, f"{at}self_attn.", rest.removeprefix("self_attention."), args)
    moe = at + ("block_sparse_moe." if f"{at}block_sparse_moe.gate.weight" in hf else "mlp.")
    if rest.startswith("mlp.router."):
        router = moe + ("router." if f"{moe}router.weight" in hf else "gate.")
        own = rest.removeprefix("mlp.router.")
        return hf[router + ("e_score_correction_bias" if own == "expert_bias" else own)]
    if rest == "mlp.shared_experts.gate_weight":
        return hf[f"{moe}shared_expert_gate.weight"]
    if rest.startswith("mlp.shared_experts."):
        one = "shared_expert." if f"{moe}shared_expert.up_proj.weight" in hf else "shared_experts."
        return _mlp(hf, moe + one, rest.removeprefix("mlp.shared_experts."))
    if found := _EXPERT.fullmatch(rest):
        return _expert(hf, f"{moe}experts.", int(found[1]), found[2], found[3])
    return _mlp(hf, f"{at}mlp.", rest.removeprefix("mlp."))


def _attention(hf: Tensors, at: str, rest: str, args: Namespace) -> torch.Tensor:
    linear, _, kind = rest.partition(".")
    if linear == "linear_qkv":
        return _by_groups(hf, at, kind, args)
    if args.multi_latent_attention and rest == "q_layernorm.weight":
        return hf[f"{at}q_a_layernorm.weight"]
    return hf[at + _ATTENTION[rest]]


def _by_groups(hf: Tensors, at: str, kind: str, args: Namespace) -> torch.Tensor:
    """Of each query group its queries, its key and its value."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if f"{at}qkv_proj.{kind}" in hf:  # Phi-3
        rows = [args.num_attention_heads * args.kv_channels, groups * args.kv_channels, groups * args.kv_channels]
        parts = hf[f"{at}qkv_proj.{kind}"].split(rows)
    else:
        parts = tuple(hf[f"{at}{name}_proj.{kind}"] for name in "qkv")
    return torch.cat([part.chunk(groups)[group] for group in range(groups) for part in parts])


def _mlp(hf: Tensors, at: str, rest: str) -> torch.Tensor:
    """A dense MLP, one expert, or the shared experts: gate above up."""
    which, kind = rest.split(".")
    gate, up, down = ("w1", "w3", "w2") if f"{at}w1.weight" in hf else ("gate_proj", "up_proj", "down_proj")
    if which == "linear_fc2":
        return hf[f"{at}{down}.{kind}"]
    if f"{at}gate_up_proj.{kind}" in hf:  # Phi-3
        return hf[f"{at}gate_up_proj.{kind}"]
    return torch.cat([hf[f"{at}{gate}.{kind}"], hf[f"{at}{up}.{kind}"]])


def _expert(hf: Tensors, at: str, expert: int, which: str, kind: str) -> torch.Tensor:
    if f"{at}gate_up_proj" not in hf:
        return _mlp(hf, f"{at}{expert}.", f"{which}.{kind}")
    # gpt-oss: all experts in one tensor, transposed, rows of gate and up alternating
    both = "gate_up_proj" if which == "linear_fc1" else "down_proj"
    rows = hf[f"{at}{both}"][expert].T if kind == "weight" else hf[f"{at}{both}_bias"][expert]
    return torch.cat([rows[::2], rows[1::2]]) if which == "linear_fc1" else rows
