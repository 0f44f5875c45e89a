"""Megatron-Core makes and loads checkpoints of the cases of `cases.py`, on four ranks.

    torchrun --nproc-per-node 4 -m tests.oracle.families.program make DIRECTORY NAME...
    torchrun --nproc-per-node 4 -m tests.oracle.families.program check DIRECTORY NAME...

Both read DIRECTORY/hf/MODEL, a Hugging Face directory. `make` writes DIRECTORY/NAME as training does. `check` builds
the model of the config.json, not of a checkpoint's args, and loads DIRECTORY/NAME/megatron strictly into it. Both keep
`problems` and logits in DIRECTORY/NAME/output.pt.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file

from tests.oracle.families.cases import CASES, FILE, FULL_CASES, Case
from tests.oracle.families.megatron_models import (
    build,
    is_whole_in_file,
    logits,
    make_all_families_run_on_cpu,
    shard,
    weights,
)
from tests.oracle.families.training_args import ITERATION, training_args
from tests.oracle.families.whole_weights import Tensors, whole
from tests.oracle.megatron_model import grid, initialise_grid, rank_directory, sharded_models

#: Kept in float32 by Megatron whatever the model's dtype.
_ROUTER_BIAS = "expert_bias"


def main(mode: str, directory: Path, names: list[str]) -> None:
    """Make or check the named cases, those of one grid after the other."""
    make_all_families_run_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    known = {case.name: case for case in (*CASES, *FULL_CASES)}
    configs = {name: _config(directory, known[name]) for name in names}
    wanted = [(training_args(configs[name], known[name]), known[name]) for name in names]
    initialised = None
    for args, case in sorted(wanted, key=lambda pair: (grid(pair[0]), pair[1].name)):
        if grid(args) != initialised:
            initialised = grid(args)
            initialise_grid(args)
        torch.manual_seed(1234)
        (make if mode == "make" else check)(case, args, directory)
    dist.barrier()
    dist.destroy_process_group()


def _config(directory: Path, case: Case) -> dict:
    config: dict = json.loads((directory / "hf" / case.model.name / "config.json").read_text())
    return config


@torch.no_grad()
def make(case: Case, args: Namespace, directory: Path) -> None:
    """Save the case as its training does."""
    model, hf = build(args), {}
    for file in sorted((directory / "hf" / case.model.name).glob("*.safetensors")):
        hf |= load_file(file)
    for weight in weights(model, args):
        part = shard(weight, whole(hf, weight.canonical, args))
        assert part.shape == weight.tensor.shape, f"{weight.canonical}: {part.shape} for {weight.tensor.shape}"
        weight.tensor.copy_(part)
    root = directory / case.name
    path = root / f"iter_{ITERATION:07d}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()
    content = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    if case.format == "torch_dist":
        dist_checkpointing.save(content | sharded_models([model]), str(path))
    elif parallel_state.get_expert_data_parallel_rank() == 0:
        (path / rank_directory()).mkdir(exist_ok=True)
        torch.save(content | {"model": _stored(model, args, hf)}, path / rank_directory() / FILE)
    _keep_output(case, args, model, directory, [])


def _stored(model: GPTModel, args: Namespace, hf: Tensors) -> dict[str, torch.Tensor]:
    """This rank's state dict in the spelling of the case."""
    return {
        weight.stored: (
            whole(hf, weight.canonical, args).clone()
            if is_whole_in_file(weight.name, args)
            else weight.tensor.detach().clone()
        )
        for weight in weights(model, args)
    }


def check(case: Case, args: Namespace, directory: Path) -> None:
    """Load what a conversion wrote, strictly, and keep the logits."""
    model = build(args)
    for weight in weights(model, args):
        weight.tensor.data.fill_(float("nan"))
    root = directory / case.name / "megatron"
    path = root / f"iter_{int((root / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    load = _load_distributed if case.format == "torch_dist" else _load_shard
    problems = load(model, args, path)
    problems += [f"{one.name} holds no values" for one in weights(model, args) if one.tensor.isnan().any()]
    _keep_output(case, args, model, directory, problems)


@torch.no_grad()
def _load_shard(model: GPTModel, args: Namespace, path: Path) -> list[str]:
    """Fill the model from this rank's file; returns what is missing, left over, or of another shape or dtype."""
    path = path / rank_directory() / FILE
    if not path.exists():
        return [f"{path} does not exist"]
    content = torch.load(path, weights_only=False)
    stored = {name: tensor for name, tensor in content["model"].items() if not name.endswith("_extra_state")}
    problems = []
    for weight in weights(model, args):
        part = stored.pop(weight.stored, None)
        if part is None:
            problems.append(f"{path}: {weight.stored} is missing")
            continue
        if weight.name.endswith(_ROUTER_BIAS) and part.dtype != torch.float32:
            problems.append(f"{path}: {weight.stored} is {part.dtype}")
        part = shard(weight, part) if is_whole_in_file(weight.name, args) else part
        if part.shape != weight.tensor.shape:
            problems.append(f"{path}: {weight.stored} is {part.shape}, not {weight.tensor.shape}")
        else:
            weight.tensor.copy_(part)
    return [*problems, *(f"{path}: nothing takes {name}" for name in stored)]


def _load_distributed(model: GPTModel, args: Namespace, path: Path) -> list[str]:
    """Fill the model from a directory of torch_dist; returns what is in it or in the model only.

    Transformer Engine's modules ask for more extra states than the local ones, so only theirs may be in the directory
    alone.
    """
    loaded, *differing = dist_checkpointing.load(sharded_models([model]), str(path), strict="return_all")
    unexpected, missing = (sorted(keys) for keys in differing)
    if args.transformer_impl == "transformer_engine":
        unexpected = [key for key in unexpected if "_extra_state" not in key]
    state = {name: value.float() if torch.is_tensor(value) else value for name, value in loaded["model"].items()}
    model.load_state_dict(state)
    return [*(f"{path}: nothing takes {key}" for key in unexpected), *(f"{path}: {key} is missing" for key in missing)]


def _keep_output(case: Case, args: Namespace, model: GPTModel, directory: Path, problems: list[str]) -> None:
    """Run the model, unless a rank has problems, and keep what it gives."""
    of_all_ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, problems)
    found: dict[str, object] = {"problems": sorted({problem for one in of_all_ranks for problem in one})}
    if not found["problems"]:
        given = torch.load(directory / "hf" / case.model.name / "logits.pt")
        found |= logits(model, args, given["input_ids"]) or {}
    if dist.get_rank() == dist.get_world_size() - 1:
        torch.save(found, directory / case.name / "output.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
