"""The flags of `dist-convert tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dist_convert.flags import add_switch
from dist_convert.job import SOURCE_MODEL_TYPES, TokenizerJob


def add_tokenizer_command(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "tokenizer",
        help="give a converted model its tokenizer",
        description="Copy or build the tokenizer of a model that was converted without one. The special ids in "
        "config.json and generation_config.json follow it; weights stay as they are.",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory of a Hugging Face tokenizer; tokenizer.model of Llama 2, Llama 3, Mistral or Mixtral, or its "
        "directory; or org/name of a model in the hub's cache",
    )
    command.add_argument("target", type=Path, metavar="DST", help="directory of the converted model")
    command.add_argument(
        "--source-model-type",
        choices=SOURCE_MODEL_TYPES,
        help="whose special tokens and chat format a tokenizer.model gets (default: what config.json suggests)",
    )
    add_switch(command, "--instruct", "add the chat template, end-of-turn tokens and sampling of an instruct model")
    add_switch(command, "--overwrite", "replace the tokenizer that is there")


def tokenizer_job_from_flags(flags: argparse.Namespace) -> TokenizerJob:
    """The job of `tokenizer`."""
    return TokenizerJob(
        source=flags.source,
        target=flags.target,
        source_model_type=flags.source_model_type,
        instruct=flags.instruct,
        overwrite=flags.overwrite,
    )
