"""The names that hf-to-megatron gives to norms and experts for Transformer Engine and for grouped experts.

Expected are all names of a layer, and for each the name under which Megatron itself wrote the same numbers with its
local layers.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.__main__ import main

LLAMA, MIXTRAL, GROUPED = "llama-tp2-pp2", "mixtral-tp2-ep2", "mixtral-grouped-tp2-ep2"
GRID_FLAGS = {
    LLAMA: ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"),
    MIXTRAL: ("--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "2"),
}
GRID_FLAGS[GROUPED] = GRID_FLAGS[MIXTRAL]

#: Name in a layer -> its name in Megatron's own checkpoint.
ATTENTION = {
    "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
}
TE_ATTENTION = ATTENTION | {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
TE_DENSE = TE_ATTENTION | {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
}
ROUTER = {"pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight", "mlp.router.weight": "mlp.router.weight"}
SEQUENTIAL = {
    "mlp.experts.local_experts.0.linear_fc1.weight": "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.local_experts.0.linear_fc2.weight": "mlp.experts.local_experts.0.linear_fc2.weight",
    "mlp.experts.local_experts.1.linear_fc1.weight": "mlp.experts.local_experts.1.linear_fc1.weight",
    "mlp.experts.local_experts.1.linear_fc2.weight": "mlp.experts.local_experts.1.linear_fc2.weight",
}
TE_GROUPED = {
    "mlp.experts.linear_fc1.weight0": "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight0": "mlp.experts.local_experts.0.linear_fc2.weight",
    "mlp.experts.linear_fc1.weight1": "mlp.experts.local_experts.1.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight1": "mlp.experts.local_experts.1.linear_fc2.weight",
}
LEGACY = {"mlp.experts.weight1": "mlp.experts.weight1", "mlp.experts.weight2": "mlp.experts.weight2"}
LOCAL_NORM = {"input_layernorm.weight": "input_layernorm.weight"}

#: The case, the flags, the names in a layer, and the args that make Megatron-LM build modules with these names.
SPELLINGS = [
    pytest.param(LLAMA, (), TE_DENSE, {"transformer_impl": "transformer_engine"}, id="dense-by-default"),
    pytest.param(
        MIXTRAL, (), TE_ATTENTION | ROUTER | SEQUENTIAL,
        {"transformer_impl": "transformer_engine", "moe_grouped_gemm": False}, id="experts-by-default",
    ),
    pytest.param(
        MIXTRAL, ("--expert-layout", "te-grouped"), TE_ATTENTION | ROUTER | TE_GROUPED,
        {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": False},
        id="te-grouped",
    ),
    pytest.param(
        GROUPED, ("--expert-layout", "grouped"), TE_ATTENTION | ROUTER | LEGACY,
        {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True},
        id="grouped-with-te",
    ),
    pytest.param(
        GROUPED, ("--expert-layout", "grouped", "--saver-transformer-impl", "local"),
        ATTENTION | LOCAL_NORM | ROUTER | LEGACY, {"transformer_impl": "local", "moe_grouped_gemm": True},
        id="grouped-with-local",
    ),
]  # fmt: skip


def _weights(path: Path) -> tuple[dict[str, torch.Tensor], Namespace]:
    content: dict[str, Any] = torch.load(path, weights_only=False)
    return {name: tensor for name, tensor in content["model"].items() if "_extra_state" not in name}, content["args"]


def _outside_layers(case: str, rank: str) -> set[str]:
    first, last = {"embedding.word_embeddings.weight"}, {"decoder.final_layernorm.weight", "output_layer.weight"}
    if case != LLAMA:
        return first | last
    return first if rank.endswith("_000") else last


@pytest.mark.parametrize(("case", "flags", "in_layer", "args"), SPELLINGS)
def test_names_and_args_are_those_of_the_modules_that_are_asked_for(
    case: str, flags: tuple[str, ...], in_layer: dict[str, str], args: dict[str, object], oracle: Path, tmp_path: Path
) -> None:
    paths = ["--load-path", str(oracle / case), "--save-path", str(tmp_path / "hf"), "--target-params-dtype", "keep"]
    assert main(["megatron-to-hf", *paths, "--device", "cpu"]) == 0
    paths = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "megatron")]
    padding = ["--make-vocab-size-divisible-by", "16"]
    assert main(["hf-to-megatron", *paths, *GRID_FLAGS[case], *padding, *flags, "--device", "cpu"]) == 0
    ranks = sorted(path.name for path in (tmp_path / "megatron/iter_0000001").glob("mp_rank_*"))
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    for rank in ranks:
        found, found_args = _weights(tmp_path / "megatron/iter_0000001" / rank / "model_optim_rng.pt")
        original, _ = _weights(oracle / case / "iter_0000004" / rank / "model_optim_rng.pt")
        layers = {
            f"decoder.layers.{layer}.{name}": f"decoder.layers.{layer}.{theirs}"
            for layer in range(2)
            for name, theirs in in_layer.items()
        }
        expected = layers | {name: name for name in _outside_layers(case, rank)}
        assert found.keys() == expected.keys()
        assert set(expected.values()) == original.keys()
        assert all(torch.equal(found[name], original[theirs]) for name, theirs in expected.items())
        assert {name: getattr(found_args, name) for name in args} == args
