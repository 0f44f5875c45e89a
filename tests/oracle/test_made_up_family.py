"""A family is one file and one line in the registry: one that nobody knows is converted both ways.

Its Megatron model is that of Qwen3, so Megatron-Core's own checkpoint says what its tensors must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_convert.__main__ import main
from dist_convert.models import FAMILIES
from tests.made_up_family import MADE_UP, OF_QWEN3
from tests.oracle.conftest import FEW
from tests.oracle.families import huggingface
from tests.oracle.families.cases import FILE, TO_HUGGINGFACE

(CASE,) = [case for case in TO_HUGGINGFACE if case.model.name == "qwen3"]
VOCAB = CASE.model.config["vocab_size"]


@pytest.fixture
def made_up(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hugging Face directory of the family, which is registered for this test."""
    monkeypatch.setitem(FAMILIES, MADE_UP.name, MADE_UP)
    directory, qwen3 = tmp_path / "made_up", made(FEW) / "hf" / CASE.model.name
    directory.mkdir()
    tensors = {}
    for name, tensor in huggingface.tensors(qwen3).items():
        for theirs, ours in OF_QWEN3.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((qwen3 / "config.json").read_text())
    config |= {"model_type": MADE_UP.name, "architectures": [MADE_UP.hf_class]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_it_becomes_the_tensors_that_megatron_wrote_itself(
    made: Callable[[str], Path], made_up: Path, tmp_path: Path
) -> None:
    padding = ["--make-vocab-size-divisible-by", "128"]
    command = ["convert", str(made_up), str(tmp_path / "megatron"), "--to", "torch", *CASE.flags, *padding]
    assert main([*command, "--device", "cpu"]) == 0
    originals = sorted((made(FEW) / CASE.name).glob(f"*/*/{FILE}"))
    assert len(originals) == 4
    for original in originals:
        rank = original.parent.name
        expected = torch.load(original, weights_only=False)["model"]
        found = torch.load(tmp_path / "megatron/iter_0000001" / rank / FILE, weights_only=False)["model"]
        assert {name for name in found if "_extra_state" not in name} == expected.keys()
        for name, tensor in expected.items():
            is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            true_rows = VOCAB - int(rank.split("_")[2]) * len(tensor) if is_vocabulary else None
            assert torch.equal(found[name][:true_rows], tensor[:true_rows]), name


def test_what_megatron_wrote_becomes_it_with_a_config_of_it(
    made: Callable[[str], Path], made_up: Path, tmp_path: Path
) -> None:
    target = tmp_path / "hf"
    command = ["convert", str(made(FEW) / CASE.name), str(target), "--to", "huggingface", "--like", str(made_up)]
    assert main([*command, "--target-params-dtype", "keep", "--device", "cpu"]) == 0
    expected, found = huggingface.tensors(made_up), huggingface.tensors(target)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("made_up", ["MadeUpForCausalLM"])
