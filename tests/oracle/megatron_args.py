"""The `args` namespace that Megatron-LM's training puts into every checkpoint."""

from __future__ import annotations

from argparse import Namespace

import torch
from cases import OracleCase
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

ITERATION = 4
NORM_EPSILON = 1e-5
MAX_POSITIONS = 16384


def training_args(case: OracleCase, rank: int, world_size: int) -> Namespace:
    """The arguments of a training run of `case`, as they are after Megatron-LM has validated them."""
    return Namespace(
        **_model_args(case), **_moe_args(case), **_parallel_args(case, rank, world_size), **_run_args(case)
    )


def _model_args(case: OracleCase) -> dict[str, object]:
    """What decides the shape and the arithmetic of the dense model."""
    grouped = case.query_groups != case.heads
    return {
        "num_layers": case.num_layers,
        "encoder_num_layers": case.num_layers,
        "decoder_num_layers": None,
        "hidden_size": case.hidden,
        "ffn_hidden_size": case.ffn,
        "num_attention_heads": case.heads,
        "group_query_attention": grouped,
        "num_query_groups": case.query_groups if grouped else 1,  # argparse's default stays when it is off
        "kv_channels": case.kv_channels,
        "max_position_embeddings": MAX_POSITIONS,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "rotary_base": case.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": case.use_rope_scaling,
        "rope_scaling_factor": 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": NORM_EPSILON,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "swiglu": True,
        "openai_gelu": False,
        "squared_relu": False,
        "add_bias_linear": case.linear_bias,
        "add_qkv_bias": case.qkv_bias,
        "qk_layernorm": case.qk_layernorm,
        "qk_l2_norm": False,
        "untie_embeddings_and_output_weights": not case.tied,
        "vocab_size": case.vocab,
        "padded_vocab_size": case.padded_vocab,
        "make_vocab_size_divisible_by": case.make_vocab_size_divisible_by,
        "multi_latent_attention": False,
        "attention_output_gate": False,
        "mtp_num_layers": None,
        "window_size": None,
        "softmax_type": "vanilla",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.02,
        "model_type": ModelType.encoder_or_decoder,
        "attention_backend": AttnBackend.auto,
        "transformer_impl": "local",
        "spec": None,
    }


def _moe_args(case: OracleCase) -> dict[str, object]:
    """The arguments of the experts, which have their defaults in a dense model."""
    return {
        "num_experts": case.experts,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": case.ffn if case.experts else None,
        "moe_shared_expert_intermediate_size": None,
        "moe_grouped_gemm": case.grouped_gemm,
        "moe_use_legacy_grouped_gemm": False,
        "moe_router_topk": case.top_k,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01 if case.experts else 0.0,
        "moe_z_loss_coeff": None,
        "moe_token_dispatcher_type": "allgather",
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_input_jitter_eps": None,
    }


def _parallel_args(case: OracleCase, rank: int, world_size: int) -> dict[str, object]:
    """The grid."""
    virtual = case.virtual_pipeline_parallel if case.virtual_pipeline_parallel > 1 else None
    layers_per_chunk = case.num_layers // case.pipeline_parallel // case.virtual_pipeline_parallel
    return {
        "tensor_model_parallel_size": case.tensor_parallel,
        "pipeline_model_parallel_size": case.pipeline_parallel,
        "transformer_pipeline_model_parallel_size": case.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_per_virtual_pipeline_stage": layers_per_chunk if virtual else None,
        "num_virtual_stages_per_pipeline_rank": None,
        "decoder_first_pipeline_num_layers": case.first_stage_layers,
        "decoder_last_pipeline_num_layers": case.last_stage_layers,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None,
        "expert_model_parallel_size": case.expert_parallel,
        "expert_tensor_parallel_size": case.etp,
        "context_parallel_size": 1,
        "data_parallel_size": world_size // (case.tensor_parallel * case.pipeline_parallel),
        "sequence_parallel": case.tensor_parallel > 1,
        "use_tp_pp_dp_mapping": False,
        "distributed_backend": "nccl",
        "rank": rank,
        "world_size": world_size,
        "local_rank": rank,
    }


def _run_args(case: OracleCase) -> dict[str, object]:
    """What is left: precision, optimiser, data, tokenizer and checkpointing."""
    return {
        "params_dtype": torch.bfloat16 if case.bf16 else torch.float32,
        "main_params_dtype": torch.float32,
        "main_grads_dtype": torch.float32,
        "exp_avg_dtype": torch.float32,
        "exp_avg_sq_dtype": torch.float32,
        "bf16": case.bf16,
        "fp16": False,
        "fp8": None,
        "optimizer": "adam",
        "use_distributed_optimizer": case.flat_storage,
        "lr": 3e-4,
        "min_lr": 3e-5,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "seq_length": 4096,
        "encoder_seq_length": 4096,
        "decoder_seq_length": None,
        "train_iters": 100,
        "iteration": ITERATION,
        "consumed_train_samples": 8 * ITERATION,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "data_path": ["/nonexistent/corpus_text_document"],
        "split": "969,30,1",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "/nonexistent/tokenizer",
        "save": "/nonexistent/checkpoints",
        "load": None,
        "ckpt_format": "torch",
        "use_dist_ckpt": False,
        "no_save_optim": None,
        "no_save_rng": None,
        "seed": 1234,
        "yaml_cfg": None,
    }
