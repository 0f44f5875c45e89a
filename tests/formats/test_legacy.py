"""Models of Megatron's classes before Megatron-Core: other names, in nested dicts, of the same tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_convert
from dist_convert.errors import ConversionError
from tests.checkpoints import Grid, Model, State, hf_tensors, megatron_shards, save, training_args
from tests.converting import assert_same, read_tensors

#: Megatron-Core's name of a part of a layer -> that of 2023 and of 2021.
PARTS = {
    "input_layernorm": ("input_norm", "input_layernorm"),
    "self_attention.linear_qkv": ("self_attention.query_key_value", "attention.query_key_value"),
    "self_attention.linear_proj": ("self_attention.dense", "attention.dense"),
    "pre_mlp_layernorm": ("post_attention_norm", "post_attention_layernorm"),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h"),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
}


def legacy(chunk: State, year: int, *, tied: bool) -> State:
    """A model as `state_dict_for_save_checkpoint` of megatron/model/language_model.py nests it."""
    is_old = year == 2021
    encoder: State = OrderedDict()
    inside: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": inside}
    for name, tensor in chunk.items():
        if name.endswith("_extra_state"):
            continue
        first, _, rest = name.partition(".")
        if first == "decoder":
            layers, _, after = rest.partition(".")
            if layers == "layers":
                number, _, part = after.partition(".")
                stem, _, kind = part.rpartition(".")
                encoder[f"layers.{number}.{PARTS[stem][is_old]}.{kind}"] = tensor
            else:
                assert rest == "final_layernorm.weight"
                encoder["final_layernorm.weight" if is_old else "final_norm.weight"] = tensor
        elif name == "embedding.word_embeddings.weight":
            inside["embedding"] = {"word_embeddings": OrderedDict(weight=tensor)}
        elif tied:
            assert name == "output_layer.weight"
            model["word_embeddings_for_head"] = OrderedDict(weight=tensor)
        else:
            assert name == "output_layer.weight"
            inside["output_layer"] = OrderedDict(weight=tensor)
    inside["transformer" if is_old else "encoder"] = encoder
    return model


def make_both(root: Path, model: Model, grid: Grid, change: Callable[[State], State], **more: Any) -> State:
    """Two checkpoints of the same tensors, `core` and `legacy`; returns transformers' tensors."""
    hf = hf_tensors(model)
    shards = megatron_shards(model, hf, grid)
    args = training_args(model, grid)
    save(root / "core", shards, args)
    save(root / "legacy", {name: [change(chunk) for chunk in chunks] for name, chunks in shards.items()}, args, **more)
    return hf


GRIDS = {"TP2 PP2": Grid(tp=2, pp=2), "PP2 VPP2": Grid(pp=2, vpp=2), "one rank": Grid()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("year", [2021, 2023])
def test_the_bytes_are_those_of_the_twin_with_core_names(year: int, grid: str, tied: bool, tmp_path: Path) -> None:
    version = {2021: 2.0, 2023: 3.0}[year]  # 2 is the oldest that is read
    how = {"change": lambda chunk: legacy(chunk, year, tied=tied), "checkpoint_version": version}
    hf = make_both(tmp_path, Model(tied=tied), GRIDS[grid], **how)
    for name in ("core", "legacy"):
        dist_convert.convert(tmp_path / name, tmp_path / f"{name}-hf", to="huggingface", verify="full")
        dist_convert.convert(tmp_path / name, tmp_path / f"{name}-torch", to="torch", target_tensor_parallel_size=1)
    assert_same(read_tensors(tmp_path / "legacy-hf"), hf)
    for file in ("core-hf/model.safetensors", "core-hf/config.json"):
        assert (tmp_path / file.replace("core", "legacy")).read_bytes() == (tmp_path / file).read_bytes()
    for path in (tmp_path / "core-torch").rglob("*.pt"):
        twin = tmp_path / "legacy-torch" / path.relative_to(tmp_path / "core-torch")
        assert twin.read_bytes() == path.read_bytes()


def flat(model: State, before: str = "") -> State:
    """The same in one dict: `language_model.encoder.layers.0.self_attention.dense.weight`."""
    found: State = OrderedDict()
    for name, value in model.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("year", [2021, 2023])
def test_the_same_names_in_one_flat_dict_are_read_too(year: int, tied: bool, tmp_path: Path) -> None:
    model = Model(tied=tied)
    hf = make_both(tmp_path, model, GRIDS["PP2 VPP2"], lambda chunk: flat(legacy(chunk, year, tied=tied)))
    dist_convert.convert(tmp_path / "legacy", tmp_path / "out", to="huggingface")
    assert_same(read_tensors(tmp_path / "out"), hf)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    def other_head(chunk: State) -> State:
        found = legacy(chunk, 2023, tied=True)
        if "word_embeddings_for_head" in found:
            found["word_embeddings_for_head"]["weight"] = chunk["output_layer.weight"] + 1
        return found

    make_both(tmp_path, Model(tied=True), Grid(pp=2), other_head)
    with pytest.raises(ConversionError, match="the head on the last stage is not the embedding"):
        dist_convert.convert(tmp_path / "legacy", tmp_path / "out", to="huggingface")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("position_embeddings", "learned position embeddings"),
        ("tokentype_embeddings", "a parameter that no table names"),
    ],
)
def test_what_has_no_place_is_refused(name: str, what: str, tmp_path: Path) -> None:
    def with_more(chunk: State) -> State:
        found = legacy(chunk, 2023, tied=False)
        found["language_model"]["embedding"][name] = {"weight": torch.ones(64, 16)}
        return found

    make_both(tmp_path, Model(), Grid(), with_more)
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "legacy", tmp_path / "out", to="huggingface")
    assert what in str(caught.value)
    assert f"language_model.embedding.{name}.weight" in str(caught.value)


@pytest.mark.parametrize("version", [0, 1.0, None])
def test_older_orders_of_queries_keys_and_values_stay_refused(version: float | None, tmp_path: Path) -> None:
    make_both(
        tmp_path, Model(), Grid(), lambda chunk: legacy(chunk, 2021, tied=False), checkpoint_version=version
    )  # fmt: skip
    with pytest.raises(ConversionError, match="a checkpoint older than version 2 orders the rows of QKV differently"):
        dist_convert.convert(tmp_path / "legacy", tmp_path / "out", to="huggingface")


def test_two_tensors_of_one_name_in_nested_dicts_are_refused(tmp_path: Path) -> None:
    def twice(chunk: State) -> State:
        found = legacy(chunk, 2023, tied=False)
        found["language_model"]["embedding"]["word_embeddings.weight"] = torch.ones(32, 16)
        return found

    make_both(tmp_path, Model(), Grid(), twice)
    with pytest.raises(ConversionError, match="two entries of a model have one name"):
        dist_convert.convert(tmp_path / "legacy", tmp_path / "out", to="huggingface")


def test_inspect_shows_what_such_a_checkpoint_is(tmp_path: Path) -> None:
    make_both(tmp_path, Model(), Grid(tp=2), lambda chunk: legacy(chunk, 2023, tied=False))
    found, expected = (dist_convert.inspect(tmp_path / name) for name in ("legacy", "core"))
    assert "not_convertible" not in found
    assert {**found, "path": "", "skipped_bytes": 0} == {**expected, "path": "", "skipped_bytes": 0}
