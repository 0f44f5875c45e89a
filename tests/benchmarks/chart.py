"""Seconds of ways that move the same bytes as a picture: an SVG for light and dark pages, shorter bars are better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

_WIDTH, _LABELS, _NUMBERS = 860, 230, 200
_BARS = _WIDTH - _LABELS - _NUMBERS
_BAR, _ROW, _GAP, _TITLE = 16, 23, 12, 26

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 } .note { fill: #59636e }
  .cp { fill: #8c959f } .ours { fill: #2f6fdb } .other { fill: #c4544d }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .note { fill: #9198a1 } .ours { fill: #589bff } .other { fill: #e5756e }
  }
"""
_NOTE = "seconds from the first byte read to the last byte written: shorter is better"


def chart(cases: Mapping[str, Sequence[tuple[str, float]]], note: str = _NOTE) -> str:
    """A picture of all cases below each other.

    Args:
        cases: by title, the name and the seconds of each way; what the others are compared with comes first.
        note: what the bars are.
    """
    most = max(seconds for ways in cases.values() for _, seconds in ways)
    lines: list[str] = []
    top = 0
    for title, ways in cases.items():
        lines += _case(title, ways, top, most)
        top += _TITLE + _ROW * len(ways) + _GAP
    lines.append(f'<text class="note" x="{_LABELS}" y="{top + 8}">{note}</text>')
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 16}" role="img">'
    return "\n".join([frame, f"<style>{_STYLE}</style>", *lines, "</svg>", ""])


def _case(title: str, ways: Sequence[tuple[str, float]], top: int, most: float) -> Iterator[str]:
    yield f'<text class="title" x="0" y="{top + 17}">{escape(title)}</text>'
    for row, (name, seconds) in enumerate(ways):
        y = top + _TITLE + _ROW * row + (_ROW - _BAR) / 2
        kind = "cp" if name == "cp" else "ours" if "rank" in name or name == "dist_convert" else "other"
        numbers = f"{seconds:.2f} s, {seconds / ways[0][1]:.2f} x {ways[0][0]}"
        yield f'<text x="{_LABELS - 8}" y="{y + _BAR - 4}" text-anchor="end">{escape(name)}</text>'
        width = _BARS * seconds / most
        yield f'<rect class="{kind}" x="{_LABELS}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
        yield f'<text x="{_LABELS + _BARS + 12}" y="{y + _BAR - 4}">{numbers}</text>'
