"""Two catalogs of shards intersected: a model cut for one grid becomes the same model cut for any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.plan.content import plan_content
from dist_convert.plan.copies import Ends, bands, blocks_of_band
from dist_convert.records import Block
from tests.checkpoints import Grid, Model
from tests.plan import arrays
from tests.plan.arrays import Image, Made

MODEL = Model(
    hidden=8, ffn=16, heads=8, groups=4, head_dim=2, layers=4, vocab=30, padded_vocab=32, dtype=torch.float32
)  # fmt: skip
MIXTRAL = Model(
    hidden=4, ffn=8, heads=4, groups=4, head_dim=2, layers=2, vocab=16, padded_vocab=16, experts=4, dtype=torch.float32
)  # fmt: skip

LLAMA_GRIDS = [Grid(), Grid(tp=2), Grid(tp=4), Grid(tp=2, pp=2), Grid(pp=4), Grid(tp=8), Grid(tp=2, pp=2, vpp=2)]
MIXTRAL_GRIDS = [
    Grid(),
    Grid(tp=2, ep=2),
    Grid(tp=4, pp=2),
    Grid(ep=4),
    Grid(tp=2, ep=4, etp=1),
    Grid(tp=4, ep=2, etp=2),
]
EXPERTS = ["sequential", "te-grouped", "te-single", "grouped", "dynamic", "dynamic-transposed"]


def planned(source: Made, target: Made) -> list[Block]:
    """All blocks between the files of two checkpoints."""
    made = plan_content(arrays.shards_of(source), target.target, ())
    found = [(transfer, band) for transfer in made.transfers for band in bands(made.ends, transfer.names)]
    return [block for transfer, band in found for block in blocks_of_band(band, transfer.target_files)]


def copied(source: Made, target: Made, blocks: list[Block]) -> Image:
    """The target's files after all copies; what no copy writes is NaN."""
    image: Image = {file: np.full_like(values, np.nan) for file, values in target.source.items()}
    for copy in (copy for block in blocks for copy in block):
        for view in copy.targets:
            assert np.isnan(arrays.seen(image, view)).all(), f"written twice: {view}"
            arrays.seen(image, view)[:] = arrays.seen(source.source, copy.sources[0]) + copy.add
    return image


def assert_becomes(source: Made, target: Made) -> None:
    image = copied(source, target, planned(source, target))
    assert sorted(image) == sorted(target.source)
    for file, values in target.source.items():
        np.testing.assert_array_equal(image[file], values, err_msg=file)


@given(grids=st.tuples(st.sampled_from(LLAMA_GRIDS), st.sampled_from(LLAMA_GRIDS)), tied=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_llama_of_any_grid_becomes_that_of_any_other(grids: tuple[Grid, Grid], tied: bool) -> None:
    model = replace(MODEL, tied=tied)
    assert_becomes(arrays.make(model, grids[0]), arrays.make(model, grids[1], norms="te"))


@given(
    grids=st.tuples(st.sampled_from(MIXTRAL_GRIDS), st.sampled_from(MIXTRAL_GRIDS)),
    experts=st.tuples(st.sampled_from(EXPERTS), st.sampled_from(EXPERTS)),
)
@settings(max_examples=40, deadline=None)
def test_a_mixtral_of_any_grid_and_storage_of_experts_becomes_that_of_any_other(
    grids: tuple[Grid, Grid], experts: tuple[str, str]
) -> None:
    made = [arrays.make(MIXTRAL, grid, experts=one) for grid, one in zip(grids, experts, strict=True)]
    assert_becomes(made[0], made[1])


@pytest.mark.parametrize(
    ("before", "after", "columns"),
    [(2, 2, [[2]] * 2), (1, 2, [[2, 2]]), (2, 1, [[2, 2]]), (2, 4, [[1, 1], [1, 1]]), (4, 2, [[1, 1], [1, 1]])],
)
def test_column_cuts_that_share_a_border_fall_into_bands_of_their_own(
    before: int, after: int, columns: list[list[int]]
) -> None:
    model = Model(hidden=4, ffn=4, heads=4, groups=4, head_dim=1, layers=1, dtype=torch.float32)
    source, target = (arrays.shards_of(arrays.make(model, Grid(tp=size))) for size in (before, after))
    listed = bands(Ends(source, target), ["model.layers.0.self_attn.o_proj.weight"])
    assert [[copy.columns for copy in band] for band in listed] == columns
