"""From the training arguments inside a Megatron checkpoint to an `Architecture`.

Which argument means what, and why some values are refused: docs/formats.md, "Arguments that decide the model".
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dist_convert.errors import ConversionError, MissingArguments, UnsupportedModel, UsageError, raise_together
from dist_convert.formats.huggingface.config import LLAMA3, ORIGINAL
from dist_convert.formats.megatron.grid import SIZES
from dist_convert.models import FAMILIES, keys
from dist_convert.models.schema import (
    MOST,
    Architecture,
    Family,
    LinearScaling,
    Pin,
    RopeScaling,
    RotaryScaling,
    YarnScaling,
    check_experts,
    is_number,
    is_size,
)
from dist_convert.records import JsonObject

_NUMERIC = ("plain", "or_none", "if_any", "or_one", "experts_wide")
#: Arguments that are computed with, and what they are at most.
_KEYS = [key for family in FAMILIES.values() for key in family.keys if key.arg and key.codec in _NUMERIC]
_SIZES = {"moe_ffn_hidden_size": MOST, "padded_vocab_size": MOST} | {
    key.arg: key.most for key in _KEYS if key.kind == "size"
}
_PARALLEL = (*SIZES, "virtual_pipeline_model_parallel_size", "make_vocab_size_divisible_by")
#: What linear scaling divides rotary frequencies by.
INTERPOLATION = "rotary_seq_len_interpolation_factor"
_NUMBERS = dict.fromkeys(
    ["layernorm_epsilon", "rope_scaling_factor", INTERPOLATION, *(key.arg for key in _KEYS if key.kind == "number")]
)
#: Before YaRN's arguments where positions, and not latent attention, have them; and whether its range is rounded.
PLAIN_YARN, ROUNDED = "yarn_", "yarn_correction_range_round_to_int"
#: Arguments of which only the truth counts.
_FLAGS = dict.fromkeys(
    ["group_query_attention", "use_rope_scaling", "apply_layernorm_1p", ROUNDED]
    + [key.arg for family in FAMILIES.values() for key in family.keys if key.arg and key.kind == "flag"]
)


#: MindSpeed-LLM's arguments for what transformers calls "llama3", and how that calls them.
_FORK_SCALING = {
    "rope_scaling_factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "rope_scaling_original_max_position_embeddings": "original_max_position_embeddings",
}  # fmt: skip
#: Where forks say how rotary frequencies are scaled.
FORKS_SCALING = ("rope_scaling", "rope_scaling_type")


def in_megatrons_words(args: JsonObject) -> dict[str, Any]:
    """Args with numbers in place of texts of numbers, and rotary scaling in words that all versions share."""
    found = dict(args)
    numeric = [name for name in (*_SIZES, *_NUMBERS, *_PARALLEL) if isinstance(found.get(name), str)]
    for name in numeric:
        with suppress(ValueError):
            text = found[name].strip()
            found[name] = int(text) if text.isdecimal() and len(text) < 19 else float(text)
    truths = {"True": True, "true": True, "False": False, "false": False}
    found |= {name: truths[value] for name, value in found.items() if isinstance(value, str) and value in truths}
    shared = {f"{PLAIN_YARN}{name}": found.get(name) for name in SHARED_YARN}
    if found.get("position_embedding_type") == "yarn" and ROUNDED in found and not shared.keys() & found.keys():
        found |= shared | {ROUNDED: found[ROUNDED] is not False}  # its default is true
    said = found.get("rope_scaling")
    if isinstance(said, str):
        with suppress(ValueError, RecursionError):
            said = json.loads(said)
    if found.get("rope_scaling_type") == "llama3":
        said = {"type": "llama3", **{theirs: found.get(name) for name, theirs in _FORK_SCALING.items()}}
    if isinstance(said, Mapping) and (words := _of_transformers(said, found)) is not None:
        found |= {name: None for name in FORKS_SCALING if name in found} | words
    return found


def _of_transformers(said: JsonObject, args: JsonObject) -> dict[str, Any] | None:
    """Megatron's words for a scaling in transformers', which ms-swift computes by transformers' own functions.

    None where Megatron has none, or where versions of transformers compute another one.
    """
    beside = {"rope_theta": args.get("rotary_base"), "partial_rotary_factor": args.get("partial_rotary_factor")}
    told = {name: value for name, value in said.items() if value is not None and value != beside.get(name)}
    kinds = {told.pop(name) for name in ("rope_type", "type") if isinstance(told.get(name), str)}
    factor = told.pop("factor", None)
    if kinds == {"default"} and factor is None and not told:
        return {}
    if kinds == {"llama3"} and is_number(factor) and told == LLAMA3:
        return {"use_rope_scaling": True, "rope_scaling_factor": factor}
    rounded, numbers = told.pop("truncate", True), {"rotary_scaling_factor": factor}
    numbers |= {name: told.pop(name) for name in (ORIGINAL, "beta_fast", "beta_slow") if name in told}
    is_plain = kinds == {"yarn"} and not told and isinstance(rounded, bool) and all(map(is_number, numbers.values()))
    # Latent attention is scaled besides, and some versions of transformers take this ratio for the factor.
    is_sure = args.get("multi_latent_attention") in (None, False) and args.get(ORIGINAL) is None
    if is_plain and is_sure and factor * numbers.get(ORIGINAL, 0) == args.get("max_position_embeddings"):
        yarn = {f"{PLAIN_YARN}{name}": value for name, value in numbers.items()}
        return {"position_embedding_type": "yarn", ROUNDED: rounded, **yarn}
    return None


#: Arguments of YaRN in the order of `YarnScaling`, with the defaults of Megatron's command line.
YARN: JsonObject = {
    "rotary_scaling_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096,
    "mscale": 1.0, "mscale_all_dim": 0.0,
}  # fmt: skip
#: Those that core 0.19 takes from the arguments of latent attention for positions, too.
SHARED_YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim")


def check_sizes(args: JsonObject, file: str) -> None:
    """Refuse arguments that are no numbers or truth values of a model, before anything is computed with them.

    Raises:
        Problems, or the one problem there is: UnsupportedModel.
    """
    wrong = {name: f"a whole number up to {most}" for name, most in _SIZES.items() if not is_size(args.get(name), most)}
    numbers = {name: args[name] for name in _NUMBERS if args.get(name) is not None}
    wrong |= {name: "a number of at least 0" for name, one in numbers.items() if not is_number(one) or one < 0}
    wrong |= {} if numbers.get("rotary_base", 1) else {"rotary_base": "a number above 0"}
    losses = args.get("moe_aux_loss_coeff")  # a list has one for each kind of balancing
    if losses is not None and not all(map(is_number, losses if isinstance(losses, list) else [losses])):
        wrong["moe_aux_loss_coeff"] = "a number, or several"
    wrong |= {name: "True or False" for name in _FLAGS if args.get(name) not in (None, True, False)}
    raise_together(
        [
            UnsupportedModel(
                f"the argument {name} is not a {'truth value' if name in _FLAGS else 'size of a model'}",
                file,
                expected,
                found=repr(args[name])[:80],
                remedy="copy the file again if it is damaged; a program that saves this must save a plain value",
            )
            for name, expected in wrong.items()
        ]
    )
    check_experts(args.get("num_layers") or 0, args.get("num_experts") or 0, file)


#: Kinds of load balancing that also decide which experts are taken, or their weights.
_OTHER_ROUTINGS = ("sinkhorn", "quantile_balancing")
#: What Megatron's own scripts train with; most versions ignore the argument.
_LLAMA3_FACTOR = 8.0


def families_of_args(args: JsonObject) -> list[Family]:
    """The families that models trained with these arguments may be of, the likeliest first.

    Where there is none, it is the nearest with experts or without, whose pins tell what is wrong: the one that leaves
    the fewest of the arguments unread that tell another family, and asks for the most.
    """

    def distance(family: Family) -> tuple[int, int]:
        others = {name for name, wanted in family.signs.items() if not wanted and keys.is_set(args.get(name))}
        return len(others - {key.arg for key in family.keys}), -sum(family.signs.values())

    fitting = [family for family in FAMILIES.values() if keys.fits_signs(family, args)]
    alike = [
        family
        for family in FAMILIES.values()
        if bool(family.moe) == bool(args.get("num_experts"))
        and all(keys.is_set(args.get(name)) for name, wanted in family.signs.items() if wanted)
    ]
    return fitting or [min(alike, key=distance)]


def architecture_from_args(
    args: JsonObject, *, vocab: int | None, file: str, family: Family | None = None, trusts_factor: bool = False
) -> Architecture:
    """The model that the training arguments describe.

    Args:
        vocab: true vocabulary size, if it is known from elsewhere (see `vocabulary`).
        file: where the args came from, for messages.
        family: of the model, if it is known from elsewhere.
        trusts_factor: the factor of its rotary scaling, which some versions ignore, is known to be the argument's.

    Raises:
        MissingArguments: an argument without which the model is not determined.
        UnsupportedModel: options that have no counterpart in transformers. All are reported together.
    """
    check_sizes(args, file)
    family = family or families_of_args(args)[0]
    pins = keys.pins_of(family)
    read = {*(key.arg for key in family.keys), *(pin.arg for pin in pins)}
    # What tells another family, and nothing of this one reads, would be dropped without a word.
    signs = [name for name, is_there in family.signs.items() if not is_there and name not in read]
    pins += tuple(Pin(name, (None,), f"no {family.name} has it") for name in signs if keys.is_set(args.get(name)))
    problems: list[ConversionError] = [
        keys.cannot_express(pin.arg, file, " or ".join(map(repr, pin.allowed)), args[pin.arg], pin.why)
        for pin in pins
        if pin.arg in args and _one_for_all(args[pin.arg]) not in pin.allowed and (not pin.when or args.get(pin.when))
        if not (pin.arg == INTERPOLATION and trusts_factor and _is_linear(args, family))
    ]
    factor = args.get("rope_scaling_factor")
    if args.get("use_rope_scaling") and factor not in (None, _LLAMA3_FACTOR) and not trusts_factor:
        found = f"rope_scaling_factor {factor:g}"
        expected = f"rope_scaling_factor {_LLAMA3_FACTOR:g}: versions that ignore the argument train with it"
        remedy = f"give the factor of that version: --rope-scaling-factor {factor:g}, or {_LLAMA3_FACTOR:g}"
        problems.append(UnsupportedModel("the factor of the rotary scaling is unknown", file, expected, found, remedy))
    balancing = args.get("moe_router_load_balancing_type")
    if family.moe and any(other in str(balancing) for other in _OTHER_ROUTINGS):
        why = "it chooses experts and their weights differently from transformers"
        problems.append(keys.cannot_express("moe_router_load_balancing_type", file, "aux_loss or none", balancing, why))
    lack = "the checkpoint's args lack "
    if family.moe and (args.get("moe_router_num_groups") or 1) > 1 and not args.get("moe_router_group_topk"):
        problems.append(MissingArguments(f"{lack}moe_router_group_topk beside moe_router_num_groups", file))
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")
    if absent := [name for name in names if not args.get(name)]:
        problems.append(MissingArguments(lack + ", ".join(absent), file, remedy="save it with its full args"))
    raise_together(problems)
    heads, groups = args["num_attention_heads"], args.get("num_query_groups") or 1
    ffn = _ffn(args, family)
    losses = (args.get("moe_aux_loss_coeff") if family.moe else None) or 0.0  # a list: one for each kind of balancing
    facts: dict[str, Any] = {key.field: key.default for key in family.keys if not key.arg and not key.config}
    facts |= {key.field: keys.of_arg(key, args, file) for key in family.keys if key.arg}
    facts |= {
        "ffn": ffn,
        "expert_ffn": facts.get("expert_ffn") or (ffn if "expert_ffn" in facts else 0),
        # argparse leaves num_query_groups at 1 in args of models without grouped queries.
        "query_groups": groups if args.get("group_query_attention", groups > 1) else heads,
        "head_dim": facts.get("head_dim") or args["hidden_size"] // heads,
        "vocab": vocab or args.get("vocab_size") or args["padded_vocab_size"],
        "padded_vocab": args["padded_vocab_size"],
        "norm_epsilon": float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or facts["norm_epsilon"]),
        "rope_scaling": _scaling(args, file, family),
        "qkv_bias": bool(facts.get("qkv_bias") or facts.get("linear_bias")),
        "router_aux_loss": float(losses[0] if isinstance(losses, list) else losses),
    }
    architecture = keys.architecture_of(family, facts)
    keys.check_computed_alike(architecture, file)
    return architecture


def _one_for_all(value: Any) -> Any:
    """The value that a list repeats for every layer, as `moe_layer_freq` may; anything else as it is."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def _ffn(args: JsonObject, family: Family) -> int:
    dense = args.get("ffn_hidden_size") or int((4 * args["hidden_size"] * 2 / 3) / 64) * 64
    if family.moe and not family.dense and not args.get("moe_dynamic_hpu"):
        return args.get("moe_ffn_hidden_size") or dense
    return dense  # Habana's dynamic experts take ffn_hidden_size


def _scaling(args: JsonObject, file: str, family: Family) -> RotaryScaling | None:
    if family.is_latent:
        return _yarn(args, file, "")
    if "default" not in family.scalings or args.get("position_embedding_type") == "yarn":
        return _yarn(args, file, PLAIN_YARN)
    if args.get("use_rope_scaling"):
        return RopeScaling(float(args.get("rope_scaling_factor") or _LLAMA3_FACTOR))
    return LinearScaling(float(args[INTERPOLATION])) if _is_linear(args, family) else None


def _is_linear(args: JsonObject, family: Family) -> bool:
    """Whether linear scaling of rotary frequencies is asked for, and no other."""
    others = args.get("use_rope_scaling") or args.get("position_embedding_type") == "yarn"
    return args.get(INTERPOLATION) not in (None, 1) and not others and "linear" in family.scalings


def _yarn(args: JsonObject, file: str, prefix: str) -> YarnScaling | None:
    """What scales rotary frequencies; a factor of 1 is none in latent attention, whose arguments have no prefix."""
    kind, factor = "yarn" if prefix else args.get("rope_type") or "yarn", f"{prefix}rotary_scaling_factor"
    absent = [] if is_number(args.get(factor)) or kind != "yarn" else [factor]
    absent += [ROUNDED] if prefix and ROUNDED not in args else []
    if absent:
        beside = " beside position_embedding_type yarn" if prefix else ""
        raise MissingArguments(f"the checkpoint's args lack {' and '.join(absent)}{beside}", file)
    said = {name: args[prefix + name] for name in YARN if is_number(args.get(prefix + name))}
    scaling = YarnScaling(*(*{**YARN, **said}.values(), not prefix or bool(args.get(ROUNDED))))
    # Latent attention scales its softmax by these two whatever the frequencies are scaled by.
    if kind not in ("rope", "yarn") or (kind == "rope" and scaling.factor > 1 and scaling.mscale_all_dim):
        expected = "yarn, or rope with a rotary_scaling_factor of 1 or an mscale_all_dim of 0"
        raise keys.cannot_express("rope_type", file, expected, (kind, scaling.factor, scaling.mscale_all_dim))
    return scaling if prefix or (kind == "yarn" and scaling.factor != 1) else None


_TRUE_VOCAB = "--true-vocab-size"


def true_vocab(*, flag: int | None, args: JsonObject, tokenizer: int | None, padded: int, file: str) -> tuple[int, str]:
    """The vocabulary without padding, and who said so. Authority: flag, args, tokenizer, else the padding is kept.

    Raises:
        UnsupportedModel: a true size above the padded one; UsageError where the flag says so.
    """
    said = args.get("vocab_size")
    if said and said < padded and args.get("tokenizer_type") == "NullTokenizer":
        said += 1  # which has an end of text behind them
    claims = {_TRUE_VOCAB: flag, "args": said, "tokenizer": tokenizer}
    who, size = next((who, size) for who, size in (claims | {"padded size": padded}).items() if size)
    if size > padded:
        raise (UsageError if who == _TRUE_VOCAB else UnsupportedModel)(
            f"the vocabulary size of {who} does not fit the embedding",
            file=file,
            expected=f"at most {padded} (padded_vocab_size)",
            found=", ".join(f"{name} {claim or 'unknown'}" for name, claim in claims.items()),
            remedy=f"give the right size with {_TRUE_VOCAB}",
        )
    return size, who


def check_own_vocab(said: int | None, vocab: int | None) -> None:
    """Refuse a flag that contradicts a source which says its vocabulary itself, by a UsageError."""
    if said not in (None, vocab):
        remedy = f"leave {_TRUE_VOCAB} out"
        raise UsageError(f"{_TRUE_VOCAB} is not the model's", expected=f"vocab_size {vocab}", found=said, remedy=remedy)


def model_type_from_args(args: JsonObject) -> str | None:
    """`--source-model-type` as far as the args decide it: mixtral by its experts, llama3.1 by its rope scaling."""
    if args.get("num_experts"):
        return "mixtral"
    return "llama3.1" if args.get("use_rope_scaling") else None


def is_of_habana(args: JsonObject) -> bool:
    """Whether the args are those of Habana's tree."""
    return "use_fused_rmsnorm" in args


def added_to_norms(args: JsonObject, file: str, *, is_fused: bool) -> int:
    """1 where norms are stored as gamma - 1 (docs/formats.md, "Norms and their spellings"), else 0.

    `is_fused`: they are Transformer Engine's, which fuses them into the linear layers behind.

    Raises:
        UnsupportedModel: the args ask for it, but nothing shows whether the norm's class obeyed.
    """
    if not args.get("apply_layernorm_1p"):
        return 0
    if is_fused != is_of_habana(args):
        return int(is_fused)  # Transformer Engine's norms obey, Habana's own RMSNorm ignores the argument
    what = "nothing says whether the norms are stored as gamma - 1"
    expected = "--apply-layernorm-1p with one kind of norm in all layers"
    found = "norms of Transformer Engine beside Habana's" if is_fused else "norms that refuse --apply-layernorm-1p"
    raise UnsupportedModel(what, file, expected, found, remedy="save the checkpoint without --apply-layernorm-1p")


def dialect_of_args(args: JsonObject) -> tuple[str, str]:
    """How the modules that the args describe spell norms and experts, as `names.dialect_of` says it of names."""
    is_local = args.get("transformer_impl") == "local"
    grouped = "grouped" if is_local or args.get("moe_use_legacy_grouped_gemm") else "te-grouped"
    experts = grouped if args.get("moe_grouped_gemm") else "sequential"
    return "local" if is_local else "transformer_engine", experts if args.get("num_experts") else ""
