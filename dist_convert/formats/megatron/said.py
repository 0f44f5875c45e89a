"""What is known of a Megatron model beside its training arguments: what the user says, and another model's config.

Arguments do not tell every family from every other, and some tools leave values in them that the model does not have.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dist_convert.errors import ConversionError, UnsupportedModel, UsageError, raise_together
from dist_convert.formats.huggingface.config import architecture_from_config, describes
from dist_convert.formats.megatron.args import FORKS_SCALING, architecture_from_args, families_of_args
from dist_convert.formats.megatron.target_args import padded_vocab, rope_values
from dist_convert.models import FAMILIES
from dist_convert.models.blocks import MTP_KEY
from dist_convert.models.catalog import Where
from dist_convert.models.keys import to_arg
from dist_convert.models.schema import Architecture, Family, RopeScaling, is_size
from dist_convert.records import JsonObject

_LIKE = "--like"
_FACTOR, _POSITIONS = "rope_scaling_factor", "position_embedding_type"
#: Facts for which a config of `--like` stands where the args say something else.
_LAYOUT = "pipeline_model_parallel_layout"
_CORRECTED = ("rope_theta", "vocab", MTP_KEY.field)


@dataclass(frozen=True)
class Said:
    """The args of a model as they are to be read.

    Attributes:
        args: as the checkpoint has them, corrected by what the user says.
        family: of the model; None where the args tell.
        config: a config.json of such a model, from `--like`.
        trusts_factor: the factor of the rotary scaling is that of the args.
        drops_mtp: layers of multi-token prediction are left out.
        notes: what the user should know of it, a line each.
    """

    args: JsonObject
    family: Family | None = None
    config: JsonObject | None = None
    trusts_factor: bool = False
    drops_mtp: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def architecture(self, *, vocab: int | None, file: str) -> Architecture:
        """See `architecture_from_args`; of tokens there are at most as many as rows."""
        found = architecture_from_args(
            self.args, vocab=vocab, file=file, family=self.family, trusts_factor=self.trusts_factor
        )
        return replace(found, vocab=min(found.vocab, found.padded_vocab))


def said_of(where: Where, args: JsonObject, file: str) -> Said:
    """The args of a checkpoint, corrected by what is said of it; an UnsupportedModel where `--like` is of another."""
    corrected: JsonObject = args
    notes = []
    asked = where.asked
    scaling = {} if asked.rope_scaling_factor is None else {_FACTOR: asked.rope_scaling_factor}
    flags: dict[str, Any] = scaling | ({} if asked.rope_theta is None else {"rotary_base": asked.rope_theta})
    family, trusts_factor = None, bool(scaling) or where.is_compared
    if where.like is not None:
        # Configs count layers of multi-token prediction that are not there: the args say how many there are.
        like = architecture_from_config({**where.like, MTP_KEY.config: 0}, zero_output_bias=True)
        family, trusts_factor = FAMILIES[like.family], True
        forks = dict.fromkeys(name for name in FORKS_SCALING if isinstance(args.get(name), Mapping | str))
        flags = {"rotary_base": like.rope_theta, **forks, **_scaling(like, args)} | flags
        # None says nothing, unless it is one of the values that an argument may have.
        plain = {key.arg for key in family.keys if key.codec == "plain" and key.kind != "flag"}
        told = {name for name, value in args.items() if value is not None or name not in plain}
        silent = {key.arg: to_arg(key, like) for key in family.keys if key.arg and key.arg not in told}
        corrected = {**args, **silent}
    elif where.family is not None:
        family = _possible(FAMILIES[where.family], args, file)
    else:
        carried = where.carried or {}
        named = next((one for one in families_of_args(args) if one.name == carried.get("model_type")), None)
        family = named and _possible(named, args, file, carried)
    has_another = "llama3" not in (family or families_of_args(args)[0]).scalings or args.get(_POSITIONS) == "yarn"
    if scaling and (has_another or (where.like is not None and not isinstance(like.rope_scaling, RopeScaling))):
        what = "--rope-scaling-factor sets Llama 3.1's rotary scaling, and this model has another kind"
        remedy = f"leave it out; {_LIKE} CONFIG, the config of a model with that scaling, sets all its numbers"
        raise UsageError(what, file, remedy=remedy)
    if scaling:
        flags["use_rope_scaling"] = True
    for name, value in flags.items():
        if (args.get(name) or None) != (value or None) and (args.get(name) or name not in (_FACTOR, _POSITIONS)):
            notes.append(f"warning: {name} is {args.get(name)!r} in the args, {value!r} is used, as you say")
    if where.like is not None and "vocab_size" in silent:
        if asked.true_vocab_size is None:
            _check_rows(like, args, file)
        notes.append(f"vocabulary: {like.vocab} tokens according to {_LIKE}, as the args do not say how many")
    if asked.drop_mtp:
        layout = corrected.get(_LAYOUT)
        without = {_LAYOUT: re.sub(r"m(\*\d+)?", "", layout)} if isinstance(layout, str) else {}
        corrected = {**corrected, MTP_KEY.arg: None, **without}
    said = Said({**corrected, **flags}, family, where.like, trusts_factor, asked.drop_mtp, tuple(notes))
    if where.like is not None:
        _check_like(said, like, file)
    elif family is None and len(fitting := families_of_args(args)) > 1:
        others = " or ".join(one.name for one in fitting[1:])
        note = (
            f"family: {fitting[0].name}; the args of {others} look the same: if it is one of these, give {_LIKE} CONFIG"
        )
        said = replace(said, notes=(*notes, note))
    return said


def _scaling(like: Architecture, args: JsonObject) -> dict[str, object]:
    """How a model scales its rotary frequencies, in training arguments; that it has others is not corrected."""
    unused = [] if isinstance(like.rope_scaling, RopeScaling) else [_FACTOR]
    unused += [_POSITIONS] if args.get(_POSITIONS) not in (None, "rope", "yarn") else []
    return {name: value for name, value in rope_values(like).items() if name not in unused}


def _check_rows(like: Architecture, args: JsonObject, file: str) -> None:
    """Refuse a vocabulary that training would have padded to other rows than the embedding has."""
    rows, divisible_by = args.get("padded_vocab_size"), args.get("make_vocab_size_divisible_by")
    tensor = args.get("tensor_model_parallel_size") or 1
    if not rows or not divisible_by or not is_size(divisible_by) or not is_size(tensor):
        return
    if (padded := padded_vocab(like.vocab, divisible_by, tensor)) != rows:
        what = f"{_LIKE} is not the checkpoint's model: it differs in vocab_size"
        expected, found = f"tokens that are padded to {rows} rows", f"{like.vocab}, which are padded to {padded}"
        remedy = "give the config of this model, or say how many tokens it has with --true-vocab-size"
        raise UnsupportedModel(what, file, expected, found, remedy)


def _possible(family: Family, args: JsonObject, file: str, config: JsonObject | None = None) -> Family | None:
    """A family, if a model with these args can be of it, and is that of a config where one is given."""
    if bool(family.moe) != bool(args.get("num_experts")):
        return None
    try:
        found = architecture_from_args(args, vocab=None, file=file, family=family, trusts_factor=True)
    except ConversionError:
        return None
    return family if config is None or describes(config, found) else None


def _check_like(said: Said, like: Architecture, file: str) -> None:
    """Refuse a config that the args contradict."""
    own = said.architecture(vocab=None, file=file)
    problems = []
    for key in FAMILIES[like.family].keys:
        said_here, said_there, name = own.fact(key.field), like.fact(key.field), key.config or key.arg
        if key.arg and key.field not in _CORRECTED and said_here != said_there:
            what = f"{_LIKE} is not the checkpoint's model: it differs in {name}"
            expected = f"{name} {said_there}, as {_LIKE} says"
            found = f"{said_here}, from the checkpoint's argument {key.arg}"
            remedy = "give the config of this model; if training changed the value, give a copy with the new value"
            problems.append(UnsupportedModel(what, file, expected, found, remedy))
    raise_together(problems)
