"""Objects of other packages' classes in a checkpoint: inert and listed, and refused by name where they are needed."""

from __future__ import annotations

import sys
from pathlib import Path

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
        ("num_layers", "the argument num_layers is no size of a model"),
        ("norm_epsilon", "the argument norm_epsilon is no size of a model"),
        ("untie_embeddings_and_output_weights", "the argument untie_embeddings_and_output_weights is no truth value"),
        ("add_qkv_bias", "the argument add_qkv_bias is no truth value"),
        ("use_rope_scaling", "the argument use_rope_scaling is no truth value"),
        ("apply_layernorm_1p", "the argument apply_layernorm_1p is no truth value"),
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


def test_a_weight_of_another_package_s_class_is_refused_by_its_name_and_class(tmp_path: Path) -> None:
    class Quantised(torch.Tensor):
        pass

    Quantised.__qualname__, Quantised.__module__ = "Quantised", "torchao.quantised"
    shards = megatron_shards(LAYER, hf_tensors(LAYER))
    [chunk] = shards["mp_rank_00"]
    chunk[NAME] = chunk[NAME].as_subclass(Quantised)
    with importable(Quantised, "torchao.quantised"):
        save(tmp_path / "in", shards, training_args(LAYER))
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert f"tensor:   {NAME}\n" in str(caught.value)
    assert "found:    an entry of class torchao.quantised.Quantised\n" in str(caught.value)
    assert not (tmp_path / "out").exists()


def save_with(root: Path, argument: str) -> dict[str, torch.Tensor]:
    """A checkpoint with an object in one of its arguments."""

    class Meta:
        pass

    Meta.__qualname__, Meta.__module__ = "Meta", PACKAGE
    hf = hf_tensors(LAYER)
    with importable(Meta, PACKAGE):
        save(root, megatron_shards(LAYER, hf), training_args(LAYER, **{argument: Meta()}))
    return hf
