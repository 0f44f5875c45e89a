"""A Mixtral of two experts that FSDP2 has cut over three ranks: rows are uneven, one rank has none of the router."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoints import Model
from tests.distributed.launching import environment, start_ranks
from tests.to_megatron import make_hf

MIXTRAL = Model(experts=2, layers=2)
_IMPORTED = (
    "accelerate",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "safetensors",
)


def train(ranks: int, *arguments: str) -> None:
    """Run `tests.dcp.training` on some ranks."""
    with ExitStack() as stack:
        program = ["tests.dcp.training", *arguments]
        started = start_ranks(stack, [program] * ranks, [environment()], imported=_IMPORTED)
        ended = [rank.finish() for rank in started]
    assert [run.returncode for run in ended] == [0] * ranks, [run.stderr for run in ended]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a model of transformers, and what three ranks have saved of it: `fsdp1` and `fsdp2` by accelerate."""
    directory = tmp_path_factory.mktemp("trained")
    make_hf(directory / "hf", MIXTRAL)
    train(3, "save", str(directory / "hf/model.safetensors"), str(directory))
    return directory
