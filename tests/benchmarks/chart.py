"""What was measured as a picture: how many bytes a second each way moves, in an SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from math import ceil

from tests.benchmarks.measured import Measured, data, ratio
from tests.benchmarks.store import Result

_WIDTH, _LABELS, _NUMBERS = 860, 230, 210
_BARS = _WIDTH - _LABELS - _NUMBERS
_BAR, _ROW, _GAP, _TITLE = 16, 23, 22, 26

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 } .note { fill: #59636e }
  .grid { stroke: #d1d9e0 } .least { stroke: #1f2328; stroke-width: 1.5 }
  .cp { fill: #8c959f } .ours { fill: #2f6fdb } .gloo { fill: #b58900 } .transformers { fill: #c4544d }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .note { fill: #9198a1 } .grid { stroke: #3d444d } .least { stroke: #f0f6fc }
    .ours { fill: #589bff } .transformers { fill: #e5756e }
  }
"""


def chart(results: Sequence[Result]) -> str:
    """A picture of all cases below each other, by medians of the data phase. What is in the table only: casts.

    Args:
        results: of cases; `cp` comes first in each.
    """
    shown = [Result(result.case, tuple(filter(_is_shown, result.measured))) for result in results]
    most = ceil(max(_gb_per_second(one) for result in shown for one in result.measured))
    height = sum(_TITLE + _ROW * len(result.measured) + _GAP for result in shown) + _GAP
    lines: list[str] = []
    top = 0
    for result in shown:
        lines += _case(result, top, most)
        top += _TITLE + _ROW * len(result.measured) + _GAP
    note = "GB/s of weights, first byte read to last byte written; the thin line is the quickest round"
    lines.append(f'<text class="note" x="{_LABELS}" y="{height - 8}">{note}</text>')
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    return "\n".join([frame, f"<style>{_STYLE}</style>", *lines, "</svg>", ""])


def _is_shown(measured: Measured) -> bool:
    """Not what moves other bytes than `cp`, nor gathers of one rank, which are none; nothing twice."""
    way = measured.way
    return way.tool not in ("gloo", "torchrun") and way.source != "fp32" and (way.placement, way.ranks) != ("gather", 1)


def _gb_per_second(measured: Measured, *, best: bool = False) -> float:
    seconds = measured.least(data) if best else measured.middle(data)
    return measured.way.moved_bytes / seconds / 1e9


def _case(result: Result, top: int, most: int) -> Iterator[str]:
    rows_top, cp = top + _TITLE, result.measured[0]
    rows_end = rows_top + _ROW * len(result.measured)
    yield f'<text class="title" x="0" y="{top + 17}">{escape(result.case.title)}</text>'
    for tick in range(most + 1):
        x = _LABELS + _BARS * tick / most
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{rows_top}" y2="{rows_end}"/>'
        yield f'<text class="note" x="{x:.1f}" y="{rows_end + 13}" text-anchor="middle">{tick}</text>'
    for row, measured in enumerate(result.measured):
        y = rows_top + _ROW * row + (_ROW - _BAR) / 2
        length, best = (_BARS * _gb_per_second(measured, best=which) / most for which in (False, True))
        seconds, text_y = measured.middle(data), y + _BAR - 4
        times = ratio(measured, cp, partial(Measured.middle, value=data))
        numbers = f"{_gb_per_second(measured):.2f} GB/s, {seconds:.2f} s, {times:.2f} x cp"
        yield f'<text x="{_LABELS - 8}" y="{text_y}" text-anchor="end">{_label(measured)}</text>'
        yield f'<rect class="{measured.way.tool}" x="{_LABELS}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
        yield f'<line class="least" x1="{_LABELS + best:.1f}" x2="{_LABELS + best:.1f}" y1="{y}" y2="{y + _BAR}"/>'
        yield f'<text x="{_LABELS + _BARS + 12}" y="{text_y}">{numbers}</text>'


def _label(measured: Measured) -> str:
    way = measured.way
    if way.tool == "cp":
        return "cp"
    if way.tool == "transformers":
        return "transformers: load, save"
    source = {"plain": "", "optimizer": ", beside optimizer"}[way.source]
    return f"{way.ranks} rank{'s' * (way.ranks > 1)}, {way.placement}{source}"
