"""Checkpoints that versions of the real Megatron-Core have saved, which are kept outside of the clone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.converting import convert
from tests.distributed.launching import REPOSITORY


def _main_checkout() -> Path:
    """The checkout whose worktree this one is, else this one."""
    ask = ["git", "-C", str(REPOSITORY), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    return Path(answer.stdout.strip()).parent if answer.returncode == 0 else REPOSITORY


FIXTURES = Path(os.environ.get("DIST_CONVERT_FIXTURES") or _main_checkout().parent / "shared/fixtures") / "torch_dist"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"{FIXTURES} is not here; DIST_CONVERT_FIXTURES names the place of real checkpoints"
)

NAMES = (
    "0.15.3-llama-tp2pp2", "0.16.1-llama-tp2pp2", "0.19.2-llama-tp2pp2", "0.16.1-llama-tied-pp2",
    "0.16.1-llama-optimizer-fully-reshardable", "0.16.1-mixtral-tp2ep2", "0.16.1-mixtral-grouped",
    "0.16.1-mixtral-singleton",
)  # fmt: skip
#: The same models in the format torch, or with their experts under other keys.
TWINS = {
    "llama-tp2pp2": "0.16.1-llama-tp2pp2-torch",
    "mixtral-grouped": "0.16.1-mixtral-grouped-torch",
    "mixtral-singleton": "0.16.1-mixtral-tp2ep2",
}


@pytest.mark.parametrize("name", NAMES)
def test_it_becomes_the_files_of_its_twin_with_the_logits_of_megatron(name: str, tmp_path: Path) -> None:
    assert convert(FIXTURES / name, tmp_path / "hf") == 0
    if twin := TWINS.get(name.partition("-")[2]):
        assert convert(FIXTURES / twin, tmp_path / "twin") == 0
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()
    expected = torch.load(FIXTURES / name / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)


def test_a_mixtral_whose_first_layer_is_dense_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(FIXTURES / "0.16.1-mixed-layers-ep2", tmp_path / "hf") == 1
    assert "--moe-layer-freq has a value that the target cannot express" in capsys.readouterr().err
