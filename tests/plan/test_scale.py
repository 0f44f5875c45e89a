"""Full-size models are planned for a thousand ranks in one process, in seconds, without torch, and exactly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.torch.survey import files_of_headers, open_catalog
from dist_convert.plan.content import Content, plan_content
from dist_convert.plan.copies import Ends, Stored, bands_of
from dist_convert.plan.plan import schedule_digest
from dist_convert.records import Block
from tests.benchmarks import scaling
from tests.plan import headers
from tests.plan.headers import FULL_SIZE

ROOT = Path(__file__).parents[2]

#: Of the processor, far beyond the one or two that it takes: only a planner that has become slower by orders fails.
PATIENCE_SECONDS = 30

#: Of a plan for 1,024 ranks: the processor's time, and memory.
PLAN_SECONDS, PLAN_BYTES = 5, 150_000_000

LLAMA_405B, LLAMA_70B = "Llama-3.1-405B TP8 PP16", "Llama-3.1-70B TP8 PP4"
MIXTRAL_8X22B, MIXTRAL_8X7B = "Mixtral-8x22B TP2 PP4 EP8", "Mixtral-8x7B TP4 EP2"

#: Parameters as the models' publishers count them, in bf16.
TARGET_BYTES = {
    LLAMA_405B: 405_853_388_800 * 2,
    LLAMA_70B: 70_553_706_496 * 2,
    MIXTRAL_8X22B: 140_630_071_296 * 2,
    MIXTRAL_8X7B: 46_702_792_704 * 2,
}


def planned(*arguments: object) -> dict[str, Any]:
    """What `scale` says; `pytest -rP` shows its seconds."""
    command = [sys.executable, "-m", "tests.plan.scale", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(arguments, {key: value for key, value in found.items() if key != "written_bytes"})
    assert found["heavy_imports"] == []
    assert found["plan_seconds"] + found["steps_seconds"] < PATIENCE_SECONDS
    return found


@pytest.mark.parametrize(
    ("model", "world"),
    [
        pytest.param(LLAMA_405B, 1024, marks=pytest.mark.slow),
        (MIXTRAL_8X22B, 1024),
        (LLAMA_70B, 64),
        (MIXTRAL_8X7B, 64),
    ],
)
def test_ranks_that_see_all_write_every_byte_once_and_about_equally_many(model: str, world: int) -> None:
    found = planned(model, "direct", world)
    assert found["target_bytes"] == sum(found["written_bytes"]) == TARGET_BYTES[model]
    assert found["overlaps"] == 0
    assert found["faults"] == []
    assert len(found["written_bytes"]) == world
    assert max(found["written_bytes"]) <= 1.1 * TARGET_BYTES[model] / world


@pytest.mark.parametrize(("model", "shards"), [(MIXTRAL_8X22B, 64), (MIXTRAL_8X7B, 8)])
def test_ranks_with_one_shard_each_write_every_byte_once_and_gather_like_their_groups(model: str, shards: int) -> None:
    found = planned(model, "gather", shards)
    assert sum(found["written_bytes"]) == TARGET_BYTES[model]
    assert found["overlaps"] == 0
    assert found["faults"] == []
    assert found["different_gathers"] == found["groups"] == found["groups_seen"]


@pytest.mark.parametrize(("model", "groups"), [(LLAMA_405B, 1024 // 8), (MIXTRAL_8X22B, 1024 // 2)])
def test_a_thousand_ranks_with_one_shard_each_form_groups_as_large_as_a_tensor_parallel_set(
    model: str, groups: int
) -> None:
    found = planned(model, "gather", 1024, 3)
    assert found["groups"] == groups
    assert found["different_gathers"] == found["groups_seen"] == 1
    assert found["overlaps"] == 0


@pytest.mark.parametrize("pair", ["megatron-to-hf", "hf-to-megatron", "megatron-to-megatron"])
@pytest.mark.parametrize(("name", "other"), [(LLAMA_405B, Grid(4, 14, 1, 1, 4)), (MIXTRAL_8X22B, Grid(4, 2, 1, 4, 4))])
def test_each_pair_of_formats_is_planned_for_a_thousand_ranks_in_seconds_and_little_memory(
    name: str, other: Grid, pair: str
) -> None:
    model, grid, layers = FULL_SIZE[name]
    source, target = headers.shards(model, grid, layers), headers.shards(model, other)
    known = headers.plan_to_huggingface(source, model) if pair == "hf-to-megatron" else None

    def planned_once() -> float:
        started = time.process_time()
        if known is not None:
            content = headers.plan_to_megatron(known, source, model)
        elif pair == "megatron-to-hf":
            content = headers.plan_to_huggingface(source, model)
        else:
            ends = open_catalog(source, model)[0], open_catalog(target, model, with_tied_copies=True)[0]
            content = plan_content(*ends, files_of_headers(target), repeat_last_row=True)
        placement = "own" if pair == "megatron-to-hf" else "gather"
        schedule_digest(headers.plan(content, scaling.visible(content, placement, 1024), "gather"))
        return time.process_time() - started

    assert planned_once() < PLAN_SECONDS
    tracemalloc.start()
    planned_once()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < PLAN_BYTES


def _content(name: str, direction: str) -> Content:
    model, grid, layers = FULL_SIZE[name]
    source = headers.shards(model, grid, layers)
    content = headers.plan_to_huggingface(source, model)
    return content if direction == "megatron-to-hf" else headers.plan_to_megatron(content, source, model)


def test_what_tensors_of_equal_geometry_have_in_common_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out: list[object] = []

    def counting(ends: Ends, listed: Iterable[Stored]) -> list[Block]:
        worked_out.append(listed)
        return bands_of(ends, listed)

    monkeypatch.setattr("dist_convert.plan.content.bands_of", counting)
    model = headers.architecture(layers=60, experts=64)
    made = headers.content(model, Grid(tensor=2, pipeline=2, expert=2, expert_tensor=2))
    assert len(made.transfers) == 60 * (5 + 2 * 64) + 3
    assert len(worked_out) < 100


@pytest.mark.parametrize(
    ("direction", "placement"),
    [("megatron-to-hf", "own"), ("hf-to-megatron", "gather"), ("hf-to-megatron", "direct")],
)
def test_none_of_a_thousand_ranks_reads_or_writes_a_tenth_more_than_the_mean(direction: str, placement: str) -> None:
    content = _content(MIXTRAL_8X22B, direction)
    load = scaling.load(content, placement, 1024)
    assert sum(load.written) == content.moved_bytes
    assert max(scaling.ratio(load.read), scaling.ratio(load.written)) <= 1.1
    assert all(used <= whole for used, whole in zip(load.gathered, load.buffers, strict=True))
    assert all(received <= written for received, written in zip(load.received, load.written, strict=True))


@pytest.mark.parametrize(
    ("model", "ranks", "tensor_parallel", "column_cut_elements"),
    [
        pytest.param(LLAMA_405B, 1024, 8, 126 * 16384 * (16384 + 53248), marks=pytest.mark.slow),
        (MIXTRAL_8X22B, 64, 2, 56 * 6144 * (6144 + 8 * 16384)),
    ],
)  # o_proj, and down_proj or every expert's w2, of each layer
def test_of_weights_cut_along_columns_each_rank_receives_what_it_writes_and_others_have_read_and_nothing_else(
    model: str, ranks: int, tensor_parallel: int, column_cut_elements: int
) -> None:
    load = scaling.load(_content(model, "megatron-to-hf"), "own", ranks)
    received_bytes = 2 * column_cut_elements * (tensor_parallel - 1) // tensor_parallel
    assert sum(load.received) == received_bytes
    assert max(load.received) <= 1.1 * received_bytes / ranks
    assert max(scaling.ratio(load.read), scaling.ratio(load.written)) <= 1.1
