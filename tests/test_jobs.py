"""Every job of `configs/` would start, on a model of the true size: its headers, with holes for values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.plan.plan import divide, schedule_digest
from tests.full_size import LLAMA_31_CONFIG, make_sparse_huggingface, make_sparse_megatron, model_of
from tests.plan.headers import FULL_SIZE
from tests.published import make_published, make_published_megatron, task_of
from tests.tokenizer.test_huggingface_directory import make_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"

#: Job -> its model and grid, its weights files on Hugging Face's hub, and what it writes in each direction.
#: Megatron's shards repeat the norms and, for every expert parallel rank, all that is no expert.
MODELS = {
    "llama3.1-8b": ("Llama-3.1-8B TP4", 4, "16.1 GB", "16.1 GB"),
    "llama3.1-70b": ("Llama-3.1-70B TP8 PP4", 30, "141 GB", "141 GB"),
    "llama3.1-405b": ("Llama-3.1-405B TP8 PP16", 191, "812 GB", "812 GB"),
    "mixtral-8x7b": ("Mixtral-8x7B TP4 EP2", 19, "93.4 GB", "96.6 GB"),
    "mixtral-8x22b": ("Mixtral-8x22B TP2 PP4 EP8", 59, "281 GB", "356 GB"),
}

#: The same of `published.PUBLISHED`: its grid, and what a job to Megatron and one to Hugging Face write.
PUBLISHED_JOBS = {
    "qwen3-8b": ("TP4 PP1 VPP1 EP1 ETP4", "16.4 GB", "16.4 GB"),
    "qwen3-32b": ("TP8 PP1 VPP1 EP1 ETP8", "65.5 GB", "65.5 GB"),
    "qwen3-30b-a3b": ("TP1 PP1 VPP1 EP8 ETP1", "", "61.1 GB"),
    "qwen3-235b-a22b": ("TP4 PP2 VPP1 EP8 ETP1", "", "470 GB"),
    "deepseek-v3": ("TP8 PP8 VPP1 EP8 ETP1", "1.38 TB", "1.37 TB"),
    "glm-4.5-air": ("TP4 PP2 VPP1 EP8 ETP1", "", ""),
    "gpt-oss-20b": ("TP1 PP1 VPP1 EP8 ETP1", "", "41.8 GB"),
    "gpt-oss-120b": ("TP1 PP1 VPP1 EP8 ETP1", "", "234 GB"),
}
PUBLISHED = [pytest.param(name, marks=() if name == "qwen3-8b" else pytest.mark.slow) for name in PUBLISHED_JOBS]


@pytest.fixture
def large_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system with room for the largest model, which nothing is written to."""
    return make_disk("size=2t")


def test_every_job_file_belongs_to_a_model_and_a_direction() -> None:
    directions = ("megatron-to-hf", "hf-to-megatron")
    expected = {f"{model}-{direction}.yaml" for model in (*MODELS, *PUBLISHED_JOBS) for direction in directions}
    assert {path.name for path in CONFIGS.iterdir()} == expected


@pytest.mark.parametrize("model", MODELS)
def test_a_job_to_hugging_face_would_start(
    model: str, large_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, files, size, _ = MODELS[model]
    make_sparse_megatron(tmp_path / "megatron", name)
    paths = {
        "--load-path": tmp_path / "megatron",
        "--save-path": large_disk / "hf",
        "--tokenizer": make_tokenizer(tmp_path / "tokenizer"),
    }
    assert dry_run("megatron-to-hf", model, paths) == 0
    answer = capsys.readouterr().out
    assert f"{size} to write to {large_disk}/hf" in answer
    assert f"model-00001-of-{files:05d}.safetensors" in answer


@pytest.mark.parametrize("model", MODELS)
def test_a_job_to_megatron_would_start(
    model: str, large_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, files, _, size = MODELS[model]
    architecture, grid, _ = FULL_SIZE[name]
    config = {} if architecture.experts else LLAMA_31_CONFIG
    make_sparse_huggingface(tmp_path / "hf", model_of(architecture), files, **config)
    paths = {
        "--load-dir": tmp_path / "hf",
        "--save-dir": large_disk / "megatron",
        "--tokenizer-model": make_tokenizer(tmp_path / "tokenizer"),
    }
    assert dry_run("hf-to-megatron", model, paths) == 0
    answer = capsys.readouterr().out
    assert f"TP{grid.tensor} PP{grid.pipeline} VPP1 EP{grid.expert} ETP{grid.expert_tensor}" in answer
    assert f"{size} to write to {large_disk}/megatron/iter_0000001" in answer


@pytest.mark.parametrize("model", PUBLISHED)
def test_jobs_of_a_published_model_would_start_in_both_directions(
    model: str, large_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, megatron_bytes, huggingface_bytes = PUBLISHED_JOBS[model]
    make_published(tmp_path / "hf", model, files=16)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    paths = {"--load-dir": tmp_path / "hf", "--save-dir": large_disk / "megatron", "--tokenizer-model": tokenizer}
    assert dry_run("hf-to-megatron", model, paths) == 0
    answer = capsys.readouterr().out
    assert grid in answer
    assert f"{megatron_bytes} to write to {large_disk}/megatron/iter_0000001" in answer

    paths["--save-dir"] = tmp_path / "megatron"
    make_published_megatron(job_words("hf-to-megatron", model, paths))
    paths = {"--load-path": tmp_path / "megatron", "--save-path": large_disk / "hf"}
    assert dry_run("megatron-to-hf", model, paths | {"--tokenizer": tokenizer, "--like": tmp_path / "hf"}) == 0
    assert f"{huggingface_bytes} to write to {large_disk}/hf" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["direct", "gather"])
def test_the_14848_experts_of_deepseek_v3_are_planned_for_1024_ranks(placement: str, tmp_path: Path) -> None:
    make_published(tmp_path / "hf", "deepseek-v3", files=163, num_nextn_predict_layers=0)
    paths = {"--load-dir": tmp_path / "hf", "--save-dir": tmp_path / "megatron", "--tokenizer-model": Path("org/model")}
    started = time.process_time()
    task = task_of(job_words("hf-to-megatron", "deepseek-v3", paths))
    visible, writable = [task.source.found.visible[0]] * 1024, [task.writable[0]] * 1024
    plan = divide(task.content, visible, placement=placement, budget_bytes=10**9, writable=writable)
    schedule_digest(plan)
    print(f"{time.process_time() - started:.1f} s")  # pytest -rP shows it
    padding = 2 * (130_048 - 129_280) * 7168  # of embedding and head
    published = 671_026_419_200 + 14_848  # which leaves the experts' biases out
    assert sum(one.size_bytes for one in task.content.transfers) == 2 * (published + padding)


def dry_run(direction: str, model: str, paths: Mapping[str, Path]) -> int:
    """Start a job file with these paths in place of its own; nothing may be written."""
    return main([*job_words(direction, model, paths), "--dry-run"])


def job_words(direction: str, model: str, paths: Mapping[str, Path]) -> list[str]:
    flags = [word for flag, path in paths.items() for word in (flag, str(path))]
    return [direction, "--config", str(CONFIGS / f"{model}-{direction}.yaml"), *flags]
