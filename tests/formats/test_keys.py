"""One fact under its names: how training arguments and config.json say it, and what neither can say of the other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dist_convert.errors import UnsupportedModel
from dist_convert.models import FAMILIES
from dist_convert.models.keys import architecture_of, fits_signs, is_set, of_arg, pins_of, to_arg, to_config
from dist_convert.models.schema import FIELDS, Architecture, Codec, Key, Product

MODEL = Architecture(
    family="llama", layers=4, hidden=16, ffn=24, heads=4, query_groups=2, head_dim=4, vocab=29, padded_vocab=32,
    max_positions=64, norm_epsilon=1e-5, rope_theta=10000.0,
)  # fmt: skip
LEADING = Key("dense_layers", "first_k_dense_replace", "moe_layer_freq", codec="leading_dense")
SPARSE = Key("dense_layers", "decoder_sparse_step", "moe_layer_freq", codec="sparse_steps")
MTP = Key("mtp_layers", "num_nextn_predict_layers", "mtp_num_layers", codec="if_any")
NO_ROPE = Key("layers_without_rope", "no_rope_layers", "no_rope_freq", codec="no_rope")
WINDOW = Key("sliding_window", "sliding_window", "window_size", codec="window")
TIED = Key("tied", "tie_word_embeddings", "untie_embeddings_and_output_weights", "flag", codec="opposite")
SCALE = Key("route_scale", "routed_scaling_factor", "moe_router_topk_scaling_factor", "number", codec="or_one")
SHARED = Key("shared_experts", "n_shared_experts", "moe_shared_expert_intermediate_size", codec="experts_wide")
HIDDEN = Key("hidden", "hidden_size", "hidden_size")

#: A key, the fact, its argument, and what config.json says.
SAID: list[tuple[Key, Any, Any, dict[str, Any]]] = [
    (HIDDEN, 16, 16, {"hidden_size": 16}),
    (TIED, True, False, {"tie_word_embeddings": True}),
    (TIED, False, True, {"tie_word_embeddings": False}),
    (Key("experts", "n", "num_experts", codec="or_none"), 8, 8, {"n": 8}),
    (Key("experts", "n", "num_experts", codec="or_none"), 0, None, {"n": None}),
    (MTP, 2, 2, {"num_nextn_predict_layers": 2}),
    (MTP, 0, None, {"num_nextn_predict_layers": 0}),
    (SCALE, 2.5, 2.5, {"routed_scaling_factor": 2.5}),
    (SCALE, 1, None, {"routed_scaling_factor": 1}),
    (SHARED, 2, 96, {"n_shared_experts": 2}),
    (WINDOW, 4096, (4095, 0), {"sliding_window": 4096}),
    (WINDOW, None, None, {"sliding_window": None}),
    (LEADING, (), 1, {"first_k_dense_replace": 0}),
    (LEADING, (0,), [0, 1, 1, 1], {"first_k_dense_replace": 1}),
    (LEADING, (0, 1, 2), [0, 0, 0, 1], {"first_k_dense_replace": 3}),
    (SPARSE, (), 1, {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    (SPARSE, (0, 2), [0, 1, 0, 1], {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}),
    (NO_ROPE, (1, 3), [0, 1, 0, 1], {"no_rope_layers": [1, 0, 1, 0]}),
    (NO_ROPE, (), None, {"no_rope_layers": [1, 1, 1, 1]}),
]


@pytest.mark.parametrize(("key", "fact", "arg", "config"), SAID)
def test_an_argument_and_a_config_say_the_fact_in_their_own_way(
    key: Key, fact: Any, arg: Any, config: dict[str, Any]
) -> None:
    own = {key.field: fact}
    model = replace(MODEL, expert_ffn=48, **(own if key.field in FIELDS else {"facts": own}))
    assert to_arg(key, model) == arg
    assert to_config(key, model) == config
    assert (
        of_arg(key, json.loads(json.dumps({key.arg: arg, "num_layers": 4, "moe_ffn_hidden_size": 48})), "shard") == fact
    )  # as args are read


@pytest.mark.parametrize(
    ("key", "arg", "fact"),
    [
        (WINDOW, [4095, 0], 4096),
        (WINDOW, [-1, 0], None),
        (SPARSE, 2, (1, 3)),
        (SPARSE, 3, (1, 2)),
        (SPARSE, None, ()),
        (NO_ROPE, 2, (1, 3)),
        (NO_ROPE, 4, (3,)),
        (LEADING, [1, 1, 1, 1], ()),
        (TIED, None, True),
        (HIDDEN, None, 0),
        (Key("norm_epsilon", "e", "norm_epsilon", "number", arg_default=1e-5), None, 1e-5),
        (Key("rope_theta", "t", "rotary_base", "number"), 500000, 500000.0),
    ],
)
def test_other_forms_of_an_argument_are_read(key: Key, arg: Any, fact: Any) -> None:
    found = of_arg(key, {key.arg: arg, "num_layers": 4}, "shard")
    assert found == fact
    assert type(found) is type(fact)


@pytest.mark.parametrize(
    ("key", "arg", "expected"),
    [
        (WINDOW, [4095, 4095], "the number of tokens to the left, and 0"),
        (WINDOW, 4096, "the number of tokens to the left, and 0"),
        (LEADING, [1, 0, 1, 1], "layers without experts at the beginning only"),
        (LEADING, 2, "layers without experts at the beginning only"),
        (SPARSE, [0, 1], "a whole number, or a list with 0 or 1 for each layer"),
        (SPARSE, [0, 1, 2, 1], "a whole number, or a list with 0 or 1 for each layer"),
        (NO_ROPE, 3, "a divisor of the layers, or a list with 0 or 1 for each layer"),
        (NO_ROPE, [0, 1], "a divisor of the layers, or a list with 0 or 1 for each layer"),
        (SPARSE, "([0]*1+[1]*3)", "a whole number, or a list with 0 or 1 for each layer"),
        (SHARED, 100, "a multiple of 48, the width of an expert"),
        (SPARSE, -1, "a whole number, or a list with 0 or 1 for each layer"),
    ],
)
def test_a_value_that_config_json_cannot_say_is_refused_by_the_arguments_name(
    key: Key, arg: Any, expected: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        of_arg(key, {key.arg: arg, "num_layers": 4, "moe_ffn_hidden_size": 48}, "shard")
    message = str(caught.value)
    assert f"--{key.arg.replace('_', '-')} has a value that the target cannot express" in message
    assert expected in message
    assert repr(arg) in message


@pytest.mark.parametrize("value", [None, False, 0, "", "vanilla", [-1, 0], [-1, -1], [None, None]], ids=str)
def test_an_argument_without_effect_is_not_set(value: object) -> None:
    assert not is_set(value)


@pytest.mark.parametrize("value", [True, 1, 0.5, "learnable", [4095, 0]], ids=str)
def test_an_argument_with_an_effect_is_set(value: object) -> None:
    assert is_set(value)


def test_no_codec_is_without_a_row_here() -> None:
    assert {key.codec for key, *_ in SAID} == set(Codec.__args__)


def test_a_family_is_held_to_every_neutral_argument_but_those_of_its_own_keys_and_pins() -> None:
    of_llama, of_qwen3 = ({pin.arg for pin in pins_of(FAMILIES[name])} for name in ("llama", "qwen3"))
    assert "qk_layernorm" in of_llama
    assert of_llama - of_qwen3 >= {"qk_layernorm"}
    assert "rotary_interleaved" in of_llama & of_qwen3
    for family in FAMILIES.values():
        pins = [pin.arg for pin in pins_of(family)]
        assert len(pins) == len(set(pins)), family.name
        assert not {key.arg for key in family.keys} & set(pins), family.name


def test_signs_tell_a_family_by_what_is_set_and_by_what_is_not() -> None:
    assert fits_signs(FAMILIES["qwen3"], {"qk_layernorm": True, "num_experts": None})
    assert not fits_signs(FAMILIES["qwen3"], {"qk_layernorm": True, "num_experts": 8})
    assert not fits_signs(FAMILIES["qwen3"], {"qk_layernorm": False})


def test_a_product_of_facts_is_a_size_of_the_tables() -> None:
    family = replace(FAMILIES["llama"], products=(Product("query_rows", "heads", ("head_dim", "rope_dim")),))
    facts = {
        "layers": 4, "hidden": 16, "ffn": 24, "heads": 4, "query_groups": 2, "head_dim": 4, "vocab": 29, "rope_dim": 3,
        "padded_vocab": 32, "max_positions": 64, "norm_epsilon": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    assert architecture_of(family, facts).sizes()["query_rows"] == 4 * (4 + 3)
