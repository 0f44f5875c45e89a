"""The flags of every command, on the command line and in YAML files, and their checked values."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import Field
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from dist_convert.cli.old_flags import add_old_flags
from dist_convert.errors import UsageError
from dist_convert.options import (
    COMMANDS,
    CONVERT,
    FORMATS,
    MOST_SECONDS,
    PAIRS,
    POSITIONAL,
    RELEASE,
    SAMPLE,
    SOURCE_MODEL_TYPES,
    Option,
    Options,
    TokenizerJob,
    VerifyJob,
    check_together,
    flag_of,
    options_of,
)
from dist_convert.records import __version__, parse_bytes

#: What the two directions call differently, and what others call shorter.
_COUNTERPARTS = {
    "--tp": "--target-tensor-parallel-size", "--pp": "--target-pipeline-parallel-size",
    "--ep": "--target-expert-parallel-size", "--etp": "--target-expert-tensor-parallel-size",
    "--vpp": "--target-virtual-pipeline-parallel-size",
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


def iteration(text: str) -> int | str:
    """A whole number of 0 or more, or the word release."""
    return RELEASE if text == RELEASE else 0 if text == "0" else positive(text)


def seconds(text: str) -> int:
    """Whole seconds, from 1 to about eleven days."""
    if not text.isdecimal() or not 1 <= int(text) <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"not a whole number of seconds from 1 to {MOST_SECONDS}: {text!r}")
    return int(text)


def repository(text: str) -> str:
    """The name of a repository on a hub."""
    from dist_convert.formats.huggingface.upload import check_repository_name  # half a second, where it is needed

    try:
        return check_repository_name(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.what}: {error.found} (expected {error.expected})") from error


def with_numbers(path: str) -> str:
    """A path with this rank's numbers in place of {rank}, {local_rank} and {node}.

    Raises:
        UsageError: the launcher does not tell such a number.
    """
    if not path:
        raise UsageError("a path is empty", remedy="give a path; where a variable holds it, is that unset?")
    told = {"rank": os.environ.get("RANK"), "local_rank": os.environ.get("LOCAL_RANK"), "node": _node()}
    for name, number in told.items():
        if "{" + name + "}" in path and number is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"{{{name}}} cannot be told", file=path, remedy="start with torchrun, or set what it sets: GROUP_RANK"
            )
        path = path.replace("{" + name + "}", number or "0")
    return os.path.expanduser(path)


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


class Parser(argparse.ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them; knows flags by their whole names only."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def add_switch(group: Any, flag: str, help_text: str) -> None:
    """A flag that is off, and that the command line can switch off again where a job file has it on."""
    name = flag[2:].replace("-", "_")
    group.add_argument(flag, action="store_true", default=False, help=f"{help_text} (default: off)")
    group.add_argument(
        f"--no-{flag[2:]}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def add_size(group: Any, flag: str, default: str, help_text: str, dest: str | None = None) -> None:
    """A flag that takes a size in bytes."""
    shown = f"{help_text}, such as 512MB or 2GiB (default: {default})"
    group.add_argument(flag, metavar="SIZE", dest=dest, type=size, default=default, help=shown)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    parser = Parser(prog="dist-convert", description="Convert checkpoints of Megatron-LM and Hugging Face.")
    parser.add_argument("--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        _add_conversion(commands, command)
    add_old_flags(commands.choices["hf-to-megatron"])
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


def _add_conversion(commands: Any, name: str) -> None:
    """A command that converts, with the flags of its options."""
    what, how = _CONVERSIONS[name]
    named = f"SRC DST --to {{{','.join(FORMATS)}}}"
    if name != CONVERT:
        named = " ".join(f"{flag_of(one, name)} PATH" for one, _ in options_of(name) if one.name in POSITIONAL)
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"dist-convert {name} {named} [FLAG ...]",
        help=what[0].lower() + what[1:],
        description=f"{what}. {how}--ranks or torchrun share the work among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in paths are replaced by this rank's numbers.",
    )
    groups = {group: command.add_argument_group(group) for group in ("source", "target", "run")}
    if name == CONVERT:
        groups["target"].add_argument("--to", choices=FORMATS, help="(required) the format that is made")
    for one, known in options_of(name):
        _add_option(groups[known.group], one, known, name)
    add_ranks(groups["run"])
    groups["run"].add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file with any of these flags; the command line wins"
    )


#: What a command does, and more of it.
_CONVERSIONS = {
    CONVERT: (
        "Convert a checkpoint of any kind to another kind, grid, dtype or size of files",
        "What the source is is found out. ",
    ),
    "megatron-to-hf": ("Convert a Megatron checkpoint to a Hugging Face directory", ""),
    "hf-to-megatron": ("Convert a Hugging Face model to a Megatron checkpoint at any parallel grid", ""),
}


def _add_option(group: Any, one: Field[Any], known: Option, command: str) -> None:
    """The flags of one option."""
    constants = (known.constants or {}).get(command, {})
    if constants and known.const is None:
        group = group.add_mutually_exclusive_group()
    flags = (known.flags or {}).get(command) or (flag_of(one, command),)
    text = known.help if isinstance(known.help, str) else known.help[command]
    if command == CONVERT and one.name in POSITIONAL:
        # The flag is what a job file has in the argument's place.
        group.add_argument(one.name, metavar=POSITIONAL[one.name], nargs="?", default=argparse.SUPPRESS, help=text)
        group.add_argument(f"--{one.name}", help=argparse.SUPPRESS)
        return
    if command == CONVERT and len(known.to) == 1:
        text += f"; --to {known.to[0]}"
    if known.kind == "switch":
        add_switch(group, flags[0], text)
    elif known.kind == "size":
        add_size(group, flags[0], known.shown, text, dest=one.name)
    else:
        how: dict[str, Any] = {"nargs": "?", "const": known.const} if known.const else {}
        how |= {"choices": known.choices} if known.choices else {"metavar": known.metavar, "type": _TYPES[known.kind]}
        default = None if one.name in POSITIONAL else one.default
        shown = f" (default: {known.shown})" if known.shown else ""
        group.add_argument(*flags, dest=one.name, default=default, help=text + shown, **how)
    for flag, (value, meaning) in constants.items():
        group.add_argument(flag, dest=one.name, action="store_const", const=value, help=meaning)


_TYPES: dict[str, Callable[[str], Any]] = {
    "text": str, "path": Path, "count": positive, "iteration": iteration, "seconds": seconds,
    "repository": repository,
}  # fmt: skip


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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line, with those of a `--config` file behind them.

    Raises:
        UsageError: an unknown flag or a wrong value, on the command line or in the file, or no source or target.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args([*argv[1:]])[0].config
    parser, commands = build_parser()
    if config and argv[0] in COMMANDS:
        commands[argv[0]].set_defaults(**flags_of_file(commands[argv[0]], config))
    flags, unknown = parser.parse_known_args([*argv])
    if flags.command == CONVERT and len(unknown) == 1 and getattr(flags, "target", None) is None:
        # argparse gives up on an argument that follows flags and others before them.
        flags.target, unknown = (None, unknown) if unknown[0].startswith("-") else (unknown[0], [])
    program = f"dist-convert {flags.command}"
    if unknown:
        known = [flag for action in commands[flags.command]._actions for flag in action.option_strings]
        raise UsageError(
            f"{program}: unrecognized arguments: {' '.join(unknown)}",
            remedy=f"see {program} --help{suggestion(unknown, known)}",
        )
    missing = []
    if flags.command in COMMANDS:
        missing = [
            flag_of(one, flags.command)
            for one, _ in options_of(flags.command)
            if one.name in POSITIONAL and getattr(flags, one.name, None) is None
        ]
        missing += ["--to"] if flags.command == CONVERT and not flags.to else []
    if missing:  # checked here: argparse would name these first, and hide a misspelt one
        raise UsageError(f"{program}: {' and '.join(missing)} must be given", remedy=f"see {program} --help")
    return flags


def options_from_flags(flags: argparse.Namespace) -> Options:
    """The options of a conversion.

    Raises:
        UsageError: see `check_together`.
    """
    to = flags.to if flags.command == CONVERT else PAIRS[flags.command][1]
    values = {one.name: getattr(flags, one.name) for one, _ in options_of(flags.command)}
    values |= {"source": with_numbers(flags.source), "target": Path(with_numbers(flags.target)).resolve()}
    options = Options(to, command=flags.command, **values)
    check_together(options)
    return options
