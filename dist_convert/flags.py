"""The flags of every command, on the command line and in YAML files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_convert.errors import UsageError
from dist_convert.flag_values import repository, seconds
from dist_convert.job import DEVICES, PLACEMENTS, SOURCE_MODEL_TYPES, TARGET_DTYPES, VERIFICATIONS, Job
from dist_convert.rank_numbers import with_numbers
from dist_convert.units import parse_bytes
from dist_convert.version import __version__

#: Flags without which no command that has them can start.
_REQUIRED = ("--load-path", "--save-path", "--load-dir", "--save-dir")


class Parser(argparse.ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def size(text: str) -> int:
    """A size with a unit, in bytes."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.what}: {text!r} (expected {error.expected})") from error


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a positive whole number: {text!r}")
    return int(text)


def positive_or_zero(text: str) -> int:
    """A whole number of 0 or more."""
    return 0 if text == "0" else positive(text)


def add_switch(group: Any, flag: str, help_text: str) -> None:
    """A flag that is off, and that the command line can switch off again where a job file has it on."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=help_text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = Parser(prog="dist-convert", description="Convert checkpoints between Megatron-LM and Hugging Face.")
    parser.add_argument("--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from dist_convert.flags_push import add_push
    from dist_convert.flags_to_megatron import add_hf_to_megatron  # they use the types above
    from dist_convert.flags_tokenizer import add_tokenizer_command
    from dist_convert.flags_verify import add_verify

    _add_megatron_to_hf(commands)
    add_hf_to_megatron(commands)
    add_tokenizer_command(commands)
    add_push(commands)
    add_verify(commands)
    inspect = commands.add_parser("inspect", help="describe a checkpoint of either kind from its headers")
    inspect.add_argument("path", type=Path, help="a Megatron checkpoint or a Hugging Face directory")
    inspect.add_argument("--ckpt-dir-name", help="iteration directory (default: what the tracker file says)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_megatron_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "megatron-to-hf",
        help="convert a Megatron checkpoint to a Hugging Face directory",
        description="Convert a Megatron checkpoint to a Hugging Face directory. Start it with torchrun to share the "
        "work among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in --load-path are replaced by this rank's numbers.",
    )
    source = command.add_argument_group("source")
    source.add_argument("--load-path", help="(required) root of the Megatron checkpoint")
    source.add_argument("--ckpt-dir-name", help="iteration directory, such as iter_0000004 (default: the tracker file)")
    said = "decides special tokens of a tokenizer.model; else checked against the checkpoint's args, which win"
    source.add_argument("--source-model-type", choices=SOURCE_MODEL_TYPES, help=said)
    source.add_argument(
        "--true-vocab-size", type=positive, help="tokens without padding (default: args, then tokenizer)"
    )
    which = "directory or tokenizer.model (default: what the args name, here or beside the checkpoint)"
    source.add_argument("--tokenizer", type=Path, help=which)
    add_switch(
        source,
        "--habana-imported-experts",
        "read Mixtral experts as Habana's own HF-to-Megatron converter wrote them at TP > 1: gate and up not "
        "interleaved over ranks. Use it only on a checkpoint that came straight from that converter, never on one "
        "that was trained since",
    )
    target = command.add_argument_group("target")
    target.add_argument("--save-path", type=Path, help="(required) Hugging Face directory to be made")
    target.add_argument(
        "--target-params-dtype",
        choices=tuple(TARGET_DTYPES),
        default="bf16",
        help="dtype of the weights stored in the checkpoint's params dtype; others keep theirs (default: bf16)",
    )
    add_switch(target, "--allow-overflow", "accept values that become infinite in fp16")
    target.add_argument("--max-shard-size", type=size, default="5GB", help="of a weights file (default: 5GB)")
    add_switch(target, "--instruct", "write end-of-turn tokens, sampling defaults, chat template of an instruct model")
    add_switch(target, "--save-capacity-bins", "write Habana's capacity_bins.pt")
    add_switch(target, "--overwrite", "replace an existing target")
    target.add_argument(
        "--push-to-hub",
        metavar="org/name",
        type=repository,
        help="upload the finished directory to this repository, which is made if it is not there",
    )
    add_switch(target, "--private", "with --push-to-hub: for members only; a public repository is refused")
    add_run_flags(command)


def add_timeout(group: Any) -> None:
    """How long ranks wait for each other."""
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        dest="timeout_seconds",
        type=seconds,
        default=600,
        help="that ranks wait for one of them that is silent (default: 600)",
    )


def add_run_flags(command: argparse.ArgumentParser) -> None:
    """Flags that both directions have."""
    run = command.add_argument_group("run")
    run.add_argument("--device", choices=DEVICES, default="auto", help="that collectives use (default: what is there)")
    run.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="auto",
        help="gather: each rank reads its own shards and the group gathers; direct: each rank reads what it writes "
        "(default: direct on the CPU where every rank sees every file, else gather)",
    )
    run.add_argument("--max-memory-per-rank", type=size, default="1GB", help="for buffers of each rank (default: 1GB)")
    add_timeout(run)
    run.add_argument(
        "--verify",
        nargs="?",
        choices=VERIFICATIONS,
        const="full",
        help="compare what was written with the source before it gets its name: all of it, or a sample",
    )
    run.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write down where the time of every rank goes, in Chrome's trace format",
    )
    add_switch(run, "--dry-run", "show what each rank would do; exit 0 if it would start")
    run.add_argument("--config", type=Path, help="YAML file with any of these flags; the command line wins")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line, with those of a `--config` file behind them.

    Raises:
        UsageError: an unknown flag or a wrong value, on the command line or in the file, or no source or target.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args([*argv[1:]])[0].config
    from_file = _flags_of_file(config) if argv[:1] in (["megatron-to-hf"], ["hf-to-megatron"]) and config else []
    flags, unknown = build_parser().parse_known_args([*argv[:1], *from_file, *argv[1:]])
    program = f"dist-convert {flags.command}"
    if unknown:
        raise UsageError(
            f"{program}: unrecognized arguments: {' '.join(unknown)}",
            file=str(config) if set(unknown) & set(from_file) else "",
            remedy=f"see {program} --help",
        )
    missing = [flag for flag in _REQUIRED if getattr(flags, flag[2:].replace("-", "_"), "") is None]
    if missing:  # checked here: argparse would name these first, and hide a misspelt one
        raise UsageError(f"{program}: {' and '.join(missing)} must be given", remedy=f"see {program} --help")
    return flags


def _flags_of_file(path: Path) -> list[str]:
    import yaml  # only here: most runs have no job file

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            "cannot read the job file", file=str(path), found=str(reason), remedy="check --config on every node"
        ) from error
    if not isinstance(data, dict):
        raise UsageError(
            "not a job file", file=str(path), expected="flag: value, a line each", found=type(data).__name__
        )
    flags: list[str] = []
    for key, value in data.items():
        flag = "--" + str(key).replace("_", "-")
        if flag == "--config":
            raise UsageError("a job file cannot name another one", file=str(path), found=f"config: {value}")
        if value is True:
            flags.append(flag)
        elif isinstance(value, list | dict):
            raise UsageError(f"{key} cannot be a {type(value).__name__}", file=str(path))
        elif value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


def job_from_flags(flags: argparse.Namespace) -> Job:
    """The job of `megatron-to-hf`.

    Raises:
        UsageError: a flag that has no meaning without another.
    """
    if flags.private and not flags.push_to_hub:
        raise UsageError("nothing is uploaded", found="--private", remedy="add --push-to-hub org/name")
    return Job(
        load_path=Path(with_numbers(flags.load_path)),
        save_path=flags.save_path.resolve(),
        ckpt_dir_name=flags.ckpt_dir_name,
        target_params_dtype=flags.target_params_dtype,
        source_model_type=flags.source_model_type,
        instruct=flags.instruct,
        save_capacity_bins=flags.save_capacity_bins,
        max_shard_size_bytes=flags.max_shard_size,
        true_vocab_size=flags.true_vocab_size,
        tokenizer=flags.tokenizer,
        habana_imported_experts=flags.habana_imported_experts,
        allow_overflow=flags.allow_overflow,
        device=flags.device,
        placement=flags.placement,
        max_memory_per_rank_bytes=flags.max_memory_per_rank,
        dry_run=flags.dry_run,
        overwrite=flags.overwrite,
        push_to_hub=flags.push_to_hub,
        private=flags.private,
        timeout_seconds=flags.timeout_seconds,
        verify=flags.verify,
        trace=flags.trace,
    )
