"""Draws docs/resumed.svg, the terminal of a run that is killed and started again, and docs/commands.svg."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;white-space:pre;fill:#d8dee9}"
    ".command{fill:#a3be8c}.stop{fill:#ebcb8b}.done{fill:#88c0d0}"
    "@keyframes show{from{opacity:0}to{opacity:1}}.line{opacity:0;animation:show .1s forwards}"
    "@media (prefers-reduced-motion:reduce){.line{opacity:1;animation:none}}"
)
_LINE_PIXELS, _CHARACTER_PIXELS, _COLUMNS = 19, 7.9, 100
#: What a user has, wants, and types.
SITUATIONS = (
    ("a Megatron checkpoint", "the model for transformers or vLLM", "convert SRC DST --to huggingface"),
    ("a published model", "to train it with Megatron-LM", "convert SRC DST --to torch --tp 8 --pp 4"),
    ("a Megatron checkpoint", "another grid", "convert SRC DST --to torch --tp 2 --pp 1"),
    ("a checkpoint of any kind", "to know what it is", "inspect SRC"),
    ("a source and its result", "to know that they are one model", "verify SRC DST"),
    ("a run that stopped", "the rest of it", "the same command again"),
    ("a result without tokenizer", "one", "tokenizer TOKENIZER DST"),
    ("a finished directory", "it on the hub", "push DST org/name"),
)


def resumed() -> str:
    """The recording in docs/resume.md, line by line."""
    block = re.search(r"```console\n(\$ dist-convert .*?)```", (DOCS / "resume.md").read_text(), re.S)
    assert block is not None
    rows, seconds = [], 0.5
    for line in block[1].splitlines():
        seconds += 1.5 if line.startswith("$") else 0.4
        kind = "command" if line.startswith("$") else "stop" if "SIGKILL" in line else ""
        kind = "done" if line.startswith("done") else kind
        rows.append((line, f"line {kind}".strip(), f"animation-delay:{seconds:.1f}s"))
    return _drawn([(0.0, *row) for row in rows])


def commands() -> str:
    """Which situation asks for which command."""
    cells = [("You have", "you want", "dist-convert ..."), *SITUATIONS]
    places = (0.0, 30.0, 65.0)
    return _drawn(
        [
            (column, text, "done" if row == 0 else "command" if place == 2 else "", "")
            for row, texts in enumerate(cells)
            for place, (column, text) in enumerate(zip(places, texts, strict=True))
        ],
        columns=3,
    )


def _drawn(texts: list[tuple[float, str, str, str]], columns: int = 1) -> str:
    """Texts (first character, text, class, style) in lines of so many."""
    rows = len(texts) // columns
    width, height = int((_COLUMNS + 6) * _CHARACTER_PIXELS), rows * _LINE_PIXELS + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#2e3440"/>',
    ]
    for number, (column, text, kind, style) in enumerate(texts):
        x, y = 20 + column * _CHARACTER_PIXELS, 27 + number // columns * _LINE_PIXELS
        attributes = (f' class="{kind}"' if kind else "") + (f' style="{style}"' if style else "")
        lines.append(f'<text x="{x:g}" y="{y}"{attributes}>{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])
