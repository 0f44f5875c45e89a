"""Layers of multi-token prediction: refused, or left out where the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import convert
from tests.to_megatron import make_hf, to_megatron

MODEL = Model(layers=2)
FURTHER = {"enorm.weight": (16,), "eh_proj.weight": (16, 32), "embed_tokens.weight": (29, 16)}


def test_a_hugging_face_model_with_further_layers_is_refused_with_the_flag_that_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = {f"model.layers.2.{name}": torch.ones(shape, dtype=torch.bfloat16) for name, shape in FURTHER.items()}
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL) | further)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 1
    assert "--drop-mtp" in capsys.readouterr().err
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--drop-mtp") == 0
    assert "left behind: 3 x layers of multi-token prediction (--drop-mtp), 1.98 kB" in capsys.readouterr().err


def test_a_megatron_model_with_further_layers_is_refused_with_the_flag_that_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = hf_tensors(MODEL)
    shards = megatron_shards(MODEL, tensors, Grid(pp=2))
    [last] = shards[max(shards)]
    last["mtp.layers.0.enorm.weight"] = torch.ones(16, dtype=torch.bfloat16)
    last["embedding.word_embeddings.weight"] = torch.zeros(32, 16, dtype=torch.bfloat16)
    save(tmp_path / "in", shards, training_args(MODEL, Grid(pp=2), mtp_num_layers=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "--drop-mtp" in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "out", "--drop-mtp") == 0
    err = capsys.readouterr().err
    assert "1 x layers of multi-token prediction (--drop-mtp), 32 B" in err
    assert "1 x embedding (the copy that multi-token prediction reads), 1.02 kB" in err
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_copy_of_the_config_counts_no_further_layers(tmp_path: Path) -> None:
    further = {"model.layers.2.enorm.weight": torch.ones(16, dtype=torch.bfloat16)}
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL) | further, num_nextn_predict_layers=1)
    flags = ("--to", "huggingface", "--drop-mtp")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), *flags]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_layers_that_config_json_does_not_count_are_not_taken_for_multi_token_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL), num_hidden_layers=1)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--drop-mtp") == 1
    assert "model.layers.1.input_layernorm.weight has no place in a LlamaForCausalLM" in capsys.readouterr().err
