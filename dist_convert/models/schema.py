"""What a model family's table is made of.

A row says which Hugging Face tensors are stacked into one Megatron parameter, and how that parameter is cut over
tensor parallel ranks. Shapes, shards, copies and checks in both directions follow from it. Names are templates with
`{layer}` and `{expert}` (global numbers); dimensions are size names of `Architecture.sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from dist_convert.models.architecture import Architecture

#: Whole on every rank; rows over ranks ("column parallel" in Megatron); columns over ranks ("row parallel").
Split = Literal["replicated", "rows", "columns"]

#: In which order the parts' rows alternate: per tensor parallel shard, per query group, or not at all.
Interleave = Literal["shards", "query_groups", "none"]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: its name, and a size name per dimension."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors stacked into it along the rows.

    Attributes:
        megatron: the parameter's canonical name; other spellings are in `dialects`.
        parts: in the order in which they are stacked.
        split: how it is cut over ranks; experts over expert tensor parallel ranks, all else over tensor parallel ones.
        interleave: see `Interleave`.
        padded_rows: size name of its rows where padding follows the parts' rows, as in the vocabulary.
        is_norm: whether "stored as gamma - 1" may apply to it.
        when, unless: names of boolean fields of `Architecture` that switch the row on or off.
    """

    megatron: str
    parts: tuple[Part, ...]
    split: Split = "replicated"
    interleave: Interleave = "none"
    padded_rows: str | None = None
    is_norm: bool = False
    when: str | None = None
    unless: str | None = None

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether a model of this architecture has the parameter."""
        wanted = self.when is None or bool(getattr(architecture, self.when))
        return wanted and not (self.unless is not None and getattr(architecture, self.unless))


@dataclass(frozen=True)
class ZeroTensor:
    """A Hugging Face tensor that is all zeros because Megatron's model has no such parameter."""

    part: Part
    when: str
    unless: str

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether the Hugging Face model needs the tensor."""
        return bool(getattr(architecture, self.when)) and not getattr(architecture, self.unless)


Entry = Row | ZeroTensor


@dataclass(frozen=True)
class Family:
    """A model family: its table in the order in which tensors are written, and what its config is called.

    Attributes:
        name: key in the registry, and `model_type` of its config.json.
        hf_class: `architectures` of its config.json.
        before, layer, after: rows before the layers, of each layer, and after them.
    """

    name: str
    hf_class: str
    before: tuple[Entry, ...]
    layer: tuple[Entry, ...]
    after: tuple[Entry, ...]


def moves_of_layer(entries: tuple[Entry, ...], experts: int) -> Iterator[tuple[Entry, int | None]]:
    """The entries of one layer with the expert number of each, one expert after the other."""
    for has_expert, group in groupby(
        entries, key=lambda entry: isinstance(entry, Row) and "{expert}" in entry.megatron
    ):
        listed = tuple(group)
        for expert in range(experts) if has_expert else (None,):
            for entry in listed:
                yield entry, expert


def part(name: str, dims: str) -> Part:
    """A part with its dimensions written as one string, "query hidden"."""
    return Part(name, tuple(dims.split()))


def norm(megatron: str, hf: Part) -> Row:
    """A norm's weight: whole on every rank."""
    return Row(megatron, (hf,), is_norm=True)


def replicated(megatron: str, hf: Part, *, when: str | None = None) -> Row:
    """A parameter that is whole on every rank."""
    return Row(megatron, (hf,), when=when)


def column_parallel(
    megatron: str,
    *parts: Part,
    interleave: Interleave = "shards",
    padded_rows: str | None = None,
    when: str | None = None,
    unless: str | None = None,
) -> Row:
    """A parameter whose output rows are divided over ranks (Megatron's ColumnParallelLinear)."""
    return Row(megatron, parts, "rows", interleave, padded_rows, when=when, unless=unless)


def row_parallel(megatron: str, hf: Part) -> Row:
    """A parameter whose input columns are divided over ranks (Megatron's RowParallelLinear)."""
    return Row(megatron, (hf,), "columns")
