"""Small distributed checkpoints of Megatron's, made without it by torch's own classes and `torch.save`.

`tests/oracle` shows that the real Megatron-Core writes the same keys and boxes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.checkpoints import Grid, Model, State, hf_tensors, megatron_shards, training_args

#: A box of a tensor: its first element in every dimension, its values, and the number of its file.
Box = tuple[tuple[int, ...], torch.Tensor, int]

LLAMA, WHOLE = Model(), Grid()

_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


@dataclass
class Files:
    """The `.distcp` files of a checkpoint and what `.metadata` says of them."""

    directory: Path
    tensors: dict[str, list[Box]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)

    def blob(self, index: MetadataIndex, value: object, number: int) -> None:
        """Append what `torch.save` makes of a value to a file."""
        saved = io.BytesIO()
        torch.save(value, saved)
        path = self.directory / f"__{number}_0.distcp"
        with path.open("ab") as file:
            self.places[index] = _StorageInfo(path.name, file.tell(), len(saved.getvalue()))
            file.write(saved.getvalue())

    def tensor(self, key: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
        """Save a tensor in boxes."""
        chunks = [ChunkStorageMetadata(torch.Size(offsets), values.shape) for offsets, values, _ in boxes]
        properties = TensorProperties(dtype=boxes[0][1].dtype)
        self.state[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for offsets, values, number in boxes:
            self.blob(MetadataIndex(key, torch.Size(offsets)), values.clone(), number)

    def object(self, key: str, value: object, number: int = 0) -> None:
        """Save an object that is no tensor."""
        self.state[key] = BytesStorageMetadata()
        self.blob(MetadataIndex(key), value, number)

    def finish(self) -> None:
        """Write `.metadata`."""
        with (self.directory / ".metadata").open("wb") as file:
            pickle.dump(Metadata(self.state, storage_data=self.places), file)


def make_distributed(
    root: Path,
    model: Model = LLAMA,
    grid: Grid = WHOLE,
    *,
    keys: str = "uniform",
    norms: str = "te",
    grouped: int = 1,
    common: str = "common.pt",
    iteration: int = 4,
    seed: int = 0,
    prefix: str = "",
    replicas: int = 1,
    **args: Any,
) -> dict[str, torch.Tensor]:
    """Make a checkpoint below `root` and return the Hugging Face tensors that it must convert to.

    Args:
        root: to be made.
        model, grid, norms, seed: see `checkpoints.make`; the grid is that of the saving ranks.
        keys: "uniform" has layers and experts as leading axes, "layers" a key for each layer, "singleton" one for each
            layer, expert, and gate or up.
        grouped: experts in one chunk.
        common: "common.pt", or "object" as Megatron-Core 0.19 has it.
        iteration: number of the directory.
        prefix: of the keys of the model.
        replicas: data parallel size of a fully-parallel save, in which replicas take turns at the boxes of a rank,
            each rank at its own pace.
        args: more training arguments.
    """
    hf = hf_tensors(model, seed)
    [[state]] = megatron_shards(model, hf, WHOLE, norms=norms).values()
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    files, turns, ranks = Files(directory), Counter[int](), grid.tp * grid.pp * grid.ep
    for key, (shape, boxes) in _stacked(model, state, grid, keys, grouped).items():
        for place, (offsets, values, rank) in enumerate(boxes):
            boxes[place] = offsets, values, rank + ranks * (turns[rank] // (rank + 1) % replicas)
            turns[rank] += 1
        files.tensor(f"{prefix}{key}", shape, boxes)
    for layer in range(model.layers):
        files.object(f"decoder.layers.self_attention.linear_qkv._extra_state/shard_{layer}_{model.layers}", [None])
    files.object("rng_state/shard_0.0_1.1", [{"torch_rng_state": torch.get_rng_state()}])
    files.tensor("chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight", (4,), [((0,), torch.ones(4), 0)])
    saved = {"args": training_args(model, grid, **args), "checkpoint_version": 3.0, "iteration": iteration}
    if common == "object":
        files.object("common_state/shard_0_1", [saved])
    else:
        torch.save(saved, directory / common)
    files.finish()
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return hf


#: Format -> what training puts before the names of its model.
PREFIXES = {"torch_dcp": "model.", "fsdp_dtensor": "model.module."}


def make_fsdp(
    root: Path,
    format: str,
    model: Model = LLAMA,
    grid: Grid = WHOLE,
    *,
    norms: str = "local",
    experts: str = "sequential",
    ranks: int = 3,
    apart: bool | None = None,
    **args: Any,
) -> dict[str, torch.Tensor]:
    """Make what training with FSDP saves below `root`, and return the Hugging Face tensors that it must convert to.

    Args:
        root: to be made.
        format: "torch_dcp" or "fsdp_dtensor".
        model, grid, norms, experts: see `checkpoints.make`; the grid is what the args say.
        ranks: over which the rows of each tensor are cut, the first of them with one row.
        apart: gate and up are two tensors; as in the format where it is None.
        args: more training arguments.
    """
    hf = hf_tensors(model)
    [[state]] = megatron_shards(model, hf, WHOLE, norms=norms, experts=experts).values()
    directory = root / "iter_0000004"
    directory.mkdir(parents=True)
    files, prefix = Files(directory), PREFIXES[format]
    files.object("args", training_args(model, grid, ckpt_format=format, **args))
    files.object("iteration", 4, 1)
    files.object("checkpoint_version", 3.0, 1)
    files.object("opt_param_scheduler.max_lr", 3e-4)
    files.object("num_floating_point_operations_so_far", 123)
    files.tensor("rng_state.0.torch_rng_state", (5,), [((0,), torch.zeros(5, dtype=torch.uint8), 2)])
    for name, values in state.items():
        if not isinstance(values, torch.Tensor):
            files.object(f"{prefix}{name}", values, 2)
            continue
        is_apart = (format == "fsdp_dtensor" if apart is None else apart) and ".linear_fc1." in name
        parts = zip(("_w", "_v"), values.chunk(2), strict=True) if is_apart and "norm" not in name else [("", values)]
        for end, part in parts:
            files.tensor(f"{prefix}{name}{end}", tuple(part.shape), _rows(part, ranks))
            moment = torch.ones(part.shape)
            files.tensor(f"optimizer.state.module.{name}{end}.exp_avg", tuple(part.shape), _rows(moment, ranks))
    files.finish()
    (root / "latest_checkpointed_iteration.txt").write_text("4")
    return hf


def _rows(tensor: torch.Tensor, ranks: int) -> list[Box]:
    """A tensor in uneven runs of rows, each in the file of a rank."""
    runs, first = [tensor[:1], *tensor[1:].chunk(ranks - 1)] if ranks > 1 else [tensor], 0
    boxes: list[Box] = []
    for rank, run in enumerate(run for run in runs if len(run)):
        boxes.append(((first, *(0,) * (tensor.dim() - 1)), run, rank))
        first += len(run)
    return boxes


def _stacked(
    model: Model, state: State, grid: Grid, keys: str, grouped: int
) -> dict[str, tuple[tuple[int, ...], list[Box]]]:
    """Key -> whole shape and boxes."""
    found: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            for key, lead, sizes, values in _keys(model, name, tensor, keys):
                shape, boxes = found.setdefault(key, ((*sizes, *values.shape), []))
                for offsets, box, number in _boxes(model, name, values, grid):
                    boxes.append(((*lead, *offsets), box.reshape(*(1 for _ in lead), *box.shape), number))
                assert shape == (*sizes, *values.shape)
    if grouped > 1:
        for key in [key for key in found if ".experts.experts." in key]:
            found[key] = found[key][0], list(_joined(found[key][1], grouped))
    return found


def _keys(
    model: Model, name: str, tensor: torch.Tensor, keys: str
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Key, index and sizes of the leading axes, and values of one layer's and expert's tensor."""
    if not name.startswith("decoder.layers."):
        yield name, (), (), tensor
        return
    _, _, layer, rest = name.split(".", 3)
    lead, sizes, at = ((int(layer),), (model.layers,), "decoder.layers.") if keys == "uniform" else ((), (), "")
    at = at or f"decoder.layers.{layer}."
    if ".local_experts." in rest:
        expert, rest = rest.removeprefix("mlp.experts.local_experts.").split(".", 1)
        at += "mlp.experts.experts."
        if keys == "singleton":
            at += f"{expert}."
        else:
            lead, sizes = (*lead, int(expert)), (*sizes, model.experts)
    if keys == "singleton" and "linear_fc1.weight" in rest:
        for end, half in zip(("_w", "_v"), tensor.chunk(2), strict=True):
            yield at + rest + end, lead, sizes, half
    else:
        yield at + rest, lead, sizes, tensor


def _boxes(model: Model, name: str, values: torch.Tensor, grid: Grid) -> Iterator[Box]:
    """A tensor of one layer and expert as the ranks of a grid save it."""
    tp = grid.tp
    pp, ep = 0, 0
    if name.startswith("decoder.layers."):
        pp = int(name.split(".")[2]) * grid.pp // model.layers
    elif not name.startswith("embedding."):
        pp = grid.pp - 1
    if ".local_experts." in name:
        ep = int(name.split(".local_experts.")[1].split(".")[0]) * grid.ep // model.experts
    is_gated = ".linear_fc1." in name and "norm" not in name
    first = 0
    for half in values.chunk(2 if is_gated and values.shape[0] == 2 * model.ffn else 1):
        if is_gated or name.endswith(_ROWS):
            pieces, axis = half.chunk(tp), 0
        elif name.endswith(_COLUMNS):
            pieces, axis = half.chunk(tp, 1), 1
        else:
            pieces, axis = (half,), 0
        at = [first] + [0] * (values.dim() - 1)
        for rank, piece in enumerate(pieces):
            yield tuple(at), piece, (pp * grid.ep + ep) * tp + rank
            at[axis] += piece.shape[axis]
        first += half.shape[0]


def _joined(boxes: list[Box], grouped: int) -> Iterator[Box]:
    """Boxes of some neighbouring experts as one, as grouped experts are saved."""
    axis = boxes[0][1].dim() - 3
    by_place: dict[tuple[int, ...], list[Box]] = {}
    for offsets, values, number in boxes:
        place = (*offsets[:axis], offsets[axis] // grouped, *offsets[axis + 1 :])
        by_place.setdefault(place, []).append((offsets, values, number))
    for together in by_place.values():
        yield together[0][0], torch.cat([values for _, values, _ in together], axis), together[0][2]
