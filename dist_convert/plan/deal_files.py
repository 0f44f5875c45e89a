"""A Hugging Face target on the nodes' own disks: which node gets which weights files, each of them whole.

Pure: integers and strings. A place is a directory as some ranks see it (see `node_local`). Names and bytes of the files
are those of a target that all nodes share, so that all places' files in one directory are that target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dist_convert.plan.content import Content

#: A place is as good for a file as the one that holds most of its source, if it holds this share of that.
_ALIKE = 3 / 4


def deal_files(
    content: Content, visible: Sequence[frozenset[str]], places: Sequence[int]
) -> tuple[frozenset[str], ...]:
    """For each place, the weights files that lie there: where most of their source is, or else where least is written.

    It depends on what each place sees, and not on how many ranks it has.

    Args:
        content: of the conversion.
        visible: for each rank, the source files that it can read.
        places: for each rank, the number of its place.
    """
    alike = places_alike(content, visible, places)
    dealt: list[list[str]] = [[] for _ in range(max(places) + 1)]
    filled_bytes = [0] * len(dealt)
    for file in content.files:
        chosen = min(alike[file.name], key=lambda place: filled_bytes[place])
        dealt[chosen].append(file.name)
        filled_bytes[chosen] += file.size_bytes
    return tuple(map(frozenset, dealt))


def places_alike(
    content: Content, visible: Sequence[frozenset[str]], places: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """For each target file, the places that see about equally much of its source, and no place sees more of it.

    Args:
        content, visible, places: see `deal_files`.
    """
    numbers = range(max(places) + 1)
    seen = [frozenset[str]().union(*(visible[r] for r, of in enumerate(places) if of == place)) for place in numbers]
    held_bytes = {file.name: [0] * len(seen) for file in content.files}
    for move in content.moves:
        shares = [sum(any(file in files for file in home) for home in move.homes) for files in seen]
        of_files = [(view.file, view.size_bytes) for view in move.hf]
        if content.sides.to_megatron:
            of_files = [(file, move.written_bytes // len(move.targets)) for file in move.targets]
        for file, size_bytes in of_files:
            for place, share in enumerate(shares):
                held_bytes[file][place] += size_bytes * share // len(move.homes)
    return {
        file: tuple(place for place in numbers if held[place] >= _ALIKE * max(held))
        for file, held in held_bytes.items()
    }


def with_own_targets(content: Content) -> Content:
    """A content whose target files not every rank can write: whoever does a move must reach them."""
    moves = tuple(replace(move, own_targets=tuple((file,) for file in move.targets)) for move in content.moves)
    return replace(content, moves=moves)


def file_numbers(content: Content, files: frozenset[str]) -> str:
    """Which of the weights files some are, by their numbers from 1: `1-3, 5`."""
    runs: list[list[int]] = []
    for number, file in enumerate(content.files, start=1):
        if file.name not in files:
            continue
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
