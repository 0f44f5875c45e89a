"""A converted checkpoint gives, in transformers, the logits that Megatron-Core's own forward gave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dist_convert
from dist_convert.__main__ import main
from tests.oracle.cases import CASES, LOSSY_CASES, OracleCase


def _convert(case: OracleCase, oracle: Path, target: Path, *flags: str) -> int:
    command = ["megatron-to-hf", "--load-path", str(oracle / case.name), "--save-path", str(target)]
    return main([*command, "--target-params-dtype", "keep", "--device", "cpu", *flags])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_gives_the_logits_of_megatron(case: OracleCase, oracle: Path, tmp_path: Path) -> None:
    assert _convert(case, oracle, tmp_path / "hf") == 0
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = torch.load(oracle / case.name / "oracle.pt")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    megatron = expected["logits"][..., : case.vocab]
    assert logits.shape == megatron.shape
    torch.testing.assert_close(logits, megatron, rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(-1), megatron.argmax(-1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_dist_that_megatron_saved_becomes_the_same_files(case: OracleCase, oracle: Path, tmp_path: Path) -> None:
    assert _convert(case, oracle, tmp_path / "hf") == 0
    of = replace(case, name=f"{case.name}/distributed")
    assert _convert(of, oracle, tmp_path / "distributed") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "distributed" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(
    ("case", "files", "beside"),
    [
        ("llama-tp2-pp2-flat-storage", 8, ["extra state (no weights)", "optimizer"]),
        ("llama-tied-tp2-pp2", 16, ["extra state (no weights)"]),
        ("mixtral-tp2-ep2-etp1", 16, ["extra state (no weights)", "optimizer"]),
    ],
)
def test_files_of_all_data_parallel_ranks_are_read_and_the_optimizer_in_them_is_left(
    case: str, files: int, beside: list[str], oracle: Path
) -> None:
    found = dist_convert.inspect(oracle / case / "distributed")
    assert (found["files"], list(found["left_behind"])) == (files, beside)


@pytest.mark.parametrize("case", LOSSY_CASES, ids=lambda case: case.name)
def test_shards_that_training_never_wrote_are_named(
    case: OracleCase, oracle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(case, oracle, tmp_path / "hf") == 1
    message = capsys.readouterr().err
    assert "mp_rank_02_000" in message
    assert "does not write" in message
