"""`verify` on two ranks: the same report as on one, from rank 0 alone, each rank with what it sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import Answer, flags, on_two_nodes, run_jobs, run_ranks
from tests.to_megatron import make_hf
from tests.verify import edit_hf, edit_shard, flip

#: Tensors of several blocks (2 MiB), some cut along their columns.
MODEL = Model(hidden=512, ffn=4608, heads=8, groups=4, head_dim=64, layers=2, vocab=1001, padded_vocab=1024)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Answer]]]:
    """Comparisons on two ranks: NODES/{RANK} holds what a rank sees of a checkpoint on the nodes' own disks."""
    root = tmp_path_factory.mktemp("verify")
    for name, grid in (("megatron", Grid(tp=2, pp=2)), ("other grid", Grid(tp=4))):
        make(root / name, MODEL, grid)
    make_hf(root / "hf", MODEL)
    make_hf(root / "wrong", MODEL)
    edit_hf(root / "wrong", flip("model.layers.1.mlp.down_proj.weight", (300, 4000)))
    edit_hf(root / "wrong", flip("model.layers.0.mlp.up_proj.weight", (4607, 511)))
    make(root / "wrong copy", MODEL, Grid(tp=2, pp=2))
    edit_shard(root / "wrong copy", "mp_rank_01_001", flip("decoder.final_layernorm.weight", (500,)))
    shards = root / "megatron" / "iter_0000004"
    nodes = {
        "stages": (shards, "mp_rank_*_000", "mp_rank_*_001"),
        "tensor ranks": (shards, "mp_rank_00_*", "mp_rank_01_*"),
        "other nodes": (shards, "mp_rank_01_*", "mp_rank_00_*"),
        "wrong tensor ranks": (root / "wrong copy" / "iter_0000004", "mp_rank_00_*", "mp_rank_01_*"),
    }
    for name, (source, *wanted) in nodes.items():
        for rank, pattern in enumerate(wanted):
            for directory in source.glob(pattern):
                shutil.copytree(directory, root / name / f"{rank}" / "iter_0000004" / directory.name)
        (root / name / "0" / "latest_checkpointed_iteration.txt").write_text("4")
    pairs = {
        "same": ("megatron", "hf"),
        "grids": ("other grid", "megatron"),
        "different": ("megatron", "wrong"),
        "different copies": ("wrong copy", "hf"),
        "sample": ("megatron", "wrong", "--sample", "1/64"),
        "stages": ("stages/{RANK}", "wrong"),
        "tensor ranks": ("tensor ranks/{RANK}", "hf"),
        "wrong tensor ranks": ("hf", "wrong tensor ranks/{RANK}"),
        "apart": ("tensor ranks/{RANK}", "other nodes/{RANK}"),
    }
    jobs = {
        name: ["verify", str(root / a), str(root / b), "--json", "--max-memory-per-rank", "30MB", *more]
        for name, (a, b, *more) in pairs.items()
    }
    jobs["conversion"] = flags(root / "megatron", root / "converted", "--verify", "--placement", "gather")
    jobs["conversion of tensor ranks"] = flags(
        root / "tensor ranks" / "{RANK}", root / "from tensor ranks", "--verify", "--placement", "gather"
    )
    jobs["conversion of stages"] = flags(root / "stages" / "{RANK}", root / "from stages", "--verify")
    yield root, run_jobs(2, jobs, root)
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("name", "a", "b", "code"),
    [
        ("same", "megatron", "hf", 0),
        ("grids", "other grid", "megatron", 0),
        ("different", "megatron", "wrong", 1),
        ("different copies", "wrong copy", "hf", 1),
    ],
)
def test_two_ranks_report_what_one_reports(
    name: str,
    a: str,
    b: str,
    code: int,
    answers: tuple[Path, dict[str, Answer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, found = answers
    assert main(["verify", str(root / a), str(root / b), "--json"]) == code
    assert json.loads(found[name].stdout[0]) == json.loads(capsys.readouterr().out)
    assert found[name].stdout[1] == ""
    assert found[name].exit_codes == [code, code]


def test_both_flipped_bits_are_named(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    values = json.loads(found["different"].stdout[0])["values"]
    assert [(f["tensor"], f["index"], f["elements"]) for f in values] == [
        ("model.layers.0.mlp.up_proj.weight", [4607, 511], 1),
        ("model.layers.1.mlp.down_proj.weight", [300, 4000], 1),
    ]
    assert values[1]["files"] == ["mp_rank_01_001/model_optim_rng.pt", "model.safetensors"]


def test_a_sample_always_has_the_last_block_of_a_tensor(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    values = json.loads(found["sample"].stdout[0])["values"]
    assert ("model.layers.0.mlp.up_proj.weight", [4607, 511]) in [(f["tensor"], f["index"]) for f in values]


def test_ranks_that_see_whole_stages_compare_their_own(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    reports = [json.loads(found[name].stdout[0]) for name in ("stages", "different")]
    assert reports[0]["values"] == reports[1]["values"]
    assert reports[0]["compared"] == reports[1]["compared"]


def test_ranks_that_see_some_shards_of_each_tensor_compare_those(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    assert found["tensor ranks"].exit_codes == [0, 0]
    reports = [json.loads(found[name].stdout[0]) for name in ("tensor ranks", "same")]
    assert reports[0]["compared"] == reports[1]["compared"]


def test_a_copy_that_only_another_node_has_is_compared_there(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    [value] = json.loads(found["wrong tensor ranks"].stdout[0])["values"]
    assert (value["tensor"], value["index"]) == ("model.norm.weight", [500])
    assert value["between"] == "copies of A and B on another node"
    assert value["files"] == ["model.safetensors", "mp_rank_01_001/model_optim_rng.pt"]


def test_shards_whose_counterparts_no_rank_sees_are_refused_once(answers: tuple[Path, dict[str, Answer]]) -> None:
    _, found = answers
    assert found["apart"].exit_codes == [2, 2]
    assert sum("no rank sees both this file" in text for text in found["apart"].stderr) == 1


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("conversion", "converted"),
        ("conversion of stages", "from stages"),
        ("conversion of tensor ranks", "from tensor ranks"),
    ],
)
def test_a_conversion_is_verified_by_all_ranks_and_says_so_once(
    name: str, target: str, answers: tuple[Path, dict[str, Answer]]
) -> None:
    root, found = answers
    assert found[name].exit_codes == [0, 0]
    assert [f"{root / target}: verified, 21 tensors" in text for text in found[name].stderr] == [True, False]


def test_a_report_for_people_is_printed_once_and_the_exit_code_is_the_difference(
    answers: tuple[Path, dict[str, Answer]],
) -> None:
    root, _ = answers
    run = run_ranks(2, "verify", str(root / "hf"), str(root / "wrong"))
    assert run.returncode == 1
    assert run.stdout.count("DIFFERENT: 2 differences") == 1
    assert "Traceback (most recent call last)" not in run.stdout


def test_every_copy_of_a_file_on_the_nodes_own_disks_is_compared_and_counted(tmp_path: Path) -> None:
    tensors = make_hf(tmp_path / "hf", MODEL)
    grid = ["--target-tensor-parallel-size", "2", "--target-ranks-per-node", "2"]
    job = ["--load-dir", f"{tmp_path}/hf", "--save-dir", f"{tmp_path}/node{{node}}", *grid, "--device", "cpu"]
    runs = on_two_nodes(1, "hf-to-megatron", *job, "--verify")
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert f"{tmp_path}/node0/iter_0000001: verified, 21 tensors" in runs[0].stderr
    shard = tmp_path / "node1" / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    content = bytearray(shard.read_bytes())
    row = tensors["model.layers.1.mlp.down_proj.weight"][300, 2304:].view(torch.uint8).numpy().tobytes()
    content[content.index(row) + 2 * 2] ^= 1  # the third element
    shard.write_bytes(content)
    runs = on_two_nodes(1, "verify", f"{tmp_path}/hf", f"{tmp_path}/node{{node}}", "--json")
    assert runs[0].returncode != 0
    report = json.loads(runs[0].stdout)
    [value] = report["values"]
    assert (value["tensor"], value["index"]) == ("model.layers.1.mlp.down_proj.weight", [300, 2306])
    assert value["files"] == ["model.safetensors", "1:mp_rank_01/model_optim_rng.pt"]
    weights_bytes = report["compared"]["bytes_a"]
    norms_bytes = 5 * 512 * 2
    assert report["compared"]["bytes_b"] == 2 * (weights_bytes + norms_bytes)
