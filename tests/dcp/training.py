"""What training does on each rank: FSDP2 cuts a model's tensors over the ranks, and DCP saves or loads them.

`python -m tests.dcp.training save FILE DIRECTORY` cuts the tensors of a safetensors file, and saves them in each way
that torch has; `load FILE DIRECTORY` loads a checkpoint and compares it with the file; `load_blocks FILE DIRECTORY R C`
does so with R ranks along the rows and C along the columns.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import save_fsdp_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def whole_model(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module with parameters of these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for child in path:
            if not hasattr(module, child):
                module.add_module(child, nn.Module())
            module = module.get_submodule(child)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


def flattened_model(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The same in FSDP's first version, which accelerate takes by default: all is cut as one flat parameter."""
    return FullyShardedDataParallel(whole_model(tensors), device_id=torch.device("cpu"))


def cut_model(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The same in FSDP2: each parameter is cut along its rows, over as many ranks as there are."""
    root = whole_model(tensors)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in root.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return root


def save(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Save a model and its optimizer as training does, and the model alone in two other ways."""
    model = cut_model(tensors)
    optimizer = torch.optim.AdamW(model.parameters())
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments, "step": 3, "tokens": torch.tensor(7)}
    dcp.save(state, checkpoint_id=directory / "plain")
    writer = FileSystemWriter(directory / "safetensors", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(model.state_dict(), storage_writer=writer)
    dcp.save(model.state_dict(), storage_writer=HuggingFaceStorageWriter(directory / "shards", save_distributed=True))
    for version, cut in ((2, model), (1, flattened_model(tensors))):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type="SHARDED_STATE_DICT")
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        save_fsdp_model(plugin, accelerator, cut, str(directory / f"fsdp{version}"))


def load(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Load a checkpoint into a model of zeros, and compare every tensor, put together again."""
    state = cut_model({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}).state_dict()
    _load(state, tensors, directory)


def load_blocks(tensors: Mapping[str, torch.Tensor], directory: Path, rows: str, columns: str) -> None:
    """Load a checkpoint into zeros on a mesh of two dimensions: vectors are whole along the columns."""
    mesh = init_device_mesh("cpu", (int(rows), int(columns)))
    state = {
        name: distribute_tensor(
            torch.zeros_like(tensor), mesh, [Shard(0), Shard(1) if tensor.dim() > 1 else Replicate()]
        )
        for name, tensor in tensors.items()
    }
    _load(state, tensors, directory)


def _load(state: dict[str, DTensor], tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    dcp.load(state, checkpoint_id=directory)
    wrong = [name for name, tensor in tensors.items() if not torch.equal(state[name].full_tensor(), tensor)]
    assert wrong == [], wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    program = {"save": save, "load": load, "load_blocks": load_blocks}[sys.argv[1]]
    program(load_file(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    dist.destroy_process_group()
