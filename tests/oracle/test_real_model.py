"""A real model, SmolLM2-135M-Instruct, through megatron-core itself in both directions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dist_convert.__main__ import main
from tests.converting import assert_same, convert
from tests.oracle.conftest import Ranks, kept

REPOSITORY = Path(__file__).parents[2]
GRID = ("--target-tensor-parallel-size", "3", "--target-pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model as a Hugging Face directory."""
    program = REPOSITORY / "launch" / "demo_inputs.py"

    def make(work: Path) -> None:
        subprocess.run([sys.executable, str(program), str(work)], check=True)

    return kept("smollm2", program.read_text(), make) / "smollm2-hf"


def test_what_megatron_saved_at_tp3_pp2_becomes_the_same_weights_and_still_answers_paris(
    smollm2: Path, tmp_path: Path, ranks: Ranks
) -> None:
    config = (smollm2 / "config.json").read_text()
    megatron = kept("real-model", config, lambda made: ranks("real_model_writer", 6, smollm2, made))
    assert convert(megatron, tmp_path / "hf", "--tokenizer", str(smollm2)) == 0
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(smollm2 / "model.safetensors"))
    check = [sys.executable, str(REPOSITORY / "launch" / "demo_check.py"), str(tmp_path / "hf")]
    answer = subprocess.run(check, capture_output=True, text=True, check=True).stdout
    assert "The capital of France is Paris" in answer


def test_a_real_model_written_at_tp3_pp2_answers_in_megatron_that_the_capital_of_france_is_paris(
    smollm2: Path, tmp_path: Path, ranks: Ranks
) -> None:
    paths = ["--load-dir", str(smollm2), "--save-dir", str(tmp_path / "smollm2/megatron")]
    assert main(["hf-to-megatron", *paths, *GRID, "--saver-transformer-impl", "local", "--device", "cpu"]) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    torch.save({"input_ids": torch.tensor([prompt]), "new_tokens": 7}, tmp_path / "smollm2/input.pt")
    ranks("megatron_reader", 6, tmp_path, "smollm2")
    output = torch.load(tmp_path / "smollm2/output.pt")
    assert output["problems"] == []
    answer = tokenizer.decode(output["input_ids"][0, len(prompt) :], skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris")
