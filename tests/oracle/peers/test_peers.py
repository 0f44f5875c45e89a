"""Other converters as witnesses: they import the tensors that we write, and export the files that we write."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.oracle.conftest import run_scripts
from tests.oracle.families.huggingface import build, tensors
from tests.oracle.families.models import MODELS
from tests.oracle.peers.environments import PACKAGES, packages_of

PROGRAM = "tests.oracle.peers.program"
#: Of a model, which of its grids: tensor, pipeline, expert, expert tensor parallel.
GRIDS = {
    "llama-tp2": (2, 1, 1, 2),
    "llama-tp2-pp2": (2, 2, 1, 2),
    "qwen2-tied-tp2-pp2": (2, 2, 1, 2),
    "qwen3-moe-tp2-ep2": (2, 1, 2, 2),
    "mixtral-ep2": (1, 1, 2, 1),
}
#: megatron-bridge 0.3.1 and mcore-bridge 1.6.5 have no Mixtral.
ROWS = [(tool, case) for tool in PACKAGES for case in GRIDS if tool == "mbridge" or "mixtral" not in case]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with CASE-hf in bf16, by transformers; and by us CASE-megatron of it, and CASE-back of that."""
    directory = tmp_path_factory.mktemp("ours")
    models = {model.name: model for model in MODELS}
    for case, grid in GRIDS.items():
        hf, megatron, back = (str(directory / f"{case}-{what}") for what in ("hf", "megatron", "back"))
        build(models[re.sub("-(tp|ep)2.*", "", case)]).to(torch.bfloat16).save_pretrained(hf)
        _say_what_version_4_reads(Path(hf, "config.json"))
        sizes = zip(("tensor", "pipeline", "expert", "expert-tensor"), grid, strict=True)
        flags = [word for axis, size in sizes for word in (f"--target-{axis}-parallel-size", str(size))]
        flags += ["--make-vocab-size-divisible-by", "1", "--expert-layout", "te-grouped", "--iteration", "1"]
        assert main(["convert", hf, megatron, "--to", "torch", *flags]) == 0
        assert main(["convert", megatron, back, "--to", "huggingface"]) == 0
    return directory


def _say_what_version_4_reads(config: Path) -> None:
    found = json.loads(config.read_text())
    found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    if "num_local_experts" in found:
        found["num_experts"] = found["num_local_experts"]
    config.write_text(json.dumps(found))


@pytest.mark.parametrize(("tool", "case"), ROWS)
def test_it_imports_the_bits_that_we_write_and_exports_those_that_we_do(
    tool: str, case: str, ours: Path, tmp_path: Path
) -> None:
    ranks = math.prod(GRIDS[case][:3])
    hf, iteration = ours / f"{case}-back", ours / f"{case}-megatron" / "iter_0000001"
    run_scripts((f"{packages_of(tool)}/", PROGRAM), PROGRAM, ranks, tool, hf, tmp_path, *GRIDS[case], iteration)
    exported, expected = tensors(tmp_path / "hf"), tensors(ours / f"{case}-hf")
    assert exported.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(exported[name], tensor)] == []
