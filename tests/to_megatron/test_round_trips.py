"""Hugging Face to Megatron and back, and Megatron to Hugging Face and back, give every bit again.

Shapes, grids and dialects are drawn; weights are random bytes, with NaNs, infinities and signed zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import Grid, Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import convert, read_tensors
from tests.to_megatron import (
    EXPERTS,
    FILE,
    NORMS,
    assert_same_shards,
    assert_same_tensors,
    expected_shards,
    load,
    make_hf,
    read_shards,
    to_megatron,
)

FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """A model, the grid and the dialect that it goes to, and a seed."""

    model: Model
    grid: Grid
    norms: str
    experts: str
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes that suit a grid: multiples of its sizes."""
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]))
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    ep = draw(st.sampled_from([0, 1, 2]))
    etp = draw(st.sampled_from([size for size in (1, 2, 3, 4) if tp % size == 0])) if ep else None
    groups = tp * draw(st.integers(1, 2)) if draw(st.booleans()) else 1
    heads = tp * groups * draw(st.integers(1, 2))
    dense = {"tied": draw(st.booleans()), "linear_bias": not ep and draw(st.booleans())}
    vocab = draw(st.integers(3, 40))
    model = Model(
        hidden=heads * draw(st.integers(1, 3)), ffn=tp * draw(st.integers(1, 9)), heads=heads, groups=groups,
        head_dim=tp * 2 if groups < tp else draw(st.sampled_from([2, 4])), layers=pp * vpp * draw(st.integers(1, 2)),
        vocab=vocab, padded_vocab=vocab, experts=ep * draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(list(_BITS))), **dense,
    )  # fmt: skip
    norms = draw(st.sampled_from(list(NORMS))) if not model.linear_bias else "transformer_engine"
    grid = Grid(tp, pp, vpp, max(ep, 1), etp)
    return Case(model, grid, norms, draw(st.sampled_from(list(EXPERTS))), draw(st.integers(0, 99)))


def random_bits(model: Model, seed: int) -> dict[str, torch.Tensor]:
    """Weights of any bit pattern."""
    random = torch.Generator().manual_seed(seed)
    bits = torch.iinfo(_BITS[model.dtype])
    return {
        name: torch.randint(bits.min, bits.max, tensor.shape, dtype=_BITS[model.dtype], generator=random).view(
            model.dtype
        )
        for name, tensor in hf_tensors(model).items()
    }


def flags_of(case: Case) -> list[str]:
    return ["--saver-transformer-impl", case.norms, "--expert-layout", case.experts]


@FEW
@given(case=cases())
def test_from_hugging_face_to_megatron_and_back_every_bit_is_the_same(case: Case) -> None:
    with TemporaryDirectory() as directory:
        root = Path(directory)
        hf = make_hf(root / "hf", case.model, random_bits(case.model, case.seed))
        assert to_megatron(root / "hf", root / "megatron", *flags_of(case), grid=case.grid) == 0
        expected = expected_shards(case.model, hf, case.grid, norms=case.norms, experts=case.experts)
        assert_same_shards(read_shards(root / "megatron"), expected)
        assert convert(root / "megatron", root / "back") == 0
        assert_same_tensors(read_tensors(root / "back"), hf)


@FEW
@given(case=cases(), divisible_by=st.sampled_from([1, 4, 128]))
def test_from_megatron_to_hugging_face_and_back_every_bit_is_the_same(case: Case, divisible_by: int) -> None:
    with TemporaryDirectory() as directory:
        root = Path(directory)
        hf = random_bits(case.model, case.seed)
        how = {"norms": case.norms, "experts": case.experts, "divisible_by": divisible_by}
        shards = expected_shards(case.model, hf, case.grid, **how)
        first = shards[sorted(shards)[0]][0]["embedding.word_embeddings.weight"]
        padded = len(first) * case.grid.tp
        dynamic = case.experts == "habana-dynamic"
        args = training_args(
            replace(case.model, padded_vocab=padded), case.grid,
            **({"moe_permuted_weights": dynamic, "moe_dynamic_hpu": dynamic} if case.model.experts else {}),
        )  # fmt: skip
        save(root / "megatron", shards, args)
        assert convert(root / "megatron", root / "hf") == 0
        flags = [*flags_of(case), "--make-vocab-size-divisible-by", str(divisible_by), "--iteration", "4"]
        assert to_megatron(root / "hf", root / "back", *flags, grid=case.grid) == 0
        assert_same_shards(read_shards(root / "back", "iter_0000004"), shards)


def test_biases_of_queries_keys_and_values_alone_come_back(tmp_path: Path) -> None:
    model = Model(qkv_bias=True, vocab=32)
    shards = expected_shards(model, hf_tensors(model), Grid(tp=2), norms="local")
    save(tmp_path / "megatron", shards, training_args(model, Grid(tp=2)))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0  # which has an o_proj.bias of zeros
    flags = ("--saver-transformer-impl", "local")
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *flags, grid=Grid(tp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "back"), shards)


def test_tensors_of_another_dtype_than_the_rest_come_back_as_they_were(tmp_path: Path) -> None:
    model = Model(experts=4, groups=4, layers=2)
    hf = hf_tensors(model)
    hf = {name: tensor.float() if "norm" in name or ".gate." in name else tensor for name, tensor in hf.items()}
    make_hf(tmp_path / "hf", model, hf)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=Grid(tp=2, ep=2)) == 0
    router = "decoder.layers.1.mlp.router.weight"
    assert read_shards(tmp_path / "megatron")["mp_rank_01_001"][0][router].dtype == torch.float32
    assert convert(tmp_path / "megatron", tmp_path / "back") == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), hf)


def test_the_arguments_of_training_come_back_through_their_file(tmp_path: Path) -> None:
    model = Model(vocab=32)
    shards = megatron_shards(model, hf_tensors(model), Grid(tp=2))
    trained = {"lr": 3e-4, "seq_length": 48, "rotary_base": 10000, "micro_batch_size": 7}
    save(tmp_path / "megatron", shards, training_args(model, Grid(tp=2), **trained))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    margs = ("--source-margs-file", str(tmp_path / "hf" / "source_megatron_args.json"))
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *margs, grid=Grid(pp=2)) == 0
    args = vars(load(tmp_path / "back" / "iter_0000001" / "mp_rank_00_001" / FILE)["args"])
    assert {name: args[name] for name in trained} == trained
    # What no flag says is as the training was.
    assert (args["tensor_model_parallel_size"], args["pipeline_model_parallel_size"]) == (2, 2)


@pytest.mark.parametrize("way", ["to hf", "to megatron"])
def test_converting_twice_gives_the_same_bytes(way: str, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model(experts=4, groups=4))
    source = tmp_path / "hf"
    if way == "to hf":
        assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=Grid(tp=2)) == 0
        source = tmp_path / "megatron"
    found = []
    for name in ("first", "second"):
        done = convert(source, tmp_path / name) if way == "to hf" else to_megatron(source, tmp_path / name)
        assert done == 0
        files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert found[0] == found[1]
