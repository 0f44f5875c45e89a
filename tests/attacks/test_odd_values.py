"""Values of any kind in a config or in training args describe a model, or end in an error of ours."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import ConversionError
from dist_convert.formats.describe import as_screen, inspect_checkpoint
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.megatron.args import architecture_from_args, dialect_of_args, true_vocab
from dist_convert.formats.megatron.grid import grid_from_args
from tests.checkpoints import Model, make, training_args
from tests.distributed_checkpoints import make_distributed
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
        read_args(args)


def read_args(args: dict[str, Any]) -> tuple[object, ...]:
    """All that is made of training arguments."""
    return (
        architecture_from_args(args, vocab=None, file="f"),
        grid_from_args(args, 1, imported_experts=False),
        true_vocab(flag=None, args=args, tokenizer=None, padded=512, file="f"),
        dialect_of_args(args),
    )


class Watched(dict[str, Any]):
    """Arguments that remember which of them were asked for."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__(args)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)


DENSE, MOE = vars(training_args(Model())), vars(training_args(Model(experts=2)))
NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED]
WRONG = {
    "text": "many", "list": [1, 2], "none": None, "dict": {"a": [{"b": {}}]}, "nested": NESTED, "huge": 10**305,
    "negative": -1, "nan": float("nan"), "a class": Path("/a"),
}  # fmt: skip
#: How an error calls the sizes of the grid.
GRID = {
    "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP", "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}  # fmt: skip
#: Of the first only the truth counts, and names of tensors decide; the second is a loss in training.
HARMLESS = ("moe_grouped_gemm", "moe_aux_loss_coeff")


def outcome(args: dict[str, Any]) -> object:
    """What is made of them, or the error of ours."""
    try:
        return read_args(args)
    except ConversionError as error:
        return error


@pytest.mark.parametrize("args", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("wrong", WRONG)
def test_every_argument_of_a_wrong_type_is_named_or_changes_nothing(wrong: str, args: dict[str, Any]) -> None:
    watched = Watched(MOE)
    read_args(watched)
    assert len(watched.asked) > 100
    for name in sorted(watched.asked - set(HARMLESS)):
        found = outcome(args | {name: WRONG[wrong]})
        if isinstance(found, ConversionError):
            assert any(word in str(found) for word in (name, name.replace("_", "-"), GRID.get(name, name))), found
        elif wrong != "none":
            unsaid = {key: value for key, value in args.items() if key != name}
            assert found in (outcome(args), outcome(unsaid)), name


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_inspect_describes_what_is_there_though_the_number_of_layers_is_none(
    kind: str, wrong: str, tmp_path: Path
) -> None:
    if kind == "torch":
        make(tmp_path / "in", Model(layers=1))
        file = tmp_path / "in/iter_0000004/mp_rank_00/model_optim_rng.pt"
    else:
        make_distributed(tmp_path / "in", Model(layers=1), keys="layers")
        file = tmp_path / "in/iter_0000004/common.pt"
    saved = torch.load(file, weights_only=False)
    saved["args"].num_layers = WRONG[wrong]
    torch.save(saved, file)
    description = inspect_checkpoint(tmp_path / "in")
    assert description["files"] == 1
    assert "num_layers" in description["not_convertible"].replace("--num-layers", "num_layers")
    assert "iteration          4" in as_screen(description)
