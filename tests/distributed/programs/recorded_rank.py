"""A rank that records what it does: `recorded_rank FILE FLAGS...` is `dist_convert FLAGS...`.

The file gets, where it converted, the outcome and the collectives that it took part in, as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dist_convert.move.convert
from dist_convert.__main__ import main
from dist_convert.move.report import Report, report_details
from dist_convert.options import Options
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import World

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send",
)  # fmt: skip


def record_collectives() -> list[tuple[str, str, list[int]]]:
    """From now on, list every call of a collective in `torch.distributed`: name, dtypes and sizes of its tensors."""
    seen: list[tuple[str, str, list[int]]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            dtypes = "+".join(sorted({str(tensor.dtype) for tensor in tensors}))
            seen.append((name, dtypes, sorted(tensor.numel() for tensor in tensors)))
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, recorded(name, getattr(dist, name)))
    return seen


def record_conversions(file: Path) -> None:
    """From now on, write down what becomes of a conversion."""
    convert = dist_convert.move.convert.convert

    def convert_recorded(job: Options, world: World, channel: Channel) -> Report:
        seen = record_collectives()
        outcome = convert(job, world, channel)
        file.write_text(json.dumps({"outcome": report_details(outcome), "seen": seen}))
        return outcome

    dist_convert.move.convert.convert = convert_recorded


if __name__ == "__main__":
    record_conversions(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
