"""The arguments with which Megatron-LM trains what a config.json describes. Nothing of dist_convert is used."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from tests.oracle.families.cases import Case

Config = dict[str, Any]
Args = dict[str, Any]

MAKE_VOCAB_SIZE_DIVISIBLE_BY = 128
ITERATION = 4


def training_args(config: Config, case: Case) -> Namespace:
    """All arguments that decide what the model is and how it is cut."""
    experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    args = _of_all(config) | _of_grid(config, case)
    if experts:
        args |= _of_experts(config, experts)
    for fill in OF_FAMILY[config["model_type"]]:
        args |= fill(config)
    if args["position_embedding_type"] == "yarn":
        args |= _yarn(config)
    return Namespace(**args)


def _of_all(config: Config) -> Args:
    heads = config["num_attention_heads"]
    groups, rope = config.get("num_key_value_heads") or heads, config.get("rope_parameters") or {}
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,  # argparse's default stays when it is off
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": 128,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "quick_geglu": False,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "softmax_type": "vanilla",
        "window_size": None,
        "window_attn_skip_freq": None,
        "position_embedding_type": "yarn" if _has_plain_yarn(config) else "rope",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_interleaved": False,
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "rope_scaling_factor": rope["factor"] if rope.get("rope_type") == "llama3" else 8.0,
        "rotary_seq_len_interpolation_factor": int(rope["factor"]) if rope.get("rope_type") == "linear" else None,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings"),
        "multi_latent_attention": False,
        "num_experts": None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "iteration": ITERATION,
    }


def _of_grid(config: Config, case: Case) -> Args:
    multiple = MAKE_VOCAB_SIZE_DIVISIBLE_BY * case.grid.tp
    return {
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "make_vocab_size_divisible_by": MAKE_VOCAB_SIZE_DIVISIBLE_BY,
        "transformer_impl": case.spelling,
        "moe_grouped_gemm": case.experts == "te-grouped",
        "mtp_num_layers": case.model.mtp_layers or None,
        "ckpt_format": case.format,
        "tensor_model_parallel_size": case.grid.tp,
        "pipeline_model_parallel_size": case.grid.pp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": case.grid.ep,
        "expert_tensor_parallel_size": case.grid.etp or case.grid.tp,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": case.layout,
    }


def _of_experts(config: Config, experts: int) -> Args:
    return {
        "num_experts": experts,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config.get("moe_intermediate_size", config["intermediate_size"]),
        "moe_layer_freq": 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "moe_token_dispatcher_type": "allgather",
    }


def _qkv_bias(config: Config) -> Args:
    return {"add_qkv_bias": config.get("attention_bias", True)}


def _qk_norm(config: Config) -> Args:
    return {"qk_layernorm": config.get("use_qk_norm", True)}


def _window(config: Config) -> Args:
    window = config.get("sliding_window")
    return {"window_size": (window - 1, 0) if window else None}  # without the token itself


def _layers_without_rotary(config: Config) -> Args:
    return {"no_rope_freq": [1 - rotates for rotates in config["no_rope_layers"]]}


def _qwen_experts(config: Config) -> Args:
    layers, step = range(config["num_hidden_layers"]), config.get("decoder_sparse_step", 1)
    sparse = [int(layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0) for layer in layers]
    return {"moe_layer_freq": 1 if all(sparse) else sparse, "moe_router_pre_softmax": not config["norm_topk_prob"]}


def _gated_shared_expert(config: Config) -> Args:
    width = config["shared_expert_intermediate_size"]
    return {"moe_shared_expert_intermediate_size": width, "moe_shared_expert_gate": True}


def _routed_experts(config: Config) -> Args:
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    args: Args = {
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
    }
    if config["n_group"] > 1:
        args |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    return args


def _softmax_first(_: Config) -> Args:
    return {"moe_router_pre_softmax": True}


def _sigmoid(_: Config) -> Args:
    return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _latent_attention(config: Config) -> Args:
    rope = config.get("rope_parameters") or {}
    is_yarn = rope.get("rope_type") == "yarn"
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "kv_channels": config["v_head_dim"],
        "num_query_groups": 1,
        "group_query_attention": False,
        "rope_type": "yarn" if is_yarn else "rope",
        "rotary_scaling_factor": rope.get("factor", 1.0),
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0) if is_yarn else 1.0,
        "beta_fast": rope.get("beta_fast", 32.0),
        "beta_slow": rope.get("beta_slow", 1.0),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", 4096),
    }


def _gpt_oss(_: Config) -> Args:
    return {
        "add_bias_linear": True,
        "swiglu": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 7.0,
        "softmax_type": "learnable",
        "window_attn_skip_freq": 2,
    }


def _has_plain_yarn(config: Config) -> bool:
    """Whether its rotary positions are YaRN's, and not those of latent attention."""
    return (config.get("rope_parameters") or {}).get("rope_type") == "yarn" and "kv_lora_rank" not in config


def _yarn(config: Config) -> Args:
    rope = config["rope_parameters"]
    return {
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


#: model_type -> what its models say beyond a Llama's arguments.
OF_FAMILY: dict[str, tuple[Callable[[Config], Args], ...]] = {
    "llama": (),
    "phi3": (),
    "qwen2": (_qkv_bias,),
    "seed_oss": (_qkv_bias,),
    "qwen3": (_qk_norm,),
    "mistral": (_window,),
    "mixtral": (_window,),
    "smollm3": (_layers_without_rotary,),
    "qwen3_moe": (_qk_norm, _qwen_experts),
    "qwen2_moe": (_qkv_bias, _qwen_experts, _gated_shared_expert),
    "deepseek_v2": (_routed_experts, _softmax_first, _latent_attention),
    "deepseek_v3": (_routed_experts, _sigmoid, _latent_attention),
    "glm4_moe": (_qkv_bias, _qk_norm, _routed_experts, _sigmoid),
    "gpt_oss": (_window, _gpt_oss),
}
