"""`--like CONFIG` says what training arguments do not tell, and nothing against what they tell."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_convert
from dist_convert.errors import Problems
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

MODEL = Model(layers=2)
#: Of the model that `tests.checkpoints` makes, as the makers of a Mistral would have published it.
MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 29, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "sliding_window": None,
}  # fmt: skip


def _like(directory: Path, **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MISTRAL | more))
    return directory


def _config(target: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return config


def test_a_family_that_the_args_do_not_tell_is_named_with_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=2, qkv_bias=True))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert _config(tmp_path / "out")["model_type"] == "qwen2"
    assert "the args of seed_oss look the same: if it is one of these, give --like" in capsys.readouterr().err


def test_it_gives_the_family_and_no_weight_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = make(tmp_path / "in", MODEL, Grid(tp=2))
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like")), "--verify") == 0
    assert _config(tmp_path / "out")["model_type"] == "mistral"
    assert _config(tmp_path / "out")["architectures"] == ["MistralForCausalLM"]
    assert_same(read_tensors(tmp_path / "out"), expected)
    assert "look the same" not in capsys.readouterr().err


def test_a_phi_3_gets_its_projections_in_one_tensor(tmp_path: Path) -> None:
    llama = make(tmp_path / "in", MODEL)
    phi3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", **phi3)), "--verify") == 0
    found, at = read_tensors(tmp_path / "out"), "model.layers.1"
    projections = [llama.pop(f"{at}.self_attn.{name}_proj.weight") for name in "qkv"]
    assert torch.equal(found[f"{at}.self_attn.qkv_proj.weight"], torch.cat(projections))
    both = [llama.pop(f"{at}.mlp.{name}_proj.weight") for name in ("gate", "up")]
    assert torch.equal(found[f"{at}.mlp.gate_up_proj.weight"], torch.cat(both))
    own = {name: tensor for name, tensor in llama.items() if "layers.0" not in name}
    assert [name for name, tensor in own.items() if not torch.equal(found[name], tensor)] == []
    assert len(found) == 15  # six in each layer, and embedding, norm and head


def test_a_window_that_the_args_do_not_tell_is_that_of_the_config(tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", sliding_window=16))) == 0
    assert _config(tmp_path / "out")["sliding_window"] == 16


def test_it_may_name_the_file_or_its_directory(tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    like = _like(tmp_path / "like")
    for name, path in {"directory": like, "file": like / "config.json"}.items():
        assert convert(tmp_path / "in", tmp_path / name, "--like", str(path)) == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "directory" / file).read_bytes() == (tmp_path / "file" / file).read_bytes()


def test_a_path_without_a_config_is_an_error_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", MODEL)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(tmp_path / "nowhere")) == 2
    said = f"the path of --like does not exist\n  file:     {tmp_path / 'nowhere'}\n"
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "directory"])
def test_what_is_wrong_with_it_names_its_own_path(is_file: bool, tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text('{"model_type": "llama", "vocab_size": [[]]}')
    path = tmp_path / "like" / "config.json"
    with pytest.raises(Problems) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", like=path if is_file else path.parent)
    assert {problem.file for problem in caught.value.problems} == {str(path)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initializer_range", 0.006),
        ("attention_dropout", 0.1),
        ("use_cache", False),
        ("eos_token_id", 8),
        ("eos_token_id", [8, 9, 10]),
        ("a_key_of_the_makers", {"nested": [1, 2.5, None]}),
    ],
    ids=str,
)
def test_what_no_argument_tells_is_taken_over_as_it_is(key: str, value: Any, tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", **{key: value}))) == 0
    assert _config(tmp_path / "out")[key] == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoConfig": "configuration_made_up.MadeUpConfig"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
    ids=str,
)
def test_what_it_says_of_its_own_files_is_not_taken_over(key: str, value: Any, tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", **{key: value}))) == 0
    assert key not in _config(tmp_path / "out")


def test_the_ids_that_end_a_text_are_those_of_generation_too(tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    like = _like(tmp_path / "like", bos_token_id=7, eos_token_id=[8, 9])
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(like)) == 0
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (7, [8, 9])


def test_the_ids_of_a_config_of_another_name_are_its_own(tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL)
    like = _like(tmp_path / "like", eos_token_id=9)
    (like / "other.json").write_text(json.dumps(MISTRAL | {"eos_token_id": 11}))
    (like / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(like / "other.json")) == 0
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (_config(tmp_path / "out")["eos_token_id"], generation["eos_token_id"]) == (11, 11)


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("norm_epsilon", "rms_norm_eps", 1e-6),
        ("max_position_embeddings", "max_position_embeddings", 4096),
        ("rotary_base", "rope_theta", 1e6),
    ],
)
def test_a_fact_that_the_args_are_silent_on_is_that_of_the_config(
    arg: str, key: str, value: float, tmp_path: Path
) -> None:
    told = {name: told for name, told in vars(training_args(MODEL)).items() if name != arg}
    save(tmp_path / "in", megatron_shards(MODEL, hf_tensors(MODEL)), Namespace(**told))
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", **{key: value}))) == 0
    assert _config(tmp_path / "out")[key] == value


def test_all_that_the_args_contradict_is_refused_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", MODEL)
    like = _like(tmp_path / "like", num_hidden_layers=5, rms_norm_eps=1e-6, num_key_value_heads=4)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(like)) == 1
    err = capsys.readouterr().err
    assert "num_hidden_layers 5, as --like says" in err
    assert "2, from the checkpoint's argument num_layers" in err
    assert "rms_norm_eps 1e-06, as --like says" in err
    assert "num_key_value_heads 4, as --like says" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_family_with_other_arguments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=2, qkv_bias=True))
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like"))) == 1
    assert "add-qkv-bias" in capsys.readouterr().err.replace("_", "-")


def test_another_base_of_the_rotary_frequencies_is_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", MODEL)
    like = _like(tmp_path / "like", rope_theta=1e6)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(like)) == 0
    assert _config(tmp_path / "out")["rope_theta"] == 1e6
    assert "rotary_base is 500000 in the args, 1000000.0 is used, as you say" in capsys.readouterr().err


def test_a_vocabulary_that_only_the_config_tells_is_said_to_be_its(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", MODEL, vocab_size=None, make_vocab_size_divisible_by=32)
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(_like(tmp_path / "like", vocab_size=27))) == 0
    assert "vocabulary: 27 tokens according to --like, as the args do not say how many" in capsys.readouterr().err
    assert read_tensors(tmp_path / "out")["model.embed_tokens.weight"].shape == (27, 16)


@pytest.mark.parametrize(("vocab", "padded"), [(300, 320), (64, 64)])
def test_a_vocabulary_that_training_would_have_padded_to_other_rows_is_refused(
    vocab: int, padded: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", MODEL, vocab_size=None, make_vocab_size_divisible_by=32)
    like = str(_like(tmp_path / "like", vocab_size=vocab))
    assert convert(tmp_path / "in", tmp_path / "out", "--like", like) == 1
    assert f"found:    {vocab}, which are padded to {padded}\n" in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "out", "--like", like, "--true-vocab-size", "29") == 0
