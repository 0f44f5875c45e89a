from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_convert.formats.torch.target import Skeleton, lay_out_skeleton
from dist_convert.records import TensorSpec
from dist_convert.write.files import held, make_file


def write_skeleton(
    root: Path, name: str, args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]]
) -> Skeleton:
    """Make one rank's file in its final size, with zeros for every tensor, or what an earlier run has put there."""
    skeleton = lay_out_skeleton(args, iteration, chunks, str(root / name))
    with held(root) as directory:
        make_file(directory, name, skeleton.container.pieces, skeleton.container.size_bytes)
    return skeleton
