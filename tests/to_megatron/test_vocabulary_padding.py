"""Rows of the vocabulary beyond the model's: the last real row again, or zeros, and never anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Grid, Model, hf_tensors
from tests.to_megatron import ONE_RANK, make_hf, read_shards, to_megatron

#: Three tokens, two numbers each; 5.0 and 6.0 is the last embedding.
MODEL = Model(hidden=2, ffn=4, heads=1, groups=1, head_dim=2, layers=1, vocab=3, padded_vocab=3)
EMBEDDING = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
HEAD = [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]
NAMES = {"embedding": "embedding.word_embeddings.weight", "head": "output_layer.weight"}


def rows(root: Path, which: str) -> list[list[float]]:
    """The rows of all tensor parallel ranks, one after the other."""
    shards = [chunk for chunks in read_shards(root).values() for chunk in chunks if NAMES[which] in chunk]
    found: list[list[float]] = torch.cat([chunk[NAMES[which]] for chunk in shards]).tolist()
    return found


def convert(tmp_path: Path, *flags: str, model: Model = MODEL, grid: Grid = ONE_RANK) -> Path:
    tensors = hf_tensors(model) | {"model.embed_tokens.weight": torch.tensor(EMBEDDING, dtype=model.dtype)}
    if not model.tied:
        tensors["lm_head.weight"] = torch.tensor(HEAD, dtype=model.dtype)
    make_hf(tmp_path / "hf", model, tensors)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags, grid=grid) == 0
    return tmp_path / "megatron"


def test_the_last_token_is_repeated_unless_zeros_are_asked_for(tmp_path: Path) -> None:
    root = convert(tmp_path, "--make-vocab-size-divisible-by", "5")
    assert rows(root, "embedding") == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [5.0, 6.0], [5.0, 6.0]]
    assert rows(root, "head") == [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0], [-5.0, -6.0], [-5.0, -6.0]]


def test_zeros_where_they_are_asked_for(tmp_path: Path) -> None:
    root = convert(tmp_path, "--make-vocab-size-divisible-by", "5", "--vocab-padding", "zeros")
    assert rows(root, "embedding") == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]
    assert rows(root, "head") == [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("padding", "fill"), [("last-row", [5.0, 6.0]), ("zeros", [0.0, 0.0])])
@pytest.mark.parametrize("target", ["keep", "bf16", "fp32"])
def test_padding_is_of_the_targets_dtype(
    target: str, padding: str, fill: list[float], dtype: torch.dtype, tmp_path: Path
) -> None:
    flags = ("--vocab-padding", padding, "--target-params-dtype", target)
    root = convert(tmp_path, *flags, model=replace(MODEL, dtype=dtype))
    assert rows(root, "embedding") == [*EMBEDDING, fill]
    expected = {"keep": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[target]
    assert read_shards(root)["mp_rank_00"][0][NAMES["embedding"]].dtype == expected


def test_the_size_is_rounded_up_to_128_for_each_rank_unless_another_divisor_is_given(tmp_path: Path) -> None:
    model = replace(MODEL, heads=2, groups=2)
    root = convert(tmp_path, "--make-vocab-size-divisible-by", "128", model=model, grid=Grid(tp=2))
    found = rows(root, "embedding")
    assert len(found) == 256
    assert found == EMBEDDING + [[5.0, 6.0]] * 253  # of which the second rank's 128 are padding only


def test_both_copies_of_a_tied_embedding_are_padded_alike(tmp_path: Path) -> None:
    root = convert(tmp_path, model=replace(MODEL, tied=True, layers=2), grid=Grid(pp=2))
    assert rows(root, "embedding") == rows(root, "head") == [*EMBEDDING, [5.0, 6.0]]


def test_wide_padding_of_many_rows_is_written_throughout(tmp_path: Path) -> None:
    model = replace(MODEL, hidden=1536, heads=1, head_dim=8)
    hf = make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--make-vocab-size-divisible-by", "3000") == 0
    found = read_shards(tmp_path / "megatron")["mp_rank_00"][0]
    for name, source in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        assert torch.equal(found[NAMES[name]][:3], hf[source])
        assert torch.equal(found[NAMES[name]][3:], hf[source][2:].repeat(2997, 1))
