"""Megatron's arguments that decide what a model computes, with the value that adds nothing to a Llama.

A family is held to all of them but those that it has a key or a pin of its own for. Versions of Megatron know fewer or
more of them; args that lack one mean its neutral value.
"""

from dataclasses import replace

from dist_convert.models.schema import Pin

_MULTIPLIERS = "transformers multiplies neither embeddings nor residuals or logits"
_SAY_SCALING = (
    "a fork's own scaling of rotary frequencies: Megatron cannot express it, or versions of transformers differ in it; "
    "--like CONFIG says which scaling the model has"
)
_SAY_LINEAR = "versions before core 0.19 ignore it: say with --like CONFIG whether the model's rope_scaling is linear"

_ALWAYS = (
    Pin("position_embedding_type", ("rope", "yarn"), "the family has rotary positions only", is_written=True),
    Pin("rotary_percent", (1.0, 1), "the family rotates all of each head", is_written=True),
    Pin("rotary_interleaved", (False, None), "transformers rotates halves, not neighbouring pairs", is_written=True),
    Pin("normalization", ("RMSNorm",), "the family normalises by RMSNorm", is_written=True),
    Pin("swiglu", (True,), "the family has gated SiLU MLPs", is_written=True),
    Pin("quick_geglu", (False, None), "the family has gated SiLU MLPs"),
    Pin("squared_relu", (False, None), "the family has gated SiLU MLPs", is_written=True),
    Pin("multi_latent_attention", (False, None), "the family has no latent attention", is_written=True),
    Pin("mtp_num_layers", (None, 0), "--drop-mtp leaves out the layers of multi-token prediction", is_written=True),
    Pin("mtp_use_repeated_layer", (False, None), "its layers have weights of their own", when="mtp_num_layers"),
    Pin("mtp_hybrid_override_pattern", (None, ""), "all its layers have attention", when="mtp_num_layers"),
    Pin("qk_layernorm", (False, None), "the family has no query and key norms", is_written=True),
    Pin("add_qkv_bias", (False, None), "the family's queries, keys and values have no biases", is_written=True),
    Pin("add_bias_linear", (False, None), "the family's linear layers have no biases", is_written=True),
    Pin("qk_l2_norm", (False, None), "the family does not normalise queries and keys"),
    Pin("no_rope_freq", (None, 0), "the family has no layers without rotary positions"),
    Pin("softmax_scale", (None,), "transformers scales attention by the root of head_dim"),
    Pin("attention_output_gate", (False, None), "the family does not gate its attention output"),
    Pin("softmax_type", ("vanilla", None), "the family has no attention sinks"),
    Pin("window_attn_skip_freq", (None, 0), "all layers of the family attend alike"),
    Pin("apply_residual_connection_post_layernorm", (False, None), "the family is pre-norm"),
    Pin("apply_norm_post_sub_block", (False, None), "the family is pre-norm"),
    Pin("heterogeneous_layers_config_path", (None,), "all layers of the family are alike"),
    Pin("heterogeneous_layers_config_encoded_json", (None, ""), "all layers of the family are alike"),
    Pin("glu_linear_offset", (None, 0, 0.0), "transformers adds nothing to the up projection"),
    Pin("activation_func_clamp_value", (None,), "transformers does not clamp the activation"),
    Pin("heterogeneous_block_specs", (False, None), "all layers of the family are alike"),
    Pin("spec", (None, [], "local"), "its module decides what the layers compute"),
    Pin("use_mup", (False, None), "transformers has no maximal update parametrisation"),
    Pin("rotary_seq_len_interpolation_factor", (None, 1, 1.0), _SAY_LINEAR, is_written=True),
    Pin("experimental_attention_variant", (None,), "all layers of the family have plain attention"),
    Pin("linear_attention_type", (None,), "all layers of the family have plain attention"),
    Pin("linear_attention_freq", (None, 0), "all layers of the family have plain attention"),
    Pin("is_hybrid_model", (False, None), "all layers of the family have attention"),
    Pin("hybrid_layer_pattern", (None, ""), "all layers of the family have attention"),
    Pin("hybrid_override_pattern", (None, ""), "all layers of the family have attention"),
    Pin("gtp_weight_remat_size", (None, 1), "weights sharded on an axis that the directory names lack"),
    Pin("expert_gtp_weight_remat_size", (None, 1), "weights sharded on an axis that the directory names lack"),
    # MindSpeed-LLM's.
    Pin("rope_scaling_type", (None,), _SAY_SCALING),
    Pin("scale_emb", (None, 1), _MULTIPLIERS),
    Pin("scale_depth", (None, 1), _MULTIPLIERS),
    Pin("dim_model_base", (None,), _MULTIPLIERS),
    Pin("embedding_multiplier_scale", (None, 1), _MULTIPLIERS),
    Pin("output_multiplier_scale", (None, 1), _MULTIPLIERS),
    Pin("query_pre_attn_scalar", (None,), "transformers scales attention by the root of head_dim"),
    Pin("attn_logit_softcapping", (None, 0), "transformers does not cap scores or logits"),
    Pin("output_logit_softcapping", (None, 0), "transformers does not cap scores or logits"),
    Pin("gelu_tanh", (False, None), "the family has gated SiLU MLPs"),
    Pin("geglu", (False, None), "the family has gated SiLU MLPs"),
    Pin("embed_layernorm", (False, None), "the family does not normalise embeddings"),
    Pin("swiglu_limit", (None, 0), "transformers does not clamp the activation"),
    Pin("add_rmsnorm_offset", (False, None), "the family's norms multiply by gamma"),
    Pin("post_norm", (False, None), "the family is pre-norm"),
    Pin("no_post_layer_norm", (False, None), "the family has a last norm"),
    Pin("input_embeds_norm", (False, None), "the family does not normalise embeddings"),
    Pin("use_glm_rope", (False, None), "transformers rotates halves of each head"),
    Pin("cla_share_factor", (None, 0, 1), "layers of the family have keys and values of their own"),
    Pin("interleave_sliding_window", (None, 0), "all layers of the family attend alike"),
    Pin("sliding_window", (None, 0), "the window has another name in Megatron, window_size"),
    Pin("noop_layers", (None, "", []), "all layers of the family compute something"),
    Pin("layer_types", (None, []), "all layers of the family attend alike"),
    Pin("layernorm_zero_centered_gamma", (False, None), "its name in Megatron's args is apply_layernorm_1p"),
    # transformers' own names of the same, as Megatron-Bridge and NeMo take them over.
    Pin("embedding_multiplier", (None, 1), _MULTIPLIERS),
    Pin("residual_multiplier", (None, 1), _MULTIPLIERS),
    Pin("logits_scaling", (None, 1), _MULTIPLIERS),
    Pin("attention_multiplier", (None,), "transformers scales attention by the root of head_dim"),
    Pin("final_logit_softcapping", (None, 0), "transformers does not cap scores or logits"),
    # ms-swift's; Megatron-Bridge's rope_scaling is a flag.
    Pin("rope_scaling", (None, False, True, {}, {"rope_type": "default"}), _SAY_SCALING),
    Pin("partial_rotary_factor", (None, 1), "the family rotates all of each head"),
)
#: Of models with experts.
_OF_EXPERTS = (
    Pin("moe_router_pre_softmax", (False, None), "the family normalises the chosen experts' weights", is_written=True),
    Pin("moe_router_score_function", ("softmax", None), "the family scores by softmax", is_written=True),
    Pin("moe_router_topk_scaling_factor", (None, 1, 1.0), "the family does not scale expert weights", is_written=True),
    Pin("moe_router_num_groups", (None, 1), "the family does not group experts"),
    Pin("moe_layer_freq", (1, None), "every layer of the family has experts", is_written=True),
    Pin("moe_shared_expert_intermediate_size", (None, 0), "the family has no shared experts", is_written=True),
    Pin("moe_router_enable_expert_bias", (False, None), "the family's router has no expert bias", is_written=True),
    Pin("moe_shared_expert_gate", (False, None), "the family has no gate of shared experts"),
    Pin("moe_mlp_glu_interleave_size", (None,), "gate and up rows alternate in blocks"),
    Pin("moe_shared_expert_glu_interleave_size", (None,), "gate and up rows alternate in blocks"),
    Pin("moe_apply_probs_on_input", (False, None), "transformers weighs the experts' outputs"),
    Pin("moe_latent_size", (None, 0), "the family's experts are as wide at both ends as the model"),
    Pin("moe_router_topk_limited_devices", (None, 0), "transformers does not limit the devices"),
    Pin("moe_router_force_load_balancing", (False, None), "experts were chosen at random"),
    Pin("moe_router_force_biased", (None,), "experts were chosen at random"),
    Pin("moe_expert_capacity_factor", (None, -1), "transformers drops no tokens"),
    Pin("moe_expert_rank_capacity_factor", (None,), "transformers drops no tokens"),
    Pin("moe_token_dropping", (False, None), "transformers drops no tokens"),
    Pin("expert_interval", (None, 0, 1), "every layer of the family has experts"),
    Pin("routed_scaling_factor", (None, 1, 1.0), "its name in Megatron is moe_router_topk_scaling_factor"),
)
NEUTRAL = (*_ALWAYS, *(replace(pin, when="num_experts") for pin in _OF_EXPERTS))
