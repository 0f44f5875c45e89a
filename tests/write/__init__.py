from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_convert.formats.saved import Container
from dist_convert.formats.torch.target import lay_out_shard
from dist_convert.records import TensorSpec
from dist_convert.write.files import held, make_file


def write_shard(
    root: Path, name: str, args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]]
) -> Container:
    """Make one rank's file in its final size, with zeros for every tensor, or what an earlier run has put there."""
    _, container = lay_out_shard(args, iteration, chunks, str(root / name))
    with held(root) as directory:
        make_file(directory, name, container.pieces, container.size_bytes)
    return container
