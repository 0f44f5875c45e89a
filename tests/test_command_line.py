"""The command line: flags and their defaults, job files behind them, and one message with code 2 for wrong use."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from dist_convert.__main__ import main, options_from_flags
from dist_convert.cli.commands import COMMANDS as EXAMPLES
from dist_convert.cli.flags import build_parser, parse
from dist_convert.errors import UsageError
from dist_convert.options import Options
from dist_convert.records import __version__
from tests.checkpoints import Model, make
from tests.converting import assert_same, read_tensors

ROOT = Path(__file__).parents[1]
#: Help of flags that are another flag's value or other spelling, or that do nothing but check.
UNSAID = ("short for", "instead of", "no effect", "checked against", "is refused")
PATHS = ("--load-path", "/in", "--save-path", "/out")


def job(*flags: str) -> Options:
    return options_from_flags(parse(["megatron-to-hf", *flags]))


def printed_to_nobody(words: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command whose reader was gone before it began."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        line = [sys.executable, "-m", "dist_convert", *words]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def job_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return str(path)


def test_only_the_two_paths_are_required_and_every_other_flag_has_a_default() -> None:
    assert job(*PATHS) == Options(
        "huggingface",
        source="/in",
        target=Path("/out"),
        ckpt_dir_name=None,
        command="megatron-to-hf",
        target_params_dtype=None,
        source_model_type=None,
        instruct=False,
        save_capacity_bins=False,
        max_shard_size_bytes=5_000_000_000,
        true_vocab_size=None,
        tokenizer=None,
        habana_imported_experts=False,
        allow_overflow=False,
        device="auto",
        placement="auto",
        max_memory_per_rank_bytes=1_000_000_000,
        dry_run=False,
        overwrite=False,
        push_to_hub=None,
        private=False,
        timeout_seconds=600,
        verify=None,
    )


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--ckpt-dir-name iter_0000004", "ckpt_dir_name", "iter_0000004"),
        *((f"--target-params-dtype {name}", "target_params_dtype", name) for name in ("fp16", "bf16", "fp32", "keep")),
        *((f"--source-model-type {name}", "source_model_type", name) for name in ("llama2", "llama3", "llama3.1")),
        ("--source-model-type mixtral", "source_model_type", "mixtral"),
        ("--instruct", "instruct", True),
        ("--no-instruct", "instruct", False),
        ("--save-capacity-bins", "save_capacity_bins", True),
        ("--max-shard-size 2GB", "max_shard_size_bytes", 2_000_000_000),
        ("--max-shard-size 2GiB", "max_shard_size_bytes", 2_147_483_648),
        ("--max-shard-size 1.5MB", "max_shard_size_bytes", 1_500_000),
        ("--max-shard-size 4096", "max_shard_size_bytes", 4096),
        ("--true-vocab-size 128256", "true_vocab_size", 128256),
        ("--tokenizer /tokenizer", "tokenizer", Path("/tokenizer")),
        ("--habana-imported-experts", "habana_imported_experts", True),
        ("--allow-overflow", "allow_overflow", True),
        *((f"--device {name}", "device", name) for name in ("auto", "cpu", "cuda", "hpu")),
        *((f"--placement {name}", "placement", name) for name in ("auto", "gather", "direct")),
        ("--max-memory-per-rank 512MiB", "max_memory_per_rank_bytes", 536_870_912),
        ("--dry-run", "dry_run", True),
        ("--overwrite", "overwrite", True),
        ("--push-to-hub org/name", "push_to_hub", "org/name"),
        ("--push-to-hub org/name --private", "private", True),
        ("--timeout 3600", "timeout_seconds", 3600),
        ("--verify", "verify", "full"),
        ("--verify sample", "verify", "sample"),
    ],
)
def test_a_flag_sets_its_field_of_the_job(flags: str, field: str, value: Any) -> None:
    assert getattr(job(*PATHS, *flags.split()), field) == value


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["hf-to-nowhere"], "hf-to-nowhere"),
        (["megatron-to-hf", "--save-path", "/out"], "--load-path"),
        (["megatron-to-hf", "--load-path", "/in"], "--save-path"),
        (["megatron-to-hf", *PATHS, "--target-dtype", "bf16"], "--target-dtype"),
        (["megatron-to-hf", *PATHS, "--target-params-dtype", "int4"], "int4"),
        (["megatron-to-hf", *PATHS, "--source-model-type", "gpt2"], "gpt2"),
        (["megatron-to-hf", *PATHS, "--device", "tpu"], "tpu"),
        (["megatron-to-hf", *PATHS, "--placement", "random"], "random"),
        (["megatron-to-hf", *PATHS, "--max-shard-size", "5 potatoes"], "5 potatoes"),
        (["megatron-to-hf", *PATHS, "--max-shard-size", "0"], "'0'"),
        (["megatron-to-hf", *PATHS, "--max-memory-per-rank=-1GB"], "-1GB"),
        (["megatron-to-hf", *PATHS, "--true-vocab-size", "many"], "many"),
        (["megatron-to-hf", *PATHS, "--ckpt-dir-name"], "--ckpt-dir-name"),
        (["megatron-to-hf", *PATHS, "--push-to-hub", "name"], "--push-to-hub"),
        (["megatron-to-hf", *PATHS, "--private"], "--private"),
        (["megatron-to-hf", *PATHS, "--timeout", "0"], "--timeout"),
        (["megatron-to-hf", *PATHS, "--timeout", "99999999999999"], "--timeout"),
        (["hf-to-megatron", "--load-dir", "/in", "--save-dir", "/out", "--timeout=-1"], "--timeout"),
        (["hf-to-megatron", "--load-dir", "/in", "--save-dir", "/out", "--bf16", "--fp16"], "--fp16: not allowed with"),
        (["hf-to-megatron", "--load-dir", "/in", "--save-dir", "/out", "--release", "--iteration", "3"], "--iteration"),
        (["megatron-to-hf", *PATHS, "--max-memory-per-rank", "5"], "a size of 5 bytes, because it has no unit: '5'"),
        (["push", "/out"], "org/name"),
        (["inspect"], "PATH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_flags_end_with_code_2_and_are_named(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flag", ["--max-shard-size", "--max-memory-per-rank"])
def test_a_wrong_size_is_reported_with_the_flag_that_has_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["megatron-to-hf", *PATHS, flag, "5XB"]) == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-5"])
def test_a_vocabulary_without_tokens_is_a_wrong_flag(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1))
    paths = ("--load-path", str(tmp_path / "in"), "--save-path", str(tmp_path / "out"))
    assert main(["megatron-to-hf", *paths, "--device", "cpu", "--true-vocab-size", size]) == 2
    assert "--true-vocab-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_no_torchrun_started_says_itself_what_is_wrong_with_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["megatron-to-hf"]) == 2
    assert "--load-path and --save-path must be given" in capsys.readouterr().err


def test_a_misspelt_flag_is_named_even_where_a_path_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["megatron-to-hf", "--lod-path", "x"]) == 2
    message = capsys.readouterr().err
    assert "unrecognized arguments: --lod-path" in message
    assert "; perhaps --load-path for --lod-path\n" in message
    assert "--load-path and --save-path must be given" in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("convert --foo", ["unrecognized arguments: --foo", "SRC, DST and --to must be given"]),
        ("convert /nope --tp x /out", ["--to must be given", "argument --tp/", "/nope"]),
        ("convert /nope /out --to hf", ["argument --to: invalid choice: 'hf'", "/nope"]),
        ("verify --max-memory-per-rank 5Q", ["A and B must be given", "argument --max-memory-per-rank"]),
        (
            "convert --tokenizer no --like /no.json --ranks 99999 --max-shard-size 5Q",
            ["--max-shard-size: not a size: '5Q'", "SRC, DST and --to must be given", "found:    --ranks 99999",
             "--tokenizer names no tokenizer", "/no.json"],
        ),
        (
            "convert /nope /out --to torch --private --tokenizer no --like /no.json --ranks 99999",
            ["add --push-to-hub", "/nope", "found:    --ranks 99999", "--tokenizer names no tokenizer", "/no.json"],
        ),
        ("convert --tp-size 8 /nope /out --to torch", ["perhaps --tp for --tp-size", "file:     /nope\n"]),
        ("verify /nope /nowhere --like /no.json", ["A (/nope): ", "B (/nowhere): ", "/no.json"]),
        ("tokenizer /nope --overwrite=1", ["argument --overwrite", "DST must be given"]),
        ("hf-to-megatron --load-dir /in --private --push-to-hub name", ["org/name", "--save-dir must be given", "/in"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_flags_ranks_and_paths_is_told_at_once(
    given: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{len(said)} problems found; nothing was written\n"), message
    for words in said:
        assert words in message


def test_wrong_flags_are_told_in_json_where_the_log_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "/in", "--log-format", "json", "--frobnicate"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert (found["event"], len(found["problems"])) == ("error", 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("megatron-to-hf llama x1", "megatron-to-hf takes its paths by flags: --load-path llama --save-path x1"),
        ("hf-to-megatron llama x1", "hf-to-megatron takes its paths by flags: --load-dir llama --save-dir x1"),
        ("megatron-to-hf --load-path llama x1", "megatron-to-hf takes its paths by flags: --save-path x1"),
        ("megatron-to-hf llama x1 x2", "megatron-to-hf: unrecognized arguments: llama x1 x2"),
    ],
)
def test_paths_without_flags_are_told_with_the_flags_they_need(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given.split()) == 2
    assert f"dist-convert {said}\n  remedy:   see dist-convert " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "megatron-to-hf", "hf-to-megatron"])
@pytest.mark.parametrize("source", ["--source", "--load-path", "--load-dir"])
@pytest.mark.parametrize("target", ["--target", "--save-path", "--save-dir"])
def test_every_command_takes_the_paths_by_all_their_names(command: str, source: str, target: str) -> None:
    to = ["--to", "torch"] if command == "convert" else []
    wanted = options_from_flags(parse([command, source, "/in", target, "/out", *to]))
    assert (wanted.source, wanted.target) == ("/in", Path("/out"))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--tp --tensor-model-parallel-size", "target_tensor_parallel_size"),
        ("--pp --pipeline-model-parallel-size", "target_pipeline_parallel_size"),
        ("--vpp --num-virtual-stages-per-pipeline-rank", "target_virtual_pipeline_parallel_size"),
        ("--ep --expert-model-parallel-size", "target_expert_parallel_size"),
        ("--etp --expert-tensor-parallel-size", "target_expert_tensor_parallel_size"),
    ],
)
def test_parallel_sizes_have_short_flags_and_megatrons(flags: str, field: str) -> None:
    for flag in (*flags.split(), "--" + field.replace("_", "-")):
        assert getattr(parse(["convert", "/in", "/out", "--to", "torch", flag, "2"]), field) == 2


@pytest.mark.parametrize(
    ("words", "what", "found"),
    [
        ("/in /out --target /other --to torch", "DST is given twice", "/out and /other"),
        ("--load-dir /other /in /out --to torch", "SRC is given twice", "/in and /other"),
    ],
)
def test_a_path_that_is_given_with_and_without_a_flag_is_refused(words: str, what: str, found: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(["convert", *words.split()])
    assert (raised.value.what, raised.value.found) == (what, found)


def test_a_path_that_is_given_twice_alike_is_one() -> None:
    words = ["convert", "/in", "/out", "--to", "torch", "--target", "/out"]
    assert options_from_flags(parse(words)).target == Path("/out")


def test_flags_may_stand_between_the_paths() -> None:
    found = parse(["convert", "--ranks", "2", "/in", "--overwrite", "/out", "--to", "torch"])
    assert (found.source, found.target, found.ranks, found.overwrite) == ("/in", "/out", 2, True)


def test_all_wrong_flags_and_keys_of_a_job_file_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = job_file(tmp_path, "max-shard-size: 5XB\nlod-path: x\nload-path: /in\n")
    flags = ("--device", "tpu", "--true-vocab-size", "0", "--dtype", "bf16")
    assert main(["megatron-to-hf", "--config", file, *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("7 problems found; nothing was written\n")
    for named in (
        "/in",
        "--save-path must be given",
        "'5XB'",
        "lod-path: x",
        "'tpu'",
        "--true-vocab-size",
        "--target-params-dtype for --dtype",
    ):
        assert named in message


def test_options_that_exclude_each_other_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--private", "--vpp", "2", "--num-layers-per-virtual-pipeline-stage", "1")
    assert main(["convert", "/in", "/out", "--to", "torch", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("3 problems found")  # the third is the source's
    assert "--private" in message
    assert "two flags say how many virtual stages there are" in message


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--dtype", "--target-params-dtype"),
        ("--memory", "--max-memory-per-rank"),
        ("--tensor-parallel", "--tensor-model-parallel-size"),
        ("--shard-size", "--max-shard-size"),
        ("--dry-rum", "--dry-run"),
        ("--output-dir", "DST"),
        ("--bf16", "--target-params-dtype bf16"),
        ("--ckpt-format", "--to"),
        ("--params-dtype", "--target-params-dtype"),
        ("--vocab-size", "--true-vocab-size"),
        ("--num-ranks", "--ranks"),
        ("--tokenizer-path", "--tokenizer"),
        ("--target-tp", "--tp"),
        ("--hf-config", "--like"),
        ("--saver", "--to"),
        ("--fp32", "--target-params-dtype fp32"),
        ("--nproc", "--ranks"),
        ("--nproc-per-node", "--ranks"),
        ("--num-processes", "--ranks"),
        ("--tensor-paralel", "--tensor-model-parallel-size"),
    ],
)
def test_an_unknown_flag_gets_the_one_that_was_meant(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "/in", "/out", "--to", "torch", flag]) == 2
    assert f"; perhaps {meant} for {flag}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "--frobnicate", "--optimizer", "--overwrit", "--force", "--accept-differing-copy", "--allow-overflows",
        "--world-size", "--num-layers", "--save-interval", "--target-model-type", "--context-parallel-size",
        "--load-format",
    ],
)  # fmt: skip
def test_a_flag_like_no_other_or_like_one_that_removes_or_accepts_something_gets_no_suggestion(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "/in", "/out", "--to", "torch", flag]) == 2
    assert "perhaps" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("convret", "convert"), ("compare", "verify"), ("/ckpts/llama", "convert"), ("upload", "push"),
     ("to-hf", "megatron-to-hf"), ("to-megatron", "hf-to-megatron")],
)  # fmt: skip
def test_an_unknown_command_gets_the_one_that_was_meant(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.endswith(f"; perhaps {meant}\n")


@pytest.mark.parametrize(
    ("value", "meant"),
    [("huggingfase", "huggingface"), ("hf", "huggingface"), ("HuggingFace", "huggingface"),
     ("torch-dist", "torch_dist"), ("mcore", "torch_dist or torch")],
)  # fmt: skip
def test_an_unknown_format_gets_the_one_that_was_meant(
    value: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "/in", "/out", "--to", value]) == 2
    assert f"; perhaps {meant}\n" in capsys.readouterr().err


def test_an_unknown_flag_of_hf_to_megatron_for_the_format_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf-to-megatron", "--load-dir", "/in", "--save-dir", "/out", "--ckpt-format", "torch_dist"]) == 2
    assert "; perhaps --target-format for --ckpt-format\n" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_printed(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([flag])
    assert capsys.readouterr().out == f"dist-convert {__version__}\n"


@pytest.mark.parametrize(
    ("flag", "more"),
    [("-v", "; perhaps --version for -v"), ("--bogus", ""), ("--verson", "; perhaps --version for --verson")],
)
def test_an_unknown_flag_in_place_of_a_command_is_named(
    flag: str, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"dist-convert: unrecognized arguments: {flag}\n  expected: a command first: convert, ")
    assert message.endswith(f"  remedy:   see dist-convert --help{more}\n")


@pytest.mark.parametrize("words", [["help", "verify"], ["verify", "help"], ["verify", "-h"], ["verify", "--help"]])
def test_help_is_given_however_it_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert capsys.readouterr().out.startswith("usage: dist-convert verify A B [FLAG ...]\n\n")


def test_help_alone_lists_the_commands_and_shows_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["help"])
    text = capsys.readouterr().out
    assert re.findall(r"(?m)^    (\S+)", text) == list(EXAMPLES)
    assert re.findall(r"(?m)^  dist-convert (.*)", text) == [
        "convert /ckpts/llama /out/llama-hf --to huggingface --ranks 4",
        "verify /ckpts/llama /out/llama-hf",
        "inspect /ckpts/llama",
    ]


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_help_has_a_usage_of_one_line_and_three_examples_that_parse(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    help = build_parser()[1][command].format_help()
    assert help.split("\n")[1] == ""
    assert help.count(f"\n  dist-convert {command} ") == 3
    monkeypatch.setattr("dist_convert.cli.job_files._read", lambda path: {"load-path": "/in", "save-path": "/out"})
    for example in EXAMPLES[command].examples:
        assert parse([command, *re.split("(?:^| )> ", example)[0].split()]).command == command


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_entry_of_a_help_starts_with_its_noun_or_verb(command: str) -> None:
    actions = [one for one in build_parser()[1][command]._actions if one.help not in (None, argparse.SUPPRESS)]
    first = {str(one.help).removeprefix("(required) ").split()[0] for one in actions}
    assert not first & {
        "a",
        "as",
        "by",
        "decides",
        "for",
        "if",
        "in",
        "is",
        "of",
        "such",
        "that",
        "the",
        "what",
        "where",
    }


@pytest.mark.parametrize("command", EXAMPLES)
def test_flags_that_switch_off_or_do_nothing_are_not_in_the_help(command: str) -> None:
    help = build_parser()[1][command].format_help()
    assert "--no-" not in help
    assert "no effect" not in help


@pytest.mark.parametrize(
    "words",
    [
        "convert /in out --to torch --tp 2 --iteration release --max-memory-per-rank 1.5GB",
        "megatron-to-hf --load-path /in --save-path out --max-shard-size 2GB --verify sample --instruct",
        "hf-to-megatron --load-dir org/name --save-dir /out --bf16 --target-format torch_dist --tokenizer-type Llama3",
    ],
)
def test_a_printed_config_is_the_same_job(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = words.split()
    assert main([*line, "--print-config"]) == 0
    file = job_file(tmp_path, capsys.readouterr().out)
    assert options_from_flags(parse([line[0], "--config", file])) == options_from_flags(parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "convert /nowhere /out --to torch --ranks 2",
        "megatron-to-hf --load-path /nowhere --save-path /out",
        "hf-to-megatron --load-dir /nowhere --save-dir /out",
        "verify /nowhere /nowhere",
        "convert --to torhc",
        "inspect /nowhere",
        "convert empty /out --to torch",
        "convert empty/file /out --to torch --ranks 2",
        "convert hf /out --to torch --like /nowhere",
        "convert megatron /out --to huggingface --ckpt-dir-name iter_0000009",
        "convert megatron /out --to huggingface --tokenizer /nowhere",
        "convert hf /out --to torch --source-margs-file /nowhere",
        "megatron-to-hf --load-path hf --save-path /out",
        "hf-to-megatron --load-dir megatron --save-dir /out",
        "verify empty hf",
        "verify hf hf --like /nowhere",
        "inspect empty",
        "tokenizer hf empty",
        "tokenizer /nowhere hf",
        "push /nowhere org/name",
        "push empty org/name",
    ],
)
def test_a_wrong_path_or_flag_is_told_before_torch_is_imported(line: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file").touch()
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_text("{}")
    (tmp_path / "megatron/iter_0000004/mp_rank_00").mkdir(parents=True)
    (tmp_path / "megatron/iter_0000004/mp_rank_00/model_optim_rng.pt").touch()
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("4")
    code = f"import sys; from dist_convert.__main__ import main; print(main({line.split()!r}), 'torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"{1 if line.startswith('inspect') else 2} False\n", done.stderr


def test_completion_is_a_script_that_knows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "--max-shard-size" in capsys.readouterr().out


def test_a_misspelt_key_of_a_job_file_is_named_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("lod-path: x\n")
    assert main(["megatron-to-hf", "--config", str(tmp_path / "job.yaml")]) == 2
    message = capsys.readouterr().err
    assert f"no flag for the key lod-path\n  file:     {tmp_path}/job.yaml\n  found:    lod-path: x\n" in message
    assert "perhaps --load-path for --lod-path" in message


@pytest.mark.parametrize("line", ["completion bash", "models", "convert --help", "convert a b --to dcp --print-config"])
def test_a_reader_that_has_read_enough_ends_what_only_prints_without_a_word(line: str) -> None:
    if line.startswith("completion"):
        pytest.importorskip("shtab")
    assert printed_to_nobody(line.split()) == (1, "")


@pytest.mark.parametrize("command", [["inspect", "--json"], ["verify", "--json"]], ids=lambda words: words[0])
def test_a_reader_that_leaves_is_no_reason_for_words_of_python(command: list[str], tmp_path: Path) -> None:
    make(tmp_path / "in", Model(layers=1))
    paths = [str(tmp_path / "in")] * (2 if command[0] == "verify" else 1)
    code, said = printed_to_nobody([*command, *paths])
    assert code == 1
    assert "Exception" not in said
    assert "Traceback" not in said


def test_the_help_says_when_imported_experts_are_to_be_read_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["megatron-to-hf", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--habana-imported-experts" in text
    assert "never on one that was trained since" in text


def test_a_job_files_values_are_the_texts_that_stand_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML 1.1 would read the names of directories as a number, a number in base 8, one in base 60 and a date."""
    for name in ("1_000", "0777", "1:30", "2026-1-2"):
        (tmp_path / "job.yaml").write_text(f"source: {name}\n")
        assert main(["convert", "--config", str(tmp_path / "job.yaml"), "--to", "torch", "--target", "out"]) == 2
        assert f"file:     {name}\n" in capsys.readouterr().err


@pytest.mark.parametrize("dash", ["-", "_"])
def test_a_job_file_may_hold_any_flag_with_dashes_or_underscores(dash: str, tmp_path: Path) -> None:
    text = """
        load-path: /in
        save-path: /out
        ckpt-dir-name: release
        target-params-dtype: fp32
        source-model-type: llama3.1
        instruct: true
        save-capacity-bins: true
        max-shard-size: 2GB
        true-vocab-size: 32000
        tokenizer: /tokenizer
        habana-imported-experts: true
        allow-overflow: true
        device: cpu
        placement: gather
        max-memory-per-rank: 512MB
        dry-run: true
        overwrite: true
        push-to-hub: org/name
        private: true
        timeout: 3600
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    text = "\n".join(f"{line.partition(':')[0].replace('-', dash)}:{line.partition(':')[2]}" for line in lines)
    assert job("--config", job_file(tmp_path, text)) == Options(
        "huggingface",
        command="megatron-to-hf",
        source="/in",
        target=Path("/out"),
        ckpt_dir_name="release",
        target_params_dtype="fp32",
        source_model_type="llama3.1",
        instruct=True,
        save_capacity_bins=True,
        max_shard_size_bytes=2_000_000_000,
        true_vocab_size=32000,
        tokenizer=Path("/tokenizer"),
        habana_imported_experts=True,
        allow_overflow=True,
        device="cpu",
        placement="gather",
        max_memory_per_rank_bytes=512_000_000,
        dry_run=True,
        overwrite=True,
        push_to_hub="org/name",
        private=True,
        timeout_seconds=3600,
    )


def test_a_flag_on_the_command_line_wins_over_the_job_file(tmp_path: Path) -> None:
    file = job_file(tmp_path, "load-path: /in\nsave-path: /out\nmax-shard-size: 1GB\ninstruct: true\n")
    wanted = job("--config", file, "--save-path", "/elsewhere", "--max-shard-size", "3GB", "--no-instruct")
    assert wanted == Options(
        "huggingface",
        "/in",
        command="megatron-to-hf",
        target=Path("/elsewhere"),
        max_shard_size_bytes=3_000_000_000,
        instruct=False,
    )


def test_the_command_line_switches_off_the_verification_that_a_job_file_asks_for(tmp_path: Path) -> None:
    file = job_file(tmp_path, "load-path: /in\nsave-path: /out\nverify: sample\n")
    assert (job("--config", file).verify, job("--config", file, "--no-verify").verify) == ("sample", None)


def test_of_flags_that_exclude_each_other_the_command_line_wins_over_the_job_file(tmp_path: Path) -> None:
    file = job_file(tmp_path, "load-dir: /in\nsave-dir: /out\nbf16: true\nrelease: true\n")
    wanted = options_from_flags(parse(["hf-to-megatron", "--config", file, "--fp16", "--iteration", "3"]))
    assert (wanted.target_params_dtype, wanted.iteration) == ("fp16", 3)
    assert options_from_flags(parse(["hf-to-megatron", "--config", file])).iteration == "release"


def test_a_job_file_with_flags_that_exclude_each_other_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = job_file(tmp_path, "bf16: true\nfp16: true\n")
    assert main(["hf-to-megatron", "--config", file]) == 2
    assert f"bf16 and fp16 are one option\n  file:     {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["convert", "megatron-to-hf", "hf-to-megatron", "verify", "tokenizer", "push", "inspect"]
)
def test_the_help_has_a_text_and_a_default_for_every_flag(command: str) -> None:
    _, commands = build_parser()
    for action in (one for one in commands[command]._actions if one.help != argparse.SUPPRESS):
        assert action.help, action.option_strings
        may_be_absent = (
            action.option_strings and action.dest not in ("help", "config") and "(required)" not in action.help
        )
        if may_be_absent and not any(word in action.help for word in UNSAID):
            assert "(default: " in action.help, action.option_strings


def test_an_empty_or_false_entry_of_a_job_file_is_as_if_absent(tmp_path: Path) -> None:
    file = job_file(tmp_path, "tokenizer:\ntrue-vocab-size: null\noverwrite: false\ninstruct: false\n")
    assert job(*PATHS, "--config", file) == job(*PATHS)


def test_a_value_of_a_job_file_may_begin_with_a_dash(tmp_path: Path) -> None:
    file = job_file(tmp_path, "load-path: -odd-name\nsave-path: /out\n")
    assert job("--config", file).source == "-odd-name"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("load-paht: /in\n", "load-paht"),
        ("max-shard-size: 5XB\n", "--max-shard-size: not a size: '5XB'"),
        ("instruct: maybe\n", "instruct must be true or false\n"),
        ("overwrite: 1\n", "overwrite must be true or false\n"),
        ("tokenizer: true\n", "tokenizer needs a value\n"),
        ("target-params-dtype: [bf16, fp16]\n", "target-params-dtype"),
        ("tokenizer: {path: /here}\n", "tokenizer"),
        ("- load-path\n", "list"),
        ("just words\n", "str"),
        ("", "NoneType"),
        ("load-path: [unclosed\n", "job.yaml"),
        ("config: other.yaml\n", "config"),
        ('"": true\noverwrite: true\n', "has no flag for the key"),
        ("save-path: /a\nsave_path: /b\n", "save-path and save_path are one option\n"),
        ("target: /a\nsave-dir: /b\n", "target and save-dir are one option\n"),
    ],
)
def test_a_wrong_job_file_ends_with_code_2_and_one_message(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["megatron-to-hf", *PATHS, "--config", job_file(tmp_path, text), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert named in err
    assert f"file:     {tmp_path}/job.yaml\n" in err
    assert "Traceback" not in err


def test_a_job_file_that_is_no_text_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00load-path")
    assert main(["megatron-to-hf", *PATHS, "--config", str(tmp_path / "job.yaml")]) == 2
    assert "job.yaml" in capsys.readouterr().err


def test_a_job_file_that_is_not_there_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["megatron-to-hf", *PATHS, "--config", "/nowhere/job.yaml"]) == 2
    assert "/nowhere/job.yaml" in capsys.readouterr().err


def test_rank_local_rank_and_node_are_filled_into_the_load_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"RANK": "13", "LOCAL_RANK": "5", "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, number)
    wanted = job("--load-path", "/node{node}/disk{local_rank}/of{rank}", "--save-path", "/out")
    assert wanted.source == "/node1/disk5/of13"


def test_rank_local_rank_and_node_are_0_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert job("--load-path", "/{node}/{local_rank}/{rank}", "--save-path", "/out").source == "/0/0/0"


def test_the_module_converts_as_one_rank_without_torchrun(tmp_path: Path) -> None:
    expected = make(tmp_path / "in" / "node0", Model(layers=1))
    command = [sys.executable, "-m", "dist_convert", "megatron-to-hf", "--load-path", f"{tmp_path}/in/node{{node}}"]
    done = subprocess.run(
        [*command, "--save-path", tmp_path / "out", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_same(read_tensors(tmp_path / "out"), expected)


def test_the_module_ends_with_code_2_on_wrong_flags() -> None:
    done = subprocess.run([sys.executable, "-m", "dist_convert", "--wrong"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_console_script_is_the_same_program() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib (Python 3.11) is absent")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("dist-convert", scripts["dist-convert"], "console_scripts").load() is main


@pytest.mark.parametrize(
    "words",
    [
        ["tokenizer", "", "model"], ["tokenizer", "tok", ""], ["push", "", "org/name"], ["inspect", ""],
        ["verify", "a", ""], ["convert", "", "b", "--to", "torch"],
        ["convert", "a", "b", "--to", "torch", "--like", ""],
        ["convert", "a", "b", "--to", "torch", "--config", ""],
    ],
)  # fmt: skip
def test_an_empty_path_is_told_as_one_by_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "a path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["tokenizer", "~/tok", "~/model"], ["/model"]),
        (["push", "~/model", "org/name"], ["/model"]),
        (["inspect", "~/model"], ["/model"]),
        (["verify", "~/a", "~/b"], ["/a", "/b"]),
        (["convert", "~/a", "~/b", "--to", "torch"], ["/a"]),
        (["convert", "--config", "~/job.yaml"], ["/job.yaml"]),
    ],
)  # fmt: skip
def test_a_tilde_is_the_home_directory_for_every_command(
    words: list[str], names: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(words) != 0
    printed = capsys.readouterr().err
    assert all(f"{tmp_path}{name}" in printed for name in names), printed
    assert "~" not in printed


def test_models_lists_what_is_converted_and_what_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  qwen3_moe       Qwen3MoeForCausalLM" in lines
    assert "  kimi_k2         DeepseekV3ForCausalLM" in lines
    assert lines.index("refused:") < lines.index("  qwen3_next      most of its layers have linear attention")
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"]["mistral"] == "MistralForCausalLM"
