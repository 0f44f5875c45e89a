"""The keys under which `torch_dist` holds Megatron's parameters. Facts: docs/formats.md, "torch_dist".

Keys are generated and looked up, never parsed. Layers and experts are a leading axis of the stored tensor where they
are alike, and numbers in the key where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_convert.formats.megatron.names import normalise, reason_to_drop, synonyms
from dist_convert.models.schema import Architecture, Row

_LAYERS = "decoder.layers"
_LAYER = f"{_LAYERS}.{{layer}}."
_EXPERT = ".mlp.experts.{expert}."
_EXPERTS = ".mlp.experts.experts."


@dataclass(frozen=True)
class KeyPiece:
    """What a key holds of a parameter: `index` of its leading axes, and which of how many equal row ranges."""

    key: str
    index: tuple[int, ...] = ()
    part: int = 0
    parts: int = 1


#: The pieces that make up a parameter.
Keys = tuple[KeyPiece, ...]


def keys(row: Row, layer: int | None, expert: int | None) -> tuple[Keys, ...]:
    """Every way in which a parameter may be stored.

    Args:
        row: of the table.
        layer, expert: global numbers, for templates that have them.
    """
    found: list[Keys] = []
    templates = [name for _, name in synonyms(row)]
    for template in [*templates, row.local_key] if row.local_key else templates:
        name = template.replace(_EXPERT, _EXPERTS)
        own = template.replace(_EXPERT, f"{_EXPERTS}{{expert}}.").format(layer=layer, expert=expert)
        experts = () if expert is None else (expert,)
        if layer is not None:
            found.append((KeyPiece(name.replace(_LAYER, f"{_LAYERS}."), (layer, *experts)),))
        found.append((KeyPiece(name.format(layer=layer), experts),))
        if expert is not None:
            found.append((KeyPiece(own),))
        if ".linear_fc1." in own and ".layer_norm_" not in own:  # gate and up apart, with singleton_local_shards
            found.append((KeyPiece(f"{own}_w", (), 0, 2), KeyPiece(f"{own}_v", (), 1, 2)))
    return tuple(found)


#: Parts of the keys of what is no weight -> what it is.
_NO_WEIGHTS = (
    ("optimizer.", "optimizer"),
    ("rng_state", "rng_state"),
    ("rerun_state_machine", "rerun_state_machine"),
    ("common_state", "args"),
)
_EXTRA_STATE = "._extra_state"


def reason_to_leave(key: str) -> str | None:
    """What of a checkpoint is no part of the model, by its key; None for weights and for what is not known."""
    name = normalise(key).partition("/")[0]  # objects have their place among shards behind it
    first, _, rest = name.partition(".")
    if first.startswith("chained_") and first[8:].isdecimal():  # of several optimizers, as experts have them
        name = rest
    return next((what for start, what in _NO_WEIGHTS if name.startswith(start)), None) or reason_to_drop(name)


def is_of_model(key: str) -> bool:
    """Whether a key is that of a module of the model."""
    return normalise(key).startswith(("decoder.", "embedding.", "output_layer.", "mtp."))


def common_object(key: str) -> bool:
    """Whether an object holds what `common.pt` holds in older versions: args and iteration."""
    return key.startswith("common_state/")


def target_key(row: Row, layer: int | None, expert: int | None, *, norms: str, is_mixed: bool) -> KeyPiece:
    """Where training with Megatron-Core saves a parameter.

    Args:
        row, layer, expert: see `keys`.
        norms: spelling of the target's norms, see `TargetDialect`.
        is_mixed: whether some layers have experts and others do not: their numbers are then in the keys.
    """
    # The local modules save their norms under the fused names, too; Habana's Intel TE under their own.
    named = {"transformer_engine": row.transformer_engine, "local": row.transformer_engine or row.local_key}
    template = (named.get(norms) or row.megatron).replace(_EXPERT, _EXPERTS)
    experts = () if expert is None else (expert,)
    if layer is None or is_mixed:
        return KeyPiece(template.format(layer=layer), experts)
    return KeyPiece(template.replace(_LAYER, f"{_LAYERS}."), (layer, *experts))


def extra_states(architecture: Architecture, *, norms: str) -> tuple[tuple[str, int | None, int | None], ...]:
    """Keys of the empty objects that Megatron-Core's modules ask for, with the layer and expert of each.

    Those of the local spec, or of all of Transformer Engine's: training ignores what it does not ask for.
    """
    is_te, layers, experts = norms != "local", architecture.layers, architecture.experts
    found: list[tuple[str, int | None, int | None]] = []
    for layer in range(layers):
        has_experts = architecture.has_experts(layer)
        modules = ["self_attention.linear_proj", "self_attention.linear_qkv"]
        modules += ["self_attention.core_attention"] * is_te + ["pre_mlp_layernorm"] * bool(is_te and has_experts)
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] * bool(is_te and architecture.qk_norm)
        shared = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
        modules += (
            shared * bool(architecture.fact("shared_ffn")) if has_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
        )
        at, shard, of = (
            (f"{_LAYERS}.{layer}", "0", "1") if architecture.is_mixed else (_LAYERS, str(layer), str(layers))
        )
        found += [(f"{at}.{module}{_EXTRA_STATE}/shard_{shard}_{of}", layer, None) for module in modules]
        for expert in range(experts) if has_experts else ():
            of_expert = (
                f"/shard_{expert}_{experts}" if architecture.is_mixed else f"/shard_{layer}.{expert}_{layers}.{experts}"
            )
            found += [
                (f"{at}{_EXPERTS}{linear}{_EXTRA_STATE}{of_expert}", layer, expert)
                for linear in ("linear_fc1", "linear_fc2")
            ]
    if is_te:
        found.append((f"decoder.final_layernorm{_EXTRA_STATE}/shard_0_1", None, None))
    return tuple(found)
