"""torchtitan, in an environment of its own: what its training saves becomes what its own adapter makes of the model.

pip fetches it, and what it imports besides.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from dist_convert.__main__ import main
from tests.converting import read_tensors
from tests.oracle.conftest import kept, run_scripts

PACKAGES = (
    "torchtitan==0.3.0", "spmd_types==0.2.3", "torch_checkpointing==0.1.1", "tyro==1.0.17",
    "docstring_parser==0.18.0", "typeguard==4.6.1",
)  # fmt: skip
#: torchtitan's Llama 3 debug model.
CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=16,
    max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, dtype="float32",
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks save; see `tests.dcp.torchtitan_training`."""

    def install(directory: Path) -> None:
        flags = ["--quiet", "--no-deps", "--target", str(directory)]
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, *PACKAGES], check=True)

    titan = kept("torchtitan", str(PACKAGES), install)
    imported = (f"{titan}/", "torch._inductor.codecache", "tests.oracle.without_compilers")
    directory = tmp_path_factory.mktemp("torchtitan")
    run_scripts(imported, "tests.dcp.torchtitan_training", 2, directory)
    CONFIG.save_pretrained(directory)
    return directory


def test_what_its_training_saves_becomes_bit_for_bit_what_its_own_adapter_makes_of_the_model(
    saved: Path, tmp_path: Path
) -> None:
    checkpoint, like = saved / "checkpoint/step-1", saved / "config.json"
    assert sorted(path.name for path in checkpoint.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    how = ["--to", "huggingface", "--like", str(like), "--target-params-dtype", "keep"]
    assert main(["convert", str(checkpoint), str(tmp_path / "hf"), *how]) == 0
    expected, found = load_file(saved / "adapter.safetensors"), read_tensors(tmp_path / "hf")
    assert len(expected) == 3 + 6 * 9
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
