"""What Megatron-Core's FSDP saves becomes the files of the same weights saved as `torch`, and gives their logits.

The wrappers and what prepares their state are Megatron-Core's; pip fetches einops, which Megatron's own FSDP needs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

import dist_convert
from dist_convert.__main__ import main
from tests.converting import convert
from tests.oracle.cases import CASES
from tests.oracle.conftest import FSDP_CASES

FP32 = ("--target-params-dtype", "fp32")  # of weights that bf16 has


@pytest.fixture
def case(request: pytest.FixtureRequest, fsdp: Path) -> Path:
    return fsdp / str(request.param).replace(":", "/")


every_case = pytest.mark.parametrize("case", FSDP_CASES, indirect=True)


@every_case
def test_it_becomes_the_files_of_the_same_weights_saved_as_torch(case: Path, tmp_path: Path) -> None:
    for kind in ("fsdp", "torch"):
        assert convert(case / kind, tmp_path / kind, *FP32) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "fsdp" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


@every_case
def test_it_becomes_torch_with_the_same_weights_on_every_rank(case: Path, tmp_path: Path) -> None:
    assert main(["convert", str(case / "fsdp"), str(tmp_path / "to"), "--to", "torch", *FP32]) == 0
    files = sorted(path.relative_to(case / "torch") for path in case.glob("torch/*/*/model_optim_rng.pt"))
    assert files == sorted(path.relative_to(tmp_path / "to") for path in tmp_path.glob("to/*/*/*.pt"))
    vocab = {one.name: one.vocab for one in CASES}[case.name]
    rows = 0
    for file in files:
        found, expected = (
            torch.load(root / file, weights_only=False)["model"] for root in (tmp_path / "to", case / "torch")
        )
        left = vocab - rows  # of these rows, which padding follows that is not kept
        rows += len(expected["embedding.word_embeddings.weight"])
        for name, tensor in expected.items():
            if isinstance(tensor, torch.Tensor):
                is_padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")
                kept_rows = slice(max(0, left)) if is_padded else slice(None)
                assert torch.equal(found[name][kept_rows], tensor[kept_rows]), (file, name)


@every_case
def test_transformers_gives_the_logits_of_megatron(case: Path, tmp_path: Path) -> None:
    assert convert(case / "fsdp", tmp_path / "hf", *FP32) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    expected = torch.load(case / "oracle.pt")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"][..., : logits.shape[-1]], rtol=0, atol=1e-5)


@every_case
def test_the_optimizer_is_left_and_named(case: Path) -> None:
    found = dist_convert.inspect(case / "fsdp")
    assert (found["format"], found["iteration"], found["missing_shards"]) == (case.parent.name, 4, [])
    assert {"optimizer", "opt_param_scheduler", "rng_state"} <= found["left_behind"].keys()
    assert found["skipped_bytes"] >= 8 * found["parameters"]  # two moments of Adam, in fp32


@pytest.mark.parametrize(
    ("case", "prefix", "dtype"),
    [("torch_dcp:llama-tp1", "model.", torch.bfloat16), ("fsdp_dtensor:llama-tp1", "model.module.", torch.float32)],
    indirect=["case"],
)
def test_torch_itself_finds_these_weights_under_these_keys(case: Path, prefix: str, dtype: torch.dtype) -> None:
    directory = case / "fsdp/iter_0000004"
    listed = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        key: torch.zeros(one.size, dtype=one.properties.dtype)
        for key, one in listed.items()
        if isinstance(one, TensorStorageMetadata) and key.startswith(prefix)
    }
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    [file] = case.glob("torch/*/*/model_optim_rng.pt")
    saved = torch.load(file, weights_only=False)["model"]
    weights = {f"{prefix}{name}": one for name, one in saved.items() if isinstance(one, torch.Tensor)}
    for key in [key for key in weights if dtype == torch.float32 and ".linear_fc1." in key]:
        weights[f"{key}_w"], weights[f"{key}_v"] = weights.pop(key).chunk(2)
    assert state.keys() == weights.keys()
    assert [key for key, tensor in weights.items() if not torch.equal(state[key], tensor.to(dtype))] == []
