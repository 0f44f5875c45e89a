"""The numbers that define a model, and what a model family's table is made of.

A row says which Hugging Face tensors are stacked into one Megatron parameter, and how that parameter is cut over
tensor parallel ranks. Shapes, shards, copies and checks in both directions follow from it. A key says what config.json
and the training arguments call one fact (`models.keys`). Names are templates with `{layer}` and `{expert}` (global
numbers); dimensions are size names of `Architecture.sizes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import groupby
from typing import Any, ClassVar, Literal

from dist_convert.errors import UnsupportedModel

MOST_LAYERS = MOST_EXPERTS = 10_000
#: Layers times experts; the largest models have a tenth of it.
MOST_EXPERTS_OF_ALL_LAYERS = 1 << 18
#: Rank directories of one checkpoint.
MOST_RANKS = 1 << 17
#: Of anything else, such as the width or the vocabulary.
MOST = 1 << 40


def is_size(value: object, most: int = MOST) -> bool:
    """Whether a value from a file is a whole number that a model can have; 0 and None stand for its absence."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most)


def is_number(value: object) -> bool:
    """Whether a value from a file is a number, and neither infinite nor too large to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def check_experts(layers: int, experts: int, file: str) -> None:
    """Refuse more experts than can be planned, by an UnsupportedModel."""
    if layers * experts > MOST_EXPERTS_OF_ALL_LAYERS:
        expected = f"at most {MOST_EXPERTS_OF_ALL_LAYERS} experts in all layers together"
        found = f"{experts} in each of {layers} layers"
        remedy = "the file is damaged; copy it again from where it came from"
        raise UnsupportedModel("a model of impossible sizes", file, expected, found, remedy)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's scaling, with the two factors of DeepSeek's attention.

    `truncate` says that the dimensions between which it interpolates are rounded.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    beta_fast: float
    beta_slow: float
    original_max_positions: int
    mscale: float
    mscale_all_dim: float
    truncate: bool = True


@dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by a factor."""

    rope_type: ClassVar[str] = "linear"
    factor: float


#: `rope_type` is transformers' name of it.
RotaryScaling = RopeScaling | YarnScaling | LinearScaling

#: A fact that only some families have.
Fact = int | float | bool | tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary embeddings, RMSNorm and gated MLPs or experts.

    `ffn` is the width of one MLP, `expert_ffn` that of one expert. `qkv_bias` says that the query, key and value
    projections have biases, `linear_bias` that the output projection and the MLP have them too. `dense_layers` are the
    layers without experts, where others have them. `facts` are those of the family's own keys.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_dim: int
    vocab: int
    padded_vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RotaryScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    dense_layers: tuple[int, ...] = ()
    router_aux_loss: float = 0.0
    sliding_window: int | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def fact(self, name: str) -> Any:
        """A field, or one of `facts`; 0 where this family has no such fact."""
        return getattr(self, name) if name in FIELDS else self.facts.get(name, 0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and no MLP."""
        return self.experts > 0 and layer not in self.dense_layers

    @property
    def expert_width(self) -> int:
        """The width of one expert, which some families call that of an MLP."""
        return self.expert_ffn or self.ffn

    @property
    def is_mixed(self) -> bool:
        """Whether some layers have experts and others do not."""
        return bool(self.dense_layers)

    def sizes(self) -> dict[str, int]:
        """The values of the size names that the tables in this package use: whole numbers, and what follows of them."""
        plain = {name: value for name, value in {**vars(self), **self.facts}.items() if type(value) is int}
        query, key_value = self.heads * self.head_dim, self.query_groups * self.head_dim
        return {"query": query, "key_value": key_value, "one": 1, "twice_hidden": 2 * self.hidden, **plain}


#: Those that every family has.
FIELDS = frozenset(known.name for known in fields(Architecture))

#: Whole on every rank; rows over ranks ("column parallel" in Megatron); columns over ranks ("row parallel").
Split = Literal["replicated", "rows", "columns"]


@dataclass(frozen=True)
class Alias:
    """Another name under which files hold a Hugging Face tensor.

    Attributes:
        name: the template.
        is_stacked: all experts lie in it, along a leading axis.
        rows, part: size names of the rows of all tensors that lie in it (of each expert), and which of them this one
            is; where it lies there alone, none.
        in_turn: their rows take turns, and do not follow each other.
        is_transposed: its columns come first.
        is_published: files have it always, and only we know the tensor's own name.
    """

    name: str
    is_stacked: bool = False
    rows: tuple[str, ...] = ()
    part: int = 0
    in_turn: bool = False
    is_transposed: bool = False
    is_published: bool = False


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: its published name, a size name per dimension, and its other name if it has one.

    `dtype` is the safetensors name of the one that it has whatever the others have.
    """

    name: str
    dims: tuple[str, ...]
    alias: Alias | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors stacked into it along the rows.

    Attributes:
        megatron: the parameter's canonical name; other spellings are in `formats.megatron.names`. "" where Megatron has
            no such parameter, and the tensors are all zeros.
        parts: in the order in which they are stacked.
        split: how it is cut over ranks; experts over expert tensor parallel ranks, all else over tensor parallel ones.
        by_query_group: the parts' rows alternate, those of one query group after those of the other.
        padded_rows: size name of its rows where padding follows the parts' rows, as in the vocabulary.
        is_norm: whether "stored as gamma - 1" may apply to it.
        when, unless: names of facts of the `Architecture` that switch the row on or off, by their truth.
        transformer_engine, habana: what these modules call it, where they call it otherwise.
        is_whole_in_te: Transformer Engine's modules do not cut it.
        local_key: under which the local modules save it in torch_dist, where that is none of these names.
    """

    megatron: str
    parts: tuple[Part, ...]
    split: Split = "replicated"
    by_query_group: bool = False
    padded_rows: str | None = None
    is_norm: bool = False
    when: str | None = None
    unless: str | None = None
    transformer_engine: str = ""
    habana: str = ""
    local_key: str = ""
    is_whole_in_te: bool = False

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether a model of this architecture has the parameter."""
        wanted = self.when is None or bool(architecture.fact(self.when))
        return wanted and not (self.unless is not None and architecture.fact(self.unless))


def part(name: str, dims: str, alias: Alias | None = None) -> Part:
    """A part with its dimensions written as one string, "query hidden"."""
    return Part(name, tuple(dims.split()), alias)


def norm(megatron: str, hf: Part, *, transformer_engine: str = "", habana: str = "", when: str | None = None) -> Row:
    """A norm's weight: whole on every rank."""
    return Row(megatron, (hf,), is_norm=True, when=when, transformer_engine=transformer_engine, habana=habana)


def replicated(megatron: str, hf: Part, *, when: str | None = None) -> Row:
    """A parameter that is whole on every rank."""
    return Row(megatron, (hf,), when=when)


def column_parallel(
    megatron: str,
    *parts: Part,
    by_query_group: bool = False,
    padded_rows: str | None = None,
    when: str | None = None,
    unless: str | None = None,
    habana: str = "",
) -> Row:
    """A parameter whose output rows are divided over ranks (Megatron's ColumnParallelLinear)."""
    return Row(megatron, parts, "rows", by_query_group, padded_rows, when=when, unless=unless, habana=habana)


def row_parallel(megatron: str, hf: Part, *, when: str | None = None) -> Row:
    """A parameter whose input columns are divided over ranks (Megatron's RowParallelLinear)."""
    return Row(megatron, (hf,), "columns", when=when)


_TOKENS, _HEAD = (part(name, "vocab hidden") for name in ("model.embed_tokens.weight", "lm_head.weight"))
#: The rows before and after the layers; families whose files name them otherwise have their own.
EMBEDDING: tuple[Row, ...] = (column_parallel("embedding.word_embeddings.weight", _TOKENS, padded_rows="padded_vocab"),)
FINAL_NORM_AND_HEAD: tuple[Row, ...] = (
    norm("decoder.final_layernorm.weight", part("model.norm.weight", "hidden")),
    column_parallel("output_layer.weight", _HEAD, padded_rows="padded_vocab", unless="tied"),
)

#: How an argument says a fact, where it does not say it plainly:
#:   opposite: it is true where the fact is false.
#:   or_none: None stands for 0.
#:   if_any: None stands for 0, which config.json has as it is.
#:   or_one: None stands for 1.
#:   experts_wide: the width of so many experts.
#:   window: of W tokens with the token itself it says (W - 1, 0).
#:   leading_dense: a list with 0 for each layer without experts, of which config.json counts those that come first.
#:   sparse_steps: the same list; config.json has `decoder_sparse_step` and `mlp_only_layers`.
#:   no_rope: a list with 1 for each of the layers, or every which layer is one; config.json's list has 0 for them.
Codec = Literal[
    "plain", "opposite", "or_none", "if_any", "or_one", "experts_wide", "window", "leading_dense", "sparse_steps",
    "no_rope",
]  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A fact about a model under its names.

    Attributes:
        field: of `Architecture`, or a name of its `facts`.
        config: the key of a config.json; "" where that has none, and `default` holds for all models of the family.
        arg: the training argument; "" where it is not that value by itself, or where neither side says it.
        kind: a whole number, another number, or yes and no.
        default: transformers', where a config.json lacks the key; None where the value then follows from others.
        arg_default: Megatron's, where the args lack it.
        most: of a size.
        codec: how the argument says it.
        aliases: other names in config.json, which some versions of transformers write.
    """

    field: str
    config: str
    arg: str = ""
    kind: Literal["size", "number", "flag"] = "size"
    default: int | float | None = None
    arg_default: int | float | None = None
    most: int = MOST
    codec: Codec = "plain"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pin:
    """A training argument that has one meaning in all models of a family; args that lack it mean the same.

    Attributes:
        arg: its name.
        allowed: the values that have the meaning.
        why: nothing else can be converted.
        is_written: into the args of a target, as the first of these.
        when: the argument that has to be true for this one to matter.
    """

    arg: str
    allowed: tuple[object, ...]
    why: str
    is_written: bool = False
    when: str | None = None


@dataclass(frozen=True)
class Product:
    """A size that is the sum of `terms`, times `factor` if it has one, all names of facts."""

    name: str
    factor: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A model family: its names and facts, and its table in the order in which tensors are written.

    Attributes:
        name: key in the registry, and `model_type` of its config.json.
        hf_class: `architectures` of its config.json.
        keys: what its config.json and its training arguments say.
        pins: see `Pin`.
        required_args, excluded_args: arguments that tell its models from those of other families, by being set or not.
        config: what every config.json of it says besides, whatever another one may say.
        config_pins: likewise, but another value makes another model.
        reasons: why Megatron cannot have another value of these pins.
        before, layer, after: rows before the layers, of each layer, and after them.
        dense, moe: further rows of the layers without and with experts.
        prediction: further rows of layers of multi-token prediction, see `in_prediction`.
        copies: Hugging Face names of what such a layer holds once more, the embedding first, and their templates in it.
        special_ids: of begin and end of text, where there is no tokenizer.
        products: sizes that its tables have besides.
        other_types: further values of `model_type` for the same model.
        scalings: how its rotary frequencies may be scaled in transformers' words, as far as Megatron computes it, too.
        layer_types: the kinds of attention that its layers have in turn, where they are not alike.
    """

    name: str
    hf_class: str
    keys: tuple[Key, ...]
    layer: tuple[Row, ...]
    required_args: tuple[str, ...] = ()
    excluded_args: tuple[str, ...] = ()
    before: tuple[Row, ...] = EMBEDDING
    after: tuple[Row, ...] = FINAL_NORM_AND_HEAD
    pins: tuple[Pin, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    dense: tuple[Row, ...] = ()
    moe: tuple[Row, ...] = ()
    config_pins: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    prediction: tuple[Row, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    special_ids: tuple[int | None, int | None] = (None, None)
    products: tuple[Product, ...] = ()
    other_types: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("default", "llama3", "yarn", "linear")
    layer_types: tuple[str, ...] = ()

    @property
    def signs(self) -> dict[str, bool]:
        """The arguments that tell its models from those of other families, and whether they are set."""
        known = {"num_experts": bool(self.moe), "multi_latent_attention": self.is_latent}
        return known | dict.fromkeys(self.required_args, True) | dict.fromkeys(self.excluded_args, False)

    @property
    def is_latent(self) -> bool:
        """Whether its attention is latent, for whose YaRN Megatron has arguments of their own."""
        return any(key.field == "kv_rank" for key in self.keys)


def entries(family: Family, architecture: Architecture) -> Iterator[tuple[Row, int | None, int | None]]:
    """All rows that apply, with layer and expert numbers, in the order in which tensors are written."""
    for row in family.before:
        yield row, None, None
    of_kind = {
        has_experts: [row for row in (*family.layer, *further) if row.applies_to(architecture)]
        for has_experts, further in ((False, family.dense), (True, family.moe))
    }
    for layer in range(architecture.layers):
        for row, expert in _rows_of_layer(of_kind[architecture.has_experts(layer)], architecture.experts):
            yield row, layer, expert
    for number in range(architecture.fact("mtp_layers")):
        # They are what the last layer is.
        kind = of_kind[architecture.has_experts(architecture.layers - 1)]
        rows = [row for row in (*family.prediction, *kind) if row.megatron]
        numbered = [in_prediction(row, architecture.layers + number, number) for row in rows]
        yield from ((row, None, expert) for row, expert in _rows_of_layer(numbered, architecture.experts))
    for row in family.after:
        if row.applies_to(architecture):
            yield row, None, None


@cache  # rows are known by their identity
def in_prediction(row: Row, layer: int, number: int) -> Row:
    """A row as a layer of multi-token prediction has it, with that layer's numbers in its names.

    `layer` is its number in Hugging Face's names, where it follows the others; `number` in Megatron's, where what all
    layers have is below `transformer_layer`.
    """

    def named(template: str) -> str:
        inside = template.replace("decoder.layers.{layer}.", f"mtp.layers.{number}.transformer_layer.")
        return inside.replace("{layer}", str(layer)).replace("{mtp}", str(number))

    aliases = [part.alias and replace(part.alias, name=named(part.alias.name)) for part in row.parts]
    parts = zip(row.parts, aliases, strict=True)
    return replace(
        row,
        megatron=named(row.megatron),
        parts=tuple(replace(part, name=named(part.name), alias=alias) for part, alias in parts),
        transformer_engine=named(row.transformer_engine),
        habana=named(row.habana),
        local_key=named(row.local_key),
    )


def copies_of(family: Family, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Under which names Hugging Face files hold a tensor once more, by its own; a tied head is the embedding."""
    further = range(architecture.layers, architecture.layers + architecture.fact("mtp_layers"))
    found: dict[str, tuple[str, ...]] = {}
    for name, copy in family.copies.items():
        own = next(iter(found), name) if architecture.tied else name
        found[own] = (*found.get(own, ()), *(copy.format(layer=layer) for layer in further))
    return found


def _rows_of_layer(listed: Sequence[Row], experts: int) -> Iterator[tuple[Row, int | None]]:
    """The rows of one layer with the expert number of each, one expert after the other."""
    for has_expert, group in groupby(listed, key=lambda row: "{expert}" in row.megatron):
        alike = tuple(group)
        for expert in range(experts) if has_expert else (None,):
            for row in alike:
                yield row, expert


def part_shape(part: Part, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Elements per dimension of a Hugging Face tensor."""
    return tuple(sizes[dim] for dim in part.dims)


def alias_shape(part: Part, alias: Alias, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Elements per dimension of what holds a Hugging Face tensor under another name."""
    rows, *columns = part_shape(part, sizes)
    shape = (sum(sizes[name] for name in alias.rows) or rows, *columns)
    shape = shape[::-1] if alias.is_transposed else shape
    return (sizes["experts"], *shape) if alias.is_stacked else shape


def part_size(part: Part, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of a Hugging Face tensor; a vector has one column."""
    shape = part_shape(part, sizes)
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)
