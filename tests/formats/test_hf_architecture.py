"""What a config.json says about the model, in the words of transformers 4 and 5, and what is refused of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_convert.__main__ import main
from dist_convert.errors import Problems, UnsupportedModel
from dist_convert.formats.huggingface.config import architecture_from_config, config_json
from dist_convert.models.schema import Architecture, RopeScaling

#: Llama-3.1-8B and Mixtral-8x7B as they lie on the hub, without what decides nothing.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
LLAMA3 = LLAMA["rope_scaling"]


def read(config: dict[str, Any], **more: Any) -> Architecture:
    return architecture_from_config(config, **more)


def changed(config: dict[str, Any], without: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    return {name: value for name, value in (config | keys).items() if name not in without}


def v5(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """The config as transformers 5 writes it."""
    parameters = {"rope_theta": config["rope_theta"], "rope_type": "default"} | (config.get("rope_scaling") or {})
    styled = changed(config, ("rope_theta", "rope_scaling", "torch_dtype"), dtype="bfloat16")
    return styled | {"rope_parameters": parameters | rope}


def test_every_number_of_llama_is_taken_from_its_config() -> None:
    assert read(LLAMA) == Architecture(
        family="llama", layers=32, hidden=4096, ffn=14336, heads=32, query_groups=8, head_dim=128, vocab=128256,
        padded_vocab=128256, max_positions=131072, norm_epsilon=1e-5, rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )  # fmt: skip


def test_every_number_of_mixtral_is_taken_from_its_config() -> None:
    assert read(MIXTRAL) == Architecture(
        family="mixtral", layers=32, hidden=4096, ffn=14336, heads=32, query_groups=8, head_dim=128, vocab=32000,
        padded_vocab=32000, max_positions=32768, norm_epsilon=1e-5, rope_theta=1000000.0, experts=8,
        experts_per_token=2, router_aux_loss=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_the_styles_of_transformers_4_and_5_and_both_at_once_say_the_same(config: dict[str, Any]) -> None:
    assert read(v5(config)) == read(config)
    assert read(config | v5(config)) == read(config)


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"head_dim": 64}, "head_dim", 64),
        ({"head_dim": None}, "head_dim", 128),
        ({"num_key_value_heads": None}, "query_groups", 32),
        ({"tie_word_embeddings": True}, "tied", True),
        ({"rope_scaling": None}, "rope_scaling", None),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling", None),
        (
            {"rope_scaling": {**LLAMA3, "factor": 8, "rope_theta": 5e5}},
            "rope_scaling",
            RopeScaling(8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_theta": 500000}, "rope_theta", 500000.0),
        ({"partial_rotary_factor": 1.0}, "rope_theta", 500000.0),
        ({"architectures": None}, "family", "llama"),
        ({"sliding_window": 4096}, "sliding_window", None),  # LlamaForCausalLM does not look at it
        ({"attention_bias": True, "mlp_bias": True}, "linear_bias", True),
        ({"attention_bias": True, "mlp_bias": True}, "qkv_bias", True),
    ],
)
def test_a_key_of_llama_decides_its_field(keys: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read(LLAMA | keys), field) == value


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"sliding_window": 4096}, "sliding_window", 4096),
        ({"num_key_value_heads": None}, "query_groups", 32),
        ({"attention_bias": True}, "qkv_bias", False),  # MixtralForCausalLM has no biases
        ({"router_aux_loss_coef": 0.0}, "router_aux_loss", 0.0),
        ({"num_experts_per_tok": 1}, "experts_per_token", 1),
    ],
)
def test_a_key_of_mixtral_decides_its_field(keys: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read(MIXTRAL | keys), field) == value


#: What every config.json says.
SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_absent_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name} is not a size"):
        read(changed(LLAMA, (name,)))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("Llama", {}),
        ("Llama", {"hidden_size": 64, "num_attention_heads": 4}),
        ("Llama", {"rope_theta": 7.0}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "default"}}),
        ("Llama", {"rope_scaling": LLAMA3}),
        ("Mixtral", {}),
        ("Mixtral", {"hidden_size": 64, "num_attention_heads": 16}),
        ("Mixtral", {"rope_parameters": {"rope_type": "default"}}),
        ("Mixtral", {"sliding_window": 16}),
    ],
)
def test_keys_that_are_absent_have_the_values_that_transformers_gives_them(name: str, keys: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    if "rope_parameters" in keys and transformers.__version__.startswith("4"):
        pytest.skip("transformers 4 does not read rope_parameters")
    keys = SIZES | keys
    filled = getattr(transformers, f"{name}Config").from_dict(json.loads(json.dumps(keys)))
    found = read({"model_type": name.lower(), **keys})
    rope = getattr(filled, "rope_parameters", None) or {"rope_theta": getattr(filled, "rope_theta", None)}
    assert found.rope_theta == rope["rope_theta"]
    assert (found.rope_scaling is not None) == (rope.get("rope_type", "default") == "llama3")
    assert found.head_dim == (filled.head_dim or filled.hidden_size // filled.num_attention_heads)
    assert (found.tied, found.norm_epsilon) == (filled.tie_word_embeddings, filled.rms_norm_eps)
    assert (found.layers, found.hidden) == (filled.num_hidden_layers, filled.hidden_size)
    assert (found.ffn, found.max_positions) == (filled.intermediate_size, filled.max_position_embeddings)
    assert (found.heads, found.query_groups) == (filled.num_attention_heads, filled.num_key_value_heads)
    assert found.vocab == filled.vocab_size
    if name == "Mixtral":
        assert (found.experts, found.experts_per_token) == (filled.num_local_experts, filled.num_experts_per_tok)
        assert (found.router_aux_loss, found.sliding_window) == (filled.router_aux_loss_coef, filled.sliding_window)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_a_config_that_transformers_saved_is_read(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-5,
        architectures=[f"{name}ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = read(json.loads((tmp_path / "config.json").read_text()))
    assert (found.family, found.hidden, found.query_groups, found.head_dim) == (name.lower(), 64, 4, 16)
    assert found.rope_theta == {"Llama": 1e4, "Mixtral": 1e6}[name]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        changed(LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_scaling=None),
        MIXTRAL,
        changed(MIXTRAL, sliding_window=4096, head_dim=64, num_key_value_heads=32),
    ],
    ids=["llama", "llama-biases", "mixtral", "mixtral-window"],
)
def test_a_config_that_we_write_is_read_as_the_same_model(config: dict[str, Any]) -> None:
    found = read(config)
    assert read(config_json(found, "BF16")) == found


@pytest.mark.parametrize(
    ("keys", "expected", "found"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=silu", "gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "a whole factor of linear scaling", "2.5"),
        ({"rope_scaling": {"type": "linear"}}, "a number of at least 1", "None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "llama3 or yarn or linear", "dynamic"),
        ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, "a number of at least 1", "0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention in all", "sliding_attention"),
        ({"layer_types": 1}, "full_attention in all", "1"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor=1", "low_freq_factor=2.0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 2.0}}, "high_freq_factor=4", "high_freq_factor=2.0"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, "embeddings=8192", "embeddings=4096"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor=1", "low_freq_factor=None"),
        ({"rope_scaling": "linear"}, "one JSON object", "'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one JSON object", "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=1", "0.5"),
        ({"attention_bias": True}, "attention_bias and mlp_bias alike", "attention_bias=True, mlp_bias=False"),
        ({"mlp_bias": True}, "attention_bias and mlp_bias alike", "attention_bias=False, mlp_bias=True"),
        ({"num_key_value_heads": 7}, "divisible by num_key_value_heads", "32 and 7"),
        ({"num_attention_heads": 24}, "head_dim, or hidden_size divisible", "4096 and 24"),
        ({"hidden_size": "4096"}, "a positive whole number", "'4096'"),
        ({"num_hidden_layers": 0}, "a positive whole number", "0"),
        ({"vocab_size": None}, "a positive whole number", "None"),
        ({"rms_norm_eps": None}, "a number above 0", "None"),
        ({"rope_theta": "1e6"}, "a number above 0", "'1e6'"),
    ],
)
def test_what_megatron_cannot_express_is_refused(keys: dict[str, Any], expected: str, found: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        read(LLAMA | keys)
    assert expected in error.value.expected
    assert found in error.value.found
    assert error.value.file == "config.json"


def test_a_partial_rotation_is_refused_where_transformers_5_writes_it() -> None:
    with pytest.raises(UnsupportedModel, match="a different part of each head is rotated"):
        read(v5(LLAMA, partial_rotary_factor=0.5))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 1e4}, "rope_theta=500000.0 and rope_parameters with rope_theta=10000.0"),
        ({}, {"rope_type": "default"}, "'rope_type': 'llama3'} and rope_parameters={'rope_theta': 500000.0"),
        ({"rope_scaling": None}, {}, "rope_scaling=None and rope_parameters={'rope_theta': 500000.0"),
        ({"rope_scaling": {**LLAMA3, "factor": 4.0}}, {}, "'factor': 4.0"),
    ],
)
def test_rotary_parameters_that_disagree_are_refused_with_both_named(
    old: dict[str, Any], new: dict[str, Any], found: str
) -> None:
    both = LLAMA | {"rope_parameters": {"rope_theta": 5e5, **LLAMA3} | new} | old
    with pytest.raises(UnsupportedModel, match="given twice and disagree") as error:
        read(both)
    assert found in error.value.found


def test_rope_scaling_without_a_theta_hides_that_of_rope_parameters_in_transformers_5_and_is_refused() -> None:
    with pytest.raises(UnsupportedModel) as error:
        read(changed(LLAMA, ("rope_theta",), rope_parameters={"rope_theta": 5e5, **LLAMA3}))
    assert error.value.found == "rope_theta=10000.0 and rope_parameters with rope_theta=500000.0"


def test_biases_of_attention_alone_are_read_where_those_of_the_output_are_known_to_be_zero() -> None:
    found = read(LLAMA | {"attention_bias": True}, zero_output_bias=True)
    assert (found.qkv_bias, found.linear_bias) == (True, False)


def test_refused_biases_come_with_a_remedy() -> None:
    with pytest.raises(UnsupportedModel) as error:
        read(LLAMA | {"attention_bias": True})
    assert error.value.remedy == "set mlp_bias true in config.json and add the missing biases to the model as zeros"


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "'gemma', architectures=['Gemma"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "'llama', architectures=['LlamaModel']"),
        ({"model_type": "mixtral", "architectures": ["LlamaForCausalLM"]}, "'mixtral', architectures=['Llama"),
        ({"model_type": None, "architectures": None}, "None, architectures=[]"),
    ],
)
def test_another_model_is_refused_by_name(keys: dict[str, Any], found: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        read(LLAMA | keys)
    assert "llama (LlamaForCausalLM); dist-convert models lists all" in error.value.expected
    assert found in error.value.found


VISION = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {}}


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model_type": "olmo2"}, "its norms come after attention and MLP"),
        ({"model_type": "olmoe"}, "its norms of queries and keys go over all heads"),
        ({"model_type": "gemma2"}, "its layers have four norms"),
        ({"model_type": "gemma3"}, "its layers have four norms"),
        ({"model_type": "gemma3_text"}, "its layers have four norms"),
        ({"model_type": "granite"}, "its embedding, attention, residuals and logits have multipliers"),
        ({"model_type": "granitemoe"}, "its embedding, attention, residuals and logits have multipliers"),
        ({"model_type": "internlm"}, "its attention may have biases where its MLP has none"),
        ({"model_type": "internlm2"}, "its queries, keys and values are one tensor"),
        ({"model_type": "internlm3"}, "its published models scale rotary positions dynamically"),
        ({"model_type": "qwen3_next"}, "most of its layers have linear attention"),
        (VISION, "it has a vision tower beside its language model"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_family_that_is_never_converted_is_refused_with_its_reason_in_inspect_too(
    keys: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LLAMA | {"architectures": None} | keys
    with pytest.raises(UnsupportedModel, match=f"not a model that can be converted: {why}"):
        read(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) != 0
    said = "".join(capsys.readouterr())
    assert f"not a model that can be converted: {why}" in " ".join(said.split())
    assert f"model_type='{keys['model_type']}'" in said


def test_all_reasons_are_reported_together() -> None:
    with pytest.raises(Problems) as error:
        read(LLAMA | {"hidden_act": "gelu", "mlp_bias": True, "rope_scaling": {"type": "dynamic"}, "head_dim": -1})
    assert [problem.found for problem in error.value.problems] == [
        "-1", "attention_bias=False, mlp_bias=True", "dynamic", "gelu",
    ]  # fmt: skip
