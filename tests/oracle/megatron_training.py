"""Loads a checkpoint with NVIDIA's own `load_checkpoint`, as `pretrain_gpt.py` starts it, and saves it anew.

    torchrun --nproc-per-node N tests/oracle/megatron_training.py LOAD SAVE [flags of Megatron-LM...]

needs megatron/training, which the package of megatron-core 0.19 has. The parameters are NaN before they are loaded, and
none may be after it. SAVE is what `save_checkpoint` writes, in torch_dist.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace

import torch
import torch.distributed as dist
from megatron_model import build_model, initialise_grid
from megatron_on_cpu import CudaIsCpu, make_megatron_run_on_cpu

#: As few as there can be: the checkpoint's own args say what the model and its grid are.
FLAGS = (
    "--use-checkpoint-args", "--use-mp-args-from-checkpoint-args", "--finetune", "--exit-on-missing-checkpoint",
    "--ckpt-format", "torch_dist", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-5", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "256", "--distributed-backend", "gloo",
    "--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-persist-layer-norm",
    "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--use-cpu-initialization", "--no-save-optim",
    "--no-save-rng", "--save-interval", "1",
)  # fmt: skip


def main(load: str, save: str, flags: list[str]) -> None:
    make_megatron_run_on_cpu()
    torch.cuda.get_device_properties = lambda *_: Namespace(major=8, minor=0)  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.get_rng_state  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["pretrain_gpt.py", "--load", load, "--save", save, *FLAGS, *flags]
    from megatron.training import global_vars
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint, save_checkpoint

    args, _ = load_args_from_checkpoint(parse_args())
    validate_args(args)
    global_vars.set_args(args)
    initialise_grid(args)
    chunks = build_model(args, core_transformer_config_from_args(args))
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        parameter.data.fill_(float("nan"))
    load_checkpoint(chunks, None, None, strict=True)
    left = [name for chunk in chunks for name, parameter in chunk.named_parameters() if parameter.isnan().any()]
    assert not left, left
    save_checkpoint(7, chunks, None, None, 0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with CudaIsCpu():
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
