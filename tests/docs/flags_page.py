"""Writes docs/flags.md from the parsers of the commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from dist_convert.cli.commands import COMMANDS
from dist_convert.cli.flags import build_parser

_HEAD = """# Flags

This page is generated from the parser (`python -m tests.docs`). `dist-convert help COMMAND` shows the same.

Every switch has a `--no-` form, which overrides a job file. Flags cannot be abbreviated. Sizes have units:
`512MB` or `2GiB`. `{rank}`, `{local_rank}` and `{node}` in paths stand for this rank's numbers. Every conversion takes
its source by `--source`, `--load-path` or `--load-dir`, its target by `--target`, `--save-path` or `--save-dir`.
"""


def flags_page() -> str:
    """The page."""
    _, parsers = build_parser()
    shown: set[str] = set()
    lines = [_HEAD]
    for name, command in COMMANDS.items():
        lines += [f"## {name}", "", f"`dist-convert {name} {command.usage}`", ""]
        rows = list(_rows(parsers[name], shown if name.endswith(("-hf", "-megatron")) else set()))
        if name == "convert":
            shown = {_without_format(row) for _, row in rows}
        elif name.endswith(("-hf", "-megatron")):
            lines += ["Besides these, it has the flags of `convert` that apply.", ""]
        group = ""
        for title, row in rows:
            if title != group:
                heading = "" if title in ("positional arguments", "options") else title.capitalize()
                lines += [*([""] if group else []), f"| {heading} | Default | |", "|---|---|---|"]
                group = title
            lines.append(row)
        lines.append("")
    return "\n".join(lines)


def _rows(parser: argparse.ArgumentParser, known: set[str]) -> Iterator[tuple[str, str]]:
    """Each flag's group, and its line of the table, but for those that are known."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.help in (None, argparse.SUPPRESS) or action.dest == "help":
                continue
            text, default = action.help or "", ""
            if found := re.search(r" \(default: (.*)\)$", text):
                text, default = text[: found.start()], found[1].replace("%(default)s", str(action.default))
            text, _, to = text.partition("; --to ")
            if action.choices and action.option_strings:
                text += ": " + ", ".join(f"`{one}`" for one in action.choices)
            text += f" (`--to {to}`)" if to else ""
            names = ", ".join(f"`{one}`" for one in action.option_strings) or f"`{action.metavar or action.dest}`"
            text = text.replace("(required) ", "").replace("|", r"\|")
            row = f"| {names} | {default} | {text} |"
            if _without_format(row) not in known:
                yield str(group.title), row


def _without_format(row: str) -> str:
    """A row without the target's format, which only `convert` names."""
    return re.sub(r" \(`--to [a-z_ ]+`\)", "", row)
