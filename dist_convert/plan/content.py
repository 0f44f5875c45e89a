"""What is converted into what, byte by byte, whoever does it: the intersection of both ends' catalogs.

Pure: integers and strings, no torch, no files, no process groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_convert.models.catalog import Catalog, LeftBehind
from dist_convert.plan.copies import Ends, Transfer, plan_transfers
from dist_convert.records import TargetFile, human_bytes, names


@dataclass(frozen=True)
class Content:
    """A conversion without its division over ranks.

    Attributes:
        title: the model and the grid, for people.
        ends: both ends' catalogs.
        files: the target's weights files.
        transfers: what is copied, in the order of the tensors.
        digest: names what is converted into what: the same for any number of ranks, placement and budget.
        params_dtype: safetensors name of the dtype in which most of the source is stored.
        target_dtype: what that becomes; tensors of other dtypes keep theirs. None keeps all.
        kept_dtypes: what is not stored in `params_dtype`, with its dtype.
        left_behind: what is not converted on purpose.
        zero_tensors: names of target tensors that stay zero.
    """

    title: str
    ends: Ends
    files: tuple[TargetFile, ...]
    transfers: tuple[Transfer, ...]
    digest: str
    params_dtype: str
    target_dtype: str | None = None
    kept_dtypes: Mapping[str, str] = field(default_factory=dict)
    left_behind: LeftBehind = ()
    zero_tensors: tuple[str, ...] = ()

    @property
    def target_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def moved_bytes(self) -> int:
        return sum(transfer.written_bytes for transfer in self.transfers)


def plan_content(
    source: Catalog,
    target: Catalog,
    files: Sequence[TargetFile],
    *,
    title: str,
    params_dtype: str,
    target_dtype: str | None = None,
    kept_dtypes: Mapping[str, str] | None = None,
    left_behind: LeftBehind = (),
    repeat_last_row: bool = False,
    extras: frozenset[tuple[str, str]] = frozenset(),
) -> Content:
    """Work out every byte that is to be read and written.

    Args:
        source, target: both ends.
        files: the target's weights files.
        title, params_dtype, target_dtype, kept_dtypes, left_behind: see `Content`.
        repeat_last_row: fill padding rows of the vocabulary with the last real one, not with zeros.
        extras: (file, tensor) of the target that are filled with something else than weights.

    Raises:
        Problems, or the one problem there is: both ends do not fit, or nothing fills a tensor of the target.
    """
    ends = Ends(source, target, repeat_last_row)
    planned = plan_transfers(ends, files, extras)
    return Content(
        title=title,
        ends=ends,
        files=tuple(files),
        transfers=planned.transfers,
        digest=digest(
            {
                "architecture": asdict(target.architecture),
                "copies": planned.digest,
                "target": [[file.name, file.size_bytes, hashlib.sha256(file.header).hexdigest()] for file in files],
            }
        ),
        params_dtype=params_dtype,
        target_dtype=target_dtype,
        kept_dtypes=kept_dtypes or {},
        left_behind=left_behind,
        zero_tensors=planned.zero_tensors,
    )


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def notes_on_content(content: Content) -> list[str]:
    """What is rounded, kept as it is and left behind, a line each, in either direction."""
    notes = []
    if content.target_dtype and content.target_dtype != content.params_dtype:
        notes.append(
            f"weights are stored in {content.params_dtype} and become {content.target_dtype} "
            "(--target-params-dtype keep leaves them as they are)"
        )
    if content.target_dtype and content.kept_dtypes:
        notes.append(
            f"{len(content.kept_dtypes)} parameters are not stored in {content.params_dtype} and keep their "
            f"dtype: {names(content.kept_dtypes)}"
        )
    for reason, count, size_bytes in content.left_behind:
        notes.append(f"left behind: {count} x {reason}, {human_bytes(size_bytes)}")
    return notes
