"""A Llama checkpoint of any size at TP4 x PP2, written one shard at a time: making it needs the memory of one shard."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import Grid, Model, State, save, training_args

GRID = Grid(tp=4, pp=2)
HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 2048, 8192, 16, 8, 128, 32000

#: All weights repeat these values; only their number matters here.
_TILE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def model(layers: int) -> Model:
    """A Llama of this many layers."""
    return Model(HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, layers, VOCAB, VOCAB)


def layers_of(size_bytes: int) -> int:
    """The number of layers, a multiple of eight, that comes nearest to a size in bf16."""
    return 8 * max(1, round((size_bytes - weights_bytes(0)) / (weights_bytes(1) - weights_bytes(0)) / 8))


def weights_bytes(layers: int) -> int:
    """Bytes of all weights in bf16, embedding and head included."""
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * GROUPS)
    return 2 * (layers * (attention + 3 * HIDDEN * FFN + 2 * HIDDEN) + 2 * VOCAB * HIDDEN + HIDDEN)


def make(root: Path, layers: int, *, with_optimizer: bool = False) -> None:
    """Write the checkpoint.

    Args:
        root: to be made.
        layers: even.
        with_optimizer: add twelve bytes a weight to the files, as Adam's fp32 state has; they are never read.
    """
    args = training_args(model(layers), GRID)
    for pipeline in range(GRID.pp):
        shard = _shard(pipeline, layers // GRID.pp)
        weights = sum(tensor.numel() for tensor in shard.values())
        # Untouched zeros need no memory, only space on the disk.
        extra = {"optimizer": {"state": torch.zeros(3 * weights)}} if with_optimizer else {}
        for tensor in range(GRID.tp):
            save(root, {f"mp_rank_{tensor:02d}_{pipeline:03d}": [shard]}, args, **extra)


def _shard(pipeline: int, layers: int) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    if pipeline == 0:
        shapes["embedding.word_embeddings.weight"] = (VOCAB // GRID.tp, HIDDEN)
    for layer in range(layers):
        at = f"decoder.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD_DIM // GRID.tp, HIDDEN),
            at + "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM // GRID.tp),
            at + "pre_mlp_layernorm.weight": (HIDDEN,),
            at + "mlp.linear_fc1.weight": (2 * FFN // GRID.tp, HIDDEN),
            at + "mlp.linear_fc2.weight": (HIDDEN, FFN // GRID.tp),
        }
    if pipeline == GRID.pp - 1:
        shapes |= {"decoder.final_layernorm.weight": (HIDDEN,), "output_layer.weight": (VOCAB // GRID.tp, HIDDEN)}
    return {name: _tiled(shape) for name, shape in shapes.items()}


def _tiled(shape: tuple[int, ...]) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    flat = weight.view(-1)
    for start in range(0, flat.numel(), _TILE.numel()):
        flat[start : start + _TILE.numel()].copy_(_TILE[: flat.numel() - start])
    return weight
