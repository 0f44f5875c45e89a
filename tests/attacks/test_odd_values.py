"""Values of any kind in a config or in training args describe a model, or end in an error of ours."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import ConversionError
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.megatron.args import architecture_from_args, true_vocab
from dist_convert.formats.megatron.grid import grid_from_args
from tests.checkpoints import Model, training_args
from tests.to_megatron import config_of

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
CONFIG = config_of(Model()).to_dict() | {"rope_theta": 5e5, "rope_scaling": None, "partial_rotary_factor": 1}
MORE_ARGS = ("moe_aux_loss_coeff", "moe_router_topk", "window_size", "window_attn_skip_freq", "num_query_groups",
             "kv_channels", "moe_ffn_hidden_size", "vocab_size", "expert_tensor_parallel_size")  # fmt: skip
ARGS = dict.fromkeys(MORE_ARGS) | vars(training_args(Model(experts=2)))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), VALUES, min_size=1, max_size=3))
def test_a_config_of_any_values_describes_a_model_or_ends_in_an_error_of_ours(changes: dict[str, Any]) -> None:
    config = CONFIG | changes
    with contextlib.suppress(ConversionError):
        architecture_from_config(config)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(ARGS)), VALUES, min_size=1, max_size=3))
def test_args_of_any_values_describe_a_model_or_end_in_an_error_of_ours(changes: dict[str, Any]) -> None:
    args = ARGS | changes
    with contextlib.suppress(ConversionError):
        architecture_from_args(args, vocab=None, file="f")
        grid_from_args(args, 1, imported_experts=False)
        true_vocab(flag=None, args=args, tokenizer=None, padded=32, file="f")
