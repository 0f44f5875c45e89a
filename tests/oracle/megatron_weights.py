"""Weights that depend on a tensor's place in the whole model and not on the grid that holds it."""

from __future__ import annotations

import re
import zlib

import torch
from cases import OracleCase
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron_model import is_grouped

PADDING_VALUE = 7.0
EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")


@torch.no_grad()
def fill_weights(model: GPTModel, case: OracleCase) -> None:
    """Give every parameter of one model chunk its share of the whole model's weights."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".experts.weight1", ".experts.weight2")):
            parameter.copy_(_local_part(_global_name(model, name, case), parameter, case))
    for name, module in model.named_modules():
        if is_grouped(module):
            _fill_grouped_experts(_global_name(model, f"{name}.", case), module, case)


def whole_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor with this name and shape of the whole model, reproducible on every rank."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return noise / shape[-1] ** 0.5


def _global_name(model: GPTModel, name: str, case: OracleCase) -> str:
    """The name with the layer's and the expert's number in the whole model; a tied head is the embedding."""
    if name == "output_layer.weight" and case.tied:
        return EMBEDDING
    name = _LAYER.sub(lambda m: f"decoder.layers.{model.decoder.layers[int(m[1])].layer_number - 1}.", name)
    return _LOCAL_EXPERT.sub(lambda m: f"local_experts.{_first_expert(case) + int(m[1])}.", name)


def _first_expert(case: OracleCase) -> int:
    """The number of this rank's first expert in the whole model."""
    return parallel_state.get_expert_model_parallel_rank() * (case.experts or 0) // case.expert_parallel


def _tensor_rank_and_size(name: str) -> tuple[int, int]:
    """This rank's place in the tensor parallel group that splits the parameter."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _local_part(name: str, parameter: torch.Tensor, case: OracleCase) -> torch.Tensor:
    """This rank's part of the whole tensor, cut along the dimension that megatron-core declares."""
    rank, size = _tensor_rank_and_size(name)
    dim = getattr(parameter, "partition_dim", -1)
    if dim < 0 or not getattr(parameter, "tensor_model_parallel", False):
        return whole_tensor(name, tuple(parameter.shape))
    shape = list(parameter.shape)
    shape[dim] *= size
    if name in (EMBEDDING, "output_layer.weight"):
        return _padded_vocabulary(name, case)[rank * shape[0] // size : (rank + 1) * shape[0] // size]
    whole = whole_tensor(name, tuple(shape))
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank]


def _padded_vocabulary(name: str, case: OracleCase) -> torch.Tensor:
    """The rows of the true vocabulary, which no padding changes, and below them rows of rubbish."""
    rows = whole_tensor(name, (case.vocab, case.hidden))
    padding = whole_tensor(f"padding of {name}", (case.padded_vocab - case.vocab, case.hidden))
    return torch.cat([rows, PADDING_VALUE + padding])


def _fill_grouped_experts(prefix: str, module: torch.nn.Module, case: OracleCase) -> None:
    """Give a GroupedMLP a SequentialMLP's numbers, in the view that its forward takes of its memory."""
    rank, size = _tensor_rank_and_size(prefix)
    up = module.weight1.view(module.num_local_experts, case.hidden, -1)
    down = module.weight2.view(module.num_local_experts, -1, case.hidden)
    for local in range(module.num_local_experts):
        expert = f"{prefix}local_experts.{_first_expert(case) + local}"
        fc1 = whole_tensor(f"{expert}.linear_fc1.weight", (2 * case.ffn, case.hidden))
        fc2 = whole_tensor(f"{expert}.linear_fc2.weight", (case.hidden, case.ffn))
        up[local].copy_(torch.cat([half.chunk(size)[rank] for half in fc1.chunk(2)]).T)
        down[local].copy_(fc2.chunk(size, 1)[rank].T)
