"""The numbers that a launcher gives a rank, in paths that each rank fills in for itself."""

from __future__ import annotations

import os

from dist_convert.errors import UsageError


def with_numbers(path: str) -> str:
    """A path with this rank's numbers in place of {rank}, {local_rank} and {node}.

    Raises:
        UsageError: the launcher does not tell such a number.
    """
    told = {"rank": os.environ.get("RANK"), "local_rank": os.environ.get("LOCAL_RANK"), "node": _node()}
    for name, number in told.items():
        if "{" + name + "}" in path and number is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"{{{name}}} cannot be told", file=path, remedy="start with torchrun, or set what it sets: GROUP_RANK"
            )
        path = path.replace("{" + name + "}", number or "0")
    return path


def _node() -> str | None:
    rank, local_size = os.environ.get("RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    known = rank is not None and local_size is not None
    return os.environ.get("GROUP_RANK", str(int(rank or 0) // int(local_size or 1)) if known else None)
