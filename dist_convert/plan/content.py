"""What is converted into what, byte by byte, whoever does it.

Pure: integers and strings, no torch, no files, no process groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dist_convert.plan.megatron import MegatronSide
from dist_convert.plan.moves import Move, Sides
from dist_convert.records import StoredTensor, TargetFile


@dataclass(frozen=True)
class Content:
    """A conversion without its division over ranks.

    Attributes:
        sides: both ends, and which is the source.
        files: the target's weights files.
        moves: one for each Megatron parameter.
        params_dtype: safetensors name of the dtype in which most of the source is stored.
        target_dtype: what that becomes; tensors of other dtypes keep theirs. None keeps all.
        kept_dtypes: tensors that are not stored in `params_dtype`, with their dtype.
        left_behind: what is not converted on purpose: (reason, tensors, bytes).
        zero_tensors: names of target tensors that stay zero.
    """

    sides: Sides
    files: tuple[TargetFile, ...]
    moves: tuple[Move, ...]
    params_dtype: str
    target_dtype: str | None
    kept_dtypes: Mapping[str, str]
    left_behind: tuple[tuple[str, int, int], ...]
    zero_tensors: tuple[str, ...] = ()

    @property
    def side(self) -> MegatronSide:
        return self.sides.megatron

    @property
    def target_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def moved_bytes(self) -> int:
        return sum(move.written_bytes for move in self.moves)

    @cached_property
    def digest(self) -> str:
        """Names what is converted into what: the same for any number of ranks, placement and budget.

        Parts of moves (see `one_node`) name it as the whole ones do.
        """
        side = self.side
        return digest(
            {
                "architecture": asdict(side.architecture),
                "family": asdict(side.family),
                "grid": asdict(side.grid),
                "megatron": [[f, v, *sorted(map(_fields, t.values()))] for (f, v), t in sorted(side.tensors.items())],
                "huggingface": [asdict(view) for view in dict.fromkeys(v for move in self.moves for v in move.hf)],
                "target": [[file.name, hashlib.sha256(file.header).hexdigest()] for file in self.files],
                "directions": [self.sides.to_megatron, self.sides.add_to_norms, self.sides.repeat_last_row],
                "permuted_experts": side.permuted_experts,
            }
        )


def _fields(tensor: StoredTensor) -> list[Any]:
    return [tensor.name, tensor.dtype, tensor.shape, tensor.strides, tensor.offset_bytes]


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
