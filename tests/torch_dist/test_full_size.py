"""What 1,024 ranks save of a model of 405B with its optimizer is planned in seconds, in little memory."""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dist_convert.plan.plan import divide, schedule_digest
from tests.published import make_published, make_published_megatron, task_of

NAME, WEIGHTS_BYTES = "llama-3.1-405b", 405_853_388_800 * 2
GRID = "--tp 8 --pp 16 --decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 7"
RANKS, REPLICAS = 1024, 8


def save_as_training_does(directory: Path) -> None:
    """Scatter the weights' chunks over the files of all ranks, and list an optimizer and every rank's plan, too."""
    metadata: Metadata = pickle.loads((directory / ".metadata").read_bytes())
    for number in range(RANKS // REPLICAS):
        for replica in range(REPLICAS):
            os.link(directory / f"__{number}_0.distcp", directory / f"__{number * REPLICAS + replica}_1.distcp")
    plans: list[list[WriteItem]] = [[] for _ in range(RANKS)]
    places: dict[MetadataIndex, _StorageInfo] = {}
    fp32 = TensorProperties(dtype=torch.float32)
    for count, (index, place) in enumerate(metadata.storage_data.items()):
        rank = int(place.relative_path.split("_")[2]) * REPLICAS + count % REPLICAS
        places[index] = replace(place, relative_path=f"__{rank}_1.distcp")
        tensor = metadata.state_dict_metadata[index.fqn]
        if not isinstance(tensor, TensorStorageMetadata):
            plans[rank].append(WriteItem(index, WriteItemType.BYTE_IO))
            continue
        chunk = next(one for one in tensor.chunks if one.offsets == index.offset)
        for before in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param."):
            own = replace(index, fqn=f"{before}{index.fqn}")
            places.setdefault(own, _StorageInfo(f"__{rank}_1.distcp", 1 << 40, place.length * 2))
            properties = fp32 if before else tensor.properties
            data = TensorWriteData(chunk, properties, tensor.size)
            plans[rank].append(WriteItem(own, WriteItemType.SHARD, tensor_data=data))
            metadata.state_dict_metadata[own.fqn] = TensorStorageMetadata(properties, tensor.size, tensor.chunks)
    metadata.storage_data = places
    metadata.all_local_plans = [SavePlan(items) for items in plans]  # type: ignore[attr-defined]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def planned(source: Path) -> tuple[int, int]:
    """What one of the ranks works out; the bytes that all move, and those left behind."""
    task = task_of(["convert", str(source), str(source.parent / "out"), "--to", "huggingface"])
    visible = [task.source.found.visible[0]] * RANKS
    schedule_digest(divide(task.content, visible, placement="direct", budget_bytes=10**9))
    [optimizer] = [size for reason, _, size in task.source.beside if reason == "optimizer"]
    return task.content.moved_bytes, optimizer


@pytest.mark.slow
def test_the_405b_that_1024_ranks_saved_with_its_optimizer_is_planned_in_seconds_and_little_memory(
    tmp_path: Path,
) -> None:
    make_published(tmp_path / "hf", NAME, files=191)
    make_published_megatron(
        ["convert", str(tmp_path / "hf"), str(tmp_path / "dist"), "--to", "torch_dist", *GRID.split()]
    )
    directory = tmp_path / "dist/iter_0000001"
    save_as_training_does(directory)
    started = time.process_time()
    moved, optimizer = planned(tmp_path / "dist")
    seconds = time.process_time() - started
    padding_bytes = 2 * 2 * (129_024 - 128_256) * 16_384  # of embedding and head
    assert (moved, optimizer) == (WEIGHTS_BYTES, 6 * (WEIGHTS_BYTES + padding_bytes))  # three states in fp32
    tracemalloc.start()
    planned(tmp_path / "dist")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size_bytes = (directory / ".metadata").stat().st_size
    print(f"{seconds:.1f} s, {peak_bytes / 1e6:.0f} MB, .metadata {size_bytes / 1e6:.1f} MB")  # pytest -rP shows it
    assert seconds < 10
    assert peak_bytes < 300_000_000
