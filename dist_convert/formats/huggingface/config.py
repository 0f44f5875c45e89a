"""`config.json` of transformers 4 or 5, read into an `Architecture` and written from one.

Absent keys have transformers' values; what Megatron cannot compute is refused. What is written is readable by
transformers 4.49 and 5, and written by hand because what transformers 5 saves is misread by 4.49 without an error
(docs/formats.md, "config.json").
"""

from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, UnsupportedModel, UsageError, below, raise_together
from dist_convert.formats.huggingface.quantised import QUANTISED_BY
from dist_convert.formats.huggingface.read import CONFIG_FILE, GENERATION_FILE, check_inside, read_config
from dist_convert.formats.tokenizer.build import padding_id
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.models import FAMILIES, REFUSED, WITH_VISION, schema
from dist_convert.models.blocks import MTP_KEY
from dist_convert.models.keys import architecture_of, check_computed_alike, to_config
from dist_convert.read.source import read_json
from dist_convert.records import JsonObject

#: The scaling of rotary frequencies that Megatron-Core has, with constants of its own; the factor may be another.
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_FACTOR, _PARTIAL, ORIGINAL = "factor", "partial_rotary_factor", "original_max_position_embeddings"
#: Of YaRN's in the order of `YarnScaling`, with the values that they have where they are absent. DeepSeek's own code
#: and versions of transformers differ in two of them, which have to be given.
_YARN: JsonObject = {
    _FACTOR: None, "beta_fast": 32, "beta_slow": 1, ORIGINAL: None, "mscale": 1.0, "mscale_all_dim": 0.0,
}  # fmt: skip
#: Of each kind of scaling, the names of its numbers.
_NUMBERS = {"yarn": (*_YARN, "truncate"), "linear": (_FACTOR,), "llama3": (_FACTOR, *LLAMA3)}
#: What YaRN may have besides in transformers and not in Megatron, with the value that changes nothing.
_YARN_PINS: dict[str, object] = {"attention_factor": None, "truncate": True}
_YARN_MSCALES: dict[str, object] = {"mscale": 1.0, "mscale_all_dim": 0.0}
#: Codecs of keys that say something of some layers.
_OF_LAYERS = ("leading_dense", "sparse_steps", "no_rope")
_REPAIR = "copy config.json again from where the model came from"
_OFTEN_ADDED_LATER = "leave it out of config.json for the conversion if the model was trained without it"
_NONE = "Megatron cannot train this model; there is nothing to convert to"


class _Config:
    """A config.json with its family's defaults, and the problems met while it is read."""

    def __init__(self, config: JsonObject) -> None:
        self.given = config
        self.problems: list[ConversionError] = []
        self.family = _family(config)
        self.keys = {key.config: key for key in self.family.keys if key.config}

    def get(self, name: str) -> object:
        key = self.keys[name]
        return next((self.given[known] for known in (name, *key.aliases) if known in self.given), key.default)

    def refuse(self, what: str, *, expected: object, found: object, remedy: str = _NONE) -> None:
        self.problems.append(UnsupportedModel(what, CONFIG_FILE, expected, found, remedy))

    def misread(self, what: str, expected: str, value: object) -> None:
        self.refuse(what, expected=expected, found=repr(value)[:80], remedy=_REPAIR)

    def size(self, name: str) -> int:
        value, most = self.get(name), self.keys[name].most
        if not isinstance(value, int) or not value or not schema.is_size(value, most):
            self.misread(f"{name} is not a size", f"a positive whole number up to {most}", value)
            return 1
        return value

    def number(self, name: str, value: object = None, *, above: float = 0) -> float:
        value = self.get(name) if value is None else value
        if not isinstance(value, int | float) or not schema.is_number(value) or value <= above:
            self.misread(f"{name} is not a number", f"a number above {above}", value)
            return 1.0
        return float(value)

    def check_divides(self, what: str, whole: int, parts: int, *, expected: str) -> None:
        if not self.problems and whole % parts:
            self.refuse(what, expected=expected, found=f"{whole} and {parts}", remedy=_REPAIR)

    def value(self, key: schema.Key) -> int | float:
        """What a key says by itself."""
        if key.kind == "flag":
            return bool(self.get(key.config))
        if key.codec in ("or_none", "if_any", "experts_wide") and self.get(key.config) in (None, 0):
            return 0
        return self.size(key.config) if key.kind == "size" else self.number(key.config)

    def some_layers(self, key: schema.Key) -> tuple[int, ...]:
        """The layers without experts, or without rotary positions."""
        layers, said = self.get("num_hidden_layers"), self.get(key.config)
        if not isinstance(layers, int) or not schema.is_size(layers, schema.MOST_LAYERS):
            return ()  # which is told where the number of layers is read
        if key.codec == "no_rope":
            every = self.given.get("no_rope_layer_interval", 4)
            if said is None and type(every) is int and every > 0:
                said = [int((layer + 1) % every != 0) for layer in range(layers)]
            if isinstance(said, list) and len(said) >= layers and all(one in (0, 1) for one in said):
                return tuple(layer for layer, one in enumerate(said[:layers]) if not one)
            self.misread(f"{key.config} is not a list of layers", "0 or 1 for each layer", said)
            return ()
        if not isinstance(said, int) or not 0 <= said <= layers:
            self.misread(f"{key.config} is not a number of layers", "a whole number", said)
            return ()
        if key.codec == "leading_dense":
            return tuple(range(said))
        listed = self.given.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            self.misread("mlp_only_layers is not a list of layers", "whole numbers", listed)
            return ()
        dense = set(listed)
        return tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % max(1, said))


def architecture_from_config(config: JsonObject, *, zero_output_bias: bool = False) -> schema.Architecture:
    """The model that a config.json describes; with `zero_output_bias` output projections' biases are known to be zeros.

    Raises:
        UnsupportedModel: what Megatron cannot express. All reasons are reported together.
    """
    read = _Config(config)
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    groups = heads if read.get("num_key_value_heads") is None else read.size("num_key_value_heads")
    what = "query heads cannot be divided among the key and value heads"
    read.check_divides(what, heads, groups, expected="num_attention_heads divisible by num_key_value_heads")
    head_dim, [name] = hidden // heads, [key.config for key in read.family.keys if key.field == "head_dim"]
    if read.get(name) is not None:
        head_dim = read.size(name)
    else:
        what = "the config does not give the width of a head"
        read.check_divides(what, hidden, heads, expected="head_dim, or hidden_size divisible by num_attention_heads")
    values: dict[str, Any] = {"hidden": hidden, "heads": heads, "query_groups": groups, "head_dim": head_dim}
    values |= {key.field: key.default for key in read.family.keys if not key.config}
    if "mlp_bias" in read.keys:
        values["qkv_bias"], values["linear_bias"] = _biases(read, zero_output_bias)
    if "router_aux_loss_coef" in read.keys:
        values["router_aux_loss"] = read.number("router_aux_loss_coef", above=-1)
    if "sliding_window" in read.keys and read.get("sliding_window") is None:
        values["sliding_window"] = None
    values |= {key.field: read.some_layers(key) for key in read.keys.values() if key.codec in _OF_LAYERS}
    values["rope_theta"], values["rope_scaling"] = _rope(read)
    _check_pins(read)
    values |= {key.field: read.value(key) for key in read.keys.values() if key.field not in values}
    raise_together(read.problems)
    architecture = architecture_of(read.family, values | {"padded_vocab": values["vocab"]})
    schema.check_experts(architecture.layers, architecture.experts, CONFIG_FILE)
    check_computed_alike(architecture, CONFIG_FILE)
    return architecture


def config_of_like(path: Path) -> JsonObject:
    """The content of the config.json that `--like` names, itself or by its directory.

    Raises:
        UsageError, CorruptFile, UnsupportedModel: there is none, or it is damaged or no model's.
    """
    if not path.exists():
        raise UsageError("the path of --like does not exist", path, remedy="check the path")
    directory, name = (path, CONFIG_FILE) if path.is_dir() else (path.parent, path.name)
    with below(directory, name):  # which is known here alone
        config = read_config(path) if path.is_dir() else read_json(path)
        architecture_from_config({**config, MTP_KEY.config: 0}, zero_output_bias=True)
    return config


def _family(config: JsonObject) -> schema.Family:
    named = config.get("model_type")
    named = named if isinstance(named, str | None) else repr(named)
    classes = config.get("architectures") or []
    classes = classes if isinstance(classes, list) else [classes]
    for family in FAMILIES.values():
        if named in (family.name, None, *family.other_types) and (
            family.hf_class in classes or (not classes and named)
        ):
            return family
    why = REFUSED.get(named or "") or (WITH_VISION if {"vision_config", "text_config"} & config.keys() else "")
    what = "not a model that can be converted" + (f": {why}" if why else "")
    expected = f"a family and its class, such as llama ({FAMILIES['llama'].hf_class}); dist-convert models lists all"
    raise UnsupportedModel(what, CONFIG_FILE, expected, found=f"model_type={named!r}, architectures={classes!r}")


def _check_pins(read: _Config) -> None:
    """Refuse what no model of the family has that Megatron can train."""
    config = read.given
    for name, wanted in {"hidden_act": "silu", **read.family.config_pins}.items():
        found = config.get(name, wanted)
        if found != wanted and not (found is None and wanted == 1):  # no groups are one group
            why = {"hidden_act": "Megatron's --swiglu is another activation", **read.family.reasons}.get(name)
            read.refuse(
                f"{name} is not supported" + (f": {why}" if why else ""), expected=f"{name}={wanted}", found=found
            )
    kinds = config.get("layer_types") or []
    has_window = "sliding_window" in read.keys and read.get("sliding_window") is not None
    wanted = read.family.layer_types or ("sliding_attention" if has_window else "full_attention",)
    is_list = isinstance(kinds, list)
    if not is_list or any(kind != wanted[layer % len(wanted)] for layer, kind in enumerate(kinds)):
        what = f"{' and '.join(wanted)} in {'turn in' if len(wanted) > 1 else 'all'} layer_types"
        read.refuse("layers attend in different ways", expected=what, found=kinds)
    if len(wanted) > 1 and not has_window:
        read.refuse("no layer has a window", expected="sliding_window", found=None)


def _biases(read: _Config, zero_output_bias: bool) -> tuple[bool, bool]:
    """(qkv_bias, linear_bias): Megatron has biases of Q, K and V alone, or of all linear layers."""
    attention, mlp = bool(read.given.get("attention_bias")), bool(read.given.get("mlp_bias"))
    if attention != mlp and not (attention and zero_output_bias):
        missing = "mlp_bias" if attention else "attention_bias"
        read.refuse(
            "Megatron has biases in all linear layers (--add-bias-linear) or in Q, K and V alone (--add-qkv-bias)",
            expected="attention_bias and mlp_bias alike",
            found=f"attention_bias={attention}, mlp_bias={mlp}",
            remedy=f"set {missing} true in config.json and add the missing biases to the model as zeros",
        )
    return attention, mlp


def _rope(read: _Config) -> tuple[float, schema.RotaryScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` (version 4) or `rope_parameters` (version 5)."""
    config, default = read.given, read.keys["rope_theta"].default
    v4, v5 = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if not isinstance(v4, Mapping) or not isinstance(v5, Mapping) or any(isinstance(v, Mapping) for v in v5.values()):
        found = f"rope_scaling={config.get('rope_scaling')!r}, rope_parameters={config.get('rope_parameters')!r}"
        read.refuse("rotary parameters are not one set of numbers", expected="one JSON object of numbers", found=found)
        return 1.0, None
    theta = config.get("rope_theta", v4.get("rope_theta", default if v4 else None))
    if v5:
        # Version 5 takes rope_scaling for all of rope_parameters, theta too; version 4 does not see rope_parameters.
        new = v5.get("rope_theta", default if theta is None else theta)
        if theta not in (None, new):
            _refuse_both(read, f"rope_theta={theta}", f"rope_parameters with rope_theta={new}")
        if "rope_scaling" in config and _kind(v4) != _kind(v5):
            _refuse_both(read, f"rope_scaling={config['rope_scaling']}", f"rope_parameters={dict(v5)}")
        theta = new
    partial, whole = [style.get(_PARTIAL) for style in (config, v4, v5)], read.family.config_pins.get(_PARTIAL, 1)
    if not all(share in (None, whole) for share in partial):
        read.refuse("a different part of each head is rotated", expected=f"{_PARTIAL}={whole}", found=partial)
    positions, scaling = config.get(ORIGINAL), v5 or v4
    if positions is not None and scaling.get(ORIGINAL) not in (None, positions):
        _refuse_both(read, f"{ORIGINAL}={positions}", f"{ORIGINAL}={scaling[ORIGINAL]} in {dict(scaling)}")
    if scaling.get("mscale_all_dim") and scaling.get("mscale") is None:
        read.refuse("transformers ignores mscale_all_dim without mscale", expected="both or none", found=dict(scaling))
    return read.number("rope_theta", theta), _read_scaling(read, scaling)


def _refuse_both(read: _Config, old: str, new: str) -> None:
    read.refuse(
        "rotary parameters are given twice and disagree: transformers 4 and 5 read different ones",
        expected="the same in both",
        found=f"{old} and {new}",
        remedy="remove the wrong one from config.json",
    )


def _kind(rope: JsonObject) -> tuple[object, ...]:
    """What decides the scaling: its type, and the numbers of Llama 3.1's."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return (kind,) if kind == "default" else (kind, rope.get(_FACTOR), *map(rope.get, (*LLAMA3, *_YARN, *_YARN_PINS)))


def _read_scaling(read: _Config, rope: JsonObject) -> schema.RotaryScaling | None:
    kind, allowed = _kind(rope)[0], read.family.scalings
    if kind not in allowed:
        remedy = _OFTEN_ADDED_LATER if kind in ("yarn", "dynamic", "linear") else _NONE
        expected = f"rope_type {' or '.join(allowed)}"
        read.refuse("an unsupported scaling of rotary frequencies", expected=expected, found=kind, remedy=remedy)
        return None
    if kind == "default":
        return None
    if kind == "yarn":
        for name, wanted in _YARN_PINS.items():
            if (found := rope.get(name, wanted)) != wanted and (read.family.is_latent or name != "truncate"):
                read.refuse(f"Megatron's YaRN has no {name}", expected=f"{name}={wanted}, or none", found=found)
        said = {name: rope.get(name, default) for name, default in _YARN.items()}
        if all(isinstance(value, int | float) and schema.is_number(value) for value in said.values()):
            return schema.YarnScaling(*(*said.values(), bool(rope.get("truncate", True))))
        read.misread("rope_scaling does not hold numbers", ", ".join(_YARN), said)
        return None
    factor = rope.get(_FACTOR)
    if kind == "llama3" and any(rope.get(name) != value for name, value in LLAMA3.items()):
        read.refuse(
            "Megatron-Core scales rotary frequencies by fixed constants",
            expected=", ".join(f"{name}={value}" for name, value in LLAMA3.items()),
            found=", ".join(f"{name}={rope.get(name)}" for name in LLAMA3),
        )
    elif not isinstance(factor, int | float) or not schema.is_number(factor) or factor < 1:
        read.misread("the factor of rope_scaling is not a number", "a number of at least 1", factor)
    elif kind == "llama3":
        return schema.RopeScaling(float(factor))
    elif factor != 1:
        return schema.LinearScaling(float(factor))
    return None


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _have_rows(config: JsonObject, rows: int) -> bool:
    """Whether each special id of a config is one of that many tokens."""
    return all(type(one) is int and one < rows for name in SPECIAL_IDS for one in _listed(config.get(name)))


def describes(config: JsonObject, architecture: schema.Architecture) -> bool:
    """Whether a config is of this model, but for what training and conversions may change.

    Those are the vocabulary, the rotary base, and layers of multi-token prediction, which configs count that have none.
    """
    try:
        theirs = architecture_from_config({**config, MTP_KEY.config: 0})
    except ConversionError:
        return False
    if not _have_rows(config, architecture.vocab):
        return False
    predicted = {name: fact for name, fact in architecture.facts.items() if name == MTP_KEY.field}
    return architecture == replace(
        theirs,
        vocab=architecture.vocab,
        padded_vocab=architecture.padded_vocab,
        rope_theta=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling,
        facts=dict(theirs.facts) | predicted,
    )


TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Tokens that end a turn of an instruct model: end_of_text, eom_id, eot_id.
_LLAMA3_INSTRUCT_EOS = [128001, 128008, 128009]
#: Llamas with a larger vocabulary have another tokenizer than Llama 2's: Llama 3's or any.
_MOST_LLAMA2_ROWS = 65_536


def special_token_ids(
    family: str | None, vocab: int, tokenizer: Tokenizer, *, instruct: bool
) -> tuple[int | None, int | list[int] | None]:
    """Begin and end of text: what the tokenizer says, or what the family has where there is none.

    Ids beyond the embedding's rows, `vocab`, are None. With `instruct` the tokens that end a turn of Llama 3 end the
    text.
    """
    bos, eos = tokenizer.bos, tokenizer.eos
    if tokenizer.kind == "none" and family in FAMILIES and not (family == "llama" and vocab > _MOST_LLAMA2_ROWS):
        bos, eos = FAMILIES[family].special_ids
    ends = [*_LLAMA3_INSTRUCT_EOS, eos] if tokenizer.is_llama3 and instruct else [eos]
    inside = list(dict.fromkeys(end for end in ends if end is not None and end < vocab))
    begin = bos if bos is not None and bos < vocab else None
    return begin, inside if len(inside) > 1 else next(iter(inside), None)


def config_json(architecture: schema.Architecture, dtype: str) -> dict[str, Any]:
    """The config of a model, in the keys of transformers 4 and, where they differ, also of 5; without special ids.

    `dtype` is the safetensors name of most weights.
    """
    family, scaling = FAMILIES[architecture.family], None
    if (said := architecture.rope_scaling) is not None:
        scaling = {"rope_type": said.rope_type, **dict(zip(_NUMBERS[said.rope_type], astuple(said), strict=True))}
        if not family.is_latent and _YARN_MSCALES.items() <= scaling.items():  # as it is published
            scaling = {name: value for name, value in scaling.items() if name not in _YARN_MSCALES}
        if scaling.get("truncate"):
            del scaling["truncate"]
    types = family.layer_types
    layer_types = {"layer_types": [types[n % len(types)] for n in range(architecture.layers)]} if types else {}
    partial = {name: value for name, value in family.config_pins.items() if name == _PARTIAL}
    return {
        "architectures": [family.hf_class],
        "model_type": family.name,
        **{name: value for key in family.keys if key.config for name, value in to_config(key, architecture).items()},
        "hidden_act": "silu",
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": architecture.rope_theta, **(scaling or {"rope_type": "default"}), **partial},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": TORCH_NAMES[dtype],
        "dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        **layer_types,
        **family.config,
        **family.config_pins,
    }


def config_of_copy(config: JsonObject, architecture: schema.Architecture, dtype: str) -> dict[str, Any]:
    """A config with the dtype that is stored, and what only one version of transformers would find in it."""
    ours = config_json(architecture, dtype)
    names = ("rope_theta", "rope_scaling", "rope_parameters", *_known_by_aliases(config, architecture))
    missing = {name: ours[name] for name in names if name not in config}
    return {**config, **missing, "torch_dtype": ours["torch_dtype"], "dtype": ours["dtype"]}


def _known_by_aliases(config: JsonObject, architecture: schema.Architecture) -> list[str]:
    """The keys that a config has under the names of another version of transformers."""
    return [key.config for key in FAMILIES[architecture.family].keys if not config.keys().isdisjoint(key.aliases)]


def config_like(config: JsonObject, architecture: schema.Architecture, dtype: str) -> dict[str, Any]:
    """The config of a model from another's of its kind, whose special ids and further keys are taken over.

    But for those that speak of its own files: of code beside them, and of how weights are quantised.
    """
    ours = config_json(architecture, dtype)
    own = ("vocab_size", "rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype", MTP_KEY.config)
    left = ("auto_map", QUANTISED_BY, *MTP_KEY.aliases)
    theirs = {name: value for name, value in config.items() if name not in left}
    return theirs | {name: ours[name] for name in (*own, *_known_by_aliases(theirs, architecture)) if name in ours}


def with_special_ids(
    config: JsonObject, generation: JsonObject, tokenizer: Tokenizer, style: Style, path: Path | None
) -> dict[str, dict[str, Any]]:
    """File name to content: both configs of a model with its special ids, all else as it was.

    Args:
        config, generation: the content of both so far.
        tokenizer, style: say the ids, and how an instruct model samples, where the makers of the model do not.
        path: theirs: a tokenizer, or the directory or the config of a model like this one.

    Raises:
        CorruptFile: a file of theirs is a link to somewhere else, or no JSON object.
    """
    if path is not None and (theirs := _published(config, generation, path)):
        return theirs
    rows = int(config.get("vocab_size") or 0)
    ends_turns = style.instruct or isinstance(generation.get("eos_token_id"), list)
    bos, eos = special_token_ids(config.get("model_type"), rows, tokenizer, instruct=ends_turns)
    if tokenizer.kind == "none" and config.get("eos_token_id") is not None:
        bos, eos = config.get("bos_token_id"), config["eos_token_id"]
    pad = padding_id(tokenizer, style, rows)
    generates = {key: value for key, value in generation.items() if key != "pad_token_id"}
    generates |= {"_from_model_config": False, "bos_token_id": bos, "eos_token_id": eos}
    generates |= {} if pad is None else {"pad_token_id": pad}
    # What Llama 3's makers say of its instruct models; others say nothing, or other things.
    if style.instruct and tokenizer.is_llama3:
        generates |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {CONFIG_FILE: {**config, "bos_token_id": bos, "eos_token_id": eos}, GENERATION_FILE: generates}


def _published(config: JsonObject, generation: JsonObject, path: Path) -> dict[str, dict[str, Any]]:
    """Both configs as the makers of a model have them, if they are there and fit."""
    file = path / CONFIG_FILE if path.is_dir() else path
    theirs = {}
    if file.suffix == ".json" and file.is_file():
        theirs = read_config(file.parent) if file.name == CONFIG_FILE else read_json(file)
    ids = {name: theirs[name] for name in SPECIAL_IDS if name in theirs}
    if not _have_rows(ids, config["vocab_size"]):
        return {}
    beside = file.with_name(GENERATION_FILE)
    if file.name == CONFIG_FILE and beside.is_file():
        check_inside(file.parent, GENERATION_FILE)
        return {CONFIG_FILE: {**config, **ids}, GENERATION_FILE: read_json(beside)}
    if ids.get("eos_token_id") is None:
        return {}
    told = {name: value for name, value in ids.items() if value is not None}
    generates = {**generation, "_from_model_config": not generation, **told}
    return {CONFIG_FILE: {**config, **ids}, GENERATION_FILE: generates}
