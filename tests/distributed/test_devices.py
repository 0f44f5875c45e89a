"""Conversions that gather through an accelerator's memory: the same bytes as on the CPU.

Gaudi is a stand-in (`standin/`) that refuses what HCCL refuses; CUDA is the machine's own, over NCCL (`pytest -m gpu`).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.errors import UsageError
from dist_convert.ranks.device import choose_device
from tests.checkpoints import Grid, Model, make
from tests.converting import convert
from tests.distributed.devices import ACCELERATORS, STAND_IN, environment_of
from tests.distributed.launching import hashes, on_two_nodes, run_jobs
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import FILE, make_hf, to_megatron

# Larger than a block, and cut along columns: several gathers.
LLAMA = Model(hidden=512, ffn=6144, heads=32, groups=8, head_dim=64, layers=2, vocab=1001, padded_vocab=1024)
MIXTRAL = Model(hidden=512, ffn=1024, heads=8, groups=4, head_dim=64, layers=1, vocab=99, padded_vocab=128, experts=4)
GATHER = ("--placement", "gather", "--target-params-dtype", "keep")


def to_huggingface(source: Path, target: Path, device: str, *flags: str) -> list[str]:
    return ["megatron-to-hf", "--load-path", str(source), "--save-path", str(target), "--device", device, *flags]


@pytest.mark.parametrize("model", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("device", ACCELERATORS)
def test_shards_gathered_on_an_accelerator_become_the_files_of_the_cpu(
    device: str, model: Model, tmp_path: Path
) -> None:
    env = environment_of(device, ranks=2)
    (tmp_path / "log").mkdir()
    make(tmp_path / "megatron", model, Grid(tp=2))
    assert convert(tmp_path / "megatron", tmp_path / "one rank") == 0
    jobs = {
        "in one go": to_huggingface(tmp_path / "megatron", tmp_path / "in one go", device, *GATHER),
        "small steps": to_huggingface(
            tmp_path / "megatron", tmp_path / "small steps", device, *GATHER, "--max-memory-per-rank", "84MB"
        ),
    }
    answers = run_jobs(2, jobs, tmp_path, env | {"STAND_IN_HCCL_LOG": str(tmp_path / "log")})
    for name, answer in answers.items():
        assert answer.outcome["gathered_bytes"] > 0
        assert hashes(tmp_path / name) == hashes(tmp_path / "one rank")
    if device == "hpu":
        seen = [path.read_text().splitlines() for path in sorted((tmp_path / "log").iterdir())]
        assert [len(lines) for lines in seen] == [len(seen[0])] * 2  # card 0 and card 1
        assert {line.split()[0] for lines in seen for line in lines} == {"hpu"}
        # Each gather has a tensor that is sent and one, twice as large, that is received.
        sent_bytes = sum(int(line.split()[1]) for lines in seen for line in lines) // 3
        assert 2 * sent_bytes == sum(answer.outcome["gathered_bytes"] for answer in answers.values())


@pytest.mark.parametrize("device", ACCELERATORS)
def test_ranks_that_all_see_a_torch_dist_checkpoint_gather_nothing_on_an_accelerator(
    device: str, tmp_path: Path
) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    assert to_megatron(tmp_path / "hf", tmp_path / "dist", "--target-format", "torch_dist", grid=Grid(tp=2)) == 0
    assert convert(tmp_path / "dist", tmp_path / "one rank") == 0
    jobs = {"two": to_huggingface(tmp_path / "dist", tmp_path / "two", device, "--target-params-dtype", "keep")}
    answers = run_jobs(2, jobs, tmp_path, environment_of(device, ranks=2))
    assert answers["two"].outcome["gathered_bytes"] == 0
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one rank")


def test_a_fully_parallel_save_on_the_nodes_own_disks_is_gathered_by_processors_and_refused_on_accelerators(
    tmp_path: Path,
) -> None:
    make_distributed(tmp_path / "dist", Model(), Grid(tp=2), replicas=2)  # a weight's two pieces lie on any two of four
    assert convert(tmp_path / "dist", tmp_path / "one rank") == 0
    for rank in "0123":
        others = [f"__{other}_0.distcp" for other in "0123" if other != rank]
        shutil.copytree(tmp_path / "dist", tmp_path / rank, ignore=shutil.ignore_patterns(*others))
    jobs = {
        device: to_huggingface(tmp_path / "{rank}", tmp_path / device, device, "--target-params-dtype", "keep")
        for device in ("cpu", "hpu")
    }
    answers = run_jobs(4, jobs, tmp_path, STAND_IN)
    assert answers["cpu"].outcome["gathered_bytes"] > 0
    [one_rank, cpu] = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one rank", "cpu"))
    assert cpu == one_rank
    assert answers["hpu"].exit_codes == [2] * 4
    assert "".join(answers["hpu"].stderr).splitlines()[-4:] == [
        "the nodes' own disks hold chunks in an order that ranks on accelerators cannot gather",
        "  expected: groups of at most 2 ranks, one for each piece of a weight",
        "  found:    a group of 4",
        "  remedy:   put the checkpoint on a file system that all nodes share, or pass --device cpu",
    ]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("hpu")]


@pytest.mark.parametrize("device", ACCELERATORS)
def test_a_target_whose_replicas_lie_on_two_nodes_is_written_over_an_accelerator(device: str, tmp_path: Path) -> None:
    env = environment_of(device, ranks=2)
    make_hf(tmp_path / "hf", LLAMA)
    assert to_megatron(tmp_path / "hf", tmp_path / "whole", grid=Grid(tp=2)) == 0
    runs = on_two_nodes(
        1, "hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", f"{tmp_path}/node{{node}}",
        "--device", device, "--placement", "gather", "--target-tensor-parallel-size", "2",
        "--target-ranks-per-node", "2", "--make-vocab-size-divisible-by", "4",
        env=[{**env, "CUDA_VISIBLE_DEVICES": node, "HLS_MODULE_ID": node} for node in "01"],
    )  # fmt: skip
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    for shard in ("mp_rank_00", "mp_rank_01"):
        whole = (tmp_path / "whole" / "iter_0000001" / shard / FILE).read_bytes()
        for node in ("node0", "node1"):
            assert (tmp_path / node / "iter_0000001" / shard / FILE).read_bytes() == whole


def chosen(wanted: str, local_rank: int = 0, **env: str) -> str:
    """The device that a process of its own chooses, or the error's text."""
    with multiprocessing.get_context("fork").Pool(1) as forked:  # torch is imported there already
        return forked.apply(_chosen, (wanted, local_rank, env))


def _chosen(wanted: str, local_rank: int, env: dict[str, str]) -> str:
    os.environ.update(env)
    sys.path[:0] = env.get("PYTHONPATH", "").split(":")
    try:
        return str(choose_device(wanted, local_rank))
    except UsageError as error:
        return str(error)


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NO_CARD = {**STAND_IN, "STAND_IN_HPU_CARDS": "0"}


@pytest.mark.parametrize(
    ("wanted", "env", "device"),
    [
        ("auto", STAND_IN, "hpu"),
        ("auto", NO_CARD | NO_GPU, "cpu"),
        ("auto", NO_GPU, "cpu"),
        ("cpu", STAND_IN, "cpu"),
        ("cuda", STAND_IN | {"PT_HPU_GPU_MIGRATION": "1"}, "hpu"),
        pytest.param("auto", {}, "cuda:0", marks=pytest.mark.gpu),
        pytest.param("cuda", {}, "cuda:0", marks=pytest.mark.gpu),
    ],
    ids=["Gaudi", "plugin without a card", "nothing", "not asked for", "migrated", "GPU", "GPU asked for"],
)
def test_auto_takes_what_is_there(wanted: str, env: dict[str, str], device: str) -> None:
    if device.startswith("cuda"):
        environment_of("cuda", ranks=1)
    assert chosen(wanted, **env) == device


@pytest.mark.parametrize(
    ("wanted", "local_rank", "env", "message"),
    [
        ("hpu", 0, {}, "no Gaudi device is available"),
        ("hpu", 0, NO_CARD, "no Gaudi device is available"),
        ("hpu", 2, STAND_IN | {"STAND_IN_HPU_CARDS": "2"}, "fewer Gaudi cards than ranks on this machine"),
        ("cuda", 0, NO_GPU, "no CUDA device is available"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_so(
    wanted: str, local_rank: int, env: dict[str, str], message: str
) -> None:
    assert chosen(wanted, local_rank, **env).splitlines()[0] == message


def test_gaudi_without_intels_package_is_one_message_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", Model(layers=1))
    assert main(to_huggingface(tmp_path / "megatron", tmp_path / "hf", "hpu")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "no Gaudi device is available",
        "  expected: a free card, and the package habana-torch-plugin of Intel's container",
        "  found:    no package habana_frameworks",
        "  remedy:   start where one is (Intel's container for Gaudi), or use --device cpu",
    ]
    assert os.listdir(tmp_path) == ["megatron"]
