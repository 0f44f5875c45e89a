"""The flags of every command but `hf-to-megatron`, on the command line and in YAML files, and their checked values."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from dist_convert.errors import UsageError
from dist_convert.job import (
    DEVICES,
    PLACEMENTS,
    SAMPLE,
    SOURCE_MODEL_TYPES,
    TARGET_DTYPES,
    VERIFICATIONS,
    Job,
    TokenizerJob,
    VerifyJob,
)
from dist_convert.units import parse_bytes
from dist_convert.version import __version__

#: What the two directions call differently.
_COUNTERPARTS = {
    "--load-path": "--load-dir", "--save-path": "--save-dir", "--load-dir": "--load-path", "--save-dir": "--save-path",
}  # fmt: skip


def suggestion(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What to add to a remedy: the command's name of what the other direction calls otherwise, or a flag spelt alike.

    Args:
        unknown: words of the command line that the command does not know.
        known: its flags.
    """
    meant = []
    for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
        other = _COUNTERPARTS.get(flag, "")
        alike = [other] if other in known else get_close_matches(flag, known, 1)
        meant += [f"{one} for {flag}" for one in alike]
    return f"; perhaps {', '.join(meant)}" if meant else ""


#: Of `--timeout`; what is far larger does not fit into the libraries' counters.
_MOST_SECONDS = 1_000_000


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


def seconds(text: str) -> int:
    """Whole seconds, from 1 to about eleven days."""
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"not a whole number of seconds from 1 to {_MOST_SECONDS}: {text!r}")
    return int(text)


def repository(text: str) -> str:
    """The name of a repository on a hub."""
    from dist_convert.write.hub import check_repository_name  # half a second, where it is needed

    try:
        return check_repository_name(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.what}: {error.found} (expected {error.expected})") from error


def with_numbers(path: str) -> str:
    """A path with this rank's numbers in place of {rank}, {local_rank} and {node}.

    Raises:
        UsageError: the launcher does not tell such a number.
    """
    told = {"rank": os.environ.get("RANK"), "local_rank": os.environ.get("LOCAL_RANK"), "node": _node()}
    for name, number in told.items():
        if "{" + name + "}" in path and number is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"{{{name}}} cannot be told", file=path, remedy="start with torchrun, or set what it sets: GROUP_RANK"
            )
        path = path.replace("{" + name + "}", number or "0")
    return path


def _node() -> str | None:
    rank, local_size = os.environ.get("RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    known = rank is not None and local_size is not None
    return os.environ.get("GROUP_RANK", str(int(rank or 0) // int(local_size or 1)) if known else None)


def flags_of_file(parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """The values that a job file gives, by their names in the parser's namespace.

    Args:
        parser: of the command.
        path: of a mapping from flags to values; `true` is a flag without a value, `false` and nothing are no flag.

    Raises:
        UsageError: with the file and the key.
    """
    words: list[str] = []
    for key, value in _read(path).items():
        flag = "--" + str(key).replace("_", "-")
        if flag == "--config":
            raise UsageError("a job file cannot name another one", file=str(path), found=f"config: {value}")
        if isinstance(value, list | dict):
            raise UsageError(f"{key} cannot be a {type(value).__name__}", file=str(path))
        if value is None or value is False:
            continue
        word = flag if value is True else f"{flag}={value}"
        _check(parser, word, path, str(key), value)
        words.append(word)
    try:
        return vars(parser.parse_args(words))  # together, as some exclude each other
    except UsageError as error:
        raise UsageError(error.what, file=str(path), remedy=error.remedy) from error


def _check(parser: ArgumentParser, word: str, path: Path, key: str, value: object) -> None:
    try:
        _, unknown = parser.parse_known_args([word])
    except UsageError as error:
        if "ignored explicit argument" in error.what:
            raise UsageError(f"{key} must be true or false", file=str(path), found=f"{key}: {value}") from error
        if value is True:
            raise UsageError(f"{key} needs a value", file=str(path), found=f"{key}: true") from error
        raise UsageError(error.what, file=str(path), found=f"{key}: {value}", remedy=error.remedy) from error
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(
            f"{parser.prog} has no flag for the key {key}",
            file=str(path),
            found=f"{key}: {value}",
            remedy=f"see {parser.prog} --help{suggestion(unknown, known)}",
        )


def _read(path: Path) -> dict[Any, Any]:
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
    return data


#: Far more than pay, far fewer than a machine has memory for: each takes a tenth of a gigabyte besides its buffers.
_MOST_PER_CORE = 16


def add_ranks(group: Any) -> None:
    """How many ranks the command itself starts."""
    group.add_argument(
        "--ranks",
        metavar="N",
        type=positive,
        help="start so many on this machine's CPUs; torchrun is for several machines, and for accelerators (default: "
        "one, or those of torchrun)",
    )


def ranks_to_start(flags: argparse.Namespace) -> int:
    """How many ranks the command starts itself; 1 where it is a rank.

    Raises:
        UsageError: a launcher has started ranks already, they are to use an accelerator, or they are too many.
    """
    if flags.ranks in (None, 1):
        return 1
    if "RANK" in os.environ:
        raise UsageError(
            "ranks that have been started start no others",
            found=f"--ranks {flags.ranks}, and RANK={os.environ['RANK']} in the environment",
            remedy="leave out --ranks (in a job file, ranks) under torchrun and other launchers; elsewhere, unset RANK",
        )
    if getattr(flags, "device", "cpu") not in ("auto", "cpu"):
        raise UsageError(
            "--ranks starts ranks on CPUs",
            found=f"--ranks {flags.ranks} --device {flags.device}",
            remedy=f"use --device cpu, or start with torchrun --nproc-per-node {flags.ranks} and without --ranks",
        )
    cores = len(os.sched_getaffinity(0))
    if flags.ranks > _MOST_PER_CORE * cores:
        raise UsageError(
            "more ranks than this machine can serve",
            expected=f"at most {_MOST_PER_CORE * cores}, {_MOST_PER_CORE} for each of {cores} cores",
            found=f"--ranks {flags.ranks}",
            remedy="half as many ranks as cores is a good start",
        )
    flags.device = "cpu"
    return int(flags.ranks)


def share(text: str) -> Fraction:
    """A share above 0 and up to 1: "1/16" or "0.05"."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"not a share above 0 and up to 1, such as 1/16 or 0.05: {text!r}")
    return value


def add_verify(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    command = commands.add_parser(
        "verify",
        help="compare two checkpoints of any kind: exit code 0 where they hold the same model, 1 where not",
        description="Compare two checkpoints, each a Hugging Face directory or a Megatron checkpoint at any grid: "
        "every tensor bit for bit (A rounded to B's dtype where they differ), all copies within each, config and "
        "vocabulary. --ranks or torchrun share the work among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in the paths are replaced by this rank's numbers.",
    )
    command.add_argument("a", metavar="A", help="the first checkpoint: what B was made from")
    command.add_argument("b", metavar="B", help="the second checkpoint")
    for letter in "ab":
        command.add_argument(
            f"--ckpt-dir-name-{letter}",
            metavar="NAME",
            help=f"iteration directory of {letter.upper()} (default: the tracker file)",
        )
        add_switch(
            command,
            f"--habana-imported-experts-{letter}",
            f"{letter.upper()} came straight from Habana's own HF-to-Megatron converter at TP > 1 and holds experts",
        )
    command.add_argument(
        "--true-vocab-size",
        metavar="N",
        type=positive,
        help="tokens without padding (default: args, tokenizer, the other side)",
    )
    command.add_argument(
        "--sample",
        nargs="?",
        type=share,
        const=SAMPLE,
        default=Fraction(1),
        metavar="SHARE",
        help=f"compare a share of the blocks (default: all; without a number {SAMPLE}), always the same ones, and the "
        "first and last block of every tensor, which of a small model are most",
    )
    add_ranks(command)
    add_size(command, "--max-memory-per-rank", "1GB", "of the buffers of each rank")
    add_timeout(command)
    command.add_argument("--json", action="store_true", help="print JSON, with every difference (default: text)")


def verify_job_from_flags(flags: argparse.Namespace) -> VerifyJob:
    """The job of `verify`."""
    return VerifyJob(
        a=Path(with_numbers(flags.a)),
        b=Path(with_numbers(flags.b)),
        ckpt_dir_name_a=flags.ckpt_dir_name_a,
        ckpt_dir_name_b=flags.ckpt_dir_name_b,
        habana_imported_experts_a=flags.habana_imported_experts_a,
        habana_imported_experts_b=flags.habana_imported_experts_b,
        true_vocab_size=flags.true_vocab_size,
        sample=flags.sample,
        max_memory_per_rank_bytes=flags.max_memory_per_rank,
        json=flags.json,
        timeout_seconds=flags.timeout_seconds,
    )


def add_tokenizer_command(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "tokenizer",
        help="give a converted model its tokenizer",
        description="Copy or build the tokenizer of a model that was converted without one. The special ids in "
        "config.json and generation_config.json follow it; weights stay as they are.",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory of a Hugging Face tokenizer; tokenizer.model of Llama 2, Llama 3, Mistral or Mixtral, or its "
        "directory; or org/name of a model in the hub's cache",
    )
    command.add_argument("target", type=Path, metavar="DST", help="directory of the converted model")
    command.add_argument(
        "--source-model-type",
        choices=SOURCE_MODEL_TYPES,
        help="whose special tokens and chat format a tokenizer.model gets (default: what config.json suggests)",
    )
    add_switch(command, "--instruct", "add the chat template, end-of-turn tokens and sampling of an instruct model")
    add_switch(command, "--overwrite", "replace the tokenizer that is there")


def tokenizer_job_from_flags(flags: argparse.Namespace) -> TokenizerJob:
    """The job of `tokenizer`."""
    return TokenizerJob(
        source=flags.source,
        target=flags.target,
        source_model_type=flags.source_model_type,
        instruct=flags.instruct,
        overwrite=flags.overwrite,
    )


def add_push(commands: Any) -> None:
    """Add the subcommand."""
    push = commands.add_parser("push", help="upload a finished Hugging Face directory, or what is missing of it")
    push.add_argument("directory", type=Path, help="what megatron-to-hf has made")
    push.add_argument("push_to_hub", metavar="org/name", type=repository, help="made if it is not there")
    add_switch(push, "--private", "for members only; a public repository is refused")


#: Flags without which no command that has them can start.
_REQUIRED = ("--load-path", "--save-path", "--load-dir", "--save-dir")


class Parser(argparse.ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them; knows flags by their whole names only."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def add_switch(group: Any, flag: str, help_text: str) -> None:
    """A flag that is off, and that the command line can switch off again where a job file has it on."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=f"{help_text} (default: off)")


def add_size(group: Any, flag: str, default: str, help_text: str) -> None:
    """A flag that takes a size in bytes."""
    shown = f"{help_text}, such as 512MB or 2GiB (default: {default})"
    group.add_argument(flag, metavar="SIZE", type=size, default=default, help=shown)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    parser = Parser(prog="dist-convert", description="Convert checkpoints between Megatron-LM and Hugging Face.")
    parser.add_argument("--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from dist_convert.cli.flags_to_megatron import add_hf_to_megatron  # they use the types above

    _add_megatron_to_hf(commands)
    add_hf_to_megatron(commands)
    add_tokenizer_command(commands)
    add_push(commands)
    add_verify(commands)
    inspect = commands.add_parser("inspect", help="describe a checkpoint of either kind from its headers")
    inspect.add_argument("path", type=Path, help="a Megatron checkpoint or a Hugging Face directory")
    inspect.add_argument(
        "--ckpt-dir-name", metavar="NAME", help="iteration directory (default: what the tracker file says)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON (default: text)")
    return parser, commands.choices


def _add_megatron_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "megatron-to-hf",
        help="convert a Megatron checkpoint to a Hugging Face directory",
        description="Convert a Megatron checkpoint to a Hugging Face directory. --ranks or torchrun share the work "
        "among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in --load-path and --save-path are replaced by this rank's numbers.",
    )
    source = command.add_argument_group("source")
    source.add_argument("--load-path", metavar="PATH", help="(required) root of the Megatron checkpoint")
    source.add_argument(
        "--ckpt-dir-name", metavar="NAME", help="iteration directory, such as iter_0000004 (default: the tracker file)"
    )
    said = (
        "decides special tokens of a tokenizer.model; else checked against the checkpoint's args, which win (default: "
        "from the args)"
    )
    source.add_argument("--source-model-type", choices=SOURCE_MODEL_TYPES, help=said)
    source.add_argument(
        "--true-vocab-size", metavar="N", type=positive, help="tokens without padding (default: args, then tokenizer)"
    )
    which = (
        "directory, tokenizer.model, or org/name of a model in the hub's cache (default: what the args name, here or "
        "beside the checkpoint)"
    )
    source.add_argument("--tokenizer", metavar="PATH", type=Path, help=which)
    add_switch(
        source,
        "--habana-imported-experts",
        "read Mixtral experts as Habana's own HF-to-Megatron converter wrote them at TP > 1: gate and up not "
        "interleaved over ranks. Use it only on a checkpoint that came straight from that converter, never on one "
        "that was trained since",
    )
    target = command.add_argument_group("target")
    target.add_argument("--save-path", metavar="PATH", help="(required) Hugging Face directory to be made")
    add_switch(
        target,
        "--save-per-node",
        "--save-path lies on each node's own disk: a node gets some of the weights files whole, and all files that are "
        "no weights; all nodes' directories copied into one are the model",
    )
    target.add_argument(
        "--target-params-dtype",
        choices=tuple(TARGET_DTYPES),
        default="bf16",
        help="dtype of the weights stored in the checkpoint's params dtype; others keep theirs (default: bf16)",
    )
    add_switch(target, "--allow-overflow", "accept values that become infinite in fp16")
    add_size(target, "--max-shard-size", "5GB", "of a weights file, at most")
    add_switch(target, "--instruct", "write end-of-turn tokens, sampling defaults, chat template of an instruct model")
    add_switch(target, "--save-capacity-bins", "write Habana's capacity_bins.pt")
    add_switch(target, "--overwrite", "replace an existing target")
    target.add_argument(
        "--push-to-hub",
        metavar="org/name",
        type=repository,
        help="upload the finished directory to this repository, which is made if it is not there (default: no upload)",
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
    run.add_argument(
        "--device", choices=DEVICES, default="auto", help="that collectives use (default: auto, what is there)"
    )
    run.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="auto",
        help="gather: each rank reads its own shards and the group gathers; direct: each rank reads what it writes "
        "(default: auto, direct on the CPU where every rank sees every file, else gather)",
    )
    add_ranks(run)
    add_size(run, "--max-memory-per-rank", "1GB", "of the buffers of each rank")
    add_timeout(run)
    run.add_argument(
        "--verify",
        nargs="?",
        choices=VERIFICATIONS,
        const="full",
        help="compare what was written with the source before it gets its name: all of it, or a sample (default: off)",
    )
    run.add_argument(
        "--no-verify", dest="verify", action="store_const", const=None, help="do not (default: as the job file says)"
    )
    run.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write down where the time of every rank goes, in Chrome's trace format (default: off)",
    )
    add_switch(run, "--dry-run", "show what each rank would do; exit 0 if it would start")
    run.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file with any of these flags; the command line wins"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line, with those of a `--config` file behind them.

    Raises:
        UsageError: an unknown flag or a wrong value, on the command line or in the file, or no source or target.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args([*argv[1:]])[0].config
    parser, commands = build_parser()
    if config and argv[0] in ("megatron-to-hf", "hf-to-megatron"):
        commands[argv[0]].set_defaults(**flags_of_file(commands[argv[0]], config))
    flags, unknown = parser.parse_known_args([*argv])
    program = f"dist-convert {flags.command}"
    if unknown:
        known = [flag for action in commands[flags.command]._actions for flag in action.option_strings]
        raise UsageError(
            f"{program}: unrecognized arguments: {' '.join(unknown)}",
            remedy=f"see {program} --help{suggestion(unknown, known)}",
        )
    missing = [flag for flag in _REQUIRED if getattr(flags, flag[2:].replace("-", "_"), "") is None]
    if missing:  # checked here: argparse would name these first, and hide a misspelt one
        raise UsageError(f"{program}: {' and '.join(missing)} must be given", remedy=f"see {program} --help")
    return flags


def job_from_flags(flags: argparse.Namespace) -> Job:
    """The job of `megatron-to-hf`.

    Raises:
        UsageError: a flag that has no meaning without another.
    """
    if flags.private and not flags.push_to_hub:
        raise UsageError("nothing is uploaded", found="--private", remedy="add --push-to-hub org/name")
    if flags.push_to_hub and flags.save_per_node:
        raise UsageError(
            "no node has all files to upload",
            found="--push-to-hub with --save-per-node",
            remedy="convert without --push-to-hub, copy the nodes' directories into one DIRECTORY, then: dist-convert "
            f"push DIRECTORY {flags.push_to_hub}",
        )
    return Job(
        load_path=Path(with_numbers(flags.load_path)),
        save_path=Path(with_numbers(flags.save_path)).resolve(),
        save_per_node=flags.save_per_node,
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
