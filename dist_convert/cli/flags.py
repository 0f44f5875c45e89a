"""The flags of every command, on the command line and in YAML files, and their checked values."""

from __future__ import annotations

import argparse
import os
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from dist_convert.cli.old_flags import OLD_SPELLINGS, add_old_flags
from dist_convert.errors import UsageError
from dist_convert.options import (
    COMMANDS,
    CONVERT,
    FORMATS,
    HUGGINGFACE,
    KINDS,
    MEGATRON,
    PAIRS,
    PATH_FLAGS,
    RELEASE,
    TORCH,
    TORCH_DIST,
    Kind,
    Option,
    Options,
    TokenizerJob,
    VerifyJob,
    check_together,
    flag_of,
    kind_of,
    options_of,
)
from dist_convert.records import __version__, human_bytes, parse_bytes

#: What the two directions call differently, and what others call shorter.
_COUNTERPARTS = {
    "--tp": "--target-tensor-parallel-size", "--pp": "--target-pipeline-parallel-size",
    "--ep": "--target-expert-parallel-size", "--etp": "--target-expert-tensor-parallel-size",
    "--vpp": "--target-virtual-pipeline-parallel-size",
    "--load-path": "--load-dir", "--save-path": "--save-dir", "--load-dir": "--load-path", "--save-dir": "--save-path",
}  # fmt: skip


def suggestion(unknown: Sequence[str], parser: ArgumentParser) -> str:
    """What to add to a remedy: a command's name of what the other direction calls otherwise, or a flag spelt alike."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    meant = []
    for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
        other = _COUNTERPARTS.get(flag, "")
        alike = [other] if other in known else get_close_matches(flag, known, 1)
        meant += [f"{one} for {flag}" for one in alike]
    return f"; perhaps {', '.join(meant)}" if meant else ""


def _whole_number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _repository(text: str) -> str:
    from dist_convert.formats.huggingface.upload import check_repository_name  # half a second, where it is needed

    return check_repository_name(text)


#: How the command line says the values of a kind, and what the help calls them.
_TEXTS: Mapping[Kind, tuple[Callable[[str], Any], str]] = {
    "text": (str, "NAME"),
    "path": (Path, "PATH"),
    "count": (_whole_number, "N"),
    "number": (float, "NUMBER"),
    "seconds": (_whole_number, "SECONDS"),
    "iteration": (lambda text: RELEASE if text == RELEASE else _whole_number(text), "N"),
    "size": (parse_bytes, "SIZE"),
    "share": (Fraction, "SHARE"),
    "repository": (_repository, "org/name"),
}


def value_of(kind: Kind) -> Callable[[str], Any]:
    """What reads a value of a kind, in argparse's way."""

    def read(text: str) -> Any:
        try:
            value = _TEXTS[kind][0](text)
        except UsageError as error:
            raise ArgumentTypeError(f"{error.what}: {error.found} (expected {error.expected})") from error
        except (ValueError, ZeroDivisionError):
            value = None  # which fits nothing
        expected, fits = KINDS[kind]
        if not fits(value):
            raise ArgumentTypeError(f"not {expected}: {text!r}")
        return value

    return read


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
    """The values that a job file gives to a command, by their names in its parser's namespace.

    It maps flags to values; `true` is a flag without a value, `false` and nothing are no flag.

    Raises:
        UsageError: with the file and the key.
    """
    words: list[str] = []
    for key, value in _read(path).items():
        found = f"{key}: {'true' if value is True else value}"
        flag = "--" + str(key).replace("_", "-")
        if flag == "--config":
            raise UsageError("a job file cannot name another one", file=str(path), found=found)
        if isinstance(value, list | dict):
            raise UsageError(f"{key} cannot be a {type(value).__name__}", file=str(path))
        if value is None or value is False:
            continue
        words.append(flag if value is True else f"{flag}={value}")
        try:
            _, unknown = parser.parse_known_args(words[-1:])
        except UsageError as error:
            what = f"{key} needs a value" if value is True else error.what
            if "ignored explicit argument" in error.what:
                what = f"{key} must be true or false"
            raise UsageError(what, file=str(path), found=found, remedy=error.remedy) from error
        if unknown:
            remedy = f"see {parser.prog} --help{suggestion(unknown, parser)}"
            raise UsageError(f"{parser.prog} has no flag for the key {key}", file=str(path), found=found, remedy=remedy)
    try:
        return vars(parser.parse_args(words))  # together, as some exclude each other
    except UsageError as error:
        raise UsageError(error.what, file=str(path), remedy=error.remedy) from error


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
        expected = "flag: value, a line each"
        raise UsageError("not a job file", file=str(path), expected=expected, found=type(data).__name__)
    return data


#: Far more than pay, far fewer than a machine has memory for: each takes a tenth of a gigabyte besides its buffers.
_MOST_PER_CORE = 16


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


def _values(flags: argparse.Namespace) -> dict[str, Any]:
    return {one.name: getattr(flags, one.name) for one, _ in options_of(flags.command)}


def options_from_flags(flags: argparse.Namespace) -> Options:
    """The options of a conversion, of which those that are given go together."""
    to = getattr(flags, "to", PAIRS.get(flags.command, ("", ""))[1])
    target = Path(with_numbers(flags.target)).resolve()
    options = Options(to, with_numbers(flags.source), target, command=flags.command, **_values(flags))
    check_together(options)
    return options


def verify_job_from_flags(flags: argparse.Namespace) -> VerifyJob:
    """The job of `verify`."""
    return VerifyJob(Path(with_numbers(flags.a)), Path(with_numbers(flags.b)), **_values(flags))


def tokenizer_job_from_flags(flags: argparse.Namespace) -> TokenizerJob:
    """The job of `tokenizer`."""
    return TokenizerJob(flags.source, flags.target, **_values(flags))


class Parser(ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them; knows flags by their whole names only."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    parser = Parser(prog="dist-convert", description="Convert checkpoints of Megatron-LM and Hugging Face.")
    parser.add_argument("--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        _add_conversion(commands, name)
    add_old_flags(commands.choices["hf-to-megatron"])

    tokenizer = commands.add_parser(
        "tokenizer",
        help="give a converted model its tokenizer",
        description="Copy or build the tokenizer of a model that was converted without one. The special ids in "
        "config.json and generation_config.json follow it; weights stay as they are.",
    )
    tokenizer.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory of a Hugging Face tokenizer; tokenizer.model of Llama 2, Llama 3, Mistral or Mixtral, or its "
        "directory; or org/name of a model in the hub's cache",
    )
    tokenizer.add_argument("target", type=Path, metavar="DST", help="directory of the converted model")
    _add_options(_groups(tokenizer), "tokenizer")

    push = commands.add_parser("push", help="upload a finished Hugging Face directory, or what is missing of it")
    push.add_argument("directory", type=Path, help="what megatron-to-hf has made")
    push.add_argument("push_to_hub", metavar="org/name", type=value_of("repository"), help="made if it is not there")
    _add_switch(push, "--private", "for members only; a public repository is refused")

    verify = commands.add_parser(
        "verify",
        help="compare two checkpoints of any kind: exit code 0 where they hold the same model, 1 where not",
        description="Compare two checkpoints, each a Hugging Face directory or a Megatron checkpoint at any grid: "
        "every tensor bit for bit (A rounded to B's dtype where they differ), all copies within each, config and "
        f"vocabulary. {_ON_RANKS}",
        epilog=_ON_NUMBERS,
    )
    verify.add_argument("a", metavar="A", help="the first checkpoint: what B was made from")
    verify.add_argument("b", metavar="B", help="the second checkpoint")
    groups = _groups(verify)
    _add_options(groups, "verify")
    _add_ranks(groups["run"])

    inspect = commands.add_parser("inspect", help="describe a checkpoint of either kind from its headers")
    inspect.add_argument("path", type=Path, help="a Megatron checkpoint or a Hugging Face directory")
    inspect.add_argument(
        "--ckpt-dir-name", metavar="NAME", help="iteration directory (default: what the tracker file says)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON (default: text)")
    return parser, commands.choices


_ON_RANKS = "--ranks or torchrun share the work among ranks; alone it is one rank."
_ON_NUMBERS = "{rank}, {local_rank} and {node} in paths are replaced by this rank's numbers."

#: What a command that converts does, more of it, and what its source and its target are.
_CONVERSIONS = {
    CONVERT: (
        "Convert a checkpoint of any kind to another kind, grid, dtype or size of files",
        "What the source is is found out. ",
        "checkpoint of either kind: root or iteration of Megatron's, Hugging Face directory, or a hub id "
        "(org/name[@revision])",
        "what is made: a Hugging Face directory, or the root of a Megatron checkpoint",
    ),
    "megatron-to-hf": (
        "Convert a Megatron checkpoint to a Hugging Face directory",
        "",
        "(required) root of the Megatron checkpoint",
        "(required) Hugging Face directory to be made",
    ),
    "hf-to-megatron": (
        "Convert a Hugging Face model to a Megatron checkpoint at any parallel grid",
        "",
        "(required) Hugging Face directory, or a hub id (org/name[@revision])",
        "(required) root of the Megatron checkpoint",
    ),
}

#: Flags that stand for a value of an option: its field, the value, what the help says, and the commands that have it.
_CONSTANTS: Mapping[str, tuple[str, str | None, str, Sequence[str]]] = {
    "--release": ("iteration", RELEASE, "write a release instead of an iteration", COMMANDS),
    "--bf16": ("target_params_dtype", "bf16", "the same as --target-params-dtype bf16", ("hf-to-megatron",)),
    "--fp16": ("target_params_dtype", "fp16", "the same as --target-params-dtype fp16", ("hf-to-megatron",)),
    "--no-verify": ("verify", None, "do not (default: as the job file says)", COMMANDS),
}


_SAVED_AS = "as --ckpt-format of Megatron-LM has it (default: %(default)s)"


def _add_conversion(commands: Any, name: str) -> None:
    """A command that converts, with the flags of its options."""
    what, more, *paths = _CONVERSIONS[name]
    flags = PATH_FLAGS[name]
    named = " ".join([*flags, f"--to {{{','.join(FORMATS)}}}"] if name == CONVERT else [f"{one} PATH" for one in flags])
    command = commands.add_parser(
        name,
        usage=f"dist-convert {name} {named} [FLAG ...]",
        help=what[0].lower() + what[1:],
        description=f"{what}. {more}{_ON_RANKS}",
        epilog=_ON_NUMBERS,
    )
    groups = _groups(command)
    for field, flag, text in zip(("source", "target"), flags, paths, strict=True):
        if name == CONVERT:
            groups[field].add_argument(field, metavar=flag, nargs="?", default=SUPPRESS, help=text)
            groups[field].add_argument(f"--{field}", help=SUPPRESS)  # what a job file has in its place
        else:
            groups[field].add_argument(flag, dest=field, metavar="PATH", help=text)
    if name == CONVERT:
        groups["target"].add_argument("--to", choices=FORMATS, help="(required) the format that is made")
    elif PAIRS[name][1] == TORCH:
        kept = [one for one in FORMATS if one != HUGGINGFACE]
        groups["target"].add_argument("--target-format", dest="to", choices=kept, default=TORCH, help=_SAVED_AS)
    _add_options(groups, name)
    _add_ranks(groups["run"])
    groups["run"].add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file with any of these flags; the command line wins"
    )


def _groups(parser: ArgumentParser) -> dict[str, Any]:
    return {group: parser.add_argument_group(group) for group in ("source", "target", "run")}


def _add_options(groups: Mapping[str, Any], command: str) -> None:
    """The flags of a command's options."""
    for one, known in options_of(command):
        to = " or ".join((TORCH, TORCH_DIST) if known.to == MEGATRON else (known.to,))
        text = known.help + (f"; --to {to}" if command == CONVERT and to else "")
        _add_option(groups[known.group], one, known, text, command)


def _add_option(group: Any, one: Field[Any], known: Option, text: str, command: str) -> None:
    constants = [flag for flag, (name, *_, of) in _CONSTANTS.items() if name == one.name and command in of]
    flag, kind = flag_of(one), kind_of(one)
    default: Any = one.default
    if kind == "switch":
        _add_switch(group, flag, text)
        return
    if constants and known.const is None:
        group = group.add_mutually_exclusive_group()
    shown = known.shown or (human_bytes(default) if kind == "size" else default)
    text += ", such as 512MB or 2GiB" if kind == "size" else ""
    text += "" if shown is None else f" (default: {shown})"
    how: dict[str, Any] = {"choices": known.choices}
    if not known.choices:
        how = {"metavar": known.metavar or _TEXTS[kind][1], "type": value_of(kind)}
    if known.const:
        how |= {"nargs": "?", "const": known.const}
    spellings = [flag, OLD_SPELLINGS.get((command, flag), flag)]
    group.add_argument(*dict.fromkeys(spellings), dest=one.name, default=default, help=text, **how)
    for constant in constants:
        _, value, meaning, _ = _CONSTANTS[constant]
        group.add_argument(constant, dest=one.name, action="store_const", const=value, help=meaning)


def _add_switch(group: Any, flag: str, text: str) -> None:
    """A flag that is off, and that the command line can switch off again where a job file has it on."""
    name = flag[2:].replace("-", "_")
    group.add_argument(flag, action="store_true", default=False, help=f"{text} (default: off)")
    group.add_argument(f"--no-{flag[2:]}", dest=name, action="store_false", default=SUPPRESS, help=SUPPRESS)


def _add_ranks(group: Any) -> None:
    """How many ranks the command itself starts."""
    group.add_argument(
        "--ranks",
        metavar="N",
        type=value_of("count"),
        help="start so many on this machine's CPUs; torchrun is for several machines, and for accelerators (default: "
        "one, or those of torchrun)",
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
        raise UsageError(
            f"{program}: unrecognized arguments: {' '.join(unknown)}",
            remedy=f"see {program} --help{suggestion(unknown, commands[flags.command])}",
        )
    paths = zip(("source", "target"), PATH_FLAGS.get(flags.command, ()), strict=False)
    missing = [flag for name, flag in paths if getattr(flags, name, None) is None]
    missing += ["--to"] if flags.command == CONVERT and not flags.to else []
    if missing:  # checked here: argparse would name these first, and hide a misspelt one
        raise UsageError(f"{program}: {' and '.join(missing)} must be given", remedy=f"see {program} --help")
    return flags
