"""Builds megatron-core models on CPU ranks and runs their forward over the pipeline."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from cases import OracleCase
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import GroupedMLP
from megatron_args import MAX_POSITIONS, NORM_EPSILON


def initialise_grid(case: OracleCase) -> None:
    """Make the process groups of the case's grid; data parallelism takes the rest of the world."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor_parallel,
        pipeline_model_parallel_size=case.pipeline_parallel,
        virtual_pipeline_model_parallel_size=_virtual_stages(case),
        expert_model_parallel_size=case.expert_parallel,
        expert_tensor_parallel_size=case.expert_tensor_parallel,
        create_gloo_process_groups=False,
    )


def _virtual_stages(case: OracleCase) -> int | None:
    """The number of chunks per rank, as megatron-core takes it: None without virtual stages."""
    return case.virtual_pipeline_parallel if case.virtual_pipeline_parallel > 1 else None


def transformer_config(case: OracleCase) -> TransformerConfig:
    """The configuration that Megatron-LM derives from the case's arguments, with every fusion off."""
    return TransformerConfig(
        num_layers=case.num_layers,
        hidden_size=case.hidden,
        ffn_hidden_size=case.ffn,
        num_attention_heads=case.heads,
        num_query_groups=case.query_groups,
        kv_channels=case.kv_channels,
        tensor_model_parallel_size=case.tensor_parallel,
        pipeline_model_parallel_size=case.pipeline_parallel,
        virtual_pipeline_model_parallel_size=_virtual_stages(case),
        num_layers_in_first_pipeline_stage=case.first_stage_layers,
        num_layers_in_last_pipeline_stage=case.last_stage_layers,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=case.expert_parallel,
        expert_tensor_parallel_size=case.etp,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_ffn_hidden_size=case.ffn if case.experts else None,
        moe_grouped_gemm=case.grouped_gemm,
        moe_token_dispatcher_type="allgather",
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.0,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPSILON,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=case.linear_bias,
        add_qkv_bias=case.qkv_bias,
        qk_layernorm=case.qk_layernorm,
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


def build_model(case: OracleCase) -> list[GPTModel]:
    """This rank's model chunks, one for every virtual pipeline stage."""
    config = transformer_config(case)
    return [_build_chunk(case, config, stage) for stage in range(case.virtual_pipeline_parallel)]


def _build_chunk(case: OracleCase, config: TransformerConfig, stage: int) -> GPTModel:
    """The model chunk of one virtual pipeline stage of this rank."""
    chunk = GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=case.experts,
            moe_grouped_gemm=case.grouped_gemm,
            qk_layernorm=case.qk_layernorm,
            normalization="RMSNorm",
        ),
        vocab_size=case.padded_vocab,
        max_sequence_length=MAX_POSITIONS,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=False,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
        rotary_base=case.rotary_base,
        rope_scaling=case.use_rope_scaling,
        vp_stage=stage if case.virtual_pipeline_parallel > 1 else None,
    ).eval()
    for module in chunk.modules():
        if isinstance(module, GroupedMLP):  # insists on the flag, not on the dtype
            module.config = copy.copy(config)
            module.config.bf16 = True
    return chunk


@torch.no_grad()
def forward(chunks: list[GPTModel], case: OracleCase, input_ids: torch.Tensor) -> torch.Tensor | None:
    """The logits [batch, sequence, padded vocabulary] on the last stage's ranks, None on the others."""
    batch, length = input_ids.shape
    positions = torch.arange(length).expand(batch, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None].expand(batch, 1, length, length)
    group = parallel_state.get_pipeline_model_parallel_group()
    hidden = torch.empty(length, batch, case.hidden)
    output = None
    for chunk in chunks:
        for stage in range(case.pipeline_parallel):
            if stage == parallel_state.get_pipeline_model_parallel_rank():
                chunk.set_input_tensor(None if chunk.pre_process else hidden.clone())
                output = chunk(input_ids, positions, future)
                hidden = hidden if chunk.post_process else output
            dist.broadcast(hidden, group=group, group_src=stage)
    return output if chunks[-1].post_process else None
