"""Has NVIDIA's own `save_checkpoint` save what training with FSDP leaves.

    torchrun --nproc-per-node 4 tests/oracle/fsdp/training.py FORMAT CASE LOAD SAVE [flags of Megatron-LM...]

needs megatron/training, which the package of megatron-core has from 0.17 on. LOAD is a checkpoint of the case, whose
args are taken; weights and optimizer are those of `fsdp.program`.
"""

from __future__ import annotations

import sys
from argparse import Namespace

import torch
import torch.distributed as dist
from cases import CASES
from megatron_model import build_model, initialise_grid
from megatron_training import FLAGS
from megatron_weights import fill_weights

from tests.oracle.fsdp.program import (
    Float16Module,
    NamedCudaIsCpu,
    make_fsdp_run_on_cpu,
    optimizer_after_a_step,
    wrap,
)

FSDP = {
    "torch_dcp": ("--use-torch-fsdp2",),
    "fsdp_dtensor": (
        "--use-megatron-fsdp", "--use-distributed-optimizer", "--data-parallel-sharding-strategy", "optim_grads_params",
    ),
}  # fmt: skip


def main(format: str, name: str, load: str, save: str, *given: str) -> None:
    make_fsdp_run_on_cpu()
    torch.cuda.get_device_properties = lambda *_: Namespace(major=8, minor=0)  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    flags = [flag for flag in FLAGS if flag not in ("--no-save-optim", "--no-save-rng")]
    more = ("--auto-detect-ckpt-format", "--bf16", *FSDP[format], "--ckpt-format", format)  # the last one counts
    sys.argv = ["pretrain_gpt.py", "--load", load, "--save", save, *flags, *more, *given]
    from megatron.training import global_vars
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint, save_checkpoint

    args, _ = load_args_from_checkpoint(parse_args())
    validate_args(args)
    global_vars.set_args(args)
    initialise_grid(args)
    config = core_transformer_config_from_args(args)
    [chunk] = build_model(args, config)
    [case] = [case for case in CASES if case.name == name]
    fill_weights(chunk, case)
    model = wrap(format, Float16Module(config, chunk))
    save_checkpoint(7, [model], optimizer_after_a_step(format, model), None, 0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with NamedCudaIsCpu():
        main(*sys.argv[1:])
