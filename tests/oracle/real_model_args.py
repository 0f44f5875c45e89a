"""What Megatron-LM's command line would have put into a real model's `args`, as far as it tells something."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import torch


def training_args(
    hf: dict[str, Any], *, tp: int, pp: int, iteration: int, tokenizer: Path, save: Path
) -> argparse.Namespace:
    """The training arguments of the model in a Hugging Face config.json, of a tp x pp grid."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    model = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "ffn_hidden_size": hf["intermediate_size"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "normalization": "RMSNorm",
        "norm_epsilon": hf["rms_norm_eps"],
        "qk_layernorm": False,
        "apply_layernorm_1p": False,
        "position_embedding_type": "rope",
        "rotary_base": int(hf["rope_parameters"]["rope_theta"]),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "max_position_embeddings": hf["max_position_embeddings"],
        "untie_embeddings_and_output_weights": not hf["tie_word_embeddings"],
        "num_experts": None,
    }
    vocabulary = {
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer),
    }
    grid = {
        "world_size": tp * pp,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": tp,
    }
    run = {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "iteration": iteration,
        "seq_length": 2048,
        "save": str(save),
        "ckpt_format": "torch",
        # Values of Megatron's and Python's classes, as real args hold them.
        "model_type": ModelType.encoder_or_decoder,
        "attention_backend": AttnBackend.local,
        "exit_signal": signal.SIGTERM,
    }
    return argparse.Namespace(**model, **vocabulary, **grid, **run)
