"""What the benchmark converts: Megatron checkpoints of any size and grid, and the Hugging Face directories of them.

A checkpoint is written one file at a time, so making it needs the memory of one file. All weights repeat the same
million random values; only their number and their shapes matter here.
"""

from __future__ import annotations

import json
import re
import shutil
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dist_convert.formats.megatron.grid import Grid
from dist_convert.models.schema import Architecture
from tests import checkpoints
from tests.checkpoints import State, hf_shapes, training_args
from tests.full_size import model_of
from tests.meta_checkpoints import make_meta
from tests.plan.headers import Shapes, architecture, chunk_shapes, directory, written_pairs
from tests.quantised import change_config, quantised

GRIDS = {"llama": "TP4xPP2", "mixtral": "TP2xEP4"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

#: From this size on, layers are as wide as those of a model of a few billion parameters.
_LARGE_BYTES = 1_000_000_000
#: Few tokens for Mixtral: every expert rank has a copy of the embedding, which would be much of so small a model.
_WIDTHS = {
    "llama": {"hidden": 2048, "ffn": 8192, "heads": 16, "query_groups": 8, "vocab": 32000, "padded_vocab": 32000},
    "mixtral": {"hidden": 2048, "ffn": 7168, "heads": 16, "query_groups": 8, "vocab": 4000, "padded_vocab": 4000},
}
_EXPERTS = {"llama": 0, "mixtral": 8}
_VALUES = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def parse_grid(text: str) -> Grid:
    """The grid of "TP4xPP2" or "TP2xEP4xETP1"; experts are cut like all else where ETP is not given."""
    sizes = {name: int(size) for name, size in re.findall(r"(VPP|PP|ETP|EP|TP)(\d+)", text.upper())}
    tensor = sizes.get("TP", 1)
    return Grid(tensor, sizes.get("PP", 1), sizes.get("VPP", 1), sizes.get("EP", 1), sizes.get("ETP", tensor))


def grid_flags(grid: Grid) -> list[str]:
    """The flags of `hf-to-megatron` for a grid."""
    flags = ["--target-tensor-parallel-size", str(grid.tensor), "--target-pipeline-parallel-size", str(grid.pipeline)]
    flags += ["--target-expert-parallel-size", str(grid.expert)]
    flags += ["--target-expert-tensor-parallel-size", str(grid.expert_tensor)]
    if grid.virtual_pipeline > 1:
        flags += ["--target-virtual-pipeline-parallel-size", str(grid.virtual_pipeline)]
    return flags


def model_near(family: str, size_bytes: int, grid: Grid, dtype: str = "bf16", parts: int = 1) -> Architecture:
    """The model of a family whose weights come nearest to a size: as many layers as it takes, evenly over stages.

    Args:
        family: of `GRIDS`.
        size_bytes: of the weights.
        grid: whose stages have equally many layers.
        dtype: of the weights, of `DTYPES`.
        parts: into which the layers can be divided, with stages that are still even.
    """
    narrower = 1 if size_bytes >= _LARGE_BYTES else 2
    widths = {name: size // narrower for name, size in _WIDTHS[family].items()} | {"experts": _EXPERTS[family]}
    chunks = grid.pipeline * grid.virtual_pipeline * parts

    def model(layers: int) -> Architecture:
        return architecture(family, layers=layers, head_dim=128, **widths)

    without, layer = (weights_bytes(model(layers), dtype) for layers in (0, 1))
    return model(chunks * max(1, round((size_bytes - without) / (layer - without) / chunks)))


def weights_bytes(model: Architecture, dtype: str = "bf16") -> int:
    """Bytes of all weights of a model."""
    return DTYPES[dtype].itemsize * sum(prod(shape) for shape in hf_shapes(model_of(model)).values())


def make_megatron(
    root: Path, model: Architecture, grid: Grid, dtype: str = "bf16", *, with_optimizer: bool = False
) -> None:
    """Write a Megatron checkpoint of sequential experts.

    Args:
        root: to be made.
        model: its sizes.
        grid: its parallel sizes.
        dtype: of the weights, of `DTYPES`.
        with_optimizer: add twelve bytes a weight to every file, as Adam's fp32 state has; they are never read. They
            are zeros, but written, so that they take their room on the disk.
    """
    sizes = checkpoints.Grid(grid.tensor, grid.pipeline, grid.virtual_pipeline, grid.expert, grid.expert_tensor)
    args = training_args(model_of(model), sizes, params_dtype=DTYPES[dtype])
    chunks = grid.pipeline * grid.virtual_pipeline
    for pipeline in range(grid.pipeline):
        numbers = [virtual * grid.pipeline + pipeline for virtual in range(grid.virtual_pipeline)]
        shapes = [
            chunk_shapes(model, grid, model.layers // chunks, is_first=number == 0, is_last=number == chunks - 1)
            for number in numbers
        ]
        for tensor, expert in written_pairs(grid):
            expert_shard = expert * grid.expert_tensor + tensor % grid.expert_tensor
            states = [_filled(chunk, DTYPES[dtype], tensor, expert_shard) for chunk in shapes]
            weights = sum(tensor.numel() for state in states for tensor in state.values())
            extra = {"optimizer": {"state": torch.zeros(3 * weights)}} if with_optimizer else {}
            checkpoints.save(root, {directory(grid, pipeline, tensor, expert): states}, args, **extra)


def make_metas(root: Path, model: Architecture, huggingface: Path) -> None:
    """Write a Hugging Face model as Meta publishes it, in two files; the memory of both is needed at once.

    Args:
        root: to be made.
        model: a Llama whose feed-forward layers are four times as wide as it is.
        huggingface: the model's directory.
    """
    state = {
        name: tensor for file in sorted(huggingface.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    make_meta(root, 2, "3", model_of(model), state, ffn_dim_multiplier=1.5, multiple_of=256)


def make_fp8(root: Path, huggingface: Path) -> None:
    """Write a Hugging Face model whose matrices but the embedding are in FP8, as DeepSeek-V3 is: blocks of 128 x 128.

    Args:
        root: to be made.
        huggingface: the model's directory, in several files.
    """
    block, index = (128, 128), "model.safetensors.index.json"
    shutil.copytree(huggingface, root, ignore=shutil.ignore_patterns("*.safetensors"))
    weight_map = json.loads((root / index).read_text())
    for file in sorted(huggingface.glob("*.safetensors")):
        state = load_file(file)
        for name in [name for name, weight in state.items() if weight.ndim == 2 and ".layers." in name]:
            state[name], state[f"{name}_scale_inv"] = quantised(state[name], block)
        weight_map["weight_map"] |= dict.fromkeys(state, file.name)
        save_file(state, root / file.name, {"format": "pt"})
    (root / index).write_text(json.dumps(weight_map))
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change_config(root, quantization_config=said)


def _filled(shapes: Shapes, dtype: torch.dtype, shard: int, expert_shard: int) -> State:
    """Random values, others in each shard: shards that are alike are taken for a file under two names."""
    state = {}
    for name, shape in shapes.items():
        first = 0 if len(shape) == 1 or "router" in name else expert_shard if ".experts." in name else shard
        state[name] = _values(prod(shape), dtype, first).view(shape)
    return state


def _values(count: int, dtype: torch.dtype, first: int) -> torch.Tensor:
    made, values = torch.empty(count, dtype=dtype), _VALUES.to(dtype).roll(-first)
    for start in range(0, count, values.numel()):
        made[start : start + values.numel()].copy_(values[: count - start])
    return made


def files_bytes(root: Path) -> int:
    """The size of a directory's files."""
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def allocated_bytes(root: Path) -> int:
    """The room that a directory's files take on the disk: holes do not count."""
    return sum(512 * file.stat().st_blocks for file in root.rglob("*") if file.is_file())


def hand_out(iteration: Path, ranks: int, places: Path) -> Path:
    """Directories with some files for each rank, tensor ranks with different ones, so that `gather` has what to gather.

    Args:
        iteration: of a Megatron checkpoint.
        ranks: that convert it.
        places: where the directories of links are made, if they are not there.

    Returns:
        What to give as load path.
    """
    if not places.exists():
        # mp_rank_TT, then pipeline and expert rank: tensor ranks are next to each other.
        shards = sorted(iteration.iterdir(), key=lambda shard: (shard.name.split("_")[3:], shard.name))
        for number, shard in enumerate(shards):
            place = places / f"rank{number % ranks}"
            place.mkdir(exist_ok=True, parents=True)
            (place / shard.name).symlink_to(shard.resolve())
    return places / "rank{rank}"
