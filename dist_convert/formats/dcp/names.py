"""The keys under which plain distributed checkpoints hold a model, among what training saves beside it.

Training saves a nested dict, whose path is in front of the names: `model.` in {"model": model.state_dict()}. Facts:
docs/formats.md, "Plain DCP".
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import product

from dist_convert.errors import InconsistentShards, UnsupportedModel
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.huggingface.quantised import BLOCKS
from dist_convert.formats.megatron.names import normalise
from dist_convert.formats.meta.names import EMBEDDING, NAMES, ROTATED
from dist_convert.models.blocks import HF
from dist_convert.models.schema import Architecture
from dist_convert.records import names

#: What the embedding is called, whose key tells where the model lies: in a model of transformers, in one of torchtitan,
#: in a base model.
_EMBEDDINGS = ("model.embed_tokens.weight", EMBEDDING, "embed_tokens.weight")

#: What the tables call a tensor -> torchtitan's names of it, of version 0.3 and of earlier ones; experts without number
#: lie along the first axis.
_Names = Mapping[str, tuple[str, ...]]
_LAYER = "layers.{layer}"


def _in_layers(names: Mapping[str, str]) -> _Names:
    """A table of tensors of a layer, by the ends of their names."""
    return {f"{HF}.{ours}": tuple(f"{_LAYER}.{one}" for one in theirs.split()) for ours, theirs in names.items()}


_EXPERTS, _EARLY_EXPERTS = "moe.routed_experts.inner_experts", "moe.experts"
_SHARED: _Names = {
    **{name: (meta,) for name, meta in NAMES.items()},
    **_in_layers(
        {f"self_attn.{one}_proj.weight": f"attention.qkv_linear.w{one}.weight attention.w{one}.weight" for one in "qkv"}
    ),
}
_ROUTED = {
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight": f"{_EXPERTS}.w1_EFD {_EARLY_EXPERTS}.w1",
    "mlp.experts.{expert}.up_proj.weight": f"{_EXPERTS}.w3_EFD {_EARLY_EXPERTS}.w3",
    "mlp.experts.{expert}.down_proj.weight": f"{_EXPERTS}.w2_EDF {_EARLY_EXPERTS}.w2",
}
_LLAMA_OR_QWEN3 = _in_layers(_ROUTED | {f"self_attn.{one}_norm.weight": f"attention.{one}_norm.weight" for one in "qk"})
_DEEPSEEK = _in_layers(_ROUTED | {
    "self_attn.q_a_proj.weight": "attention.wq_a.weight", "self_attn.q_b_proj.weight": "attention.wq_b.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight", "self_attn.kv_b_proj.weight": "attention.wkv_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.wkv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias_E moe.expert_bias",
    "mlp.shared_experts.gate_proj.weight": "moe.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared_experts.w2.weight",
    "enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "mtp_norm.weight",
})  # fmt: skip
#: Its experts lie as those of the published files do in blocks, whatever their dtype.
_GPT_OSS = _in_layers({
    **{f"self_attn.{one}_proj.bias": f"attention.qkv_linear.w{one}.bias attention.w{one}.bias" for one in "qkv"},
    "self_attn.o_proj.bias": "attention.wo.bias", "self_attn.sinks": "attention.sinks",
    "mlp.router.weight": "moe.router.gate.weight", "mlp.router.bias": "moe.router.gate.bias",
    f"mlp.experts.gate_up_proj{BLOCKS}": f"{_EXPERTS}.mlp1_weight_EGD {_EARLY_EXPERTS}.mlp1_weight",
    f"mlp.experts.down_proj{BLOCKS}": f"{_EXPERTS}.mlp2_weight_EDF {_EARLY_EXPERTS}.mlp2_weight",
    "mlp.experts.gate_up_proj_bias": f"{_EXPERTS}.mlp1_bias_EG {_EARLY_EXPERTS}.mlp1_bias",
    "mlp.experts.down_proj_bias": f"{_EXPERTS}.mlp2_bias_ED {_EARLY_EXPERTS}.mlp2_bias",
})  # fmt: skip
#: Of models that torchtitan has code of its own for; all others are its Llama, or its Qwen3.
_OF_FAMILY = {"deepseek_v2": _DEEPSEEK, "deepseek_v3": _DEEPSEEK, "gpt_oss": _GPT_OSS}


def is_of_torchtitan(names: Collection[str]) -> bool:
    """Whether a model has torchtitan's names."""
    return EMBEDDING in names


def huggingface_tensors(stored: Mapping[str, Stored], architecture: Architecture) -> dict[str, Stored]:
    """A model's tensors from torchtitan's names to what the tables call them; what has no place there keeps its name.

    Only its Llama, which has no norms of queries and keys, has the rows of heads in Meta's order: DeepSeek's rotate
    neighbours in transformers, too.

    Raises:
        InconsistentShards: a tensor is there under both names.
        UnsupportedModel: heads of an odd size, whose rows are no pairs.
    """
    found = {}
    used = set()
    own = _OF_FAMILY.get(architecture.family)
    head_dim = 0 if own or architecture.qk_norm else architecture.head_dim
    if head_dim % 2:
        what, remedy = "heads of an odd size", "the config is of another model: take it from where the model came from"
        raise UnsupportedModel(what, expected="pairs of rows, which rotate together", found=head_dim, remedy=remedy)
    all_layers = range(architecture.layers + architecture.fact("mtp_layers"))
    for template, spellings in {**_SHARED, **(own or _LLAMA_OR_QWEN3)}.items():
        layers = all_layers if "{layer}" in template else (None,)
        experts = range(architecture.experts) if "{expert}" in template else (None,)
        for spelling, layer, expert in product(spellings, layers, experts):
            key, name = _key(spelling, layer, architecture.layers), template.format(layer=layer, expert=expert)
            has_all = key in stored and (expert is None or stored[key].shape[:1] == (architecture.experts,))
            if has_all and name not in found:
                tensor = stored[key].at(() if expert is None else (expert,))
                found[name] = replace(tensor, head_dim=head_dim) if template in ROTATED else tensor
                used.add(key)
    kept = {name: tensor for name, tensor in stored.items() if name not in used}
    if twice := sorted(kept.keys() & found.keys()):
        what, tensor = f"{twice[0]} is stored twice, under this and another name", kept[twice[0]]
        both = names([name for one in twice for name in (one, found[one].key)])
        raise InconsistentShards(what, tensor.whole.file, tensor=tensor.key, expected="one of them", found=both)
    return found | kept


def _key(spelling: str, layer: int | None, layers: int) -> str:
    """torchtitan's name of a tensor; layers of multi-token prediction have numbers of their own."""
    if layer is None or layer < layers:
        return spelling.format(layer=layer)
    return f"mtp_{spelling.format(layer=layer - layers)}"


def find_prefix(keys: Collection[str], file: str) -> str:
    """What comes before the names of the model in their keys.

    Args:
        keys: of all tensors.
        file: that has them, for messages.

    Raises:
        UnsupportedModel: there is no model.
        InconsistentShards: there are several.
    """
    ours = [f".{normalise(key)}" for key in keys if not reason_to_leave(key)]
    for embedding in _EMBEDDINGS:
        found = sorted(key.removesuffix(embedding)[1:] for key in ours if key.endswith(f".{embedding}"))
        if len(found) > 1:
            raise InconsistentShards(
                "several models in one checkpoint",
                file,
                expected="one embedding",
                found=names([f"{prefix}{embedding}" for prefix in found]),
                remedy="save the model you mean on its own",
            )
        if found:
            return found[0]
    what, expected = "no known language model", f"a key that ends in one of {', '.join(_EMBEDDINGS)}"
    remedy = "give the directory that holds the model's own .metadata"
    raise UnsupportedModel(what, file, expected, found=names(sorted(keys)) or "no tensor", remedy=remedy)


def reason_to_leave(key: str) -> str:
    """What of a checkpoint is not part of the model, by its key; "" for weights and for what is not known."""
    return "optimizer" if any(part.startswith("optim") for part in key.split(".")) else ""
