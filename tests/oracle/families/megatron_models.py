"""GPTModels of all families on CPU ranks, with the names that the local and Transformer Engine's modules give.

Transformer Engine is not there: its models are local ones, whose parameters are saved and found under its names.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import megatron.core.fusions.fused_softmax as fused_softmax
import megatron.core.transformer.multi_latent_attention as latent_attention
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from tests.oracle.megatron_model import forward
from tests.oracle.megatron_on_cpu import make_megatron_run_on_cpu

#: Fields of TransformerConfig -> arguments, where they differ.
_ARGUMENTS = {
    "layernorm_epsilon": "norm_epsilon",
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
#: Whole on every rank with Transformer Engine, and cut by the local modules.
_WHOLE_IN_TE = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")
_ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")


def make_all_families_run_on_cpu() -> None:
    """Replace what megatron-core 0.16.1 lacks without CUDA and Transformer Engine, some of it by mistake."""
    make_megatron_run_on_cpu()
    fused_softmax.get_sliding_window_causal_mask = _window_mask
    plain = DotProductAttention.__init__

    def without_widths(self: DotProductAttention, *args: object, **more: object) -> None:
        """It takes no widths of keys and values, which latent attention gives it."""
        plain(self, *args, **{name: value for name, value in more.items() if name not in ("k_channels", "v_channels")})

    DotProductAttention.__init__ = without_widths
    latent_attention.HAVE_TE = False  # or it asks whether a linear is one of the package that is not there


def _window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """What may not be seen: all but the tokens from `window[0]` before a token to `window[1]` behind it."""
    seen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - window[0]).tril(keys - queries + window[1])
    return ~seen


def build(args: Namespace) -> GPTModel:
    """This rank's part of the model, in float32, that saves torch_dist under the keys of `args.transformer_impl`."""
    config = _config(args)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    mtp_spec = None
    if args.mtp_num_layers:
        mtp_spec = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_spec,
    ).eval()
    if args.transformer_impl == "transformer_engine":
        prediction = [one.transformer_layer for one in model.mtp.layers] if model.mtp_process else []
        for layer in (*model.decoder.layers, *prediction):
            layer.submodules_config.sharded_state_dict_keys_map = _fused(args, has_experts=hasattr(layer.mlp, "router"))
    return model


def _config(args: Namespace) -> TransformerConfig:
    """What Megatron-LM derives from the arguments, with every fusion off."""
    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    of_args = {field: _ARGUMENTS.get(field, field) for field in kind.__dataclass_fields__}
    fields = {field: getattr(args, name) for field, name in of_args.items() if hasattr(args, name)}
    fields |= {
        "num_query_groups": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "gated_linear_unit": True,
        "activation_func": quick_gelu if args.quick_geglu else torch.nn.functional.silu,
        "transformer_impl": "local",
        "moe_grouped_gemm": False,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }
    config = kind(**fields)
    for name, value in vars(args).items():
        if name.startswith("yarn_"):
            setattr(config, name, value)
    return config


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of this rank: its name here, that in the whole model, and the one in a file."""

    name: str
    canonical: str
    stored: str
    tensor: torch.Tensor


def weights(model: GPTModel, args: Namespace) -> Iterator[Weight]:
    """Everything that is saved of this rank's model and no extra state."""
    first = parallel_state.get_expert_model_parallel_rank() * (args.num_experts or 0) // args.expert_model_parallel_size

    def in_model(name: str) -> str:
        start, _, rest = name.partition("decoder.layers.")
        if not start and rest:
            layer, _, rest = rest.partition(".")
            name = f"decoder.layers.{model.decoder.layers[int(layer)].layer_number - 1}.{rest}"
        return _LOCAL_EXPERT.sub(lambda found: f"local_experts.{first + int(found[1])}.", name)

    state = model.state_dict(keep_vars=True)
    with_experts = {name.removesuffix("mlp.router.weight") for name in state if name.endswith("mlp.router.weight")}
    for name, tensor in state.items():
        if torch.is_tensor(tensor) and not name.endswith("_extra_state"):
            has_experts = any(name.startswith(layer) for layer in with_experts)
            yield Weight(name, in_model(name), _stored(name, args, has_experts=has_experts), tensor)


def _stored(name: str, args: Namespace, *, has_experts: bool) -> str:
    """The name in a file of the `torch` format."""
    if args.transformer_impl == "transformer_engine":
        for local, fused in _fused(args, has_experts=has_experts).items():
            name = name.replace(local, fused)
    if args.moe_grouped_gemm:
        name = re.sub(r"local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$", r"\2.\3\1", name)
    return name


def _fused(args: Namespace, *, has_experts: bool) -> dict[str, str]:
    """The norms that Transformer Engine has inside of a linear: a router reads the norm of a layer with experts too."""
    return (_LATENT_NORMS if args.multi_latent_attention else _ATTENTION_NORM) | ({} if has_experts else _MLP_NORM)


def is_whole_in_file(name: str, args: Namespace) -> bool:
    """Whether a parameter that is cut here is whole in a file."""
    return args.transformer_impl == "transformer_engine" and name.endswith(_WHOLE_IN_TE)


def shard(weight: Weight, full: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, cut along the dimension that megatron-core declares."""
    name, tensor = weight.canonical, weight.tensor
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    if ".local_experts." in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    dim = getattr(tensor, "partition_dim", -1) if getattr(tensor, "tensor_model_parallel", False) else -1
    if name.endswith(("softmax_offset", "linear_fc1.bias", "linear_qkv.bias")):
        dim = 0
    if dim < 0:
        return full
    if ".linear_fc1." in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim)[rank]


@torch.no_grad()
def logits(model: GPTModel, args: Namespace, input_ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """`logits` [batch, sequence, vocabulary] and perhaps `mtp_logits` [layers, ...] on the last stage's ranks."""
    if not (args.mtp_num_layers and model.post_process):
        found = forward([model], input_ids)
        return None if found is None else {"logits": found[..., : args.vocab_size]}
    # It insists on labels, and gives losses: what goes into them is seen on its way, before it is overwritten.
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        seen.append(output[0].transpose(0, 1).clone())

    hook = model.output_layer.register_forward_hook(keep)
    model.forward = functools.partial(model.forward, labels=input_ids)
    forward([model], input_ids)
    hook.remove()
    *ahead, logits = (found[..., : args.vocab_size] for found in seen)
    return {"logits": logits, "mtp_logits": torch.stack(ahead)}
