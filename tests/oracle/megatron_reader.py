"""Loads checkpoints into megatron-core as Megatron-LM's `--load --use-checkpoint-args` does, and runs its forward.

    torchrun --standalone --nproc-per-node N tests/oracle/megatron_reader.py DIRECTORY NAME...

reads DIRECTORY/NAME/megatron, a checkpoint's root, and DIRECTORY/NAME/input.pt with `input_ids` and the number of
`new_tokens` to append greedily. Writes DIRECTORY/NAME/output.pt with `problems`, which loading met on any rank, and
without problems `input_ids` with the new tokens and the `logits` of the last forward. It knows nothing of the
model or the grid but what the files' own `args` say, and what DIRECTORY/NAME/args.json says instead, if it is there.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron_model import build_model, forward, grid, initialise_grid, rank_directory, sharded_models
from megatron_on_cpu import make_megatron_run_on_cpu

FILE = "model_optim_rng.pt"


def main(directory: Path, names: list[str]) -> None:
    """Load and run the named checkpoints."""
    make_megatron_run_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    args_of = {name: args_to_load(directory / name) for name in names}
    initialised = None
    for name in sorted(names, key=lambda name: grid(args_of[name])):
        if grid(args_of[name]) != initialised:
            initialised = grid(args_of[name])
            initialise_grid(args_of[name])
        read_checkpoint(directory / name, args_of[name])
    dist.barrier()
    dist.destroy_process_group()


def args_to_load(directory: Path) -> Namespace:
    """The checkpoint's args, and what is asked for instead: another grid."""
    args, instead = first_args(iteration_directory(directory / "megatron")), directory / "args.json"
    return Namespace(**{**vars(args), **json.loads(instead.read_text() if instead.exists() else "{}")})


def iteration_directory(root: Path) -> Path:
    """The directory that the tracker file names."""
    tracked = (root / "latest_checkpointed_iteration.txt").read_text().strip()
    return root / ("release" if tracked == "release" else f"iter_{int(tracked):07d}")


def first_args(directory: Path) -> Namespace:
    """The args of rank 0's file, found by the names that Megatron-LM tries before it knows the grid."""
    if (directory / ".metadata").exists():
        return load(directory / "common.pt")["args"]
    tried = [directory / f"mp_rank_00{rest}" / FILE for rest in ("", "_000", "_000_000")]
    (found,) = [path for path in tried if path.exists()]
    return load(found)["args"]


def load(path: Path) -> dict:
    """The content of one file, with everything in it that Megatron-LM may find there."""
    return torch.load(path, map_location="cpu", weights_only=False)


def read_checkpoint(directory: Path, args: Namespace) -> None:
    """Load this rank's file strictly and, if every rank could, run the model."""
    chunks = build_model(args)
    of_all_ranks: list[list[str]] = [[]] * dist.get_world_size()
    path = iteration_directory(directory / "megatron")
    is_distributed = (path / ".metadata").exists()
    problems = (
        load_distributed(chunks, path) if is_distributed else load_strictly(chunks, path / rank_directory() / FILE)
    )
    dist.all_gather_object(of_all_ranks, problems)
    output: dict[str, object] = {"problems": sorted({problem for problems in of_all_ranks for problem in problems})}
    if not output["problems"]:
        given = torch.load(directory / "input.pt")
        output["input_ids"], output["logits"] = generate(chunks, given["input_ids"], given["new_tokens"])
    if dist.get_rank() == dist.get_world_size() - 1:
        torch.save(output, directory / "output.pt")


def load_distributed(chunks: list[GPTModel], path: Path) -> list[str]:
    """Fill the chunks from a torch_dist directory; returns what is in it or in the model only."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    loaded, *differing = dist_checkpointing.load(sharded_models(chunks), str(path), strict="return_all")
    problems = [f"{key} is in one of both only" for keys in differing for key in keys]
    for number, chunk in enumerate(chunks):
        state = loaded["model" if len(chunks) == 1 else f"model{number}"]
        chunk.load_state_dict(
            {name: value.float() if torch.is_tensor(value) else value for name, value in state.items()}
        )
        problems += [f"{name} holds no values" for name, value in chunk.named_parameters() if value.isnan().any()]
    return problems


def load_strictly(chunks: list[GPTModel], path: Path) -> list[str]:
    """Fill the chunks from the file; returns why that failed. megatron-core itself adds an absent `_extra_state`."""
    if not path.exists():
        return [f"{path} does not exist"]
    content = load(path)
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    problems = [f"{path}: {key} is missing or not expected" for key in models(content) ^ set(keys)]
    for key, chunk in zip(keys, chunks, strict=True):
        try:
            chunk.load_state_dict(content.get(key, {}), strict=True)
        except RuntimeError as error:
            problems.append(f"{path}: {key}: {error}")
    return problems


def models(content: dict) -> set[str]:
    """The keys of a file that hold state dicts of models."""
    return {key for key in content if key.startswith("model")}


def generate(chunks: list[GPTModel], input_ids: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, object]:
    """The ids with the most probable tokens appended one by one, and the logits of the last forward."""
    logits = forward(chunks, input_ids)
    for _ in range(new_tokens):
        chosen = torch.empty(len(input_ids), 1, dtype=torch.long)
        if logits is not None:
            chosen = logits[:, -1:].argmax(-1)
        dist.broadcast(chosen, dist.get_world_size() - 1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        logits = forward(chunks, input_ids)
    return input_ids, logits


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
