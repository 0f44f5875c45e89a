"""What the user asked for, frozen: one record for each command."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

#: `--target-params-dtype` in safetensors names; `keep` leaves every tensor as it is stored.
TARGET_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "keep": None}
SOURCE_MODEL_TYPES = ("llama2", "llama3", "llama3.1", "mistral", "mixtral")
DEVICES = ("auto", "cpu", "cuda", "hpu")
PLACEMENTS = ("auto", "gather", "direct")
#: What `--verify` compares: every block, or a share.
VERIFICATIONS = ("full", "sample")
SAMPLE = Fraction(1, 16)


@dataclass(frozen=True)
class Job:
    """One Megatron to Hugging Face conversion. Field names are the flags' names; see `--help` for each.

    Sizes are in bytes. Paths are as this rank sees them (`{rank}` and its like already filled in).
    """

    load_path: Path
    save_path: Path
    ckpt_dir_name: str | None = None
    target_params_dtype: str = "bf16"
    source_model_type: str | None = None
    instruct: bool = False
    save_capacity_bins: bool = False
    max_shard_size_bytes: int = 5_000_000_000
    true_vocab_size: int | None = None
    tokenizer: Path | None = None
    habana_imported_experts: bool = False
    allow_overflow: bool = False
    device: str = "auto"
    placement: str = "auto"
    max_memory_per_rank_bytes: int = 1_000_000_000
    dry_run: bool = False
    overwrite: bool = False
    push_to_hub: str | None = None
    private: bool = False
    timeout_seconds: int = 600
    verify: str | None = None
    trace: Path | None = None
    save_per_node: bool = False


@dataclass(frozen=True)
class ToMegatronJob:
    """One Hugging Face to Megatron conversion. Field names are the flags' names; see `--help` for each.

    `iteration` is None for a release.
    """

    load_dir: str
    save_dir: Path
    target_tensor_parallel_size: int | None = None
    target_pipeline_parallel_size: int | None = None
    target_virtual_pipeline_parallel_size: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    target_expert_parallel_size: int | None = None
    target_expert_tensor_parallel_size: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    pipeline_model_parallel_layout: str | None = None
    target_ranks_per_node: int | None = None
    make_vocab_size_divisible_by: int = 128
    vocab_padding: str = "last-row"
    target_params_dtype: str = "keep"
    saver_transformer_impl: str = "transformer_engine"
    expert_layout: str = "sequential"
    source_margs_file: Path | None = None
    tokenizer_model: str | None = None
    tokenizer_type: str | None = None
    model_size: str | None = None
    iteration: int | None = 1
    true_vocab_size: int | None = None
    load_capacity_bins: bool = False
    allow_overflow: bool = False
    device: str = "auto"
    placement: str = "auto"
    max_memory_per_rank_bytes: int = 1_000_000_000
    dry_run: bool = False
    overwrite: bool = False
    verify: str | None = None
    trace: Path | None = None
    verbose: bool = False
    timeout_seconds: int = 600


def given_flags(job: ToMegatronJob) -> frozenset[str]:
    """The flags that differ from their defaults, such as "--target-params-dtype"."""
    changed = [field.name for field in fields(job) if getattr(job, field.name) != field.default]
    names = ["release" if name == "iteration" and job.iteration is None else name for name in changed]
    return frozenset("--" + name.replace("_", "-") for name in names)


@dataclass(frozen=True)
class VerifyJob:
    """A comparison of two checkpoints. Field names are the flags' names; see `--help` for each.

    Sizes are in bytes. Paths are as this rank sees them (`{rank}` and its like already filled in).
    """

    a: Path
    b: Path
    ckpt_dir_name_a: str | None = None
    ckpt_dir_name_b: str | None = None
    habana_imported_experts_a: bool = False
    habana_imported_experts_b: bool = False
    true_vocab_size: int | None = None
    sample: Fraction = Fraction(1)
    max_memory_per_rank_bytes: int = 1_000_000_000
    json: bool = False
    timeout_seconds: int = 600


@dataclass(frozen=True)
class TokenizerJob:
    """One tokenizer for a model that is converted already. Field names are the flags' names; see `--help` for each."""

    source: Path
    target: Path
    source_model_type: str | None = None
    instruct: bool = False
    overwrite: bool = False
