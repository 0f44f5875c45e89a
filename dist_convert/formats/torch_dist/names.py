"""The keys under which Megatron's distributed formats hold its parameters. See docs/formats.md, "torch_dist", "FSDP".

Keys are generated and looked up, never parsed. Layers and experts are a leading axis of the stored tensor where they
are alike, and numbers in the key where they are not.
"""

from collections.abc import Collection
from dataclasses import dataclass

from dist_convert.formats.megatron.names import TIED, has_fused_norm, is_of_mtp, normalise, reason_to_drop, synonyms
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture, Row, entries
from dist_convert.options import FSDP_DTENSOR, TORCH_DCP, TORCH_DIST

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
    """Every way in which a parameter may be stored, by global numbers of its layer and its expert."""
    found: list[Keys] = []
    templates = [name for _, name in synonyms(row)]
    for template in [*templates, row.local_key] if row.local_key else templates:
        name = template.replace(_EXPERT, _EXPERTS)
        own = template.replace(_EXPERT, f"{_EXPERTS}{{expert}}.").format(layer=layer, expert=expert)
        experts = () if expert is None else (expert,)
        if layer is not None:
            found.append((KeyPiece(name.replace(_LAYER, f"{_LAYERS}."), (layer, *experts)),))
        found.append((KeyPiece(name.format(layer=layer), experts),))
        alone = [own]
        if expert is not None:  # under its number also as FSDP saves the modules, one by one or grouped
            ends = template.replace(_EXPERT, ".mlp.experts.") + "{expert}"
            local = template.replace(_EXPERT, ".mlp.experts.local_experts.{expert}.")
            alone += [one.format(layer=layer, expert=expert) for one in (local, ends)]
            found += [(KeyPiece(one),) for one in alone]
        if is_of_gates(own):  # apart
            found += [(KeyPiece(f"{one}_w", (), 0, 2), KeyPiece(f"{one}_v", (), 1, 2)) for one in alone]
    return tuple(found)


#: What training puts before the keys of the model that FSDP saves, and what of its state says what the model is.
STATE, OF_STATE = "model.", ("args", "iteration", "checkpoint_version")
#: Parts of the keys of what is no weight -> what it is.
_NO_WEIGHTS = (
    ("optimizer.", "optimizer"),
    ("opt_param_scheduler.", "opt_param_scheduler"),
    ("rng_state", "rng_state"),
    ("rerun_state_machine", "rerun_state_machine"),
    ("common_state", "args"),
)
_EXTRA_STATE = "._extra_state"


def is_of_gates(name: str) -> bool:
    """Whether a tensor is gate and up, or one of both."""
    return ".linear_fc1." in name and not has_fused_norm(name)


def format_of(keys: Collection[str]) -> str:
    """Which of Megatron's distributed formats has these keys: where the embedding lies tells."""
    found = next((key for key in keys if normalise(key.removeprefix(STATE)) == TIED[0]), "")
    if not found.startswith(STATE):
        return TORCH_DIST
    return FSDP_DTENSOR if found.startswith(f"{STATE}module.") else TORCH_DCP


def reason_to_leave(key: str) -> str | None:
    """What of a checkpoint is not part of the model, by its key; None for weights and for what is not known."""
    name = normalise(key).partition("/")[0]  # objects have their place among shards behind it
    first, _, rest = name.partition(".")
    if first.startswith("chained_") and first[8:].isdecimal():  # of several optimizers, as experts have them
        name = rest
    return next((what for start, what in _NO_WEIGHTS if name.startswith(start)), None) or reason_to_drop(name)


def is_of_model(key: str) -> bool:
    """Whether a key is that of a module of the model."""
    return normalise(key).startswith(("decoder.", "embedding.", "output_layer.", "mtp."))


def target_key(row: Row, layer: int | None, expert: int | None, architecture: Architecture, *, norms: str) -> KeyPiece:
    """Where training with Megatron-Core saves a parameter.

    Args:
        norms: spelling of the target's norms, see `TargetDialect`.
    """
    # The local modules save their norms under the fused names, too, but not beside latent attention; Habana's Intel TE
    # under their own.
    local = "" if architecture.fact("kv_rank") else row.transformer_engine or row.local_key
    named = {"transformer_engine": row.transformer_engine, "local": local}
    template, index = _place(named.get(norms) or row.megatron, layer, expert, architecture)
    return KeyPiece(template, index)


def _place(
    template: str, layer: int | None, expert: int | None, architecture: Architecture
) -> tuple[str, tuple[int, ...]]:
    """The key of a name, and the leading axes' index: numbers of layers that are not alike are in the key."""
    name, experts = template.replace(_EXPERT, _EXPERTS), () if expert is None else (expert,)
    if layer is None or architecture.is_mixed:
        return name.format(layer=layer), experts
    return name.replace(_LAYER, f"{_LAYERS}."), (layer, *experts)


def extra_states(architecture: Architecture, *, norms: str) -> tuple[tuple[str, int | None, int | None], ...]:
    """Keys of the empty objects that Megatron-Core's modules ask for, with the layer and expert of each.

    Those of the local spec, or of all of Transformer Engine's: training ignores what it does not ask for.
    """
    is_te = norms != "local"
    modules = []
    for row, layer, expert in entries(FAMILIES[architecture.family], architecture):
        if row.megatron.endswith(".weight"):
            is_linear = (layer is not None or is_of_mtp(row.megatron)) and row.split != "replicated"
            if is_linear or (is_te and row.is_norm and not row.transformer_engine):
                modules.append((row.megatron.removesuffix(".weight"), layer, expert))
    if is_te:
        modules += [(f"{_LAYER}self_attention.core_attention", layer, None) for layer in range(architecture.layers)]
        numbers = range(architecture.fact("mtp_layers"))
        modules += [(f"mtp.layers.{n}.transformer_layer.self_attention.core_attention", None, None) for n in numbers]
    found = []
    for module, layer, expert in modules:
        key, index = _place(module, layer, expert, architecture)
        axes = (architecture.layers,) if expert is None else (architecture.layers, architecture.experts)
        place, whole = index or (0,), axes[len(axes) - len(index) :] or (1,)
        shard = f"shard_{'.'.join(map(str, place))}_{'.'.join(map(str, whole))}"
        found.append((f"{key}{_EXTRA_STATE}/{shard}", layer, expert))
    return tuple(found)
