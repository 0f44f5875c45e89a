"""What tests of `hf-to-megatron` share: models saved by safetensors and transformers, and shards read back by torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, State, hf_tensors, megatron_shards

FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"

#: Flags' names -> those of `tests.checkpoints`. Intel's Transformer Engine on HPU names norms like the local modules.
NORMS = {"local": "local", "transformer_engine": "te", "habana": "local"}
EXPERTS = {"sequential": "sequential", "te-grouped": "te-grouped", "grouped": "grouped", "habana-dynamic": "dynamic"}

#: Small vocabularies stay small with it.
DIVISIBLE_BY = 4

LLAMA = Model()
ONE_RANK = Grid()


def config_of(model: Model, **more: Any) -> PretrainedConfig:
    """The config of a model as transformers makes it."""
    sizes: dict[str, Any] = {
        "vocab_size": model.vocab, "hidden_size": model.hidden, "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.groups,
        "head_dim": model.head_dim, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": model.tied,
    }  # fmt: skip
    if model.experts:
        moe = {"num_local_experts": model.experts, "sliding_window": None, "architectures": ["MixtralForCausalLM"]}
        return MixtralConfig(**{**sizes, **moe, **more})
    biases = {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**{**sizes, **biases, **more})


def make_hf(
    directory: Path, model: Model = LLAMA, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any
) -> dict[str, torch.Tensor]:
    """Save a model of one safetensors file and its config; returns the tensors."""
    saved = dict(hf_tensors(model) if tensors is None else tensors)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})
    config_of(model, **config).save_pretrained(directory)
    return saved


def grid_flags(grid: Grid) -> list[str]:
    """The flags of a target's parallel sizes."""
    sizes = {"tensor": grid.tp, "pipeline": grid.pp, "virtual-pipeline": grid.vpp, "expert": grid.ep}
    sizes |= {"expert-tensor": grid.etp} if grid.etp else {}
    return [word for name, size in sizes.items() if size != 1 or name == "expert-tensor"
            for word in (f"--target-{name}-parallel-size", str(size))]  # fmt: skip


def to_megatron(source: Path, target: Path, *flags: str, grid: Grid = ONE_RANK) -> int:
    """Convert with one rank on the CPU; returns the exit code."""
    few = [] if "--make-vocab-size-divisible-by" in flags else ["--make-vocab-size-divisible-by", str(DIVISIBLE_BY)]
    command = ["hf-to-megatron", "--load-dir", str(source), "--save-dir", str(target), "--device", "cpu"]
    return main([*command, *grid_flags(grid), *few, *flags])


def load(path: Path, **how: Any) -> dict[str, Any]:
    """A rank's file, by torch's own unpickler of weights, which is told of `argparse.Namespace` and nothing else."""
    with torch.serialization.safe_globals([Namespace]):
        found: dict[str, Any] = torch.load(path, weights_only=True, **how)
    return found


def read_shards(root: Path, iteration: str = "iter_0000001") -> dict[str, list[State]]:
    """Rank directory -> one state dict per virtual stage."""
    shards = {}
    for directory in sorted((root / iteration).glob("mp_rank_*")):
        saved = load(directory / FILE)
        virtual = sorted(name for name in saved if name.startswith("model"))
        shards[directory.name] = [dict(saved[name]) for name in virtual]
    return shards


def expected_shards(
    model: Model,
    hf: Mapping[str, torch.Tensor],
    grid: Grid = ONE_RANK,
    *,
    norms: str = "transformer_engine",
    experts: str = "sequential",
    divisible_by: int = DIVISIBLE_BY,
    zeros: bool = False,
) -> dict[str, list[State]]:
    """What the files must hold, by plain reshapes: padding rows are part of the vocabulary that is cut."""
    rows = -(-model.vocab // (divisible_by * grid.tp)) * divisible_by * grid.tp
    whole = dict(hf)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & hf.keys():
        last = torch.zeros_like(hf[name][-1:]) if zeros else hf[name][-1:]
        whole[name] = torch.cat([hf[name], last.repeat(rows - model.vocab, 1)])
    padded = replace(model, vocab=rows, padded_vocab=rows)
    shards = megatron_shards(padded, whole, grid, norms=NORMS[norms], experts=EXPERTS[experts])
    return {
        name: [{key: value for key, value in chunk.items() if not key.endswith("_extra_state")} for chunk in chunks]
        for name, chunks in shards.items()
    }


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: NaNs with their payloads, and the signs of zeros."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def assert_same_shards(found: Mapping[str, Sequence[State]], expected: Mapping[str, Sequence[State]]) -> None:
    """Equal files, virtual stages, names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for file, chunks in expected.items():
        assert [sorted(chunk) for chunk in found[file]] == [sorted(chunk) for chunk in chunks], file
        for virtual, chunk in enumerate(chunks):
            wrong = [name for name, tensor in chunk.items() if not same_bits(found[file][virtual][name], tensor)]
            assert wrong == [], (file, virtual)


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []
