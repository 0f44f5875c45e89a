"""One rank of Megatron-Core's model of Transformer Engine's layers, on the CPU: it loads a torch_dist checkpoint.

`program ROOT OUT`: builds the model that the checkpoint's args describe. OUT/mp_rank_TT....pt has, of each rank, what
the model asks for that the checkpoint lacks, what the checkpoint has besides, and all tensors that were loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.oracle.peers.stand_ins import Linear, Other

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from tests.oracle import megatron_model, megatron_reader
from tests.oracle.megatron_on_cpu import CudaIsCpu, make_megatron_run_on_cpu


def give_extra_state(kind: type[torch.nn.Module]) -> None:
    """Have modules keep what Transformer Engine's keep beside their weights without FP8: nothing, under a key."""
    kind.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)  # type: ignore[method-assign]
    kind.set_extra_state = lambda self, state: None  # type: ignore[method-assign]


def main(root: Path, out: Path) -> None:
    """Load, and save what was found."""
    make_megatron_run_on_cpu()
    dist.init_process_group("gloo")
    path = megatron_reader.iteration_directory(root)
    args = megatron_reader.first_args(path)
    megatron_model.initialise_grid(args)
    for kind in (Linear, Other):
        give_extra_state(kind)
    with CudaIsCpu():
        sharded = megatron_model.sharded_models(
            megatron_model.build_model(args, spec=get_gpt_layer_with_transformer_engine_spec)
        )
        loaded, besides, lacking = dist_checkpointing.load(sharded, str(path), strict="return_all")
    tensors = {name: one for name, one in loaded["model"].items() if torch.is_tensor(one)}
    found = {"lacking": sorted(lacking), "besides": sorted(besides), "tensors": tensors}
    torch.save(found, out / f"{megatron_model.rank_directory()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
