"""The flags of `verify`."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from dist_convert.flag_values import positive
from dist_convert.flags import add_size, add_switch, add_timeout
from dist_convert.flags_ranks import add_ranks
from dist_convert.job import SAMPLE, VerifyJob
from dist_convert.rank_numbers import with_numbers


def share(text: str) -> Fraction:
    """A share above 0 and up to 1: "1/16" or "0.05"."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"not a share above 0 and up to 1, such as 1/16 or 0.05: {text!r}")
    return value


def add_verify(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    command = commands.add_parser(
        "verify",
        help="compare two checkpoints of any kind: exit code 0 where they hold the same model, 1 where not",
        description="Compare two checkpoints, each a Hugging Face directory or a Megatron checkpoint at any grid: "
        "every tensor bit for bit (A rounded to B's dtype where they differ), all copies within each, config and "
        "vocabulary. --ranks or torchrun share the work among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in the paths are replaced by this rank's numbers.",
    )
    command.add_argument("a", metavar="A", help="the first checkpoint: what B was made from")
    command.add_argument("b", metavar="B", help="the second checkpoint")
    for letter in "ab":
        command.add_argument(
            f"--ckpt-dir-name-{letter}",
            metavar="NAME",
            help=f"iteration directory of {letter.upper()} (default: the tracker file)",
        )
        add_switch(
            command,
            f"--habana-imported-experts-{letter}",
            f"{letter.upper()} came straight from Habana's own HF-to-Megatron converter at TP > 1 and holds experts",
        )
    command.add_argument(
        "--true-vocab-size",
        metavar="N",
        type=positive,
        help="tokens without padding (default: args, tokenizer, the other side)",
    )
    command.add_argument(
        "--sample",
        nargs="?",
        type=share,
        const=SAMPLE,
        default=Fraction(1),
        metavar="SHARE",
        help=f"compare a share of the blocks (default: all; without a number {SAMPLE}), always the same ones, and the "
        "first and last block of every tensor, which of a small model are most",
    )
    add_ranks(command)
    add_size(command, "--max-memory-per-rank", "1GB", "of the buffers of each rank")
    add_timeout(command)
    command.add_argument("--json", action="store_true", help="print JSON, with every difference (default: text)")


def verify_job_from_flags(flags: argparse.Namespace) -> VerifyJob:
    """The job of `verify`."""
    return VerifyJob(
        a=Path(with_numbers(flags.a)),
        b=Path(with_numbers(flags.b)),
        ckpt_dir_name_a=flags.ckpt_dir_name_a,
        ckpt_dir_name_b=flags.ckpt_dir_name_b,
        habana_imported_experts_a=flags.habana_imported_experts_a,
        habana_imported_experts_b=flags.habana_imported_experts_b,
        true_vocab_size=flags.true_vocab_size,
        sample=flags.sample,
        max_memory_per_rank_bytes=flags.max_memory_per_rank,
        json=flags.json,
        timeout_seconds=flags.timeout_seconds,
    )
