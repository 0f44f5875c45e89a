"""One `model_optim_rng.pt` before any data: its args, the names of its tensors, and room for their values."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_convert.errors import PlanError
from dist_convert.formats.saved import Pieces, SavedTensor, common_content, lay_out_container, pickled
from dist_convert.records import StoredTensor, TensorSpec
from dist_convert.write.files import make_file


@dataclass(frozen=True)
class Skeleton:
    """A file before any data.

    Attributes:
        pieces: offset in bytes and content of everything that is not a tensor's value.
        size_bytes: of the whole file.
        chunks: per virtual pipeline stage, where each tensor's values go, by name; what `read_shard` finds in the file.
    """

    pieces: Pieces
    size_bytes: int
    chunks: tuple[dict[str, StoredTensor], ...]


def write_skeleton(
    root: Path, name: str, args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]]
) -> None:
    """Make one rank's file in its final size, with zeros for every tensor, or what an earlier run has put there.

    Args:
        root, name: of the file, see `write.files.open_below`.
        args, iteration, chunks: see `lay_out_skeleton`.

    Raises:
        PlanError: see `lay_out_skeleton`.
        NotEnoughSpace, TargetError: see `make_file`.
    """
    skeleton = lay_out_skeleton(args, iteration, chunks, str(root / name))
    make_file(root, name, skeleton.pieces, skeleton.size_bytes)


def lay_out_skeleton(
    args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]], file: str
) -> Skeleton:
    """One rank's file in memory, without memory for its tensors.

    The bytes follow from the first three arguments alone.

    Args:
        args, iteration: see `common_content`.
        chunks: per virtual pipeline stage, the tensors (name, safetensors dtype, shape) in their order.
        file: how messages and the tensors' places name it.

    Raises:
        PlanError: see `common_content`, or two tensors of one name.
    """
    saved = common_content(args, iteration, file)
    keys = itertools.count()
    models: dict[str, OrderedDict[str, SavedTensor]] = {}
    for virtual, specs in enumerate(chunks):
        model = OrderedDict((name, SavedTensor(next(keys), dtype, tuple(shape))) for name, dtype, shape in specs)
        if len(model) < len(specs):
            [(repeated, _)] = Counter(name for name, _, _ in specs).most_common(1)
            raise PlanError("two tensors of one name", tensor=repeated, file=file)
        models["model" if len(chunks) == 1 else f"model{virtual}"] = model
    tensors = [tensor for model in models.values() for tensor in model.values()]
    pieces, size_bytes, offsets_bytes = lay_out_container(
        pickled(saved | models), [tensor.size_bytes for tensor in tensors]
    )
    places = tuple(
        {
            name: StoredTensor(
                name if len(chunks) == 1 else f"{key}.{name}", file, t.dtype, t.shape, t.strides, offsets_bytes[t.key]
            )
            for name, t in model.items()
        }
        for key, model in models.items()
    )
    return Skeleton(pieces, size_bytes, places)
