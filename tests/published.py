"""Published models of families: what their config.json says, and sparse checkpoints of their full sizes.

Which tensors a model has is what its family's table says: these are for plans of true sizes, not witnesses of names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isal import isal_zlib

from dist_convert.cli.flags import options_from_flags, parse
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.huggingface.lay_out import to_huggingface
from dist_convert.formats.huggingface.names import published
from dist_convert.formats.open import open_source
from dist_convert.formats.to_megatron import to_megatron
from dist_convert.models import FAMILIES
from dist_convert.models.schema import alias_shape, copies_of, entries
from dist_convert.options import HUGGINGFACE
from dist_convert.ranks.collectives import alone
from dist_convert.write.files import held
from dist_convert.write.task import Task
from tests.full_size import LLAMA_31_CONFIG, write_sparse_files

_QWEN3 = {
    "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "head_dim": 128, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
_QWEN3_DENSE = _QWEN3 | {"model_type": "qwen3", "num_key_value_heads": 8}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

_GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4,
    "sliding_window": 128, "max_position_embeddings": 131072, "rope_theta": 150000, "rms_norm_eps": 1e-5,
    "attention_bias": True, "tie_word_embeddings": False, "swiglu_limit": 7.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

#: config.json, as far as it decides what the model is.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3_DENSE
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "qwen3-32b": _QWEN3_DENSE
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    "qwen3-30b-a3b": _QWEN3_MOE
    | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": _QWEN3_MOE
    | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "max_position_embeddings": 131072, "rope_theta": 1000000, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
        "attention_bias": True, "use_qk_norm": False, "num_nextn_predict_layers": 1,
    },
    "llama-3.1-405b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, **LLAMA_31_CONFIG,
    },
    "mixtral-8x22b": {
        "model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1000000.0, "max_position_embeddings": 65536,
        "tie_word_embeddings": False, "sliding_window": None, "rms_norm_eps": 1e-5,
    },
    "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
}  # fmt: skip


def make_published(root: Path, name: str, files: int, **more: Any) -> None:
    """One of `PUBLISHED` as a Hugging Face directory of so many weights files, with holes for values."""
    config = PUBLISHED[name] | more
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    architecture = architecture_from_config(config)
    family, sizes = FAMILIES[architecture.family], architecture.sizes()
    shapes = {
        alias.name.format(layer=layer, expert=expert): alias_shape(part, alias, sizes)
        for entry, layer, expert in entries(family, architecture)
        for part in entry.parts
        for alias in [published(part)]
    }
    copies = copies_of(family, architecture).items()
    shapes |= {copy: shapes[name] for name, of_layers in copies for copy in of_layers}
    write_sparse_files(root, shapes, files)


def task_of(words: Sequence[str]) -> Task:
    """What a command line would do."""
    job, world = options_from_flags(parse(words)), alone()
    lay_out = to_huggingface if job.to == HUGGINGFACE else to_megatron
    return lay_out(job, open_source(job, world), world)


def make_published_megatron(words: Sequence[str]) -> None:
    """The Megatron checkpoint that a command line would make, with holes for values, and the checksums of zeros."""
    task = task_of(words)
    task.target.mkdir(parents=True)
    sizes_bytes = {tensor.size_bytes for file in task.files for tensor in file.tensors}
    checksums = {size_bytes: isal_zlib.crc32(bytes(size_bytes)) for size_bytes in sizes_bytes}
    known = {
        file.name: [(one.offset_bytes, one.size_bytes, checksums[one.size_bytes]) for one in file.tensors]
        for file in task.files
    }
    with held(task.target) as directory:
        task.layout.make_files(directory, task.files, is_first=True)
        task.layout.complete(directory, task.files, known, is_first=True)
    (task.target.parent / "latest_checkpointed_iteration.txt").write_text("1")
