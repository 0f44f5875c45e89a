"""The keys under which plain distributed checkpoints hold a model, among what training saves beside it.

Training saves a nested dict, whose path is in front of the names: `model.` in {"model": model.state_dict()}. Facts:
docs/formats.md, "Plain DCP".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import product

from dist_convert.errors import InconsistentShards, UnsupportedModel
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.megatron.names import normalise
from dist_convert.formats.meta.names import EMBEDDING, NAMES, ROTATED
from dist_convert.models.blocks import HF
from dist_convert.models.schema import Architecture
from dist_convert.records import names

#: What the embedding is called, whose key tells where the model lies: in a model of transformers, in one of torchtitan,
#: in a base model.
_EMBEDDINGS = ("model.embed_tokens.weight", EMBEDDING, "embed_tokens.weight")
_OF_MEGATRON = "embedding.word_embeddings.weight"

_LAYER = "layers.{layer}"
_ATTENTION, _EXPERTS = f"{_LAYER}.attention", f"{_LAYER}.moe.routed_experts.inner_experts"
#: What the tables call a tensor -> torchtitan's names of it, of version 0.3 and of earlier ones; experts without number
#: lie along the first axis.
_TITAN = {name: (meta,) for name, meta in NAMES.items()} | {
    f"{HF}.self_attn.q_proj.weight": (f"{_ATTENTION}.qkv_linear.wq.weight", f"{_ATTENTION}.wq.weight"),
    f"{HF}.self_attn.k_proj.weight": (f"{_ATTENTION}.qkv_linear.wk.weight", f"{_ATTENTION}.wk.weight"),
    f"{HF}.self_attn.v_proj.weight": (f"{_ATTENTION}.qkv_linear.wv.weight", f"{_ATTENTION}.wv.weight"),
    f"{HF}.self_attn.q_norm.weight": (f"{_ATTENTION}.q_norm.weight",),
    f"{HF}.self_attn.k_norm.weight": (f"{_ATTENTION}.k_norm.weight",),
    f"{HF}.mlp.gate.weight": (f"{_LAYER}.moe.router.gate.weight",),
    f"{HF}.mlp.experts.{{expert}}.gate_proj.weight": (f"{_EXPERTS}.w1_EFD", f"{_LAYER}.moe.experts.w1"),
    f"{HF}.mlp.experts.{{expert}}.up_proj.weight": (f"{_EXPERTS}.w3_EFD", f"{_LAYER}.moe.experts.w3"),
    f"{HF}.mlp.experts.{{expert}}.down_proj.weight": (f"{_EXPERTS}.w2_EDF", f"{_LAYER}.moe.experts.w2"),
}


def is_of_torchtitan(names: Collection[str]) -> bool:
    """Whether a model has torchtitan's names."""
    return EMBEDDING in names


def huggingface_tensors(stored: Mapping[str, Stored], architecture: Architecture) -> dict[str, Stored]:
    """A model's tensors from torchtitan's names to what the tables call them; what has no place there keeps its name.

    Only models without norms of queries and keys rotate as Meta's code does.
    """
    found: dict[str, Stored] = {}
    used: set[str] = set()
    head_dim = 0 if architecture.qk_norm else architecture.head_dim
    for template, spellings in _TITAN.items():
        layers = range(architecture.layers) if "{layer}" in template else (None,)
        experts = range(architecture.experts) if "{expert}" in template else (None,)
        for spelling, layer, expert in product(spellings, layers, experts):
            key, name = spelling.format(layer=layer), template.format(layer=layer, expert=expert)
            has_all = key in stored and (expert is None or stored[key].shape[:1] == (architecture.experts,))
            if has_all and name not in found:
                tensor = stored[key].at(() if expert is None else (expert,))
                found[name] = replace(tensor, head_dim=head_dim) if template in ROTATED else tensor
                used.add(key)
    return found | {name: tensor for name, tensor in stored.items() if name not in used}


def find_prefix(keys: Collection[str], file: str) -> str:
    """What comes before the names of the model in their keys.

    Args:
        keys: of all tensors.
        file: that has them, for messages.

    Raises:
        UnsupportedModel: there is no model, or one of Megatron's.
        InconsistentShards: there are several.
    """
    ours = [f".{normalise(key)}" for key in keys if not reason_to_leave(key)]
    for embedding in _EMBEDDINGS:
        found = sorted(key.removesuffix(embedding)[1:] for key in ours if key.endswith(f".{embedding}"))
        if len(found) > 1:
            raise InconsistentShards(
                "several models in one checkpoint",
                file=file,
                expected="one embedding",
                found=names([f"{prefix}{embedding}" for prefix in found]),
                remedy="save the one that is meant on its own",
            )
        if found:
            return found[0]
    is_of_megatron = any(key.endswith(_OF_MEGATRON) for key in ours)
    raise UnsupportedModel(
        "not read: Megatron's torch_dcp or fsdp_dtensor" if is_of_megatron else "no language model that is known",
        file=file,
        expected=f"a key that ends in one of {', '.join(_EMBEDDINGS)}",
        found=names(sorted(keys)) or "no tensor",
        remedy="load one of Megatron's with Megatron-LM and save it with --ckpt-format torch_dist; of any other, give "
        "the directory that holds its own .metadata",
    )


def reason_to_leave(key: str) -> str:
    """What of a checkpoint is no part of the model, by its key; "" for weights and for what is not known."""
    return "optimizer" if any(part.startswith("optim") for part in key.split(".")) else ""
