"""One rank of another converter between Hugging Face and Megatron-Core, on the CPU: it imports, and exports.

`program TOOL HF OUT TP PP EP ETP [ITERATION]`: the tool builds Megatron-Core's model at a grid, loads a Hugging Face
directory into it, and saves it as OUT/hf. With ITERATION, a checkpoint of ours at that grid, each rank must have loaded
what its shard holds, and is filled from the shard before the model is saved. The first rank prints seconds and memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.oracle.peers.stand_ins import Other, mark

# isort: split
import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from transformers import AutoConfig

from tests.oracle.megatron_on_cpu import CudaIsCpu, make_megatron_run_on_cpu

#: A tool's model, what loads it, and what saves it in a directory.
Model = tuple[list[torch.nn.Module], Callable[[], object], Callable[[str], object]]

_AXES = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
_CONFIG = {  # weights are loaded anyway, and fusions need CUDA
    "use_cpu_initialization": True, "perform_initialization": False, "masked_softmax_fusion": False,
    "bias_dropout_fusion": False, "gradient_accumulation_fusion": False, "persist_layer_norm": False,
}  # fmt: skip
_BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def mbridge(hf: str, grid: dict[str, Any]) -> Model:
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(hf)
    bridge.set_extra_args(**_CONFIG)
    models = bridge.get_model(use_cpu_initialization=True, data_parallel_random_init=False)
    return models, partial(bridge.load_weights, models, hf), partial(bridge.save_weights, models)


def mcore_bridge(hf: str, grid: dict[str, Any]) -> Model:
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config

    config = ModelConfig(**hf_to_mcore_config(AutoConfig.from_pretrained(hf)), **grid, **_CONFIG, **_BF16)
    models = get_mcore_model(config)
    return models, partial(config.bridge.load_weights, models, hf), partial(config.bridge.save_weights, models)


def megatron_bridge(hf: str, grid: dict[str, Any]) -> Model:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=False)
    vars(provider).update(**grid, **_CONFIG, **_BF16)
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, bf16=True)
    return models, partial(bridge.load_hf_weights, models), partial(bridge.save_hf_weights, models)


_TOOLS = {"mbridge": mbridge, "mcore-bridge": mcore_bridge, "megatron-bridge": megatron_bridge}


class _OnCpu(CudaIsCpu):
    """Tensors that are sent to CUDA stay, too."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple("cpu" if isinstance(one, str) and one == "cuda" else one for one in args)
        return super().__torch_function__(function, kinds, args, kwargs)


_scatter = torch.distributed.scatter


def _scatter_contiguous(output: torch.Tensor, shares: list[torch.Tensor] | None, **where: Any) -> object:
    """Scatter slices as they are: gloo takes their memory for one piece, and says nothing."""
    return _scatter(output, shares and [share.contiguous() for share in shares], **where)


def _fill(model: torch.nn.Module, iteration: Path) -> None:
    """Compare a rank's model with its shard of ours, and fill it from there."""
    place = [f"{parallel_state.get_tensor_model_parallel_rank():02d}"]
    for axis in ("pipeline", "expert"):
        if getattr(parallel_state, f"get_{axis}_model_parallel_world_size")() > 1:
            place.append(f"{getattr(parallel_state, f'get_{axis}_model_parallel_rank')():03d}")
    shard = iteration / "_".join(["mp_rank", *place]) / "model_optim_rng.pt"
    states = model.state_dict(), torch.load(shard, weights_only=False)["model"]
    theirs, ours = ({key: value for key, value in state.items() if torch.is_tensor(value)} for state in states)
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    assert {key: value.dtype for key, value in theirs.items()} == {key: value.dtype for key, value in ours.items()}
    differing = [key for key, value in theirs.items() if not torch.equal(value, ours[key])]
    assert not differing, f"{shard}: {differing}"
    for key, value in theirs.items():
        value.copy_(ours[key])


def main() -> None:
    """Import and export."""
    tool, hf, out, *more = sys.argv[1:]
    make_megatron_run_on_cpu()
    torch.cuda.Stream = torch.cuda.Event = Other  # type: ignore[assignment, misc]
    torch.distributed.scatter = _scatter_contiguous
    torch.distributed.init_process_group("gloo")
    grid = {f"{axis}_parallel_size": int(size) for axis, size in zip(_AXES, more, strict=False)}
    parallel_state.initialize_model_parallel(**grid)
    with _OnCpu(), torch.no_grad():
        models, load, save = _TOOLS[tool](hf, {**grid, "sequence_parallel": more[0] != "1"})
        for module in (module for model in models for module in model.modules()):
            if isinstance(module, (VocabParallelEmbedding, ColumnParallelLinear)) and module.weight is not None:
                mark(module.weight, 0)  # as initialization does
        torch.distributed.barrier()
        began = time.monotonic()
        load()
        torch.distributed.barrier()
        loaded = time.monotonic()
        if iteration := more[len(grid) :]:
            _fill(models[0], Path(*iteration))
        save(f"{out}/hf")
        torch.distributed.barrier()
        ended = time.monotonic()
    peak_bytes = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    torch.distributed.all_reduce(peak_bytes)
    if torch.distributed.get_rank() == 0:
        found = {"import_seconds": loaded - began, "export_seconds": ended - loaded, "peak_bytes": peak_bytes.item()}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
