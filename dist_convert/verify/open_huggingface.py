"""A Hugging Face directory as a verification sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_convert.boxes import Box
from dist_convert.errors import ConversionError, UnsupportedModel, raise_together
from dist_convert.hf_dialects import hf_view, leftovers
from dist_convert.hf_to_megatron import discover_tensors
from dist_convert.metadata.hf_architecture import architecture_from_config, config_vocab
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.models.schema import Part, Row
from dist_convert.move.exchange import World
from dist_convert.plan.geometry import part_shape, part_size
from dist_convert.plan.megatron import entries
from dist_convert.read.discover import Discovery
from dist_convert.read.huggingface import CONFIG_FILE, read_directory
from dist_convert.records import FLOAT_DTYPES, StoredTensor, View
from dist_convert.verify.catalog import Checkpoint, Opened, Region, Whole


def open_huggingface(directory: Path, world: World) -> Opened:
    """Read the config and the headers of all weights files.

    Raises:
        SourceError: all that they show to be wrong.
    """
    seen = read_directory(directory)
    vocab = config_vocab(seen.config, file=CONFIG_FILE)
    # Output biases without MLP biases are read as tensors that must be zero, which the comparison finds out.
    architecture = architecture_from_config(
        seen.config, padded_vocab=vocab, file=CONFIG_FILE, zero_output_bias=not seen.config.get("mlp_bias")
    )
    found, stored = discover_tensors(directory, seen, world)
    return Opened(vocab, lambda _: _catalog(directory, architecture, found, stored))


def _catalog(
    directory: Path, architecture: Architecture, found: Discovery, stored: Mapping[str, StoredTensor]
) -> Checkpoint:
    tensors: dict[str, Whole] = {}
    copies: dict[str, tuple[View, ...]] = {}
    problems: list[ConversionError] = []
    sizes = architecture.sizes()
    for part, layer, expert in _parts(architecture):
        name = part.name.format(layer=layer, expert=expert)
        try:
            view = hf_view(part.name, layer, expert, stored, *part_size(part, sizes), experts=architecture.experts)
        except ConversionError as problem:
            problems.append(problem)
            continue
        if view.dtype not in FLOAT_DTYPES:
            problems.append(_no_float(view))
        tensors[name] = Whole(name, part_shape(part, sizes), view.dtype)
        copies[name] = (view,)
    copies |= _tied_head(architecture, stored, copies)
    _, unknown = leftovers(
        stored,
        {view.tensor for views in copies.values() for view in views} | {problem.tensor for problem in problems},
        hf_class=FAMILIES[architecture.family].hf_class,
        tied=architecture.tied,
    )
    raise_together([*problems, *unknown])
    return Checkpoint(
        path=directory,
        kind="Hugging Face",
        architecture=architecture,
        says_vocab=True,
        tensors=tensors,
        regions=lambda name: (Region(Box(0, 0, tensors[name].rows, tensors[name].columns), copies[name]),),
        padding_rows=0,
        visible=found.visible,
    )


def _parts(architecture: Architecture) -> list[tuple[Part, int | None, int | None]]:
    return [
        (part, layer, expert)
        for entry, layer, expert in entries(FAMILIES[architecture.family], architecture)
        for part in (entry.parts if isinstance(entry, Row) else (entry.part,))
    ]


def _tied_head(
    architecture: Architecture, stored: Mapping[str, StoredTensor], copies: Mapping[str, tuple[View, ...]]
) -> dict[str, tuple[View, ...]]:
    """The embedding with the head as another copy of it, where a tied model is saved with one of the same shape."""
    family = FAMILIES[architecture.family]
    heads = [entry for entry in family.after if isinstance(entry, Row) and entry.unless == "tied"]
    if not architecture.tied or not isinstance(family.before[0], Row):
        return {}
    embedding = family.before[0].parts[0].name
    views = copies.get(embedding, ())
    for head in heads:
        tensor = stored.get(head.parts[0].name)
        if views and tensor and tensor.dtype == views[0].dtype and tensor.shape == (views[0].rows, views[0].columns):
            views = (*views, View.of(tensor))
    return {embedding: views} if views else {}


def _no_float(view: View) -> UnsupportedModel:
    return UnsupportedModel(
        "a weight of an unexpected dtype",
        tensor=view.tensor,
        file=view.file,
        expected=" or ".join(FLOAT_DTYPES),
        found=view.dtype,
        remedy="save the model dequantised",
    )
