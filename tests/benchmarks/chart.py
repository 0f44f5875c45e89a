"""The tables of docs/speed.md as pictures: SVGs for light and dark pages, whose bars are seconds: shorter is better."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABELS, _NUMBERS = 860, 230, 200
_BARS = _WIDTH - _LABELS - _NUMBERS
_BAR, _ROW, _GAP, _TITLE, _HEAD = 16, 23, 12, 26, 58

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 } .note { fill: #59636e }
  .cp { fill: #8c959f } .ours { fill: #2f6fdb } .other { fill: #c4544d }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .note { fill: #9198a1 } .ours { fill: #589bff } .other { fill: #e5756e }
  }
"""
#: Kinds of bars, and what the legend calls them.
_LEGEND = {"cp": "cp of the same bytes", "ours": "dist_convert", "other": "another converter"}
#: Columns of the table of converters -> what a part of their picture is called.
_TRIPS = {
    "to Megatron, s": "Hugging Face to Megatron",
    "to Hugging Face, s": "Megatron to Hugging Face",
    "whole, s": "There and back, with the start of Python and torch",
}


@dataclass(frozen=True)
class Bar:
    """One way's seconds, and how many times as long it takes as the one that it is compared with."""

    kind: str
    name: str
    seconds: float
    ratio: float


def pairs_chart(page: str) -> str:
    """The picture of the table of `bench.py`; ways that read other bytes than `cp` are left out."""
    cases: dict[str, list[Bar]] = {}
    for row in _rows(page, "bench"):
        if "for a byte" not in row["way"]:
            kind = "cp" if row["way"] == "cp" else "ours"
            bar = Bar(kind, row["way"], float(row["data, s"]), float(row["x cp"]))
            cases.setdefault(row["from, to"], []).append(bar)
    return _chart("Seconds from the first byte read to the last byte written: shorter is better", cases, "cp")


def peers_chart(page: str) -> str:
    """The picture of the table of `peers.py`."""
    rows = list(_rows(page, "peers"))
    cases = {
        title: [
            Bar(
                "ours" if row[""].startswith("dist_convert") else "other",
                row[""],
                float(row[column]),
                float(row[column]) / float(rows[0][column]),
            )
            for row in rows
        ]
        for column, title in _TRIPS.items()
    }
    weights = re.search(r"Weights of ([\d.]+ GB)", page)
    title = f"Seconds for {weights[1] if weights else 'the model'} of weights on two cores: shorter is better"
    return _chart(title, cases, "dist_convert")


def _rows(page: str, mark: str) -> Iterator[dict[str, str]]:
    """The rows of the table between the marks of a page, by the names of its columns."""
    found = re.search(rf"(?s)<!-- {mark} -->\n(.*?)<!-- end -->", page)
    assert found is not None, mark
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    yield from (dict(zip(names, row, strict=True)) for row in rows)


def _chart(title: str, cases: Mapping[str, Sequence[Bar]], compared: str) -> str:
    """A picture of all cases below each other, with a legend.

    Args:
        title: what the bars are.
        cases: bars, by what they have in common.
        compared: what ratios are of.
    """
    bars = [bar for case in cases.values() for bar in case]
    most = max(bar.seconds for bar in bars)
    lines = [f'<text class="title" x="0" y="17">{escape(title)}</text>']
    for number, kind in enumerate(kind for kind in _LEGEND if any(bar.kind == kind for bar in bars)):
        x = 200 * number
        lines.append(f'<rect class="{kind}" x="{x}" y="30" width="{_BAR}" height="{_BAR}" rx="2"/>')
        lines.append(f'<text class="note" x="{x + _BAR + 6}" y="43">{_LEGEND[kind]}</text>')
    top = _HEAD
    for name, case in cases.items():
        lines += _case(name, case, top, most, compared)
        top += _TITLE + _ROW * len(case) + _GAP
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" role="img">'
    return "\n".join([frame, f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", *lines, "</svg>", ""])


def _case(name: str, case: Sequence[Bar], top: int, most: float, compared: str) -> Iterator[str]:
    yield f'<text class="title" x="0" y="{top + 17}">{escape(name)}</text>'
    for row, bar in enumerate(case):
        y = top + _TITLE + _ROW * row + (_ROW - _BAR) / 2
        yield f'<text x="{_LABELS - 8}" y="{y + _BAR - 4}" text-anchor="end">{escape(bar.name)}</text>'
        width = _BARS * bar.seconds / most
        yield f'<rect class="{bar.kind}" x="{_LABELS}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
        numbers = f"{bar.seconds:.2f} s, {bar.ratio:.2f} x {compared}"
        yield f'<text x="{_LABELS + _BARS + 12}" y="{y + _BAR - 4}">{escape(numbers)}</text>'
