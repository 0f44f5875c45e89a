"""Megatron-Core's model of Transformer Engine's layers finds in our torch_dist all that it asks for.

The layers are Megatron-Core's own; what they wrap is replaced by modules with the same parameters (`stand_ins.py`).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.oracle.conftest import run_scripts
from tests.oracle.families.huggingface import build
from tests.oracle.families.models import MODELS

PROGRAM = "tests.oracle.peers.transformer_engine_program"
#: Only with a softmax of its own has attention of this version a key; others had it always.
UNASKED = "decoder.layers.self_attention.core_attention._extra_state"


@pytest.mark.parametrize(
    ("name", "sizes", "ranks"),
    [("llama", (2, 2, 1, 2), 4), ("mixtral", (2, 1, 2, 2), 4), ("qwen3", (1, 2, 1, 1), 2)],
    ids=["llama-tp2-pp2", "mixtral-tp2-ep2", "qwen3-pp2"],
)
def test_a_model_of_transformer_engines_layers_finds_all_that_it_asks_for(
    name: str, sizes: tuple[int, ...], ranks: int, tmp_path: Path
) -> None:
    model = next(model for model in MODELS if model.name == name)
    build(model).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    axes = zip(("tensor", "pipeline", "expert", "expert-tensor"), sizes, strict=True)
    flags = [word for axis, size in axes for word in (f"--target-{axis}-parallel-size", str(size))]
    flags += ["--make-vocab-size-divisible-by", "1", "--expert-layout", "te-grouped", "--iteration", "1"]
    for form in ("torch", "torch_dist"):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / form), "--to", form, *flags]) == 0
    run_scripts((f"{Path(__file__).parents[1]}/", PROGRAM), PROGRAM, ranks, tmp_path / "torch_dist", tmp_path)
    shards = sorted((tmp_path / "torch" / "iter_0000001").glob("mp_rank_*"))
    assert len(shards) == math.prod(sizes[:3])
    for shard in shards:
        found = torch.load(tmp_path / f"{shard.name}.pt", weights_only=False)
        assert (found["lacking"], found["besides"]) == ([], [UNASKED])
        same_shard = torch.load(shard / "model_optim_rng.pt", weights_only=False)["model"]
        expected = {key: one for key, one in same_shard.items() if torch.is_tensor(one)}
        assert found["tensors"].keys() == expected.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(found["tensors"][key], tensor)] == []
