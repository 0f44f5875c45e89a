"""What a verification found, as data, as text and as JSON."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from math import prod
from typing import Any

from dist_convert.compare.blocks import Amount, Checkpoint, Work
from dist_convert.compare.compare import Compared, Difference
from dist_convert.errors import shown_line
from dist_convert.models.schema import Architecture
from dist_convert.records import DTYPE_BYTES, counted, human_bytes

#: Fields of `Architecture` that do not belong to the model: how a checkpoint is laid out, and how it was trained.
_NOT_THE_MODEL = ("padded_vocab", "router_aux_loss")

#: Differences that the text shows.
_SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """What was compared, and what differs.

    Attributes:
        a, b: what the checkpoints are: their path and kind.
        fields: of the config that were compared.
        config: fields that differ, with both values.
        only_a, only_b: tensors that one of them lacks.
        shapes: tensors of different shapes, with both.
        values: tensors, or copies of a tensor, whose values differ.
        tensors: that were compared, by the dtypes on both sides.
        amount: elements and bytes of what was compared of them.
        all_elements: of these tensors.
        padding_rows: of the vocabulary, of A and of B.
        sample: share of the blocks that were compared.
        notes: what the user should know beside it.
    """

    a: tuple[str, str]
    b: tuple[str, str]
    fields: int
    config: Mapping[str, tuple[Any, Any]]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    values: tuple[Difference, ...]
    tensors: Mapping[tuple[str, str], int]
    amount: Amount
    all_elements: int
    padding_rows: tuple[int, int]
    sample: Fraction
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        return not (self.config or self.only_a or self.only_b or self.shapes or self.values)


def outcome_of(a: Checkpoint, b: Checkpoint, work: Work, compared: Compared) -> Outcome:
    """Everything that differs, of config, tensors and values; `compared` is what all ranks found."""
    names = [field.name for field in fields(Architecture) if field.name not in _NOT_THE_MODEL]
    config = {name: (getattr(a.catalog.architecture, name), getattr(b.catalog.architecture, name)) for name in names}
    shapes = {name: (a.tensors[name].shape, b.tensors[name].shape) for name in a.tensors if name in b.tensors}
    order = {name: number for number, name in enumerate(a.tensors)}
    found = sorted(compared.differences.values(), key=lambda one: (order[one.tensor], one.between))
    return Outcome(
        a=(str(a.path), a.kind),
        b=(str(b.path), b.kind),
        fields=len(names),
        config={name: pair for name, pair in config.items() if pair[0] != pair[1]},
        only_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_b=tuple(name for name in b.tensors if name not in a.tensors),
        shapes={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        values=tuple(replace(one, index=one.index[: len(a.tensors[one.tensor].shape)]) for one in found),
        tensors=Counter((a.tensors[name].dtype, b.tensors[name].dtype) for name in work.tensors),
        amount=compared.amount,
        all_elements=sum(prod(a.tensors[name].shape) for name in work.tensors),
        padding_rows=(_padding_rows(a), _padding_rows(b)),
        sample=work.sample,
        notes=tuple(_notes(a, b, {one.tensor for one in found})),
    )


def _padding_rows(side: Checkpoint) -> int:
    return sum(region.box.rows for name in side.tensors for region in side.catalog.padding(name))


def _notes(a: Checkpoint, b: Checkpoint, differ: set[str]) -> list[str]:
    notes = []
    for side, letter, other in ((a, "A", b), (b, "B", a)):
        if not side.says_vocab:
            taken = "that of the other is used" if other.says_vocab else "its padded size is used"
            notes.append(
                f"{letter} does not say how many tokens its vocabulary has: {taken} (or give --true-vocab-size)"
            )
    if any(DTYPE_BYTES[a.tensors[name].dtype] < DTYPE_BYTES[b.tensors[name].dtype] for name in differ):
        notes.append("A has the narrower dtype: if A was made from B, swap them")
    return notes


def differences(outcome: Outcome) -> list[str]:
    """Every difference, a line each: config fields, then tensors."""
    lines = [f"{name}: {first} in A, {second} in B" for name, (first, second) in outcome.config.items()]
    lines += [f"{name}: only in A" for name in outcome.only_a]
    lines += [f"{name}: only in B" for name in outcome.only_b]
    lines += [f"{name}: shape {list(one)} in A, {list(other)} in B" for name, (one, other) in outcome.shapes.items()]
    least = "at least " if outcome.sample < 1 else ""
    for found in outcome.values:
        first, second = (v + (f" in {file}" if file else "") for v, file in zip(found.values, found.files, strict=True))
        what = f"{found.between} differ in {least}{counted(found.elements, 'element')}"
        lines.append(f"{found.tensor}: {what}, first at {list(found.index)}: {first}, {second}")
    return lines


def describe_sample(outcome: Outcome) -> str:
    """Which share was asked for, and how much that is: a tensor of few blocks has a large part of them in its ends."""
    share = 100 * outcome.amount.elements / max(1, outcome.all_elements)
    blocks = f"{outcome.sample} of the blocks, and the first and last block of every tensor"
    return f"{blocks}: {share:.3g} % of all elements"


def as_text(outcome: Outcome) -> str:
    """The report for people."""
    amount = outcome.amount
    lines = [f"{letter}  {path}  {kind}" for letter, (path, kind) in (("A", outcome.a), ("B", outcome.b))]
    if outcome.sample < 1:
        lines.append(f"sample   {describe_sample(outcome)}")
    lines.append(f"config   {outcome.fields} fields compared")
    for (first, second), count in outcome.tensors.items():
        how = f"bit for bit in {second}" if first == second else f"A in {first} rounded to B's {second}"
        lines.append(f"tensors  {count} compared, {how}")
    lines += [
        f"values   {amount.elements:,} elements, {human_bytes(amount.bytes_a)} of A, "
        f"{human_bytes(amount.bytes_b)} of B",
        f"copies   {human_bytes(amount.copies_a_bytes)} of A and {human_bytes(amount.copies_b_bytes)} of B are "
        "further copies of the same tensors, compared with the first",
        f"padding  {outcome.padding_rows[0]} rows of A and {outcome.padding_rows[1]} rows of B, not part of the model",
        *(f"note     {note}" for note in outcome.notes),
    ]
    found = differences(outcome)
    if found:
        lines += [f"DIFFERENT: {counted(len(found), 'difference')}", *(f"  {line}" for line in found[:_SHOWN])]
    else:
        lines.append("the same model" + (", as far as the sample goes" if outcome.sample < 1 else ""))
    if len(found) > _SHOWN:
        lines.append(f"  ... and {len(found) - _SHOWN} more (--json shows all)")
    return "\n".join(map(shown_line, lines))


def as_json(outcome: Outcome) -> str:
    """The report for programs."""
    report = {
        "same": outcome.is_same,
        "a": dict(zip(("path", "kind"), outcome.a, strict=True)),
        "b": dict(zip(("path", "kind"), outcome.b, strict=True)),
        "sample": float(outcome.sample),
        "compared": {
            "config_fields": outcome.fields,
            "tensors": sum(outcome.tensors.values()),
            "tensors_by_dtype": {" to ".join(pair): count for pair, count in outcome.tensors.items()},
            **asdict(outcome.amount),
            "all_elements": outcome.all_elements,
        },
        "padding_rows": dict(zip("ab", outcome.padding_rows, strict=True)),
        "config": {name: dict(zip("ab", pair, strict=True)) for name, pair in outcome.config.items()},
        "only_in_a": outcome.only_a,
        "only_in_b": outcome.only_b,
        "shapes": {name: dict(zip("ab", pair, strict=True)) for name, pair in outcome.shapes.items()},
        "values": [asdict(found) for found in outcome.values],
        "notes": outcome.notes,
    }
    return json.dumps(report, indent=2, default=asdict)
