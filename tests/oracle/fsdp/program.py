"""Writes checkpoints of Megatron-Core's fully sharded data parallelism, as `save_checkpoint` of core 0.19.2 does.

    torchrun --nproc-per-node 4 tests/oracle/fsdp/program.py OUT_DIR FORMAT:CASE...

makes OUT_DIR/FORMAT/CASE/{fsdp,torch}/iter_0000004 and OUT_DIR/FORMAT/CASE/oracle.pt of a model that is trained in
bf16. FORMAT is torch_dcp (`TorchFullyShardedDataParallel`) or fsdp_dtensor (`FullyShardedDataParallel` of Megatron's
own FSDP, which needs einops).
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, OracleCase
from megatron.core.distributed import DistributedDataParallelConfig, torch_fully_sharded_data_parallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from megatron_args import ITERATION, training_args
from megatron_model import build_model, initialise_grid
from megatron_on_cpu import CudaIsCpu, make_megatron_run_on_cpu
from megatron_weights import fill_weights
from megatron_writer import rng_state, save_checkpoint, save_logits
from torch.distributed.device_mesh import DeviceMesh

DEVICE = torch.device


class MeshOfCpus:
    """Stands in for DeviceMesh, whose devices the wrappers name."""

    @staticmethod
    def from_group(group: Any, device_type: str, **more: Any) -> DeviceMesh:
        assert device_type == "cuda"
        return DeviceMesh.from_group(group, "cpu", **more)


class Nothing:
    """Stands in for CUDA's streams and events, which wait for nothing where there is one stream."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, _: str) -> Any:
        return Nothing

    def query(self) -> bool:
        return True


class NamedCudaIsCpu(CudaIsCpu):
    """The same for devices that are given by position, or by number."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(DEVICE("cpu") if isinstance(arg, DEVICE) and arg.type == "cuda" else arg for arg in args)
        if isinstance((kwargs or {}).get("device"), int):
            kwargs = {**kwargs, "device": "cpu"}
        return super().__torch_function__(function, kinds, args, kwargs)


def make_fsdp_run_on_cpu() -> None:
    """Replace what the wrappers take from CUDA."""
    make_megatron_run_on_cpu()
    torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[assignment, misc]
    torch.cuda.current_stream = Nothing  # type: ignore[assignment]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.get_rng_state  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment]
    torch_fully_sharded_data_parallel.DeviceMesh = mcore_fsdp_adapter.DeviceMesh = MeshOfCpus
    if not isinstance(getattr(mcore_fsdp_adapter, "TELinear", type), type):  # without Transformer Engine
        mcore_fsdp_adapter.TELinear = type("TELinear", (), {})


def main(out_dir: Path, names: list[str]) -> None:
    known = {case.name: case for case in CASES}
    make_fsdp_run_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for format, _, name in (named.partition(":") for named in names):
        write_case(known[name], format, out_dir / format / name)
    dist.barrier()
    dist.destroy_process_group()


def write_case(case: OracleCase, format: str, directory: Path) -> None:
    """Write one case's checkpoint below `fsdp`, and beside it the same weights as `torch` and the model's logits."""
    args = training_args(case, dist.get_rank(), dist.get_world_size())
    args.ckpt_format, args.bf16, args.params_dtype = format, True, torch.bfloat16
    initialise_grid(args)
    torch.manual_seed(1234)
    [chunk] = build_model(args)
    fill_weights(chunk, case)
    for parameter in chunk.parameters():
        parameter.data = parameter.bfloat16().float()
    save_checkpoint(args, [chunk], directory / "torch")
    chunk.config.bf16 = True
    with NamedCudaIsCpu():
        save_logits(case, [chunk], directory)
        state = state_of(args, wrap(format, Float16Module(chunk.config, chunk)))
        path = directory / "fsdp" / f"iter_{ITERATION:07d}"
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
            (path.parent / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        dist.barrier()
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path))


def wrap(format: str, module: Float16Module) -> torch.nn.Module:
    """The model as training wraps it that saves this format."""
    if format == "torch_dcp":
        module.config.transformer_impl = "local"
        settings = DistributedDataParallelConfig()
        return torch_fully_sharded_data_parallel.TorchFullyShardedDataParallel(module.config, settings, module)
    settings = DistributedDataParallelConfig(
        use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params", use_distributed_optimizer=True,
        overlap_grad_reduce=True, overlap_param_gather=True,
    )  # fmt: skip
    return mcore_fsdp_adapter.FullyShardedDataParallel(module.config, settings, module)


def optimizer_after_a_step(format: str, wrapped: torch.nn.Module) -> MegatronOptimizer:
    """Adam with its state, after a step that changes no weight."""
    distributed = format == "fsdp_dtensor"
    settings = OptimizerConfig(lr=3e-4, weight_decay=0.0, bf16=True, use_distributed_optimizer=distributed)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in (parameter for group in one.optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        one.optimizer.step()
    return optimizer


def state_of(args: Namespace, wrapped: torch.nn.Module) -> dict[str, Any]:
    """What `save_checkpoint` saves of a model and its optimizer."""
    [model], optimizer = unwrap_model([wrapped]), optimizer_after_a_step(args.ckpt_format, wrapped)
    state = {
        "args": args, "checkpoint_version": 3.0, "iteration": ITERATION,
        "model": model.state_dict_for_save_checkpoint(), "rng_state": rng_state(),
        "opt_param_scheduler": {"max_lr": 3e-4, "lr_warmup_steps": 0, "num_steps": 8 * ITERATION},
        "num_floating_point_operations_so_far": 123456789012345,
    }  # fmt: skip
    if args.ckpt_format == "torch_dcp":
        return {**state, "optimizer": optimizer.state_dict()}
    how = {"distrib_optim_sharding_type": "fsdp_dtensor"}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=how)
    handle_fp8_extra_state_case(state["model"])
    state["model"], state["optimizer"] = handle_swiglu_in_state_dict(model, state["model"], state["optimizer"])
    if args.num_experts:
        state["model"] = handle_experts_in_state_dict(state["model"], args.num_experts)
    preprocess_state_dict_for_uneven_dtensor(state)
    return state


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
