"""Writes true Megatron-LM checkpoints in the `torch` layout and the logits of megatron-core's own forward.

    torchrun --standalone --nproc-per-node 8 tests/oracle/megatron_writer.py OUT_DIR [case names...]

makes OUT_DIR/CASE/{latest_checkpointed_iteration.txt, iter_0000004/mp_rank_*/model_optim_rng.pt, oracle.pt}, and below
OUT_DIR/CASE/distributed the same model as --ckpt-format torch_dist saves it.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from cases import CASES, LOSSY_CASES, OracleCase
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState
from megatron_args import ITERATION, training_args
from megatron_model import build_model, forward, grid, initialise_grid, rank_directory, sharded_models
from megatron_on_cpu import CudaIsCpu, make_megatron_run_on_cpu
from megatron_weights import fill_weights

BATCH = 2


def main(out_dir: Path, names: list[str]) -> None:
    """Write the named cases, or all."""
    known = {case.name: case for case in CASES + LOSSY_CASES}
    make_megatron_run_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    initialised = None
    for case in sorted((known[name] for name in names or known), key=lambda case: case.grid):
        args = training_args(case, dist.get_rank(), dist.get_world_size())
        if grid(args) != initialised:
            initialised = grid(args)
            initialise_grid(args)
        write_case(case, args, out_dir / case.name)
    dist.barrier()
    dist.destroy_process_group()


def write_case(case: OracleCase, args: Namespace, directory: Path) -> None:
    """Write one case's checkpoint and logits."""
    torch.manual_seed(1234)
    chunks = build_model(args)
    for chunk in chunks:
        fill_weights(chunk, case)
        if case.bf16:
            chunk.bfloat16()
    with CudaIsCpu() if case.flat_storage else nullcontext():
        optimizer = distributed_optimizer(chunks) if case.flat_storage else None
        save_checkpoint(args, chunks, directory)
        save_distributed(case, args, chunks, optimizer, directory / "distributed")
    for chunk in chunks:
        chunk.float()
    save_logits(case, chunks, directory)


def distributed_optimizer(chunks: list[GPTModel]) -> MegatronOptimizer:
    """Megatron's DDP, which moves parameters into one flat storage, and the distributed optimizer with its state."""
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    models = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    # Making its state is a step, which must change no weight.
    settings_of_adam = OptimizerConfig(lr=3e-4, weight_decay=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings_of_adam, models, use_gloo_process_groups=False)
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        one._init_optimizer_states_with_dummy_values()
    return optimizer


def save_checkpoint(args: Namespace, chunks: list[GPTModel], directory: Path) -> None:
    """Save what Megatron-LM saves, on the ranks where megatron-core 0.10 to 0.17 saves it."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    if parallel_state.get_expert_data_parallel_rank() != 0:
        return
    path = directory / f"iter_{ITERATION:07d}" / rank_directory() / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint(args, chunks), path)


def save_distributed(
    case: OracleCase, args: Namespace, chunks: list[GPTModel], optimizer: MegatronOptimizer | None, directory: Path
) -> None:
    """Save what Megatron-LM saves as torch_dist."""
    path = directory / f"iter_{ITERATION:07d}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()
    state: dict[str, object] = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    state |= sharded_models(chunks)
    if optimizer is not None:
        how = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": False}
        state["optimizer"] = optimizer.sharded_state_dict(sharded_models(chunks), metadata=how)
    strategy = None
    if case.fully_parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group)
    dist_checkpointing.save(state, str(path), strategy)
    dist.barrier()


def checkpoint(args: Namespace, chunks: list[GPTModel]) -> dict[str, object]:
    """The dictionary in model_optim_rng.pt."""
    models = [chunk.state_dict_for_save_checkpoint() for chunk in chunks]
    keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 123456789012345,
        **dict(zip(keys, models, strict=True)),
        "optimizer": optimizer_state(chunks),
        "opt_param_scheduler": {"max_lr": 3e-4, "lr_warmup_steps": 0, "num_steps": 8 * ITERATION},
        "rerun_state_machine": rerun_state(),
        "rng_state": rng_state(),
    }


def optimizer_state(chunks: list[GPTModel]) -> dict[str, object]:
    """An Adam state in fp32 with master weights: larger than the model, and no weight's true value."""
    weights = [parameter.detach().float() for chunk in chunks for parameter in chunk.parameters()]
    moments = {n: {"exp_avg": w * 0.1 + 9, "exp_avg_sq": w * w + 9} for n, w in enumerate(weights)}
    groups = [{"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "step": ITERATION, "params": [*moments]}]
    return {
        "optimizer": {"state": moments, "param_groups": groups},
        "grad_scaler": None,
        "fp32_from_fp16_params": [[weight + 9 for weight in weights]],
    }


def rerun_state() -> dict[str, object]:
    """The rerun state machine's state, with its own enumerations."""
    return {
        "mode": RerunMode.DISABLED,
        "state": RerunState.NOT_RUNNING_YET,
        "current_iteration": ITERATION,
        "sharded": {"error_injector_checkpoint": {"error_injection_type": RerunDiagnostic.TRANSIENT_ERROR}},
    }


def rng_state() -> list[dict[str, object]]:
    """The random generators' states, one entry for every data parallel rank that is saved."""
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]


def save_logits(case: OracleCase, chunks: list[GPTModel], directory: Path) -> None:
    """Save fixed token ids and the model's logits for them."""
    generator = torch.Generator().manual_seed(case.sequence_length)
    input_ids = torch.randint(case.vocab, (BATCH, case.sequence_length), generator=generator)
    logits = forward(chunks, input_ids)
    first_in_stage = dist.get_rank(parallel_state.get_tensor_model_parallel_group()) == 0
    if logits is not None and first_in_stage and parallel_state.get_data_parallel_rank() == 0:
        torch.save({"input_ids": input_ids, "logits": logits.float()}, directory / "oracle.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
