"""Spellings of the same Hugging Face tensor: one file entry per expert or all experts fused, with and without a head.

Tables in `models` use the names that every version of transformers reads and writes. Files may also hold what
transformers 5 has in memory; checked by running transformers 5.23 on a Mixtral with F the width of an expert, h hidden
and E experts:

* `save_pretrained` writes the tables' names, and `save_pretrained(save_original_format=False)` writes
  `mlp.gate.weight` [E, h], `mlp.experts.gate_up_proj` [E, 2F, h] (of each expert, rows 0..F are w1 and F..2F w3) and
  `mlp.experts.down_proj` [E, h, F] (w2). It loads both.
* a base model (`MixtralModel`, `LlamaModel`) is saved without `model.` in front of the names, and without a head.

Names are generated and looked up, never parsed. More: docs/formats.md, "Tensor names for Llama and Mixtral".
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, UnknownTensor, WrongShape
from dist_convert.formats.huggingface.quantised import ACTIVATION_SCALE, BLOCKS
from dist_convert.formats.huggingface.read import CONFIG_FILE
from dist_convert.models.blocks import MTP_REASON
from dist_convert.models.schema import Alias, Part, alias_shape, part_size
from dist_convert.records import Box, StoredTensor, View

_BASE_MODEL = "model."
HEAD = "lm_head.weight"
_ROTARY = ".rotary_emb.inv_freq"
#: The norm of embeddings, which each layer of multi-token prediction has and no other.
OF_MTP = ".enorm.weight"

#: Tensors without a place in any family here: part of the name -> what they are.
_HOMELESS = (
    ((".q_norm.", ".k_norm."), "a norm of queries or keys"),
    ((".weight_scale", ".input_scale", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".SCB"), "quantisation"),
    ((".lora_",), "an adapter that is not merged"),
    ((".shared_expert",), "shared experts"),
    ((".experts.", ".block_sparse_moe."), "experts"),
    ((".bias",), "a bias"),
    (("score.", "classifier.", "v_head."), "a head that is not a language model's"),
)


def published(part: Part) -> Alias:
    """How published files hold a tensor."""
    return part.alias if part.alias and part.alias.is_published else Alias(part.name)


@cache  # what all layers and experts share
def _spellings(part: Part) -> dict[str, Alias]:
    """The templates of names under which a part may be stored."""
    found = [published(part), *([part.alias] if part.alias else [])]
    # Blocks of codes lie along the columns, which come last in them.
    found += [replace(a, name=f"{a.name}{BLOCKS}", is_transposed=False) for a in found[-1:] if a.is_transposed]
    whole = {alias.name: alias for alias in found}
    return whole | {n.removeprefix(_BASE_MODEL): alias for n, alias in whole.items() if n.startswith(_BASE_MODEL)}


def hf_view(
    part: Part, layer: int | None, expert: int | None, stored: Mapping[str, StoredTensor], sizes: Mapping[str, int]
) -> View:
    """Where a table's part at one layer and expert is stored, as rows x columns; vectors have one column.

    `stored` are all tensors of the model by name, `sizes` see `Architecture.sizes`.

    Raises:
        MissingTensor: under none of its names.
        WrongShape: of another shape than config.json implies.
        InconsistentShards: under two of its names.
    """
    spellings = {name.format(layer=layer, expert=expert): alias for name, alias in _spellings(part).items()}
    name, first = next(iter(spellings.items()))
    present = [(alias, stored[other]) for other, alias in spellings.items() if other in stored]
    if not present:
        remedy = f"the model is incomplete, or {CONFIG_FILE} is another model's; download or save it again"
        if name == HEAD:
            remedy = "a base model was saved without its head: save the ...ForCausalLM model; "
            remedy += f"if it shares the embedding, set tie_word_embeddings in {CONFIG_FILE}"
        found = "nothing in any weights file"
        expected = f"shape {list(alias_shape(part, first, sizes))}, under one of {', '.join(spellings)}"
        raise MissingTensor(f"no tensor for {name}", tensor=name, expected=expected, found=found, remedy=remedy)
    if len(present) > 1:
        expected = "one spelling for each tensor"
        files, found = dict.fromkeys(tensor.file for _, tensor in present), ", ".join(one.name for _, one in present)
        remedy = "two saves are mixed in this directory; download or save the model again"
        raise InconsistentShards(f"{name} is stored twice", ", ".join(files), expected, found, remedy, tensor=name)
    [(alias, tensor)] = present
    if tensor.shape != (shape := alias_shape(part, alias, sizes)):
        raise WrongShape(
            f"wrong shape for {name}",
            tensor.file,
            tensor=tensor.name,
            expected=f"{list(shape)} from {CONFIG_FILE}",
            found=f"{list(tensor.shape)}",
            remedy=f"{CONFIG_FILE} is not this model's, or was changed; take both from the same place",
        )
    if tensor.scales and (alias.is_transposed or (alias.in_turn and tensor.scales.block_rows > 1)):
        tensor = replace(tensor, scales=None)  # blocks that do not lie along the rows are not decoded: another dtype
    whole = View.of(tensor.entry(expert or 0) if alias.is_stacked else tensor)
    whole = whole.transposed() if alias.is_transposed else whole
    rows, heights = part_size(part, sizes)[0], [sizes[name] for name in alias.rows]
    begin = alias.part if alias.in_turn else sum(heights[: alias.part])
    begun = whole.window(Box(begin, 0, rows, whole.columns))
    return begun.with_row_stride(rows, len(heights) * whole.row_stride) if alias.in_turn else begun


def leftovers(
    stored: Mapping[str, StoredTensor],
    used: Collection[str],
    *,
    hf_class: str,
    tied: bool,
    dropped_from: int | None = None,
) -> tuple[tuple[tuple[str, int, int], ...], list[ConversionError]]:
    """Stored tensors that no part used: what is dropped on purpose, and an `UnknownTensor` for each other.

    Layers of multi-token prediction from `dropped_from` on are left out; `check_tied` compares a head that is stored
    though config.json says that it is `tied`.
    """
    dropped: dict[str, list[int]] = {}
    unknown: list[ConversionError] = []
    # Others are the model's own, where config.json counts too few.
    further = {_layer_of(name) for name in stored if name.endswith(OF_MTP)}
    for name, tensor in stored.items():
        if name in used:
            continue
        if name.endswith(ACTIVATION_SCALE):
            reason = "activation_scale (of inference in FP8)"
        elif f".{name}".endswith(_ROTARY):
            reason = "rotary_emb.inv_freq (computed from the config)"
        elif name == HEAD and tied:
            reason = f"{HEAD} (tied to the embedding by {CONFIG_FILE})"
        elif dropped_from is not None and (layer := _layer_of(name)) >= dropped_from and layer in further:
            reason = MTP_REASON
        else:
            unknown.append(_unknown(tensor, hf_class))
            continue
        dropped.setdefault(reason, []).append(tensor.size_bytes)
    return tuple((reason, len(sizes), sum(sizes)) for reason, sizes in sorted(dropped.items())), unknown


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 for none."""
    stem, _, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return int(number) if stem in ("", _BASE_MODEL) and number.isdecimal() else -1


def _unknown(tensor: StoredTensor, hf_class: str) -> UnknownTensor:
    what = next((what for marks, what in _HOMELESS if any(mark in tensor.name for mark in marks)), "an unknown tensor")
    return UnknownTensor(
        f"{tensor.name} has no place in a {hf_class}",
        tensor.file,
        tensor=tensor.name,
        expected=f"only tensors of {hf_class} with the sizes in {CONFIG_FILE}",
        found=f"{what}, shape {list(tensor.shape)}",
        remedy="nothing is dropped silently: check num_hidden_layers and model_type; give --drop-mtp "
        "to leave out layers of multi-token prediction, which are numbered after the others",
    )
