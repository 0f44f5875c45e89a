"""Megatron-Bridge's checkpoints have no args, but `run_config.yaml`: the one here is by megatron-bridge 0.3.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_convert.__main__ import main
from dist_convert.errors import SourceError
from dist_convert.formats.torch_dist.contents import args_of_run_config
from tests.checkpoints import Grid, Model
from tests.converting import convert
from tests.distributed_checkpoints import make_distributed

WRITTEN = (Path(__file__).parent / "run_config.yaml").read_text()
LLAMA = Model()
MIXTRAL = Model(experts=4, layers=2)
DIRECTORY = "bridge/iter_0000004"


def make_bridge(root: Path, model: Model = LLAMA, **fields: Any) -> Path:
    """A checkpoint as Megatron-Bridge saves it; the directory."""
    make_distributed(root / "bridge", model, Grid(tp=2))
    directory = root / DIRECTORY
    args = torch.load(directory / "common.pt", weights_only=False)["args"]
    torch.save({"checkpoint_version": 3.0, "iteration": 4, "content_metadata": {}}, directory / "common.pt")
    config = yaml.safe_load(WRITTEN)
    config["model"] |= {
        "num_layers": model.layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "kv_channels": args.kv_channels,
        "seq_length": args.max_position_embeddings,
        "rotary_base": args.rotary_base,
        "layernorm_epsilon": args.norm_epsilon,
        "vocab_size": model.vocab,
        "share_embeddings_and_output_weights": model.tied,
        "num_moe_experts": model.experts or None,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size if model.experts else None,
        "moe_aux_loss_coeff": getattr(args, "moe_aux_loss_coeff", 0.0),
        **fields,
    }
    (directory / "run_config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.mark.parametrize("model", [LLAMA, Model(tied=True), MIXTRAL], ids=["llama", "tied", "mixtral"])
def test_a_checkpoint_of_megatron_bridge_becomes_the_files_of_its_twin_with_args(model: Model, tmp_path: Path) -> None:
    make_bridge(tmp_path, model)
    make_distributed(tmp_path / "twin", model, Grid(tp=2))
    assert convert(tmp_path / "bridge", tmp_path / "hf") == 0
    assert convert(tmp_path / "twin", tmp_path / "expected") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_it_becomes_torch_with_args_that_training_reads(tmp_path: Path) -> None:
    make_bridge(tmp_path)
    assert main(["convert", str(tmp_path / "bridge"), str(tmp_path / "torch"), "--to", "torch"]) == 0
    args = torch.load(tmp_path / "torch/iter_0000004/mp_rank_00/model_optim_rng.pt", weights_only=False)["args"]
    assert (args.num_layers, args.swiglu, args.untie_embeddings_and_output_weights) == (LLAMA.layers, True, True)
    assert main(["verify", str(tmp_path / "bridge"), str(tmp_path / "torch")]) == 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}, "--swiglu has a value"),
        ("multi_latent_attention", True, "--multi-latent-attention has a value"),
        ("rope_scaling_factor", 1.0, ""),
        ("hidden_size", 32, "wrong shape for embedding.word_embeddings.weight"),
        ("num_layers", "many", "num_layers is not a size of a model"),
        ("share_embeddings_and_output_weights", True, "a separate head, although the args tie it"),
    ],
)
def test_what_it_says_of_another_model_is_refused(
    field: str, value: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bridge(tmp_path, **{field: value})
    assert convert(tmp_path / "bridge", tmp_path / "hf") == (1 if words else 0)
    error = capsys.readouterr().err
    assert words in error
    assert not words.startswith("--") or str(tmp_path / DIRECTORY / "run_config.yaml") in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {num_layers: 2}", "no hidden_size, ffn_hidden_size"),
        ("model: []", "no num_layers, hidden_size"),
        ("[]", "list"),
        ("a: [", "while parsing a flow node"),
        ("a: !!python/object/apply:os.system [true]", "line 1: an unsupported kind of value"),
        ("a: &a [1]\nb: *a", "line 1: an alias"),
        ("a: " + "[" * 5000, "recursion"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: \xff\x00", "can't decode byte"),
        ("a: " + "b" * (1 << 17), "131 kB"),
    ],
)
def test_a_damaged_run_config_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SourceError) as caught:
        args_of_run_config(tmp_path)
    assert caught.value.file == str(path)
    assert words in caught.value.found


def test_a_checkpoint_of_nemo_is_named_with_what_would_be_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_bridge(tmp_path)
    (directory / "run_config.yaml").unlink()
    (tmp_path / "nemo/context").mkdir(parents=True)
    directory.rename(tmp_path / "nemo/weights")
    assert convert(tmp_path / "nemo", tmp_path / "hf", "--ckpt-dir-name", "weights") == 1
    error = capsys.readouterr().err
    assert "a NeMo checkpoint" in error
    assert "llm.export_ckpt" in error
