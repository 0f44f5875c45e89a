"""Meta's files as chunks of tensors: of each matrix a file has some rows or some columns, of the norms all."""

from collections.abc import Mapping
from math import prod

from dist_convert.errors import ConversionError, WrongShape, raise_together
from dist_convert.formats.dcp.chunks import Stored, StoredChunk
from dist_convert.formats.megatron.parameters import dtype_problems
from dist_convert.formats.meta.names import DROPPED
from dist_convert.records import StoredTensor, View

#: For each file, its tensors by name.
Headers = Mapping[str, Mapping[str, StoredTensor]]


def tensors_of(headers: Headers, hidden: int) -> dict[str, Stored]:
    """The tensors by Meta's names, put together from all files; a vector is the first file's.

    A matrix is cut along its rows if these have the hidden size in each file, else along its columns.

    Raises:
        Problems, or the one problem there is: pieces that do not fit each other, or are no floats.
    """
    found: dict[str, Stored] = {}
    problems: list[ConversionError] = []
    for name in dict.fromkeys(name for held in headers.values() for name in held if name != DROPPED):
        pieces = [held[name] for held in headers.values() if name in held]
        shapes = [piece.shape for piece in pieces]
        axis = int(all(shape[1:] and shape[1] != hidden for shape in shapes))
        alike = {shape if len(shape) == 1 else shape[1 - axis :][:1] for shape in shapes}
        if len(shapes) < len(headers) or len(shapes[0]) not in (1, 2) or len(alike) > 1 or not all(map(prod, shapes)):
            problems.append(
                WrongShape(
                    "the pieces of a tensor do not fit each other",
                    tensor=name,
                    file=next((file for file, held in headers.items() if name not in held), pieces[0].file),
                    expected="a vector, or as many rows or columns, in every file",
                    found=", ".join(str(list(shape)) for shape in shapes),
                    remedy="a file is damaged, or of another model: copy all of them again",
                )
            )
            continue
        problems += [problem for piece in pieces for problem in dtype_problems(View.of(piece), pieces[0].dtype)]
        chunks, end = [], 0
        for piece in pieces if len(shapes[0]) == 2 else pieces[:1]:
            offsets = (0, end) if axis else (end, 0)[: len(piece.shape)]
            chunks.append(StoredChunk(offsets, piece))
            end += piece.shape[axis]
        shape = (shapes[0][0], end) if axis else (end, *shapes[0][1:])
        found[name] = Stored(name, pieces[0].dtype, shape, tuple(chunks))
    raise_together(problems)
    return found
