"""Spellings of the same Megatron parameter: local, Transformer Engine and Habana names, grouped and dynamic experts.

Tables in `models` use one canonical name for each parameter. Here each canonical name is given every spelling that a
file may use, and each spelling says how the stored tensor is seen as the canonical rows x columns: names are generated
and looked up, never parsed. Names that no table has are described to people at the end. Facts: docs/formats.md, "Norms
and their spellings" and "Experts".
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dist_convert.models.schema import Row
from dist_convert.options import MTP_LAYER_NAMES
from dist_convert.records import DTYPE_BYTES, StoredTensor, View

#: plain: as in the table. transposed: columns x rows. stacked: experts along a leading axis. grouped: all experts of
#: a rank in one matrix whose memory is [expert][column][row].
Storage = Literal["plain", "transposed", "stacked", "grouped"]


@dataclass(frozen=True)
class Piece:
    """One stored tensor that holds all or some rows of a canonical shard, or those of all experts of a rank.

    Attributes:
        name: the template of its name, normalised, see `Numbers`.
        storage: see `Storage`.
        part, parts: which of how many equal row ranges of the canonical shard it holds.
    """

    name: str
    storage: Storage = "plain"
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Numbers:
    """What templates of names call `{layer}`, within its file, `{expert}` of the model and `{local}` one of its rank.

    `per_rank` are the experts of a rank.
    """

    layer: int | None = None
    expert: int | None = None
    local: int = 0
    per_rank: int = 1

    def named(self, template: str) -> str:
        """A template's name with these numbers."""
        return template.format(layer=self.layer, expert=self.expert, local=self.local)


@dataclass(frozen=True)
class Spelling:
    """One way to store a canonical parameter: a dialect's name, and the pieces that make it up."""

    dialect: str
    pieces: tuple[Piece, ...]


#: Ends of names that hold no weights.
_NO_WEIGHTS = ("._extra_state", ".rotary_pos_emb.inv_freq", ".local_tokens_per_expert")
CAPACITY_BINS = ".mlp.router.capacity_bins."


def capacity_bin(layer: int, name: str) -> str:
    """The full name of a capacity bin tensor, by the layer's number in its file."""
    return f"decoder.layers.{layer}{CAPACITY_BINS}{name}"


#: Components of names in Megatron's classes before Megatron-Core, and what they are called since.
_BEFORE_CORE = {
    "encoder": "decoder", "transformer": "decoder", "attention": "self_attention", "query_key_value": "linear_qkv",
    "dense": "linear_proj", "dense_h_to_4h": "linear_fc1", "dense_4h_to_h": "linear_fc2",
    "input_norm": "input_layernorm", "post_attention_norm": "pre_mlp_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm", "final_norm": "final_layernorm",
}  # fmt: skip


def normalise(name: str) -> str:
    """What Megatron-Core calls a stored tensor, without the components that wrappers and torch.compile put in.

    What is below newer versions' `mtp_model_layer` is below `transformer_layer`, as in core 0.16.
    """
    components = [component for component in name.split(".") if component != "_orig_mod"]
    while components[:1] == ["module"]:
        components = components[1:]
    if components[:1] == ["language_model"]:
        components = [_BEFORE_CORE.get(component, component) for component in components[1:]]
    if components == ["word_embeddings_for_head", "weight"]:
        return TIED[1]
    return ".".join(components).replace(f".{MTP_LAYER_NAMES[1]}.", f".{MTP_LAYER_NAMES[0]}.")


def with_mtp_name(name: str, mtp: str) -> str:
    """A name as training has it whose layers of multi-token prediction call the layer in them so."""
    return name.replace(f".{MTP_LAYER_NAMES[0]}.", f".{mtp}.") if is_of_mtp(name) else name


def mtp_name_of(listed: Iterable[str]) -> str:
    """Which of `MTP_LAYER_NAMES` some stored names have."""
    return MTP_LAYER_NAMES[any(f".{MTP_LAYER_NAMES[1]}." in name for name in listed)]


def layer_of(name: str) -> int | None:
    """The number of the layer, within its file, that a normalised name belongs to."""
    stem, layers, number = (*name.split(".", 3), "", "", "")[:3]
    return int(number) if (stem, layers) == ("decoder", "layers") and number.isdecimal() else None


#: The embedding, and what its copy on the last of several pipeline stages is called where both are tied.
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")

#: Ends of names of weights whose shapes tell sizes of layers: gated, projection, fused queries, keys and values.
TELLING_SIZES = ("mlp.linear_fc1.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight")


def reason_to_drop(name: str) -> str | None:
    """What an entry is that a converted model does not need; None for weights and for what is not known."""
    if CAPACITY_BINS in name:
        return "capacity bins (statistics of training)"
    return "extra state (no weights)" if f".{name}".endswith(_NO_WEIGHTS) else None


def is_of_mtp(name: str) -> bool:
    """Whether a tensor belongs to the layers of multi-token prediction."""
    return name.startswith("mtp.")


def has_fused_norm(name: str) -> bool:
    """Whether a tensor is a norm that Transformer Engine fused into the linear layer behind it."""
    return name.endswith(".layer_norm_weight")


def synonyms(row: Row) -> tuple[tuple[str, str], ...]:
    """The templates under which a parameter may be stored as it is, each with the dialect that uses it."""
    others = (("transformer_engine", row.transformer_engine), ("habana", row.habana))
    return (("canonical", row.megatron), *((dialect, name) for dialect, name in others if name))


def spellings(row: Row) -> tuple[Spelling, ...]:
    """Every way in which the parameters of a row may be stored, of all layers and experts."""
    if "{expert}" not in row.megatron:
        return tuple(Spelling(dialect, (Piece(name),)) for dialect, name in synonyms(row))
    before, tail = row.megatron.split("{expert}.")
    linear, kind = tail.split(".")
    found = [
        Spelling("sequential", (Piece(f"{before}local_experts.{{local}}.{tail}"),)),
        Spelling("te-grouped", (Piece(f"{before}{tail}{{local}}"),)),
        Spelling("te-single", (Piece(f"{before}{tail}", "stacked"),)),
    ]
    if kind != "weight":
        return tuple(found)
    grouped = "weight1" if linear == "linear_fc1" else "weight2"
    dynamic = f"{before}local_expert_{{expert}}_{linear}"
    found += [
        Spelling("grouped", (Piece(f"{before}{grouped}", "grouped"),)),
        Spelling("habana-dynamic", (Piece(f"{dynamic}_weight"),)),
        Spelling("habana-dynamic-transposed", (Piece(f"{dynamic}_weight", "transposed"),)),
    ]
    halves = (0, 1) if linear == "linear_fc1" else ()
    unfused = [Piece(f"{dynamic}{half + 1}_weight", part=half, parts=2) for half in halves]
    transposed = [replace(half, storage="transposed") for half in unfused]
    listed = (("habana-dynamic-unfused", unfused), ("habana-dynamic-transposed-unfused", transposed))
    return (*found, *(Spelling(dialect, tuple(pieces)) for dialect, pieces in listed if pieces))


def spelling_for(found: Iterable[Spelling], *, norms: str, experts: str) -> Spelling:
    """The spelling, among all of one parameter, that a target of this dialect wants; see `TargetDialect`."""
    listed = tuple(found)
    wanted = (experts, "transformer_engine" if norms == "transformer_engine" else "canonical", "canonical")
    return next(spelling for dialect in wanted for spelling in listed if spelling.dialect == dialect)


def stored_shape(piece: Piece, rows: int, columns: int, per_rank: int, *, is_vector: bool) -> tuple[int, ...]:
    """The shape of the stored tensor that holds a piece of `rows` x `columns`: the inverse of `view`."""
    if piece.storage == "grouped":
        first = piece.name.endswith("weight1")
        return (columns, per_rank * rows) if first else (per_rank * columns, rows)
    if piece.storage == "stacked":
        return (per_rank, rows, columns)
    if piece.storage == "transposed":
        return (columns, rows)
    return (rows,) if is_vector else (rows, columns)


def choose(found: Iterable[Spelling], *, permuted: bool) -> Spelling | None:
    """The one spelling among those that fit the stored shapes; None when there is none or more than one.

    `permuted` is `moe_permuted_weights` of the args, which decides for square matrices only.
    """
    fitting = list(found)
    if len(fitting) == 2 and fitting[1].dialect.startswith(f"{fitting[0].dialect.removesuffix('-unfused')}-transposed"):
        return fitting[0] if permuted else fitting[1]
    return fitting[0] if len(fitting) == 1 else None


def view(piece: Piece, stored: StoredTensor, rows: int, columns: int, numbers: Numbers) -> View | None:
    """A stored tensor seen as `rows` x `columns` of its piece, None where it does not fit; vectors have one column."""
    shape, strides = stored.shape, stored.strides
    offset, between = 0, (0, 0)  # elements before the first one; between rows, and between columns
    if piece.storage == "plain" and shape == (rows, columns):
        between = strides[0], strides[1]
    elif piece.storage == "plain" and shape == (rows,) and columns == 1:
        between = strides[0], 1
    elif piece.storage == "transposed" and shape == (columns, rows):
        between = strides[1], strides[0]
    elif piece.storage == "stacked" and shape == (numbers.per_rank, rows, columns):
        offset, between = numbers.local * strides[0], (strides[1], strides[2])
    elif piece.storage == "grouped" and len(shape) == 2 and strides == (shape[1], 1):
        # weight1 is declared [hidden, experts x rows], weight2 [experts x columns, hidden]; the memory is alike.
        if shape not in ((columns, numbers.per_rank * rows), (numbers.per_rank * columns, rows)):
            return None
        offset, between = numbers.local * rows * columns, (1, rows)
    else:
        return None
    offset_bytes = stored.offset_bytes + offset * DTYPE_BYTES[stored.dtype]
    return View(stored.file, stored.name, stored.dtype, offset_bytes, rows, columns, *between)


#: Parameters that exist in Megatron and have no place in any family here: part of the name -> what it is.
_HOMELESS = (
    (".q_layernorm.", "query layernorm (--qk-layernorm)"),
    (".k_layernorm.", "key layernorm (--qk-layernorm)"),
    (".shared_experts.", "shared experts (--moe-shared-expert-intermediate-size)"),
    (".router.expert_bias", "the router's expert bias (--moe-router-enable-expert-bias)"),
    (".router.bias", "the router's bias"),
    ("mtp.", "multi-token prediction (--mtp-num-layers)"),
    ("embedding.position_embeddings.", "learned position embeddings"),
    (".experts.dynamic_mlp.", "FP8 dynamic experts (IntelFP8DynamicMLP)"),
    ("layernorm.bias", "a LayerNorm bias"),
    ("layer_norm_bias", "a LayerNorm bias"),
    (".bias", "a bias"),
)


def describe_homeless(name: str) -> str:
    """What a parameter is for which no table has a row."""
    return next((what for part, what in _HOMELESS if part in name), "a parameter that no table names")


#: A part of the names of experts -> their spelling.
_EXPERTS = {
    ".experts.local_experts.": "sequential",
    ".experts.local_expert_": "habana-dynamic",
    ".experts.weight1": "grouped",
    ".experts.linear_fc1.weight": "te-grouped",
}


def is_of_expert(name: str) -> bool:
    """Whether a tensor is one of the experts, which other ranks hold others of."""
    return ".experts." in name


def dialect_of(names: Iterable[str]) -> tuple[str, str]:
    """How names spell norms and experts: what a target of the same spelling is asked for with."""
    listed = list(names)
    experts = [what for mark, what in _EXPERTS.items() if any(mark in name for name in listed)]
    return "transformer_engine" if any(map(has_fused_norm, listed)) else "local", experts[0] if experts else ""
