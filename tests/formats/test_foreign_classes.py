"""Objects of other packages' classes in a checkpoint: inert and listed, and refused by name where they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_convert
from dist_convert.errors import ConversionError
from tests.checkpoints import Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import assert_same, read_tensors
from tests.read.test_restricted_pickle import importable

LAYER = Model(layers=1)
PACKAGE = "swift.megatron.register"
NAME = "decoder.layers.0.mlp.linear_fc2.weight"


def test_an_object_in_an_argument_that_nothing_needs_is_inert_and_listed(tmp_path: Path) -> None:
    hf = save_with(tmp_path / "in", "megatron_model_meta")
    report = dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert f"not imported, and no tensor or argument needs them: {PACKAGE}.Meta" in report.notes
    assert dist_convert.inspect(tmp_path / "in")["foreign_classes"] == [f"{PACKAGE}.Meta"]
    assert_same(read_tensors(tmp_path / "out"), hf)
    assert "swift" not in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("num_layers", "the argument num_layers is not a size of a model"),
        ("norm_epsilon", "the argument norm_epsilon is not a size of a model"),
        (
            "untie_embeddings_and_output_weights",
            "the argument untie_embeddings_and_output_weights is not a truth value",
        ),
        ("add_qkv_bias", "the argument add_qkv_bias is not a truth value"),
        ("use_rope_scaling", "the argument use_rope_scaling is not a truth value"),
        ("apply_layernorm_1p", "the argument apply_layernorm_1p is not a truth value"),
        (
            "yarn_correction_range_round_to_int",
            "the argument yarn_correction_range_round_to_int is not a truth value",
        ),
        ("swiglu", "--swiglu has a value that the target cannot express"),
        ("tensor_model_parallel_size", "a parallel grid of impossible sizes"),
    ],
)
def test_an_object_in_an_argument_that_decides_the_model_is_refused_by_name(
    name: str, said: str, tmp_path: Path
) -> None:
    save_with(tmp_path / "in", name)
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert said in str(caught.value)
    assert f"<{PACKAGE}.Meta>" in str(caught.value)
    assert not (tmp_path / "out").exists()


class Quantised(torch.Tensor):
    """A weight that another package keeps in its own way."""


class Wrapped:
    """What holds a weight, and is none."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight


def quantised(weight: torch.Tensor) -> torch.Tensor:
    return weight.as_subclass(Quantised)


@pytest.mark.parametrize(
    ("made", "replaced"),
    [
        (quantised, [NAME]),
        (Wrapped, [NAME]),
        (quantised, ["embedding.word_embeddings.weight"]),
        (quantised, None),
    ],
    ids=["a weight", "an object", "the embedding", "every weight"],
)
def test_the_class_is_all_that_is_said_of_objects_where_tensors_are_needed(
    made: Callable[[torch.Tensor], object], replaced: list[str] | None, tmp_path: Path
) -> None:
    shards = megatron_shards(LAYER, hf_tensors(LAYER))
    [chunk] = shards["mp_rank_00"]
    weights = {name: weight for name, weight in chunk.items() if weight is not None}
    changed: dict[str, Any] = {name: made(weights[name]) for name in replaced or weights}
    with named(Quantised, "torchao.quantised"), named(Wrapped, "torchao.wrapped"):
        save(tmp_path / "in", {"mp_rank_00": [{**chunk, **changed}]}, training_args(LAYER))
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    text = str(caught.value)
    package = "torchao.wrapped.Wrapped" if made is Wrapped else "torchao.quantised.Quantised"
    first = next(iter(changed))
    assert (
        f"an object of class {package}, which is not imported, among the model's tensors\n  tensor:   {first}\n" in text
    )
    assert "no tensor for" not in text
    assert "has no place" not in text
    assert not (tmp_path / "out").exists()


def test_the_class_of_what_stands_where_the_model_should_be_is_named(tmp_path: Path) -> None:
    save(tmp_path / "in", megatron_shards(LAYER, hf_tensors(LAYER)), training_args(LAYER))
    file = tmp_path / "in/iter_0000004/mp_rank_00/model_optim_rng.pt"
    saved = torch.load(file, weights_only=False)
    with named(Wrapped, "torchao.wrapped"):
        torch.save({**saved, "model": Wrapped(torch.ones(1))}, file)
    with pytest.raises(ConversionError, match="the file holds no model") as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert "model: torchao.wrapped.Wrapped" in caught.value.found


@contextmanager
def named(kind: type, module: str) -> Iterator[None]:
    """Within it a class is pickled as one of another package."""
    before = kind.__module__
    kind.__module__ = module
    with importable(kind, module):
        yield
    kind.__module__ = before


def save_with(root: Path, argument: str) -> dict[str, torch.Tensor]:
    """A checkpoint with an object in one of its arguments."""

    class Meta:
        pass

    Meta.__qualname__, Meta.__module__ = "Meta", PACKAGE
    hf = hf_tensors(LAYER)
    with importable(Meta, PACKAGE):
        save(root, megatron_shards(LAYER, hf), training_args(LAYER, **{argument: Meta()}))
    return hf
