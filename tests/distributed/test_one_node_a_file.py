"""Targets on a stand-in for NFS: each file is written by one node, and has the bytes of any other conversion."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Grid
from tests.distributed.interrupting import Run, Runs, hashes_below
from tests.distributed.small_sources import make_small_sources
from tests.to_megatron import grid_flags

NOTE = "the target lies on nfs4: each weights file is written by one node"
CASES = ("megatron-to-hf", "hf-to-megatron, llama", "hf-to-megatron, mixtral")
DISTRIBUTED = ("convert, torch_dist", "convert, dcp")
PLACEMENTS = ("direct", "gather")
WEIGHTS = (".safetensors", "model_optim_rng.pt", ".distcp")


@dataclass(frozen=True)
class OnNfs:
    """Runs whose targets lie on NFS."""

    runs: Runs

    def do(self, flags: list[str], **how: Any) -> Run:
        return self.runs.do(flags, before=["nodes_on_nfs"], **how)


@pytest.fixture
def on_nfs(runs: Runs) -> OnNfs:
    return OnNfs(runs)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def expected(sources: Path, runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """For each case, the files of an ordinary conversion by one rank."""
    found = {}
    for case in (*CASES, *DISTRIBUTED):
        root = tmp_path_factory.mktemp("expected")
        assert runs.do(command(case, sources, root)).exit_codes == [0]
        found[case] = hashes_below(root)
    return found


def command(case: str, sources: Path, root: Path, *more: str) -> list[str]:
    """Small files: 8 of a Hugging Face model, 6 of a Llama at TP2 x PP3, 4 of a Mixtral at TP2 x EP2; of a Llama 4 of
    torch_dist at TP4, 8 of DCP."""
    direction, _, model = case.partition(", ")
    if direction == "convert":
        more = (*more, *(("--tp", "4", "--pp", "1") if model == "torch_dist" else ("--max-shard-size", "50KB")))
        return [direction, str(sources / "megatron"), str(root / "made"), "--to", model, "--device", "cpu", *more]
    words = ["--load-path", str(sources / "megatron"), "--save-path", str(root / "hf"), "--max-shard-size", "50KB"]
    if model:
        grid = [*grid_flags(Grid(tp=2, pp=3))]
        if model == "mixtral":  # of whose experts every write has gaps
            grid = [*grid_flags(Grid(tp=2, ep=2)), "--expert-layout", "grouped"]
        words = ["--load-dir", str(sources / model), "--save-dir", str(root / "megatron"), *grid]
    return [direction, *words, "--target-params-dtype", "keep", "--device", "cpu", *more]


def nodes_of_files(run: Run, ranks_each: int) -> dict[str, set[int]]:
    """By file, the nodes of which some rank wrote tensors to it."""
    found: dict[str, set[int]] = {}
    for rank, printed in enumerate(run.stderr):
        for path in re.findall(r"^(.*) is open to write$", printed, re.MULTILINE):
            found.setdefault(path, set()).add(rank // ranks_each)
    assert "is open to read" not in run.printed
    return found


@pytest.mark.parametrize(
    ("case", "placement", "nodes", "ranks"),
    [
        *((case, placement, *nodes) for case in CASES for placement in PLACEMENTS for nodes in [(2, 4), (3, 3)]),
        *((case, placement, 2, 4) for case in DISTRIBUTED for placement in PLACEMENTS),
    ],
)
def test_every_file_is_written_by_one_node_with_the_bytes_of_any_other_conversion(
    case: str, placement: str, nodes: int, ranks: int, on_nfs: OnNfs, sources: Path,
    expected: dict[str, dict[str, str]], tmp_path: Path,
) -> None:  # fmt: skip
    run = on_nfs.do(command(case, sources, tmp_path, "--placement", placement), ranks=ranks, nodes=nodes)
    assert run.exit_codes == [0] * ranks, run.printed
    assert hashes_below(tmp_path) == expected[case]
    writing = nodes_of_files(run, ranks // nodes)
    weights = [name for name in expected[case] if name.endswith(WEIGHTS)]
    assert len(writing) == len(weights)
    assert all(len(of_file) == 1 for of_file in writing.values()), writing
    assert set.union(*writing.values()) == set(range(nodes))
    assert run.printed.count(NOTE) == 1


def test_shards_of_both_nodes_end_in_files_of_one_node_each(
    on_nfs: OnNfs, sources: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    for shard in (sources / "megatron").glob("iter_*/mp_rank_*"):
        node = int(shard.name.split("_")[2])  # a tensor rank a node
        shutil.copytree(shard, tmp_path / f"disk{node}" / "iter_0000004" / shard.name)
    words = command(CASES[0], sources, tmp_path, "--ckpt-dir-name", "iter_0000004")
    words[words.index("--load-path") + 1] = f"{tmp_path}/disk{{node}}"
    run = on_nfs.do(words, ranks=4, nodes=2)
    assert run.exit_codes == [0] * 4, run.printed
    assert all(len(of_file) == 1 for of_file in nodes_of_files(run, 2).values())
    made = {name: value for name, value in hashes_below(tmp_path / "hf").items() if name.endswith(".safetensors")}
    assert made == {n.removeprefix("hf/"): v for n, v in expected[CASES[0]].items() if n.endswith(".safetensors")}


@pytest.mark.parametrize("case", CASES)
def test_what_other_nodes_began_without_regard_to_it_is_gone_on_with(
    case: str, runs: Runs, on_nfs: OnNfs, sources: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    words = command(case, sources, tmp_path)
    killed = {"signals": ["SIGKILL"], "all": True}
    assert -9 in runs.do([*words, "--placement", "gather"], ranks=2, nodes=2, rank=1, moment=60, **killed).exit_codes
    # A rank 0 that finds nothing left to write makes some 60 calls.
    assert -9 in on_nfs.do([*words, "--placement", "direct"], ranks=3, nodes=3, rank=0, moment=40, **killed).exit_codes
    run = on_nfs.do(words, ranks=4, nodes=2)
    assert run.exit_codes == [0] * 4, run.printed
    assert "are written already; resuming" in run.printed
    assert all(len(of_file) == 1 for of_file in nodes_of_files(run, 2).values())
    assert hashes_below(tmp_path) == expected[case]


SAID: dict[str, tuple[str, list[str], int, str]] = {
    "files for all nodes": (CASES[0], ["--dry-run"], 2, f"{NOTE}\n"),
    "one file": (
        CASES[0], ["--dry-run", "--max-shard-size", "5GB"], 3,
        f"{NOTE}; 2 of 3 nodes have none, smaller files (--max-shard-size) would share the work\n",
    ),
    "one rank directory": (
        CASES[1], ["--dry-run", "--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "1"], 2,
        f"{NOTE}; 1 of 2 nodes have none, a larger grid would share the work\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_dry_run_says_so_and_shows_nodes_without_work(
    name: str, on_nfs: OnNfs, sources: Path, tmp_path: Path
) -> None:
    case, more, nodes, note = SAID[name]
    run = on_nfs.do(command(case, sources, tmp_path, *more), ranks=nodes, nodes=nodes)
    assert run.exit_codes == [0] * nodes, run.printed
    assert note in run.printed
    assert len(re.findall("0 B +0 B +0 B", run.stdout[0])) == (nodes - 1 if "none" in note else 0)


def test_ranks_of_one_node_share_its_files_as_elsewhere(on_nfs: OnNfs, sources: Path, tmp_path: Path) -> None:
    run = on_nfs.do(command(CASES[0], sources, tmp_path, "--max-shard-size", "5GB"), ranks=2)
    assert run.exit_codes == [0, 0], run.printed
    assert all("model.safetensors is open to write" in printed for printed in run.stderr)
    assert NOTE not in run.printed
