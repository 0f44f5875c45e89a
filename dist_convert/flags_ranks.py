"""The flag that starts ranks on this machine without torchrun."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.flag_values import positive

#: Far more than pay, far fewer than a machine has memory for: each takes a tenth of a gigabyte besides its buffers.
_MOST_PER_CORE = 16


def add_ranks(group: Any) -> None:
    """How many ranks the command itself starts."""
    group.add_argument(
        "--ranks",
        metavar="N",
        type=positive,
        help="start so many on this machine's CPUs; torchrun is for several machines, and for accelerators (default: "
        "one, or those of torchrun)",
    )


def ranks_to_start(flags: argparse.Namespace) -> int:
    """How many ranks the command starts itself; 1 where it is a rank.

    Raises:
        UsageError: a launcher has started ranks already, they are to use an accelerator, or they are too many.
    """
    if flags.ranks in (None, 1):
        return 1
    if "RANK" in os.environ:
        raise UsageError(
            "ranks that have been started start no others",
            found=f"--ranks {flags.ranks}, and RANK={os.environ['RANK']} in the environment",
            remedy="leave out --ranks (in a job file, ranks) under torchrun and other launchers; elsewhere, unset RANK",
        )
    if getattr(flags, "device", "cpu") not in ("auto", "cpu"):
        raise UsageError(
            "--ranks starts ranks on CPUs",
            found=f"--ranks {flags.ranks} --device {flags.device}",
            remedy=f"use --device cpu, or start with torchrun --nproc-per-node {flags.ranks} and without --ranks",
        )
    cores = len(os.sched_getaffinity(0))
    if flags.ranks > _MOST_PER_CORE * cores:
        raise UsageError(
            "more ranks than this machine can serve",
            expected=f"at most {_MOST_PER_CORE * cores}, {_MOST_PER_CORE} for each of {cores} cores",
            found=f"--ranks {flags.ranks}",
            remedy="half as many ranks as cores is a good start",
        )
    flags.device = "cpu"
    return int(flags.ranks)
