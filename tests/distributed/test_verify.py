"""`verify` on two ranks: the same report as on one, from rank 0 alone, each rank with what it sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import Answer, flags, run_jobs, torchrun
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
    for nodes, last in (("stages", "_00{}"), ("tensor ranks", "")):
        for rank in (0, 1):
            wanted = f"mp_rank_*{last.format(rank)}" if last else f"mp_rank_0{rank}_*"
            for directory in shards.glob(wanted):
                shutil.copytree(directory, root / nodes / f"{rank}" / "iter_0000004" / directory.name)
    (root / "stages" / "0" / "latest_checkpointed_iteration.txt").write_text("4")
    (root / "tensor ranks" / "0" / "latest_checkpointed_iteration.txt").write_text("4")
    pairs = {
        "same": ("megatron", "hf"),
        "grids": ("other grid", "megatron"),
        "different": ("megatron", "wrong"),
        "different copies": ("wrong copy", "hf"),
        "sample": ("megatron", "wrong", "--sample", "1/64"),
        "stages": ("stages/{RANK}", "wrong"),
        "tensor ranks": ("tensor ranks/{RANK}", "hf"),
    }
    jobs = {
        name: ["verify", str(root / a), str(root / b), "--json", "--max-memory-per-rank", "30MB", *more]
        for name, (a, b, *more) in pairs.items()
    }
    jobs["conversion"] = flags(root / "megatron", root / "converted", "--verify", "--placement", "gather")
    jobs["conversion of tensor ranks"] = flags(
        root / "tensor ranks" / "{RANK}", root / "not converted", "--verify", "--placement", "gather"
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
    assert [report["values"] for report in reports][0] == reports[1]["values"]
    assert reports[0]["compared"] == reports[1]["compared"]


@pytest.mark.parametrize("name", ["tensor ranks", "conversion of tensor ranks"])
def test_shards_that_no_rank_sees_together_are_refused_once_before_anything_is_done(
    name: str, answers: tuple[Path, dict[str, Answer]]
) -> None:
    root, found = answers
    assert found[name].exit_codes == [2, 2]
    assert sum("no rank sees all files that hold a tensor" in text for text in found[name].stderr) == 1
    assert not (root / "not converted.partial").exists()


@pytest.mark.parametrize(("name", "target"), [("conversion", "converted"), ("conversion of stages", "from stages")])
def test_a_conversion_is_verified_by_all_ranks_and_says_so_once(
    name: str, target: str, answers: tuple[Path, dict[str, Answer]]
) -> None:
    root, found = answers
    assert found[name].exit_codes == [0, 0]
    assert [f"{root / target}: verified, 21 tensors" in text for text in found[name].stderr] == [True, False]


def test_torchrun_sees_the_difference_in_the_exit_code(answers: tuple[Path, dict[str, Answer]]) -> None:
    root, _ = answers
    run = torchrun(2, "verify", str(root / "hf"), str(root / "wrong"))
    assert run.returncode == 1
    assert run.stdout.count("DIFFERENT: 2 differences") == 1
    assert "Traceback (most recent call last)" not in run.stdout
