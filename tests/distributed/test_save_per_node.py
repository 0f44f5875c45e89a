"""A Hugging Face target on the nodes' own disks: parts that together are what a shared disk would hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, make
from tests.distributed.interrupting import Run, Runs, hashes_below
from tests.distributed.launching import flags
from tests.tokenizer.pieces import train

LLAMA = Model(hidden=64, ffn=192, heads=8, groups=4, head_dim=8, layers=4, vocab=200, padded_vocab=256)
MIXTRAL = Model(hidden=64, ffn=96, heads=8, groups=4, head_dim=8, layers=2, vocab=200, padded_vocab=256, experts=4)
INDEX = "model.safetensors.index.json"
#: Model, grid, the rank directories of each node (None where both see all), and the weights files that each gets.
CASES: dict[str, tuple[Model, Grid, list[list[str]] | None, list[list[int]]]] = {
    "a stage a node": (LLAMA, Grid(pp=2), [["mp_rank_00_000"], ["mp_rank_00_001"]], [[1, 2, 3], [4, 5, 6]]),
    "a tensor rank a node": (LLAMA, Grid(tp=2), [["mp_rank_00"], ["mp_rank_01"]], [[1, 4, 6], [2, 3, 5]]),
    "experts of both nodes": (
        MIXTRAL, Grid(tp=2, ep=2),
        [["mp_rank_00_000", "mp_rank_01_000"], ["mp_rank_00_001", "mp_rank_01_001"]], [[1, 2, 4], [3, 5, 6]],
    ),
    "a shared source": (LLAMA, Grid(tp=2), None, [[1, 4, 6], [2, 3, 5]]),
}  # fmt: skip
SMALL_FILES = ("--max-shard-size", "80KB")


def make_source(root: Path, name: str) -> str:
    """A checkpoint on the disks of two nodes, or on one that they share; returns the flag that names it."""
    model, grid, of_nodes, _ = CASES[name]
    make(root / "whole", model, grid)
    if of_nodes is None:
        return str(root / "whole")
    for node, directories in enumerate(of_nodes):
        for directory in directories:
            shard = Path("iter_0000004") / directory
            shutil.copytree(root / "whole" / shard, root / f"source{node}" / shard)
    return f"{root}/source{{node}}"


def job(source: str, target: str | Path, *more: str) -> list[str]:
    named = ("--ckpt-dir-name", "iter_0000004", *SMALL_FILES)
    return flags(source, Path(target), *named, *more)


def convert(runs: Runs, source: str, root: Path, *more: str, ranks: int = 2) -> Run:
    return runs.do(job(source, f"{root}/part{{node}}", "--save-per-node", *more), ranks=ranks, nodes=2)


def weights(directory: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(directory.glob("model-*-of-*.safetensors"))]


def merged(root: Path) -> Path:
    """All parts copied into one directory; files of one name must be the same."""
    for part in (root / "part0", root / "part1"):
        for path in part.iterdir():
            copied = root / "merged" / path.name
            assert not copied.exists() or copied.read_bytes() == path.read_bytes(), path
        shutil.copytree(part, root / "merged", dirs_exist_ok=True)
    return root / "merged"


@pytest.mark.parametrize("ranks", [2, 6])
@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_all_nodes_in_one_directory_are_the_target_that_a_shared_disk_holds(
    name: str, ranks: int, runs: Runs, tmp_path: Path
) -> None:
    source = make_source(tmp_path, name)
    assert runs.do(job(source, tmp_path / "shared"), ranks=2, nodes=2).exit_codes == [0, 0]
    run = convert(runs, source, tmp_path, ranks=ranks)
    assert run.exit_codes == [0] * ranks, run.printed
    assert [weights(tmp_path / f"part{node}") for node in (0, 1)] == CASES[name][3]
    assert hashes_below(merged(tmp_path)) == hashes_below(tmp_path / "shared")


def test_transformers_loads_the_merged_directory_with_every_weight(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a stage a node")
    assert convert(runs, source, tmp_path).exit_codes == [0, 0]
    model = AutoModelForCausalLM.from_pretrained(merged(tmp_path), dtype=torch.bfloat16)
    state = model.state_dict()
    expected = hf_tensors(LLAMA)
    assert sorted(state) == sorted(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_every_node_has_the_whole_index_and_a_tokenizer_that_the_first_node_alone_could_find(
    runs: Runs, tmp_path: Path
) -> None:
    source = make_source(tmp_path, "a tensor rank a node")
    train(tmp_path / "source0" / "tokenizer" / "tokenizer.model")
    run = convert(runs, source, tmp_path, "--true-vocab-size", "200")
    assert run.exit_codes == [0, 0], run.printed
    for node in (0, 1):
        named = json.loads((tmp_path / f"part{node}" / INDEX).read_text())["weight_map"]
        assert sorted(named) == sorted(hf_tensors(LLAMA))
        assert (tmp_path / f"part{node}" / "tokenizer.json").is_file()
    merged(tmp_path)


@pytest.mark.parametrize(("rank", "moment"), [(0, 30), (1, 60), (1, 90), (0, 120)])
def test_killed_on_all_nodes_it_goes_on_with_another_number_of_ranks_a_node(
    rank: int, moment: int, runs: Runs, tmp_path: Path
) -> None:
    source = make_source(tmp_path, "a stage a node")
    command = job(source, f"{tmp_path}/part{{node}}", "--save-per-node")
    run = runs.do(command, ranks=2, nodes=2, rank=rank, moment=moment, signals=["SIGKILL"], all=True)
    assert run.exit_codes == [-9, -9]
    again = convert(runs, source, tmp_path, ranks=4)
    assert again.exit_codes == [0] * 4, again.printed
    assert runs.do(job(source, tmp_path / "shared"), ranks=2, nodes=2).exit_codes == [0, 0]
    assert hashes_below(merged(tmp_path)) == hashes_below(tmp_path / "shared")


def test_a_part_that_was_begun_with_other_files_is_refused_and_left_alone(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a stage a node")
    command = job(source, f"{tmp_path}/part{{node}}", "--save-per-node")
    run = runs.do(command, ranks=2, nodes=2, rank=1, moment=80, signals=["SIGKILL"], all=True)
    assert run.exit_codes == [-9, -9]
    before = hashes_below(tmp_path / "part1.partial")
    for node in (0, 1):
        shutil.copytree(
            tmp_path / "whole" / "iter_0000004", tmp_path / f"source{node}" / "iter_0000004", dirs_exist_ok=True
        )
    run = convert(runs, str(tmp_path / "source0"), tmp_path)
    assert run.exit_codes == [1, 1]
    refusals = ("argument weights files here was 1-3, now 1, 4, 6", "argument weights files here was 4-6, now 2-3, 5")
    assert sum(run.printed.count(refusal) for refusal in refusals) == 1, run.printed
    assert hashes_below(tmp_path / "part1.partial") == before


def test_started_again_after_its_end_it_says_that_nothing_is_left_to_do(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a stage a node")
    assert "is a part of the model on each of 2 disks: copy them" in convert(runs, source, tmp_path).printed
    before = hashes_below(tmp_path)
    again = convert(runs, source, tmp_path)
    assert again.exit_codes == [0, 0]
    assert again.printed.count("is complete already") == 1
    assert hashes_below(tmp_path) == before


@pytest.mark.parametrize("node", [0, 1])
def test_a_part_that_is_gone_since_all_were_complete_is_missed_and_made_with_overwrite(
    node: int, runs: Runs, tmp_path: Path
) -> None:
    source = make_source(tmp_path, "a shared source")
    assert convert(runs, source, tmp_path).exit_codes == [0, 0]
    before, part = hashes_below(tmp_path), tmp_path / f"part{node}"
    shutil.rmtree(part)
    assert "is complete already" not in convert(runs, source, tmp_path, "--dry-run").printed
    run = convert(runs, source, tmp_path)
    assert run.exit_codes == [1, 1]
    expected = f"it, or all of it in {part}.partial"
    message = f"the target is complete on other disks, but no longer on this one\n  file:     {part}\n"
    assert f"{message}  expected: {expected}\n  remedy:   move it away on every node, then start" in run.printed
    assert not part.exists()
    assert convert(runs, source, tmp_path, "--overwrite").exit_codes == [0, 0]
    assert hashes_below(tmp_path) == before


@pytest.mark.parametrize(
    ("before_last", "is_named", "has_journals"), [(24, False, [True, True]), (8, True, [True, False])],
    ids=["as only the other node has named its part", "as only the other node has removed its journal"],
)  # fmt: skip
def test_a_rank_killed_at_the_end_of_a_replacement_goes_on_with_overwrite(
    before_last: int, is_named: bool, has_journals: list[bool], runs: Runs, tmp_path: Path
) -> None:
    source = make_source(tmp_path, "a shared source")
    assert convert(runs, source, tmp_path).exit_codes == [0, 0]
    before = hashes_below(tmp_path)
    command = job(source, f"{tmp_path}/part{{node}}", "--save-per-node", "--overwrite")
    moment = runs.do(command, ranks=2, nodes=2).calls[0] - before_last
    runs.do(command, ranks=2, nodes=2, rank=0, moment=moment, signals=["SIGKILL"], patience_seconds=1)
    places = [tmp_path / ("part0" if is_named else "part0.partial"), tmp_path / "part1"]
    assert [(place / ".journal" / "identity.json").exists() for place in places] == has_journals
    assert not (places[0] / "resumable").exists()
    run = runs.do(command, ranks=2, nodes=2)
    assert run.exit_codes == [0, 0], run.printed
    assert hashes_below(tmp_path) == before


def test_a_dry_run_says_which_weights_files_each_node_gets(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a stage a node")
    before = hashes_below(tmp_path)
    run = convert(runs, source, tmp_path, "--dry-run", ranks=4)
    assert run.exit_codes == [0] * 4
    assert "own disk of ranks 0, 1: weights files 1-3 of 6, 235 kB\n" in run.printed
    assert "own disk of ranks 2, 3: weights files 4-6 of 6, 235 kB\n" in run.printed
    assert hashes_below(tmp_path) == before


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "without the flag": ((), 1, "give --save-per-node if each node is to keep some of the files"),
    "uploaded": (("--save-per-node", "--push-to-hub", "me/model"), 2, "no node has all files to upload"),
    "verified": (("--save-per-node", "--verify"), 2, "cannot compare files on the disks of different nodes"),
    "without a gather": (("--save-per-node", "--placement", "direct"), 2, "no rank alone sees all shards"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_on_nodes_cannot_be_is_refused_before_anything_is_written(
    name: str, runs: Runs, tmp_path: Path
) -> None:
    more, exit_code, message = REFUSED[name]
    source = make_source(tmp_path, "a tensor rank a node")
    before = hashes_below(tmp_path)
    run = runs.do(job(source, f"{tmp_path}/part{{node}}", *more), ranks=2, nodes=2)
    assert run.exit_codes == [exit_code] * 2, run.printed
    assert run.printed.count(message) == 1
    assert hashes_below(tmp_path) == before


def test_parts_are_verified_where_every_node_sees_the_whole_source(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a shared source")
    run = convert(runs, source, tmp_path, "--verify")
    assert run.exit_codes == [0, 0], run.printed
    assert "verified, 39 tensors" in run.printed


def test_a_part_is_described_with_what_it_lacks_and_the_merged_directory_equals_the_source(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path, "a stage a node")
    assert convert(runs, source, tmp_path).exit_codes == [0, 0]
    capsys.readouterr()
    assert main(["inspect", "--json", str(tmp_path / "part1")]) == 1  # something is missing
    described = json.loads(capsys.readouterr().out)
    assert described["files"] == 3
    assert described["missing_shards"] == [f"model-{number:05d}-of-00006.safetensors" for number in (1, 2, 3)]
    assert main(["verify", str(tmp_path / "whole"), str(tmp_path / "part1")]) == 1
    assert "a weights file is missing" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "whole"), str(merged(tmp_path))]) == 0


def test_the_flag_has_no_effect_on_a_disk_that_all_nodes_share(runs: Runs, tmp_path: Path) -> None:
    source = make_source(tmp_path, "a shared source")
    run = runs.do(job(source, tmp_path / "hf", "--save-per-node"), ranks=2, nodes=2)
    assert run.exit_codes == [0, 0]
    assert "--save-per-node has no effect: all ranks see the same target" in run.printed
    assert weights(tmp_path / "hf") == [1, 2, 3, 4, 5, 6]
