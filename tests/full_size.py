"""Checkpoints of real models' full sizes that take no room: true headers and file sizes, and holes for values."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from dist_convert.models.schema import Architecture
from tests.checkpoints import Grid, Model, hf_shapes, training_args
from tests.plan.headers import FULL_SIZE, chunk_shapes, directory, written_pairs
from tests.to_megatron import config_of

#: What the args of these models say besides their sizes, and what their config.json does.
LLAMA_31_ARGS = {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "max_position_embeddings": 131072}
LLAMA_31_CONFIG = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip


def make_sparse_megatron(root: Path, name: str) -> None:
    """One of `FULL_SIZE` as a Megatron checkpoint."""
    architecture, grid, layers = FULL_SIZE[name]
    model = model_of(architecture)
    more: dict[str, Any] = {} if model.experts else LLAMA_31_ARGS
    sizes = Grid(grid.tensor, grid.pipeline, grid.virtual_pipeline, grid.expert, grid.expert_tensor)
    args = training_args(model, sizes, **more)
    for pipeline in range(grid.pipeline):
        shapes = chunk_shapes(
            architecture, grid, layers[pipeline], is_first=pipeline == 0, is_last=pipeline == grid.pipeline - 1
        )
        for tensor, expert in written_pairs(grid):
            shard = root / "iter_0000004" / directory(grid, pipeline, tensor, expert)
            shard.mkdir(parents=True)
            state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
            with torch.serialization.skip_data():
                saved = {"args": args, "checkpoint_version": 3.0, "iteration": 4, "model": state}
                torch.save(saved, shard / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("4")


def make_sparse_huggingface(root: Path, model: Model, files: int, **config: Any) -> None:
    """A model as a Hugging Face directory of so many weights files."""
    root.mkdir()
    config_of(model, **config).save_pretrained(root)
    write_sparse_files(root, hf_shapes(model), files)


def write_sparse_files(root: Path, shapes: Mapping[str, Sequence[int]], files: int) -> None:
    """Tensors in bf16 as so many weights files with an index, with holes for values."""
    names = sorted(shapes)
    weight_map = {}
    for number in range(files):
        header, offset_bytes = {}, 0
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            end_bytes = offset_bytes + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset_bytes, end_bytes]}
            offset_bytes = end_bytes
            weight_map[name] = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        text = json.dumps(header).encode()
        with (root / f"model-{number + 1:05d}-of-{files:05d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset_bytes)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def model_of(a: Architecture) -> Model:
    """The same sizes, as the makers of small checkpoints take them."""
    return Model(
        hidden=a.hidden, ffn=a.ffn, heads=a.heads, groups=a.query_groups, head_dim=a.head_dim, layers=a.layers,
        vocab=a.vocab, padded_vocab=a.padded_vocab, experts=a.experts,
    )  # fmt: skip
