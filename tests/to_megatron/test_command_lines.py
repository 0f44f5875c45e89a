"""Command lines: those of Habana's convert.py but for the program's name, and what is ours in addition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.__main__ import main
from dist_convert.cli.flags import options_from_flags, parse
from dist_convert.errors import UsageError
from dist_convert.formats.open import open_source
from dist_convert.formats.to_megatron import to_megatron
from dist_convert.options import Options
from dist_convert.ranks.collectives import World
from dist_convert.write.task import Task
from tests.checkpoints import Grid, Model, hf_tensors
from tests.full_size import make_sparse_huggingface
from tests.to_megatron import FILE, assert_same_shards, expected_shards, load, make_hf, read_shards

LLAMA_COMMAND = """
    --bf16 --model-type GPT --loader llama_mistral --saver mcore --loader-transformer-impl local
    --saver-transformer-impl transformer_engine --target-tensor-parallel-size {TP} --target-pipeline-parallel-size {PP}
    --checkpoint-type hf --source-margs-file {hf}/source_megatron_args.json --load-dir {hf} --save-dir {save}
    --tokenizer-model {hf}/tokenizer.model --model-size llama3-70B
"""
MIXTRAL_COMMAND = """
    --bf16 --model-type GPT --loader mixtral_hf --saver mcore --saver-transformer-impl local
    --target-tensor-parallel-size {TP} --target-pipeline-parallel-size {PP} --target-expert-parallel-size {EP}
    --source-margs-file {hf}/source_megatron_args.json --load-dir {hf} --save-dir {save}
    --tokenizer-model {hf}/tokenizer.model
"""
ALONE = World(0, 1, (0,), torch.device("cpu"))
MARGS = {"lr": 3e-4, "seq_length": 48, "tokenizer_model": "/theirs", "tensor_model_parallel_size": 8}


def words(command: str, hf: Path, **values: Any) -> list[str]:
    return ["hf-to-megatron", *command.format(hf=hf, save=hf.parent / "megatron", **values).split()]


def job(*flags: str) -> Options:
    return options_from_flags(parse(["hf-to-megatron", "--load-dir", "/hf", "--save-dir", "/out", *flags]))


def plan(asked: Options) -> Task:
    return to_megatron(asked, open_source(asked, ALONE), ALONE)


LLAMA3_70B = Model(
    hidden=8192, ffn=28672, heads=64, groups=8, head_dim=128, layers=80, vocab=128256, padded_vocab=128256
)


def test_the_old_llama_command_plans_a_model_of_70_billion(tmp_path: Path) -> None:
    make_sparse_huggingface(tmp_path / "hf", LLAMA3_70B, files=30)
    (tmp_path / "hf" / "source_megatron_args.json").write_text(json.dumps(MARGS))
    asked = options_from_flags(parse(words(LLAMA_COMMAND, tmp_path / "hf", TP=8, PP=4)))
    task = plan(asked)
    assert len(task.content.files) == 32
    # As published; the rows of padding to 128 x 8 (768 in the embedding, 768 in the head); 161 norms on 7 more ranks.
    assert task.content.moved_bytes == 2 * (70_553_706_496 + 2 * 768 * 8192 + 161 * 7 * 8192)
    sizes = [file.size_bytes for file in task.content.files]
    assert sum(sizes) - task.content.moved_bytes < 32 * 1_000_000  # names, args and alignment
    assert not (tmp_path / "megatron").exists()


def test_the_old_llama_command_converts_but_for_the_size_that_is_not_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_hf(tmp_path / "hf")
    (tmp_path / "hf" / "source_megatron_args.json").write_text(json.dumps(MARGS))
    asked = words(LLAMA_COMMAND, tmp_path / "hf", TP=2, PP=2)
    assert main(asked) == 2
    message = capsys.readouterr().err
    assert "--model-size is not the model in the source" in message
    assert [number for number in ("llama3-70B", "80", "8192", "28672", "128256") if number not in message] == []
    assert not (tmp_path / "megatron").exists()
    assert main([word for word in asked if word not in ("--model-size", "llama3-70B")]) == 0
    grid = Grid(tp=2, pp=2)
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(Model(), hf, grid, divisible_by=128))
    args = vars(load(tmp_path / "megatron" / "iter_0000001" / "mp_rank_00_000" / FILE)["args"])
    assert {name: args[name] for name in ("lr", "seq_length", "tensor_model_parallel_size")} == {
        "lr": 3e-4, "seq_length": 48, "tensor_model_parallel_size": 2,
    }  # fmt: skip
    assert args["tokenizer_model"] == str(tmp_path / "hf" / "tokenizer.model")


@pytest.mark.parametrize("spelling", ["--target-expert-parallel-size", "--target-expert-paralell-size"])
def test_the_old_mixtral_command_converts_in_both_spellings(spelling: str, tmp_path: Path) -> None:
    model = Model(experts=4, groups=4)
    hf = make_hf(tmp_path / "hf", model)
    (tmp_path / "hf" / "source_megatron_args.json").write_text(json.dumps(MARGS))
    command = MIXTRAL_COMMAND.replace("--target-expert-parallel-size", spelling)
    assert main(words(command, tmp_path / "hf", TP=2, PP=2, EP=2)) == 0
    grid = Grid(tp=2, pp=2, ep=2)
    expected = expected_shards(model, hf, grid, norms="local", divisible_by=128)
    assert_same_shards(read_shards(tmp_path / "megatron"), expected)


WITHOUT_MEANING = {
    "--model-type": "GPT", "--loader": "llama_mistral", "--saver": "mcore", "--loader-transformer-impl": "local",
    "--max-queue-size": "200", "--no-checking": None, "--megatron-path": "/megatron", "--vocab-file": "/vocab",
    "--checkpoint-type": "hf",
}  # fmt: skip


@pytest.mark.parametrize("flag", WITHOUT_MEANING)
def test_a_flag_that_means_nothing_any_more_says_so_in_one_line(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    value = WITHOUT_MEANING[flag]
    given = [flag] if value is None else [flag, value]
    assert (
        main(["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), *given]) == 0
    )
    notes = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"{flag} has no effect: ")


@pytest.mark.parametrize(
    ("size", "fits"),
    [("llama3-8B", True), ("llama3-8Bf", True), ("llama2-7B", False), ("llama2-13B", False), ("llama3-70B", False)],
)
def test_a_model_size_is_compared_with_the_config(size: str, fits: bool, tmp_path: Path) -> None:
    llama3_8b = Model(
        hidden=4096, ffn=14336, heads=32, groups=8, head_dim=128, layers=32, vocab=128256, padded_vocab=128256
    )
    make_sparse_huggingface(tmp_path / "hf", llama3_8b, files=2)
    flags = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), "--model-size", size]
    asked = options_from_flags(parse(["hf-to-megatron", *flags]))
    if fits:
        assert len(plan(asked).content.files) == 1
    else:
        with pytest.raises(UsageError, match="--model-size is not the model in the source"):
            plan(asked)


@pytest.mark.parametrize(("size", "code"), [("29", 0), ("30", 2)])
def test_the_true_size_of_the_vocabulary_is_compared_with_the_config(size: str, code: int, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    flags = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), "--true-vocab-size", size]
    assert main(["hf-to-megatron", *flags]) == code


def test_the_tokenizer_may_be_a_name_of_the_hub(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    flags = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), "--tokenizer-model", "org/model"]
    assert main(["hf-to-megatron", *flags]) == 0
    args = load(tmp_path / "out" / "iter_0000001" / "mp_rank_00" / FILE)["args"]
    assert (args.tokenizer_model, args.tokenizer_type) == ("org/model", "HuggingFaceTokenizer")


@pytest.mark.parametrize(
    ("files", "flags", "tokenizer"),
    [
        (["tokenizer.json"], [], "hf"),
        (["tokenizer.model"], ["--tokenizer-type", "Llama2Tokenizer"], "hf/tokenizer.model"),
        ([], [], None),
    ],
)
def test_without_a_flag_the_args_name_the_models_own_tokenizer(
    files: list[str], flags: list[str], tokenizer: str | None, tmp_path: Path
) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    for name in files:
        (tmp_path / "hf" / name).write_text("{}")
    assert (
        main(["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), *flags]) == 0
    )
    args = load(tmp_path / "out" / "iter_0000001" / "mp_rank_00" / FILE)["args"]
    assert args.tokenizer_model == (tokenizer and str(tmp_path / tokenizer))


def test_a_command_line_of_the_old_tool_is_told_which_names_gaudi_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    old = ["--loader", "llama_mistral", "--saver", "mcore", "--saver-transformer-impl", "transformer_engine"]
    assert main(["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out"), *old]) == 0
    assert "Gaudi needs --saver-transformer-impl habana" in capsys.readouterr().err


def test_a_job_file_holds_any_flag_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("bf16: true\ntarget_expert_paralell_size: 2\niteration: 7\nno-checking: true\n")
    found = job("--config", str(path), "--iteration", "8")
    assert (found.target_params_dtype, found.target_expert_parallel_size, found.iteration) == ("bf16", 2, 8)


@pytest.mark.parametrize(
    ("text", "flags", "field", "value"),
    [
        ("bf16: true", ("--target-params-dtype", "fp32"), "target_params_dtype", "fp32"),
        ("bf16: true", ("--fp16",), "target_params_dtype", "fp16"),
        ("iteration: 7", ("--release",), "iteration", "release"),
    ],
)
def test_the_command_line_wins_over_a_job_files_flag_that_excludes_its_own(
    text: str, flags: tuple[str, ...], field: str, value: object, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert getattr(job("--config", str(tmp_path / "job.yaml"), *flags), field) == value


def test_messages_name_flags_that_this_command_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    paths = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    assert main(["hf-to-megatron", *paths]) == 0
    assert main(["hf-to-megatron", *paths, "--vocab-padding", "zeros"]) == 1
    message = capsys.readouterr().err
    assert "the target directory is not empty" in message
    assert "found:    a conversion: --vocab-padding was last-row, now zeros\n" in message
    assert "--save-path" not in message  # which is megatron-to-hf's


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    paths = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    assert main(["hf-to-megatron", *paths, "--target-tensor-parallel-size", "2", "--dry-run"]) == 0
    answer = capsys.readouterr().out
    assert "LlamaForCausalLM, TP2 PP1" in answer
    assert [name in answer for name in (f"mp_rank_00/{FILE}", f"mp_rank_01/{FILE}")] == [True, True]
    assert "dry run: the conversion would start; nothing was written" in answer
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_margs_file_the_flag_that_names_one_is_wrong(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", tensors=hf_tensors(Model()))
    paths = ["--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    assert main(["hf-to-megatron", *paths, "--source-margs-file", str(tmp_path / "missing.json")]) == 2
    assert not (tmp_path / "out").exists()
