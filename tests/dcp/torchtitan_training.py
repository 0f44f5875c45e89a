"""What torchtitan's training does on each rank: its FSDP2 cuts its Llama 3 debug model, its manager saves a checkpoint.

`python -m tests.dcp.torchtitan_training DIRECTORY` makes `checkpoint/step-1`, with the optimizer and the learning
rates, and `adapter.safetensors`: what torchtitan's adapter makes of the model, to be compared with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.models.llama3 import model_registry


def save(directory: Path) -> None:
    """Make the model as torchtitan's trainer does, with random weights, and save it and its optimizer."""
    parallel_dims.device_type = "cpu"  # it takes "cuda" where there is no accelerator
    spec = model_registry("debugmodel")
    with torch.device("meta"):
        model = spec.model.build()
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    model = spec.parallelize_fn(
        model,
        parallel_dims=ParallelDims.from_config(parallelism, dist.get_world_size()),
        training=TrainingConfig(),
        parallelism=parallelism,
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder=str(directory),
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        for parameter in model.parameters():  # norms begin as ones, all alike
            parameter.to_local().normal_()
    optimizers = default_adamw().build(model_parts=[model])
    adapter = spec.state_dict_adapter(spec.model, None)
    manager = CheckpointManager.Config(enable=True, interval=1).build(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=LRSchedulersContainer.Config().build(optimizers=optimizers, training_steps=10),
        states={},
        sd_adapter=adapter,
        base_folder=str(directory),
    )
    assert manager.save(1)
    manager.close()
    whole = adapter.to_hf({name: tensor.full_tensor() for name, tensor in model.state_dict().items()})
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, directory / "adapter.safetensors")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(Path(sys.argv[1]))
    dist.destroy_process_group()
