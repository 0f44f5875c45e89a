"""Every field of Megatron's config is an argument that a family knows, one of the neutral list, or decides nothing."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from dist_convert.formats.megatron.args import YARN
from dist_convert.models import FAMILIES
from dist_convert.models.neutral import NEUTRAL

#: Fields of core 0.16.1 and 0.19.2 that are read under another name, or with more than one value in mind.
READ_OTHERWISE = {
    "activation_func", "gated_linear_unit", "layernorm_epsilon", "num_moe_experts", "mtp_standalone", "mrope_section",
    "moe_aux_loss_coeff", "moe_router_load_balancing_type", "rope_type", "transformer_impl",
}  # fmt: skip
#: How training goes, where what runs, what is kept in memory, and in which precision something is computed.
_WORDS = """
    _cpu_offloading_context account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    activation_func_fp8_input_store activation_offload_fraction apply_rope_fusion async_tensor_model_parallel_allreduce
    attention_backend attention_dropout attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time
    batch_invariant_mode batch_p2p_comm batch_p2p_sync bf16 bias_activation_fusion bias_dropout_fusion
    cache_mla_latents calculate_per_token_loss clone_scatter_output_in_embedding config_logger_dir
    context_parallel_size cp_comm_type cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights
    cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl cuda_graph_modules
    cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps
    deallocate_pipeline_outputs defer_embedding_wgrad_compute delay_offload_until_cuda_graph delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deterministic_mode disable_bf16_reduced_precision_matmul
    disable_parameter_transpose_cache distribute_saved_activations embedding_init_method embedding_init_method_std
    enable_autocast enable_cuda_graph ep_overlap_early_attn_memory_release
    experimental_attention_variant_loss_scale_func expert_model_parallel_size
    expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size external_cuda_graph finalize_model_grads_func
    fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads first_last_layers_bf16
    flash_attention_version flash_decode fp16 fp32_residual_connection fp4 fp4_param fp4_quantizer_factory fp4_recipe
    fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_dot_product_attention fp8_interval fp8_margin
    fp8_multi_head_attention fp8_output_proj fp8_param fp8_quantizer_factory fp8_recipe fp8_wgrad
    fused_residual_rmsnorm fused_single_qkv_rope grad_scale_func grad_sync_func gradient_accumulation_fusion
    hetereogenous_dist_checkpoint hidden_dropout hierarchical_context_parallel_sizes high_priority_a2a_comm_stream
    hybrid_context_parallel inference_cuda_graph_scope inference_disable_triton_nvls_kernels
    inference_fuse_tp_communication inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
    inference_moe_token_dispatcher_type inference_rng_tracker inference_sampling_seed init_method init_method_std
    init_model_with_meta_device kitchen_attention_backend log_max_attention_logit masked_softmax_fusion
    max_seqlen_per_dp_cp_rank memory_efficient_layer_norm microbatch_group_size_per_vp_stage min_offloaded_tensor_size
    mlp_chunks_for_prefill mlp_chunks_for_training moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay
    moe_extended_tp moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grad_scale_func moe_grouped_gemm
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
    moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps
    moe_layer_recompute moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_experts_for_cuda_graph_inference
    moe_paged_stash moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_bias_update_rate moe_router_dtype moe_router_fusion moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_shared_expert_overlap moe_single_grouped_bias moe_single_grouped_weight
    moe_token_dispatcher_type moe_use_legacy_grouped_gemm moe_z_loss_coeff mtp_detach_heads mtp_grad_scale_func
    mtp_loss_scaling_factor nccl_all_reduce_for_prefill no_sync_func num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints offload_modules output_layer_init_method
    overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm overlap_p2p_comm
    overlap_p2p_comm_warmup_flush param_sync_func params_dtype perform_initialization persist_layer_norm
    pipeline_dtype pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_size
    qk_clip qk_clip_alpha qk_clip_threshold quant_recipe recompute_granularity recompute_method recompute_modules
    recompute_num_layers sequence_parallel symmetric_ar_type tensor_model_parallel_size
    tensor_parallel_num_weight_shards test_mode timers tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
    tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_disable_fc1
    tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
    tp_only_amax_red use_cpu_initialization use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_inference_optimized_layers use_kitchen use_kitchen_attention
    use_mamba_mem_eff_path use_ring_exchange_p2p use_te_activation_func use_te_rng_tracker
    use_transformer_engine_op_fuser variable_seq_lengths virtual_pipeline_model_parallel_size wgrad_deferral_limit
"""
DECIDE_NOTHING = set(_WORDS.split())
#: Scores divided by the layer's number, and multiplied with it before the softmax.
DECIDE_NOTHING |= {"apply_query_key_layer_scaling"}
#: Names of parameters that no table has: a checkpoint with them is refused.
DECIDE_NOTHING |= {"mla_down_proj_fusion"}
#: Another argument that is refused has to be set for these to matter.
OF_REFUSED = ("dsa_", "linear_", "mamba_", "mup_")
OF_REFUSED_NAMES = {
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
    "moe_router_quantile_balancing_ema",
}


def _fields(core: Path) -> set[str]:
    found = set()
    for file in ("transformer/transformer_config.py", "model_parallel_config.py"):
        for node in ast.parse((core / file).read_text()).body:
            if isinstance(node, ast.ClassDef):
                found |= {
                    one.target.id
                    for one in node.body
                    if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
                }
    return found


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_every_field_of_megatrons_config_is_known() -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    fields = {name for name in _fields(Path(spec.origin).parent) if not name.startswith(OF_REFUSED)}
    keys = {key.arg for family in FAMILIES.values() for key in family.keys}
    pins = {pin.arg for family in FAMILIES.values() for pin in (*NEUTRAL, *family.pins)}
    assert len(fields) > 200
    assert fields - keys - pins - set(YARN) - READ_OTHERWISE - DECIDE_NOTHING - OF_REFUSED_NAMES == set()
