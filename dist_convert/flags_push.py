"""The flags of `dist-convert push`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_convert.flag_values import repository
from dist_convert.flags import add_switch


def add_push(commands: Any) -> None:
    """Add the subcommand."""
    push = commands.add_parser("push", help="upload a finished Hugging Face directory, or what is missing of it")
    push.add_argument("directory", type=Path, help="what megatron-to-hf has made")
    push.add_argument("push_to_hub", metavar="org/name", type=repository, help="made if it is not there")
    add_switch(push, "--private", "for members only; a public repository is refused")
