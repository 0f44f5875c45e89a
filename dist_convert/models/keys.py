"""The facts of a model as training arguments and as config.json have them, by the keys of its family."""

from dataclasses import replace
from typing import Any

from dist_convert.errors import UnsupportedModel, raise_together
from dist_convert.models.neutral import NEUTRAL
from dist_convert.models.schema import FIELDS, Architecture, Family, Key, LinearScaling, Pin, YarnScaling
from dist_convert.records import JsonObject

#: The values of an argument that is not set.
_UNSET: tuple[object, ...] = (None, False, 0, "", "vanilla", [-1, 0], [-1, -1], [None, None])


def is_set(value: object) -> bool:
    """Whether an argument, as JSON has it, asks for anything."""
    return value not in _UNSET


def fits_signs(family: Family, args: JsonObject) -> bool:
    """Whether a family's models are trained with arguments like these."""
    return all(is_set(args.get(name)) == wanted for name, wanted in family.signs.items())


def architecture_of(family: Family, facts: JsonObject) -> Architecture:
    """The model of a family whose facts these are, with the sizes that follow from them."""
    own = {name: value for name, value in facts.items() if name in FIELDS}
    others = {name: value for name, value in facts.items() if name not in FIELDS}
    plain = Architecture(family=family.name, facts=others, **own)
    products = {
        p.name: (plain.fact(p.factor) if p.factor else 1) * sum(map(plain.fact, p.terms)) for p in family.products
    }
    return replace(plain, facts=others | products)


def check_computed_alike(architecture: Architecture, file: str) -> None:
    """Refuse numbers with which Megatron computes otherwise than transformers, all by UnsupportedModel."""
    problems = []

    def refuse(what: str, expected: object, found: object) -> None:
        remedy = "the model cannot be the same in both formats; there is nothing to convert to"
        problems.append(UnsupportedModel(what, file, expected, found, remedy))

    if architecture.experts_per_token > architecture.experts:
        refuse("more experts for each token than there are", architecture.experts, architecture.experts_per_token)
    groups, chosen = architecture.fact("expert_groups"), architecture.fact("chosen_groups")
    if groups > 1 and architecture.experts_per_token != 2 * chosen:  # transformers adds up the two best of each
        refuse(
            "Megatron scores groups of experts differently from transformers",
            f"{2 * chosen} experts for each token, two for each of {chosen} chosen groups",
            architecture.experts_per_token,
        )
    if groups and architecture.experts_per_token == 1:
        refuse("Megatron does not make the weight of a single expert 1", "two experts or more for each token", 1)
    if "kv_rank" in architecture.facts and architecture.query_groups != architecture.heads:
        refuse("latent attention has no groups of queries", f"{architecture.heads} groups", architecture.query_groups)
    scaling = architecture.rope_scaling
    if scaling is not None and scaling.factor < 1:
        refuse("the scaling of rotary frequencies is none", "a factor of 1 or more", f"{scaling.factor:g}")
    elif isinstance(scaling, LinearScaling) and scaling.factor % 1:
        what = "Megatron's --rotary-seq-len-interpolation-factor is a whole number"
        refuse(what, "a whole factor of linear scaling", f"{scaling.factor:g}")
    elif isinstance(scaling, YarnScaling):
        if min(scaling.beta_fast, scaling.beta_slow, scaling.original_max_positions) <= 0:
            refuse("YaRN's numbers are impossible", "numbers above 0", scaling)
        # Where one of them is 0, transformers takes neither, Megatron both.
        elif not (scaling.mscale and scaling.mscale_all_dim) and (scaling.mscale, scaling.mscale_all_dim) != (1, 0):
            refuse(
                "YaRN scales attention differently in Megatron and in transformers",
                "mscale and mscale_all_dim, or mscale 1 and mscale_all_dim 0",
                f"mscale {scaling.mscale:g} and mscale_all_dim {scaling.mscale_all_dim:g}",
            )
    raise_together(problems)


def pins_of(family: Family) -> tuple[Pin, ...]:
    """What is fixed in all models of a family: its own pins, and the neutral value of all that it has no key for."""
    known = {key.arg for key in family.keys} | {pin.arg for pin in family.pins}
    return (*(pin for pin in NEUTRAL if pin.arg not in known), *family.pins)


def to_arg(key: Key, architecture: Architecture) -> object:
    """The value of a key's argument for a model."""
    value = architecture.fact(key.field)
    match key.codec:
        case "opposite":
            return not value
        case "or_none" | "if_any":
            return value or None
        case "or_one":
            return None if value == 1 else value
        case "experts_wide":
            return value * architecture.expert_width
        case "window":
            return None if value is None else (value - 1, 0)  # without the token itself
        case "leading_dense" | "sparse_steps":
            return [int(layer not in value) for layer in range(architecture.layers)] if value else 1
        case "no_rope":
            return [int(layer in value) for layer in range(architecture.layers)] if value else None
        case "plain":
            return value


def to_config(key: Key, architecture: Architecture) -> dict[str, object]:
    """What config.json says of a fact."""
    value = architecture.fact(key.field)
    match key.codec:
        case "or_none":
            return {key.config: value or None}
        case "leading_dense":
            return {key.config: len(value)}
        case "sparse_steps":
            return {key.config: 1, "mlp_only_layers": list(value)}
        case "no_rope":
            return {key.config: [int(layer not in value) for layer in range(architecture.layers)]}
    return {key.config: value}


def of_arg(key: Key, args: JsonObject, file: str) -> Any:
    """A fact as its argument has it; an UnsupportedModel for a value that config.json cannot say."""
    value = args.get(key.arg)
    match key.codec:
        case "leading_dense" | "sparse_steps":
            return _dense_layers(key, value, args.get("num_layers") or 0, file)
        case "no_rope":
            return _layers_without_rope(key, value, args.get("num_layers") or 0, file)
        case "window":
            return _window(key, value, file) if is_set(value) else None
        case "or_one":
            return value or 1
        case "experts_wide":
            width = args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size") or 1
            if not isinstance(value or 0, int) or (value or 0) % width:
                raise cannot_express(key.arg, file, f"a multiple of {width}, the width of an expert", value)
            return (value or 0) // width
    if key.kind == "flag":
        return bool(value) != (key.codec == "opposite")
    value = value or key.arg_default
    return value or 0 if key.kind == "size" else float(value or 0)


def _dense_layers(key: Key, value: object, layers: int, file: str) -> tuple[int, ...]:
    if value is None or (type(value) is int and value > 0):
        step = value or 1
        dense = tuple(layer for layer in range(layers) if layer % step)
    elif isinstance(value, list) and len(value) == layers and all(one in (0, 1) for one in value):
        dense = tuple(layer for layer, one in enumerate(value) if not one)
    else:
        raise cannot_express(key.arg, file, "a whole number, or a list with 0 or 1 for each layer", value)
    if key.codec == "leading_dense" and dense != tuple(range(len(dense))):
        raise cannot_express(key.arg, file, "layers without experts at the beginning only", value)
    return dense


def _layers_without_rope(key: Key, value: object, layers: int, file: str) -> tuple[int, ...]:
    if not value:
        return ()
    if type(value) is int and value > 0 and layers % value == 0:
        value = [*[0] * (value - 1), 1] * (layers // value)
    if not isinstance(value, list) or len(value) != layers or any(one not in (0, 1) for one in value):
        raise cannot_express(key.arg, file, "a divisor of the layers, or a list with 0 or 1 for each layer", value)
    return tuple(layer for layer, one in enumerate(value) if one)


def _window(key: Key, value: object, file: str) -> int:
    left, *right = value if isinstance(value, list | tuple) and value else (0,)
    if type(left) is not int or left < 1 or right not in ([0], []):
        raise cannot_express(key.arg, file, "the number of tokens to the left, and 0", value)
    return left + 1  # Megatron counts the tokens to the left, transformers the token itself as well


def cannot_express(arg: str, file: str, expected: str, found: object, remedy: str = "") -> UnsupportedModel:
    """The error about an argument whose value has no place in the target."""
    what = f"--{arg.replace('_', '-')} has a value that the target cannot express"
    return UnsupportedModel(what, file, expected, found=repr(found)[:80], remedy=remedy)
