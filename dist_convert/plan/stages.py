"""Which Megatron targets can exist, and how many layers each chunk of their pipelines holds.

Facts: docs/formats.md, "Splitting over ranks".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dist_convert.errors import ConversionError, UsageError, raise_together
from dist_convert.layout import Grid
from dist_convert.models.architecture import Architecture

#: Letters of a layout: embedding, transformer layer, loss (head); `|` ends a stage.
_LETTERS = "EtL|"
#: Far above any real model; a repeat count is a request for memory.
_LONGEST_LAYOUT = 100_000
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT = "--pipeline-model-parallel-layout"


def check_target(
    architecture: Architecture,
    grid: Grid,
    *,
    first: int | None = None,
    last: int | None = None,
    layout: str | None = None,
) -> None:
    """Refuse a target that cannot exist.

    Args:
        architecture: the model.
        grid: parallel sizes of the target.
        first, last, layout: see `stage_layers`.

    Raises:
        UsageError: with the reason; all reasons are reported together.
    """
    a = architecture
    if min(grid.tensor, grid.pipeline, grid.virtual_pipeline, grid.expert, grid.expert_tensor) < 1:
        raise UsageError("parallel sizes are at least 1", found=str(grid))
    divided = [("the attention heads", a.heads, "tensor", grid.tensor)]
    divided += [("the rows of the padded vocabulary", a.padded_vocab, "tensor", grid.tensor)]
    if grid.tensor % a.query_groups:
        divided += [("the query groups", a.query_groups, "tensor", grid.tensor)]
    else:  # fewer groups than ranks divide them instead, and ranks share the rows of a group
        qkv_rows = (a.heads + 2 * a.query_groups) * a.head_dim
        divided += [("the rows of queries, keys and values", qkv_rows, "tensor", grid.tensor)]
    if a.experts:
        divided += [("the experts", a.experts, "expert", grid.expert)]
        divided += [("the columns of an expert", a.ffn, "expert-tensor", grid.expert_tensor)]
    else:
        divided += [("the columns of the MLP", a.ffn, "tensor", grid.tensor)]
    allowed = {  # every divisor of these is accepted: a remedy must not lead into the next refusal
        "tensor": math.gcd(a.heads, a.padded_vocab, a.query_groups, 0 if a.experts else a.ffn),
        "expert": a.experts,
        "expert-tensor": math.gcd(a.ffn, grid.tensor),
    }
    problems: list[ConversionError] = [
        UsageError(
            f"{what} cannot be divided over the {axis} parallel ranks",
            expected=f"a multiple of {ranks}",
            found=size,
            remedy=f"choose a --target-{axis}-parallel-size that divides {allowed[axis]}",
        )
        for what, size, axis, ranks in divided
        if size % ranks
    ]
    if a.experts and grid.tensor % grid.expert_tensor:
        problems.append(
            UsageError(
                "two expert tensor parallel ranks would share the name of one file",
                expected=f"--target-expert-tensor-parallel-size divides the tensor parallel size {grid.tensor}",
                found=grid.expert_tensor,
            )
        )
    if not a.experts and grid.expert > 1:
        problems.append(
            UsageError(
                "a model without experts has no expert parallel ranks",
                expected=1,
                found=grid.expert,
                remedy="leave out --target-expert-parallel-size",
            )
        )
    try:
        stage_layers(a.layers, grid.pipeline, grid.virtual_pipeline, first=first, last=last, layout=layout)
    except UsageError as problem:
        problems.append(problem)
    raise_together(problems)


def notes_on_target(architecture: Architecture, grid: Grid) -> tuple[str, ...]:
    """What the user should know about a target that can exist: one sentence each."""
    if architecture.query_groups >= grid.tensor:
        return ()
    return (
        f"{architecture.query_groups} query groups on {grid.tensor} tensor parallel ranks: only Megatron-Core 0.16 and "
        "newer load such a checkpoint",
    )


def stage_layers(
    layers: int, pipeline: int, virtual: int, *, first: int | None, last: int | None, layout: str | None
) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk, by virtual stage, then by pipeline rank: the order in which a token meets them.

    Args:
        layers: of the model.
        pipeline, virtual: parallel sizes; 1 is none.
        first, last: layers of the first and the last pipeline rank over all its virtual stages; the other ranks share
            the rest evenly. None: the same as the others.
        layout: a string such as `Et*3|(tt|)*2tL`, instead of `first` and `last`.

    Raises:
        UsageError: no such pipeline exists; its text gives all reasons.
    """
    reasons: list[str] = []
    if min(pipeline, virtual) < 1:
        reasons.append(f"parallel sizes are at least 1, not {pipeline} and {virtual}")
    elif layout is not None:
        if (first, last) != (None, None):
            reasons.append(f"{_LAYOUT} excludes {_FIRST} and {_LAST}")
        stages = _parse(layout, reasons)
        if not reasons:
            reasons += _wrong_layout(stages, layers, pipeline, virtual)
        if not reasons:
            counts = [stage.count("t") for stage in stages]
            return tuple(tuple(counts[v * pipeline : (v + 1) * pipeline]) for v in range(virtual))
    else:
        ranks = _ranks(layers, pipeline, virtual, first, last, reasons)
        if not reasons:
            return (tuple(count // virtual for count in ranks),) * virtual
    raise UsageError(
        f"{layers} layers cannot be divided over {pipeline} pipeline ranks"
        + (f" with {virtual} virtual stages each" if virtual != 1 else ""),
        found="; ".join(reasons),
        remedy="choose sizes that divide the layers, or say where they go: "
        f"{_FIRST} and {_LAST}, or {_LAYOUT}, e.g. Ett|(ttt|)*2ttL",
    )


def layout_stages(layout: str) -> int:
    """How many stages a layout has: the pipeline size times the virtual one.

    Raises:
        UsageError: it cannot be read.
    """
    reasons: list[str] = []
    stages = _parse(layout, reasons)
    if reasons:
        raise UsageError(f"{_LAYOUT} cannot be read", found="; ".join(reasons), remedy="e.g. Ett|(ttt|)*2ttL")
    return len(stages)


def virtual_stages(layers: int, pipeline: int, layers_each: int) -> int:
    """How many virtual stages of so many layers each pipeline rank has.

    Raises:
        UsageError: they do not come out even.
    """
    if layers % (pipeline * layers_each):
        raise UsageError(
            f"{layers} layers cannot be divided over {pipeline} pipeline ranks in virtual stages of {layers_each}",
            expected=f"a multiple of {pipeline * layers_each} layers",
            found=layers,
            remedy="choose another --num-layers-per-virtual-pipeline-stage",
        )
    return layers // (pipeline * layers_each)


def _ranks(
    layers: int, pipeline: int, virtual: int, first: int | None, last: int | None, reasons: list[str]
) -> list[int]:
    """Layers of each pipeline rank; every reason against them is added to `reasons`."""
    if virtual > 1 and pipeline == 1:
        reasons.append("virtual stages need at least 2 pipeline ranks")
    if pipeline == 1 and (first, last) != (None, None):
        reasons.append(f"{_FIRST} and {_LAST} need at least 2 pipeline ranks")
    given = [count for count in (first, last) if count is not None]
    if any(count < 1 for count in given):
        reasons.append(f"{_FIRST} and {_LAST} are at least 1")
    rest, others = layers - sum(given), pipeline - len(given)
    if rest < 0:
        reasons.append(f"the first and last ranks alone would hold {sum(given)} layers")
    elif others == 0 and rest:
        reasons.append(f"{rest} layers are left and no rank between the first and the last")
    elif others > 0 and rest % others:
        remain = " remaining" if given else ""
        reasons.append(f"{rest}{remain} layers are not divisible by {others}{remain} pipeline ranks")
    elif others > 0 and rest == 0:
        reasons.append(f"no layers are left for {others} of the pipeline ranks")
    share = rest // others if others > 0 else 0
    ranks = [share] * max(0, others)
    ranks = ([first] if first is not None else []) + ranks + ([last] if last is not None else [])
    # With an uneven rest the shares mean nothing; what was given is checked all the same.
    for count in dict.fromkeys(given if others > 0 and rest % others else ranks):
        if virtual > 1 and count % virtual:
            reasons.append(f"the {count} layers of a pipeline rank are not divisible by {virtual} virtual stages")
    return ranks


def _parse(layout: str, reasons: list[str]) -> list[str]:
    """The letters of each stage. Commas mean nothing; `x*n` and `(...)*n` repeat; parentheses do not nest."""
    letters = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        length = len(letters) + sum(len(what) * int(count) for what, count in re.findall(pattern, letters))
        if length > _LONGEST_LAYOUT:
            reasons.append(f"the layout describes more than {_LONGEST_LAYOUT} letters")
            return []
        letters = re.sub(pattern, lambda match: match[1] * int(match[2]), letters)
    unknown = sorted(set(letters) - set(_LETTERS))
    if unknown:
        hint = ": there are no multi-token prediction layers to place" if unknown == ["m"] else ""
        reasons.append(f"the layout has {' '.join(map(repr, unknown))} beside E, t, L, |, (...)*n and t*n{hint}")
    return letters.split("|")


def _wrong_layout(stages: Sequence[str], layers: int, pipeline: int, virtual: int) -> list[str]:
    """Every reason why a layout does not suit the model and the parallel sizes."""
    reasons = []
    if len(stages) != pipeline * virtual:
        reasons.append(f"the layout has {len(stages)} stages, the parallel sizes {pipeline * virtual}")
    letters = "".join(stages)
    if letters.count("t") != layers:
        reasons.append(f"the layout has {letters.count('t')} layers (t), the model {layers}")
    if letters.count("E") != 1 or not stages[0].startswith("E"):
        reasons.append("the layout needs one E, at the beginning of its first stage")
    if letters.count("L") != 1 or not stages[-1].endswith("L"):
        reasons.append("the layout needs one L, at the end of its last stage")
    return reasons
