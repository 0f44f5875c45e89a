"""What the arguments of a Megatron target say about the model, the parallel sizes and the files.

Which argument means what: docs/formats.md, "Arguments that decide the model" and "Splitting over ranks".
"""

from __future__ import annotations

import math
from collections.abc import Collection

from dist_convert.layout import Grid
from dist_convert.metadata.hf_config import TORCH_NAMES
from dist_convert.models.architecture import Architecture

#: Where a value can be from.
CONFIG, MARGS, DEFAULT, PARALLEL = "config.json", "--source-margs-file", "default", "the parallel sizes"
#: Flags that say how many virtual stages there are.
_VIRTUAL_FLAGS = (
    "--target-virtual-pipeline-parallel-size", "--num-layers-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
)  # fmt: skip

#: What Habana's loaders leave out of a margs file: it belongs to the run that is over, or to its machine. And
#: disable_bias_linear, from which Megatron-LM would set add_bias_linear anew.
LLAMA_EXCLUDED = frozenset({
    "sequence_parallel", "use_distributed_optimizer", "verify_checkpoint", "load", "use_rotary_position_embeddings",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size",
    "consumed_train_samples", "consumed_valid_samples", "tokenizer_model", "disable_bias_linear",
})  # fmt: skip
MIXTRAL_EXCLUDED = LLAMA_EXCLUDED | {
    "expert_model_parallel_size", "expert_tensor_parallel_size", "encoder_num_layers", "encoder_seq_length",
    "start_weight_decay", "end_weight_decay", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
    "exp_avg_sq_dtype",
}  # fmt: skip

#: An argument's name -> its value, and in words where that is from.
Found = dict[str, tuple[object, str]]


def default_values(a: Architecture, tokenizer_model: str | None) -> Found:
    """What a margs file may say better: how training went, not what the model is."""
    is_bare = tokenizer_model is not None and tokenizer_model.endswith(".model") and a.vocab <= 128000
    bare_type = "GPTSentencePieceTokenizer" if a.experts else "Llama2Tokenizer"
    values: dict[str, object] = {
        "seq_length": min(a.max_positions, 32768 if a.experts else 4096),
        "micro_batch_size": 1,
        "global_batch_size": 128 if a.experts else 1024,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "context_parallel_size": 1,
        "tokenizer_model": None,
        "tokenizer_type": bare_type if is_bare else "HuggingFaceTokenizer",
    }
    found: Found = {name: (value, DEFAULT) for name, value in values.items()}
    if a.experts:
        found["moe_router_load_balancing_type"] = "aux_loss", DEFAULT
        found["moe_aux_loss_coeff"] = a.router_aux_loss, CONFIG
    return found


def model_values(a: Architecture) -> dict[str, object]:
    """What config.json decides, with what it implies in Megatron's words."""
    theta = int(a.rope_theta) if a.rope_theta == int(a.rope_theta) else a.rope_theta
    experts: dict[str, object] = {
        "moe_layer_freq": 1,
        "moe_router_topk": a.experts_per_token,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_enable_expert_bias": False,
        "moe_shared_expert_intermediate_size": None,
    }
    return {
        "num_layers": a.layers,
        "hidden_size": a.hidden,
        "ffn_hidden_size": a.ffn,
        "num_attention_heads": a.heads,
        "group_query_attention": a.query_groups != a.heads,
        "num_query_groups": a.query_groups,
        "kv_channels": a.head_dim,
        "max_position_embeddings": a.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # argparse's default, which Megatron-LM compares on loading
        "rotary_base": theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": a.rope_scaling is not None,
        "rope_scaling_factor": 8.0,
        "window_size": None if a.sliding_window is None else (a.sliding_window - 1, 0),  # without the token itself
        "normalization": "RMSNorm",
        "norm_epsilon": a.norm_epsilon,
        "apply_layernorm_1p": False,
        "qk_layernorm": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": a.linear_bias,
        "add_qkv_bias": a.qkv_bias,
        "untie_embeddings_and_output_weights": not a.tied,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "num_experts": a.experts or None,
        "moe_ffn_hidden_size": a.ffn if a.experts else None,
    } | (experts if a.experts else {})


def vocabulary_values(a: Architecture, vocab: int, divisible_by: int) -> Found:
    """Sizes of the vocabulary, `vocab` without padding (docs/formats.md, "Vocabulary padding")."""
    return {
        "vocab_size": (vocab, CONFIG),
        "padded_vocab_size": (a.padded_vocab, "flag --make-vocab-size-divisible-by"),
        "make_vocab_size_divisible_by": (divisible_by, "flag --make-vocab-size-divisible-by"),
    }


def precision_values(params_dtype: str) -> Found:
    """The dtype of the weights, from its safetensors name."""
    values = {
        "params_dtype": f"torch.{TORCH_NAMES[params_dtype]}",
        "bf16": params_dtype == "BF16",
        "fp16": params_dtype == "F16",
    }
    return {name: (value, "flag --target-params-dtype") for name, value in values.items()}


def parallel_values(
    a: Architecture,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    first: int | None,
    last: int | None,
    layout: str | None,
    given: Collection[str] = (),
) -> Found:
    """Parallel sizes; `stages` and the rest are those of `target_args`."""
    says_virtual = next((flag for flag in _VIRTUAL_FLAGS if flag in given), _VIRTUAL_FLAGS[0])
    virtual = grid.virtual_pipeline if grid.virtual_pipeline > 1 else None
    is_even = (first, last, layout) == (None, None, None)
    expert_tensor = grid.expert_tensor if a.experts else grid.tensor
    stage_ranks = math.lcm(grid.tensor, grid.expert * expert_tensor)
    found: Found = {
        "tensor_model_parallel_size": (grid.tensor, "flag --target-tensor-parallel-size"),
        "pipeline_model_parallel_size": (grid.pipeline, "flag --target-pipeline-parallel-size"),
        "transformer_pipeline_model_parallel_size": (grid.pipeline, "flag --target-pipeline-parallel-size"),
        "virtual_pipeline_model_parallel_size": (virtual, f"flag {says_virtual}"),
        # Megatron-LM takes the one where stages are even and the other where they are not, and never both.
        "num_layers_per_virtual_pipeline_stage": (
            stages[0][0] if virtual and is_even else None,
            f"flag {says_virtual}",
        ),
        "num_virtual_stages_per_pipeline_rank": (
            virtual if not is_even and layout is None else None,
            f"flag {says_virtual}",
        ),
        "expert_model_parallel_size": (grid.expert, "flag --target-expert-parallel-size"),
        "expert_tensor_parallel_size": (expert_tensor, "flag --target-expert-tensor-parallel-size"),
        # Megatron-LM refuses experts and tensor parallelism without it.
        "sequence_parallel": (bool(a.experts) and grid.tensor > 1, PARALLEL),
        "world_size": (grid.pipeline * stage_ranks, PARALLEL),
        "data_parallel_size": (stage_ranks // grid.tensor, PARALLEL),
    }
    return found | {
        "decoder_first_pipeline_num_layers": (first, "flag --decoder-first-pipeline-num-layers"),
        "decoder_last_pipeline_num_layers": (last, "flag --decoder-last-pipeline-num-layers"),
        "pipeline_model_parallel_layout": (layout, "flag --pipeline-model-parallel-layout"),
        "account_for_embedding_in_pipeline_split": (False, DEFAULT),
        "account_for_loss_in_pipeline_split": (False, DEFAULT),
    }


def run_values(iteration: int | None, transformer_impl: str) -> Found:
    """What is true of the files: no optimizer, no random state, and no samples seen."""
    values = {
        "ckpt_format": "torch",
        "use_dist_ckpt": False,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }
    impl = "local" if transformer_impl == "local" else "transformer_engine"  # what Habana's modules go by, too
    return {name: (value, DEFAULT) for name, value in values.items()} | {
        "iteration": (iteration or 0, "flag --release" if iteration is None else "flag --iteration"),
        "transformer_impl": (impl, "flag --saver-transformer-impl"),
    }


def expert_values(layout: str) -> Found:
    """Which class of experts the tensors' names belong to (docs/formats.md, "Experts")."""
    dynamic = layout == "habana-dynamic"
    values: dict[str, object] = {
        "moe_grouped_gemm": layout in ("te-grouped", "grouped"),
        "moe_use_legacy_grouped_gemm": layout == "grouped",
        "moe_single_grouped_weight": False,
        "moe_dynamic_hpu": dynamic,
        "moe_permuted_weights": dynamic,
        "moe_fused_weights": dynamic,
    } | ({"moe_capacity_bins_num": 0} if dynamic else {})
    return {name: (value, "flag --expert-layout") for name, value in values.items()}
