"""Hugging Face to Megatron on several ranks: the same bytes for any number of them, read once, in flat memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, hf_tensors
from tests.distributed.launching import Answer, run_jobs, run_ranks
from tests.to_megatron import assert_same_shards, expected_shards, grid_flags, make_hf, read_shards, to_megatron

# down_proj is cut along columns and larger than a block (4 MiB); the vocabulary is padded to 256 x the tensor size.
LLAMA = Model(hidden=512, ffn=4608, heads=8, groups=4, head_dim=64, layers=2, vocab=1001)
MIXTRAL = Model(hidden=512, ffn=1536, heads=8, groups=4, head_dim=64, layers=1, vocab=99, experts=4)
ZEROS = ("--vocab-padding", "zeros")
TARGETS: dict[str, tuple[Model, Grid, tuple[str, ...]]] = {
    "llama TP2 PP2": (LLAMA, Grid(tp=2, pp=2), ZEROS),
    "llama TP4": (LLAMA, Grid(tp=4), ()),
    "mixtral TP2 EP2": (MIXTRAL, Grid(tp=2, ep=2), ZEROS),
    "mixtral TP2 EP4 ETP1, grouped": (MIXTRAL, Grid(tp=2, ep=4, etp=1), ("--expert-layout", "grouped", *ZEROS)),
}
WAYS = {
    "direct": ("--placement", "direct"),
    "gather": ("--placement", "gather"),
    "gather in small steps": ("--placement", "gather", "--max-memory-per-rank", "68MB"),
}
MARGS = {
    "lr": 1e-4,
    "betas": [0.9, 0.95],
    "main_grads_dtype": "torch.float32",
    "data": {"b": 1, "a": None},
    "name": "a",
}


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a root."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flags_of(name: str, root: Path) -> list[str]:
    _, grid, more = TARGETS[name]
    margs = ["--source-margs-file", str(root / "margs.json")]
    return [*grid_flags(grid), *more, *margs, "--make-vocab-size-divisible-by", "256"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The models, and beside each the checkpoint `NAME one rank` of a conversion without torchrun."""
    root = tmp_path_factory.mktemp("sources")
    (root / "margs.json").write_text(json.dumps(MARGS))
    for name, (model, grid, more) in TARGETS.items():
        tensors = make_hf(root / name, model)
        assert to_megatron(root / name, root / f"{name} one rank", *flags_of(name, root)) == 0
        layout = "grouped" if "grouped" in name else "sequential"
        expected = expected_shards(model, tensors, grid, experts=layout, divisible_by=256, zeros="zeros" in more)
        assert_same_shards(read_shards(root / f"{name} one rank"), expected)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> int:
    """How many ranks torchrun starts."""
    return int(request.param)


@pytest.fixture(scope="module")
def converted(
    ranks: int, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Answer, dict[str, str]]]:
    """Every model converted in every way: "NAME, WAY" -> the answer, and the files' hashes."""
    scratch = tmp_path_factory.mktemp("converted")
    jobs = {
        f"{name}, {way}": [
            "hf-to-megatron", "--load-dir", str(sources / name), "--save-dir", str(scratch / f"{name}, {way}"),
            "--device", "cpu", *flags_of(name, sources), *how,
        ]
        for name in TARGETS
        for way, how in WAYS.items()
    }  # fmt: skip
    answers = run_jobs(ranks, jobs, scratch)
    found = {name: (answer, hashes(scratch / name)) for name, answer in answers.items()}
    shutil.rmtree(scratch)
    return found


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_ranks_writes_the_bytes_that_one_rank_writes(
    way: str, name: str, sources: Path, converted: dict[str, tuple[Answer, dict[str, str]]]
) -> None:
    answer, found = converted[f"{name}, {way}"]
    assert answer.exit_codes == [0] * len(answer.exit_codes), answer.stderr
    assert found == hashes(sources / f"{name} one rank")


def weights_bytes(directory: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with (directory / "model.safetensors").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        return file.seek(0, 2) - 8 - header_bytes


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if "zeros" in target[2]])
@pytest.mark.parametrize("way", WAYS)
def test_every_weight_is_read_once_in_all(
    way: str, name: str, sources: Path, converted: dict[str, tuple[Answer, dict[str, str]]]
) -> None:
    answer, _ = converted[f"{name}, {way}"]
    assert answer.outcome["read_bytes"] == weights_bytes(sources / name)


def test_to_repeat_the_last_row_it_is_read_again_and_not_once_for_each_row_of_padding(
    sources: Path, converted: dict[str, tuple[Answer, dict[str, str]]]
) -> None:
    row_bytes = 512 * 2
    for way in WAYS:
        answer, _ = converted[f"llama TP4, {way}"]
        again_bytes = answer.outcome["read_bytes"] - weights_bytes(sources / "llama TP4")
        assert 0 <= again_bytes <= 2 * 4 * row_bytes  # for each rank's shard of embedding and head at most


@pytest.mark.parametrize("format", ["torch", pytest.param("torch_dist", marks=pytest.mark.slow)])
def test_peak_memory_does_not_grow_with_the_model(format: str, tmp_path: Path) -> None:
    budget_bytes = 64_000_000
    peaks = {}
    jobs = {}
    for layers in (1, 10):  # 23 MB and 228 MB of weights
        model = Model(hidden=512, ffn=7000, heads=8, groups=4, head_dim=64, layers=layers, vocab=99)
        make_hf(tmp_path / f"{layers}", model)
        jobs[f"{layers}"] = [
            "hf-to-megatron", "--load-dir", str(tmp_path / f"{layers}"), "--save-dir", str(tmp_path / f"{layers} m"),
            "--device", "cpu", "--target-tensor-parallel-size", "2", "--max-memory-per-rank", "68MB",
            "--placement", "gather", "--target-format", format,
        ]  # fmt: skip
    for layers, answer in run_jobs(2, jobs, tmp_path).items():
        peaks[layers] = answer.outcome["peak_memory_bytes"]
    assert (tmp_path / "10" / "model.safetensors").stat().st_size > 3 * budget_bytes
    assert peaks["10"] - peaks["1"] < budget_bytes / 4


def test_one_rank_that_fails_leaves_no_iteration_and_one_message(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model())
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 2)
    job = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "m"), "--device", "cpu"]
    answer = run_jobs(2, {"cut short": job}, tmp_path)["cut short"]
    assert all(answer.exit_codes)
    assert sum("model.safetensors" in text for text in answer.stderr) == 1
    assert not (tmp_path / "m" / "iter_0000001").exists()


def test_a_tied_head_on_another_nodes_disk_is_compared_with_the_embedding(tmp_path: Path) -> None:
    model = Model(layers=1, tied=True)
    whole = hf_tensors(model)
    head = whole["model.embed_tokens.weight"].clone()
    head[17, 3] += 1
    parts = [whole, {"lm_head.weight": head}]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    for rank, (name, part) in enumerate(zip(names, parts, strict=True)):
        own = tmp_path / f"rank{rank}"
        make_hf(own, model, part)
        (own / "model.safetensors").rename(own / name)
        (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run = run_ranks(
        2, "hf-to-megatron", "--load-dir", str(tmp_path / "rank{rank}"), "--save-dir", str(tmp_path / "out")
    )
    assert run.returncode == 1
    assert "the model stores a head that differs" in run.stderr
    assert "found:    other values\n" in run.stderr
