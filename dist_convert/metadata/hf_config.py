"""`config.json` and `generation_config.json` of the target, readable by transformers 4.49 and 5.

They are written by hand because what transformers 5 saves is misread by 4.49 without an error (docs/formats.md,
"config.json").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_convert.models.architecture import Architecture, RopeScaling
from dist_convert.tokenizer.record import Style, Tokenizer

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Tokens that end a turn of an instruct model: end_of_text, eom_id, eot_id.
_LLAMA3_INSTRUCT_EOS = [128001, 128008, 128009]
_LLAMA3_VOCAB = 128000


def special_token_ids(vocab: int, tokenizer: Tokenizer, *, instruct: bool) -> tuple[int | None, int | list[int] | None]:
    """Begin and end of text: what the tokenizer says, or what the family has where there is none.

    Args:
        vocab: rows of the model's embedding; ids from there on are None.
        tokenizer: as found.
        instruct: whether the tokens that end a turn of Llama 3 end the text, too.
    """
    is_unknown = tokenizer.kind == "none"
    is_llama3 = vocab > _LLAMA3_VOCAB if is_unknown else tokenizer.is_llama3
    bos, eos = tokenizer.bos, tokenizer.eos
    if is_unknown:
        bos, eos = (_LLAMA3_VOCAB, _LLAMA3_VOCAB + 1) if is_llama3 else (1, 2)
    ends = [*_LLAMA3_INSTRUCT_EOS, eos] if is_llama3 and instruct else [eos]
    known = list(dict.fromkeys(end for end in ends if end is not None and end < vocab))
    begin = bos if bos is not None and bos < vocab else None
    return begin, known if len(known) > 1 else next(iter(known), None)


def config_json(
    architecture: Architecture, hf_class: str, dtype: str, bos: int | None, eos: int | Sequence[int] | None
) -> dict[str, Any]:
    """The config of a model, in the keys of transformers 4 and, where they differ, also of 5.

    Args:
        architecture: the model.
        hf_class: transformers' class.
        dtype: safetensors name of most weights.
        bos, eos: token ids.
    """
    a = architecture
    scaling = _scaling(a.rope_scaling)
    config: dict[str, Any] = {
        "architectures": [hf_class],
        "model_type": a.family,
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.query_groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": a.rope_theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": a.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": TORCH_NAMES[dtype],
        "dtype": TORCH_NAMES[dtype],
        "use_cache": True,
    }
    if a.experts:
        return config | {
            "num_local_experts": a.experts,
            "num_experts_per_tok": a.experts_per_token,
            "router_aux_loss_coef": a.router_aux_loss,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
            "sliding_window": a.sliding_window,
        }
    return config | {"attention_bias": a.qkv_bias, "mlp_bias": a.linear_bias, "pretraining_tp": 1}


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def generation_config_json(
    bos: int | None, eos: int | Sequence[int] | None, pad: int | None = None, *, sampling: bool
) -> dict[str, Any]:
    """How the model generates by default.

    Args:
        bos, eos, pad: token ids; without a pad token the key is left out.
        sampling: whether it samples, as instruct models do.
    """
    config: dict[str, Any] = {"_from_model_config": False, "bos_token_id": bos, "eos_token_id": eos}
    config |= {} if pad is None else {"pad_token_id": pad}
    return config | ({"do_sample": True, "temperature": 0.6, "top_p": 0.9} if sampling else {})


def samples(style: Style) -> bool:
    """Whether a dense model samples by default: instruct models of Llama do, Mistral's makers say nothing of it."""
    return style.instruct and style.model_type.startswith("llama")
