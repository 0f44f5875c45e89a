"""The files of a conversion are the same bytes for any number of ranks, either placement and any memory budget.

The weights are larger than a block (4 MiB), and those that are cut along their columns take several gather steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.launching import Answer, flags, hashes, run_jobs

# down_proj and o_proj are cut along columns: 6.3 MB and 2.1 MB each in bf16; 341 of down_proj's rows make a block.
LLAMA = Model(hidden=512, ffn=6144, heads=32, groups=8, head_dim=64, layers=2, vocab=1001, padded_vocab=1024)
MIXTRAL = Model(hidden=512, ffn=5120, heads=8, groups=4, head_dim=64, layers=1, vocab=99, padded_vocab=128, experts=4)
CHECKPOINTS = {
    "llama TP2 PP2": (LLAMA, Grid(tp=2, pp=2)),
    "llama TP4": (LLAMA, Grid(tp=4)),
    "mixtral TP2 EP2": (MIXTRAL, Grid(tp=2, ep=2)),
}
WAYS = {
    "direct": ("--placement", "direct"),
    "gather": ("--placement", "gather"),
    "gather in small steps": ("--placement", "gather", "--max-memory-per-rank", "68MB"),
}
IN_FILES_OF = ("--max-shard-size", "20MB")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoints, and beside each the target `NAME one rank` of a conversion without torchrun."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (model, grid) in CHECKPOINTS.items():
        expected = make(root / name, model, grid)
        assert convert(root / name, root / f"{name} one rank", *IN_FILES_OF) == 0
        assert_same(read_tensors(root / f"{name} one rank"), expected)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=[2, 3, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> int:
    """How many ranks torchrun starts."""
    return int(request.param)


@dataclass(frozen=True)
class Converted:
    """An answer, and the hashes of the files that were written."""

    answer: Answer
    files: dict[str, str]


@pytest.fixture(scope="module")
def converted(ranks: int, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """Every checkpoint converted in every way: "NAME, WAY" -> what came of it."""
    scratch = tmp_path_factory.mktemp("converted")
    sources = {f"{name}, {way}": (checkpoints / name, how) for name in CHECKPOINTS for way, how in WAYS.items()}
    jobs = {name: flags(source, scratch / name, *how, *IN_FILES_OF) for name, (source, how) in sources.items()}
    answers = run_jobs(ranks, jobs, scratch)
    assert all(answer.outcome for answer in answers.values())
    found = {name: Converted(answer, hashes(scratch / name)) for name, answer in answers.items()}
    shutil.rmtree(scratch)
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_ranks_writes_the_files_that_one_rank_writes(
    way: str, name: str, checkpoints: Path, converted: dict[str, Converted]
) -> None:
    assert converted[f"{name}, {way}"].files == hashes(checkpoints / f"{name} one rank")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_rank_writes_the_same_files_in_gather_placement(name: str, checkpoints: Path, tmp_path: Path) -> None:
    assert convert(checkpoints / name, tmp_path / "hf", "--placement", "gather", *IN_FILES_OF) == 0
    assert hashes(tmp_path / "hf") == hashes(checkpoints / f"{name} one rank")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ranks_that_gather_read_every_weight_once(name: str, converted: dict[str, Converted]) -> None:
    alone, together = (converted[f"{name}, {way}"].answer.outcome for way in ("direct", "gather"))
    assert alone["read_bytes"] == together["read_bytes"] == together["written_bytes"]


def test_messages_carry_int32_words_and_what_is_sent_is_received(converted: dict[str, Converted]) -> None:
    for name in CHECKPOINTS:
        answer = converted[f"{name}, gather in small steps"].answer
        calls = [seen for of_rank in answer.collectives for seen in of_rank if seen[0] in ("isend", "irecv")]
        assert {dtype for _, dtype, _ in calls} <= {"torch.int32"}
        words = {kind: sum(sum(sizes) for found, _, sizes in calls if found == kind) for kind in ("isend", "irecv")}
        assert answer.outcome["gathered_bytes"] == 4 * words["isend"] == 4 * words["irecv"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensor_parallel_weights_cross_in_several_gathers(
    name: str, ranks: int, converted: dict[str, Converted]
) -> None:
    answer = converted[f"{name}, gather in small steps"].answer
    gathers = [sum(seen[0] != "all_gather_object" for seen in of_rank) for of_rank in answer.collectives]
    if (ranks == 2 and name != "llama TP4") or (ranks == 3 and name == "mixtral TP2 EP2"):
        # Sets that one rank can read and write alone are dealt to single ranks, and nothing crosses.
        assert (answer.outcome["gathered_bytes"], gathers) == (0, [0] * ranks)
    else:
        assert answer.outcome["gathered_bytes"] > 0
        assert max(gathers) >= 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_data_crosses_in_no_collective_of_direct_placement(name: str, converted: dict[str, Converted]) -> None:
    answer = converted[f"{name}, direct"].answer
    assert answer.outcome["gathered_bytes"] == 0
    assert {seen[0] for of_rank in answer.collectives for seen in of_rank} == {"all_gather_object"}
