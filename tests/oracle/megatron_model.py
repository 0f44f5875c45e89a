"""Builds, on CPU ranks, the megatron-core model that `args` describe, and runs its forward over the pipeline."""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig


def grid(args: Namespace) -> tuple[int, int, int, int, int]:
    """What decides the process groups: TP, PP, VP, EP, ETP."""
    return (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size or 1,
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size,
    )


def initialise_grid(args: Namespace) -> None:
    """Make the process groups of the arguments' grid; data parallelism takes the rest of the world."""
    parallel_state.destroy_model_parallel()
    _of_this_version(
        parallel_state.initialize_model_parallel,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )


def rank_directory() -> str:
    """The name of this rank's directory, as Megatron-LM's get_checkpoint_name makes it."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return name


def transformer_config(args: Namespace) -> TransformerConfig:
    """The configuration that Megatron-LM derives from the arguments, in fp32 with every fusion off."""
    config: TransformerConfig = _of_this_version(
        TransformerConfig,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        sequence_parallel=args.num_experts is not None and args.tensor_model_parallel_size > 1,
        num_moe_experts=args.num_experts,
        moe_router_topk=getattr(args, "moe_router_topk", 2),
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        moe_grouped_gemm=getattr(args, "moe_grouped_gemm", False),
        moe_token_dispatcher_type="allgather",
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.0,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=args.swiglu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    config.sequence_parallel = False  # which older versions ask for beside experts, and which changes no weight
    return config


def _of_this_version(function: Callable[..., Any], *given: Any, **arguments: Any) -> Any:
    """Call a function with what is given, and with those of the arguments that this version of megatron-core knows."""
    known = inspect.signature(function).parameters
    return function(*given, **{name: value for name, value in arguments.items() if name in known})


def is_grouped(module: torch.nn.Module) -> bool:
    """Whether it is the legacy GroupedMLP, which newer versions do not have."""
    return type(module).__name__ == "GroupedMLP"


def build_model(
    args: Namespace, config: TransformerConfig | None = None, spec: Callable[..., Any] = get_gpt_layer_local_spec
) -> list[GPTModel]:
    """This rank's model chunks, one for every virtual pipeline stage, of a spec's layers."""
    config = config or transformer_config(args)
    return [_build_chunk(args, config, spec, stage) for stage in range(args.virtual_pipeline_model_parallel_size or 1)]


def _build_chunk(args: Namespace, config: TransformerConfig, spec: Callable[..., Any], stage: int) -> GPTModel:
    """The model chunk of one virtual pipeline stage of this rank."""
    chunk: GPTModel = _of_this_version(
        GPTModel,
        config,
        _of_this_version(
            spec,
            num_experts=args.num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=args.qk_layernorm,
            normalization=args.normalization,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=_of_this_version(parallel_state.is_pipeline_first_stage, ignore_virtual=False, vp_stage=stage),
        post_process=_of_this_version(parallel_state.is_pipeline_last_stage, ignore_virtual=False, vp_stage=stage),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=stage if args.virtual_pipeline_model_parallel_size else None,
    )
    for module in chunk.modules():
        if is_grouped(module):  # insists on the flag, not on the dtype
            module.config = copy.copy(config)
            module.config.bf16 = True
    return chunk.eval()


@torch.no_grad()
def sharded_models(chunks: list[GPTModel]) -> dict[str, dict]:
    """The chunks' sharded state, by the keys under which Megatron-LM saves it."""
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(keys, chunks, strict=True)}


def forward(chunks: list[GPTModel], input_ids: torch.Tensor) -> torch.Tensor | None:
    """The logits [batch, sequence, padded vocabulary] on the last stage's ranks, None on the others."""
    batch, length = input_ids.shape
    positions = torch.arange(length).expand(batch, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None].expand(batch, 1, length, length)
    group = parallel_state.get_pipeline_model_parallel_group()
    hidden = torch.empty(length, batch, chunks[0].config.hidden_size)
    output = None
    for chunk in chunks:
        for stage in range(parallel_state.get_pipeline_model_parallel_world_size()):
            if stage == parallel_state.get_pipeline_model_parallel_rank():
                chunk.set_input_tensor(None if chunk.pre_process else hidden.clone())
                output = chunk(input_ids, positions, future)
                hidden = hidden if chunk.post_process else output
            rows = torch.tensor([len(hidden)])  # a stage of multi-token prediction passes several tokens' rows on
            dist.broadcast(rows, group=group, group_src=stage)
            hidden = hidden if len(hidden) == rows else hidden.new_empty(int(rows), *hidden.shape[1:])
            dist.broadcast(hidden, group=group, group_src=stage)
    return output if chunks[-1].post_process else None
