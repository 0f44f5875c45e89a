"""The keys under which `torch_dist` holds Megatron's parameters. Facts: docs/formats.md, "torch_dist".

Keys are generated and looked up, never parsed. Layers and experts are a leading axis of the stored tensor where they
are alike, and numbers in the key where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_convert.formats.megatron.names import normalise, synonyms

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


def keys(megatron: str, layer: int | None, expert: int | None) -> tuple[Keys, ...]:
    """Every way in which a parameter may be stored.

    Args:
        megatron: the canonical name template, a `Row.megatron`.
        layer, expert: global numbers, for templates that have them.
    """
    found: list[Keys] = []
    for _, template in synonyms(megatron):
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
    ("common_state/", "args"),
)
_EXTRA_STATE = "._extra_state"


def reason_to_leave(key: str) -> str | None:
    """What of a checkpoint is no part of the model, by its key; None for weights and for what is not known."""
    name = normalise(key)
    if _EXTRA_STATE in name and not name.startswith("optimizer."):
        return "extra state (no weights)"
    return next((what for start, what in _NO_WEIGHTS if name.startswith(start)), None)


def common_object(key: str) -> bool:
    """Whether an object holds what `common.pt` holds in older versions: args and iteration."""
    return key.startswith("common_state/")
