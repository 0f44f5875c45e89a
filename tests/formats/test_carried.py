"""What only transformers reads of a model goes to Megatron beside the checkpoint, and comes back with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dist_convert
from dist_convert.errors import SourceError
from tests.checkpoints import Model
from tests.converting import read_tensors
from tests.published import make_published
from tests.to_megatron import make_hf

MODEL = Model(layers=2)
CONFIG = {
    "bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 10, "attention_dropout": 0.25, "use_cache": False,
    "transformers_version": "4.51.0",
}  # fmt: skip
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [8, 9], "pad_token_id": 10}

SMALL_V3 = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 4, "num_nextn_predict_layers": 0,
}  # fmt: skip
SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_hf(tmp_path / "hf", MODEL)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | CONFIG))
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(GENERATION))
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def assert_equal_configs(place: Path) -> None:
    before, after = (read(place / name / "config.json") for name in ("hf", "back"))
    assert {name: after.get(name) for name in before} == before
    assert read(place / "back" / "generation_config.json") == GENERATION


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_configs_come_back_whole_from_a_megatron_checkpoint(kind: str, place: Path) -> None:
    dist_convert.convert(place / "hf", place / "megatron", to=kind)
    dist_convert.convert(place / "megatron", place / "back", to="huggingface")
    assert_equal_configs(place)


def test_configs_come_back_through_another_grid(place: Path) -> None:
    dist_convert.convert(place / "hf", place / "one", to="torch")
    dist_convert.convert(place / "one", place / "two", to="torch_dist", target_tensor_parallel_size=2)
    dist_convert.convert(place / "two", place / "back", to="huggingface")
    assert_equal_configs(place)


def test_a_config_of_another_model_is_not_taken_over(place: Path) -> None:
    dist_convert.convert(place / "hf", place / "megatron", to="torch")
    carried = place / "megatron" / "iter_0000001" / "huggingface_configs.json"
    content = read(carried)
    content["config.json"]["max_position_embeddings"] = 7
    carried.write_text(json.dumps(content))
    dist_convert.convert(place / "megatron", place / "back", to="huggingface")
    after = read(place / "back" / "config.json")
    assert after["max_position_embeddings"] == read(place / "hf" / "config.json")["max_position_embeddings"]
    assert after["attention_dropout"] == 0.0


def test_a_damaged_file_of_configs_is_named(place: Path) -> None:
    dist_convert.convert(place / "hf", place / "megatron", to="torch")
    (place / "megatron" / "iter_0000001" / "huggingface_configs.json").write_text("{")
    with pytest.raises(SourceError, match=r"huggingface_configs\.json"):
        dist_convert.convert(place / "megatron", place / "back", to="huggingface")


@pytest.mark.parametrize("kept", [True, False], ids=["counted", "dropped"])
def test_a_config_that_counts_layers_of_multi_token_prediction_comes_back(kept: bool, tmp_path: Path) -> None:
    make_published(tmp_path / "hf", "deepseek-v3", 1, **SMALL_V3)
    config = read(tmp_path / "hf" / "config.json") | {"num_nextn_predict_layers": 1, "initializer_range": 0.05}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    dist_convert.convert(tmp_path / "hf", tmp_path / "megatron", to="torch", drop_mtp=not kept)
    dist_convert.convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    assert read(tmp_path / "back" / "config.json")["initializer_range"] == 0.05


def of_family(family: str, directory: Path, **more: Any) -> None:
    """A model whose arguments are also those of another family."""
    classes = {"phi3": "Phi3ForCausalLM", "seed_oss": "SeedOssForCausalLM"}
    biases = {"attention_bias": family == "seed_oss"}
    own = SMALL | biases | more | {"model_type": family, "architectures": [classes[family]]}
    make_published(directory, "qwen3-8b", 1, **own)


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
@pytest.mark.parametrize("family", ["phi3", "seed_oss"])
def test_a_family_that_the_args_do_not_tell_is_that_of_the_config(family: str, kind: str, tmp_path: Path) -> None:
    of_family(family, tmp_path / "hf")
    dist_convert.convert(tmp_path / "hf", tmp_path / "megatron", to=kind)
    dist_convert.convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    assert read(tmp_path / "back" / "config.json")["model_type"] == family
    assert read_tensors(tmp_path / "back").keys() == read_tensors(tmp_path / "hf").keys()


@pytest.mark.parametrize(("family", "plainest"), [("phi3", "llama"), ("seed_oss", "qwen2")])
def test_a_family_is_not_that_of_the_config_of_another_model(family: str, plainest: str, tmp_path: Path) -> None:
    of_family(family, tmp_path / "hf")
    dist_convert.convert(tmp_path / "hf", tmp_path / "megatron", to="torch")
    carried = tmp_path / "megatron" / "iter_0000001" / "huggingface_configs.json"
    content = read(carried)
    content["config.json"]["rms_norm_eps"] = 1e-3
    carried.write_text(json.dumps(content))
    dist_convert.convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    assert read(tmp_path / "back" / "config.json")["model_type"] == plainest


def test_each_iteration_of_a_root_has_the_configs_of_its_own_model(place: Path) -> None:
    other = json.loads((place / "hf" / "config.json").read_text()) | {"bos_token_id": 1, "use_cache": True}
    dist_convert.convert(place / "hf", place / "megatron", to="torch", iteration=1)
    shutil.copytree(place / "hf", place / "other")
    (place / "other" / "config.json").write_text(json.dumps(other))
    dist_convert.convert(place / "other", place / "megatron", to="torch", iteration=2)
    dist_convert.convert(place / "megatron", place / "back", to="huggingface", ckpt_dir_name="iter_0000001")
    assert_equal_configs(place)


def test_special_ids_without_a_row_are_not_taken_over(place: Path) -> None:
    dist_convert.convert(place / "hf", place / "megatron", to="torch")
    dist_convert.convert(place / "megatron", place / "back", to="huggingface", true_vocab_size=10)
    after = read(place / "back" / "config.json")
    assert (after["vocab_size"], after.get("pad_token_id")) == (10, None)


@pytest.mark.parametrize("config", [{}, {"config.json": 5}, {"config.json": {"model_type": ["llama"]}}], ids=str)
def test_a_generation_config_without_the_config_of_this_model_is_not_taken_over(config: Any, place: Path) -> None:
    dist_convert.convert(place / "hf", place / "megatron", to="torch")
    carried = place / "megatron" / "iter_0000001" / "huggingface_configs.json"
    carried.write_text(json.dumps(config | {"generation_config.json": {"eos_token_id": 9}}))
    dist_convert.convert(place / "megatron", place / "back", to="huggingface")
    assert read(place / "back" / "generation_config.json")["eos_token_id"] == 2


@pytest.mark.parametrize("to", ["torch", "huggingface"])
def test_the_number_of_experts_has_its_name_of_every_version_of_transformers(to: str, tmp_path: Path) -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    make_published(tmp_path / "hf", "qwen3-30b-a3b", files=1, **SMALL, **sizes)
    config = read(tmp_path / "hf" / "config.json")
    config["num_local_experts"] = config.pop("num_experts")  # as transformers 5 saves it
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    dist_convert.convert(tmp_path / "hf", tmp_path / "made", to=to)
    if to == "torch":
        dist_convert.convert(tmp_path / "made", tmp_path / "back", to="huggingface")
    after = read(tmp_path / ("back" if to == "torch" else "made") / "config.json")
    assert (after["num_experts"], after["num_local_experts"]) == (8, 8)
