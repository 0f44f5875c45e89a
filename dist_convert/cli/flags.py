"""The flags of every command, on the command line and in YAML files, and their checked values."""

import argparse
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

from dist_convert import options as table
from dist_convert.cli import commands as words
from dist_convert.cli.job_files import flags_of_file
from dist_convert.errors import ConversionError, UsageError, quoted, raise_together
from dist_convert.ranks.signals import node_number
from dist_convert.records import __version__, human_bytes, parse_bytes

#: The flags of both paths and of the target's format, of which each command shows its own.
_SAME_FLAGS = {
    "source": ("--source", *(table.PATH_FLAGS[command][0] for command in table.PAIRS)),
    "target": ("--target", *(table.PATH_FLAGS[command][1] for command in table.PAIRS)),
    "to": ("--to", "--target-format"),
}


def suggestion(unknown: Iterable[str], parser: ArgumentParser) -> str:
    """What to add to a remedy: the command's name for what others call otherwise, or a flag spelt alike.

    None that removes or accepts something, which nobody is to take over without a thought.
    """
    actions = [action for action in parser._actions if action.help != SUPPRESS and action.dest != "overwrite"]
    shown = [
        flag for action in actions for flag in action.option_strings if not flag.startswith(("--accept", "--allow"))
    ]
    of_flags = {one: set(one[2:].split("-")) for one in shown if one.startswith("--")}
    known = set().union(*of_flags.values())
    meant = []
    for flag in (word.partition("=")[0] for word in unknown if word.startswith("-")):
        other = words.OTHER_FLAGS.get(flag)
        parts = {(get_close_matches(part, known, 1, 0.85) or [part])[0] for part in flag[2:].split("-")}
        if other is not None:
            found = [(one.option_strings or [str(one.metavar)])[-1] for one in actions if one.dest == other]
            found += [other] if other.split(" ")[0] in shown else []
        else:
            holding = [one for one, its in of_flags.items() if parts <= its or (its < parts and len(parts - its) == 1)]
            found = [*get_close_matches(flag, shown, 1, 0.85), *sorted(holding, key=len)]
        meant += [f"{one} for {flag}" for one in found[:1]]
    return f"; perhaps {', '.join(meant)}" if meant else ""


def _whole_number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _share(text: str) -> Fraction | None:
    """Of a few digits: what an exponent stands for may have billions of them."""
    return Fraction(text) if re.fullmatch("[0-9./]{1,20}", text) else None


def _text(text: str) -> str:
    """A name, or a path in which ~ is the home directory."""
    if not text:
        raise UsageError("a name is empty: is a variable unset?", remedy="give a name")
    return table.expanded_path(text)


def _repository(text: str) -> str:
    from dist_convert.formats.huggingface.upload import check_repository_name  # half a second, where it is needed

    return check_repository_name(text)


#: How the command line says the values of a kind, and what the help calls them.
_TEXTS: Mapping[table.Kind, tuple[Callable[[str], Any], str]] = {
    "text": (_text, "NAME"),
    "path": (lambda text: Path(table.expanded_path(text)), "PATH"),
    "count": (_whole_number, "N"),
    "number": (float, "NUMBER"),
    "seconds": (_whole_number, "SECONDS"),
    "iteration": (lambda text: table.RELEASE if text == table.RELEASE else _whole_number(text), "N"),
    "size": (parse_bytes, "SIZE"),
    "share": (_share, "SHARE"),
    "repository": (_repository, "org/name"),
}


def value_of(kind: table.Kind) -> Callable[[str], Any]:
    """What reads a value of a kind, in argparse's way."""

    def read(text: str) -> Any:
        try:
            value = _TEXTS[kind][0](text)
        except UsageError as error:
            more = f": {error.found}" if error.found else ""
            more += f" (expected {error.expected})" if error.expected else ""
            raise ArgumentTypeError(f"{error.what}{more}") from error
        except (ValueError, ZeroDivisionError):
            value = None  # which fits nothing
        expected, fits = table.KINDS[kind]
        if not fits(value):
            raise ArgumentTypeError(f"not {expected}: {text!r}")
        return value

    return read


def with_numbers(path: str) -> str:
    """A path with this rank's numbers in place of {rank}, {local_rank} and {node}.

    Raises:
        UsageError: the launcher does not tell such a number, or the path is empty.
    """
    told = {"rank": os.environ.get("RANK"), "local_rank": os.environ.get("LOCAL_RANK"), "node": node_number()}
    for name, number in told.items():
        if "{" + name + "}" in path and number is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(f"{{{name}}} is unknown", path, remedy="start with torchrun, or set GROUP_RANK")
        path = path.replace("{" + name + "}", number or "0")
    return table.expanded_path(path)


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
        found = f"--ranks {flags.ranks}, and RANK={os.environ['RANK']} in the environment"
        remedy = "remove --ranks (in a job file, ranks) under torchrun and other launchers; elsewhere, unset RANK"
        raise UsageError("a launcher has started the ranks already", found=found, remedy=remedy)
    if getattr(flags, "device", "cpu") not in ("auto", "cpu"):
        what = "--ranks starts ranks on CPUs"
        remedy = f"use --device cpu, or start with torchrun --nproc-per-node {flags.ranks} and without --ranks"
        raise UsageError(what, found=f"--ranks {flags.ranks} --device {flags.device}", remedy=remedy)
    cores = len(os.sched_getaffinity(0))
    if flags.ranks > _MOST_PER_CORE * cores:
        what, found = "more ranks than this machine can serve", f"--ranks {flags.ranks}"
        expected = f"at most {_MOST_PER_CORE * cores}, {_MOST_PER_CORE} for each of {cores} cores"
        raise UsageError(what, expected=expected, found=found, remedy="half as many ranks as cores is a good start")
    flags.device = "cpu"
    return int(flags.ranks)


def _values(flags: argparse.Namespace) -> dict[str, Any]:
    return {one.name: getattr(flags, one.name) for one, _ in table.options_of(flags.command)}


def options_from_flags(flags: argparse.Namespace) -> table.Options:
    """The options of a conversion, unchecked, see `check_together`; a source that is not given is empty."""
    source, target = (getattr(flags, name, None) for name in ("source", "target"))
    return table.Options(
        getattr(flags, "to", table.HUGGINGFACE),
        "" if source is None else with_numbers(source),
        Path(os.path.realpath(with_numbers("." if target is None else target))),  # of a link to itself, too
        command=flags.command,
        **_values(flags),
    )


def job_from_flags(flags: argparse.Namespace) -> table.Options | table.VerifyJob:
    """The job of any command that several ranks share."""
    if flags.command == "verify":
        return table.VerifyJob(Path(with_numbers(flags.a)), Path(with_numbers(flags.b)), **_values(flags))
    return options_from_flags(flags)


def tokenizer_job_from_flags(flags: argparse.Namespace) -> table.TokenizerJob:
    """The job of `tokenizer`."""
    return table.TokenizerJob(Path(flags.source), Path(flags.target), **_values(flags))


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows all spellings of a flag, and the name of its value once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them; knows flags by their whole names only."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **how)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            alike = [words.OTHER_FORMATS[value]] if action.dest == "to" and value in words.OTHER_FORMATS else []
            alike += get_close_matches(str(value).lower(), map(str, action.choices or ()), 1)
            error.message += f"; perhaps {alike[0]}" if alike else ""
            raise

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # newer versions of Python do not tell that nobody reads it

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    examples = "".join(f"\n  dist-convert {one} {words.COMMANDS[one].examples[0]}" for one in _SHOWN_FIRST)
    parser = Parser(
        prog="dist-convert",
        usage="dist-convert COMMAND [FLAG ...]",
        description="Convert checkpoints between Megatron-LM, Hugging Face and PyTorch DCP.",
        epilog=f"examples:{examples}\n\ndist-convert help COMMAND shows the flags of a command, and more examples.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="dist-convert")
    for name, said in words.COMMANDS.items():
        examples = "".join(f"\n  dist-convert {name} {one}" for one in said.examples)
        command = commands.add_parser(
            name,
            usage=f"dist-convert {name} {said.usage}",
            help=said.help,
            description=fill(said.description, 100),
            epilog=f"examples:{examples}" + (f"\n\n{_ON_NUMBERS}" if said.ranks else ""),
        )
        groups = {group: command.add_argument_group(group) for group in ("source", "target", "run")}
        if name in table.COMMANDS:
            _add_ends(command, groups, name)
        else:  # `parse` looks for what is missing: argparse would not say all that is wrong
            for dest, text in said.paths.items():
                shown = {"source": "SRC", "target": "DST"}.get(dest, dest.upper())
                command.add_argument(dest, metavar=shown, nargs="?", type=table.expanded_path, help=text)
        _add_options(groups, name)
        if said.ranks:
            groups["run"].add_argument(
                "--ranks",
                metavar="N",
                type=value_of("count"),
                help="ranks to start on this machine's CPUs; use torchrun for several machines or accelerators "
                "(default: 1, or torchrun's)",
            )
        if name in table.COMMANDS:
            what = "YAML file with any of these flags; the command line wins"
            groups["run"].add_argument("--config", metavar="FILE", type=value_of("path"), help=what)
            what = "print the given flags as such a file and exit (default: off)"
            groups["run"].add_argument("--print-config", action="store_true", help=what)
    words.add_old_flags(commands.choices["hf-to-megatron"])
    commands.choices["push"].add_argument(
        "push_to_hub",
        metavar="org/name",
        nargs="?",
        type=value_of("repository"),
        help="repository; created if it does not exist",
    )
    for name in ("inspect", "models"):
        commands.choices[name].add_argument("--json", action="store_true", help="print JSON (default: text)")
    commands.choices["completion"].add_argument("shell", nargs="?", choices=("bash", "zsh", "tcsh"), help="which shell")
    return parser, commands.choices


#: Commands of which the help of the whole program has an example.
_SHOWN_FIRST = (table.CONVERT, "verify", "inspect")
_ON_NUMBERS = "{rank}, {local_rank} and {node} in paths are replaced by this rank's numbers."

#: Flags that stand for a value of an option: its field, the value, what the help says, and the commands that have it.
_CONSTANTS: Mapping[str, tuple[str, str | None, str, Sequence[str]]] = {
    "--release": ("iteration", table.RELEASE, "write a release instead of an iteration", table.COMMANDS),
    "--bf16": ("target_params_dtype", "bf16", "short for --target-params-dtype bf16", ("hf-to-megatron",)),
    "--fp16": ("target_params_dtype", "fp16", "short for --target-params-dtype fp16", ("hf-to-megatron",)),
    "--no-verify": ("verify", None, SUPPRESS, table.COMMANDS),
}


def _add_ends(command: ArgumentParser, groups: Mapping[str, Any], name: str) -> None:
    """Source, target and format of a command that converts; what other commands call them is not in its help."""
    to = (
        table.FORMATS
        if name == table.CONVERT
        else table.formats_of(table.MEGATRON if table.PAIRS[name][1] == table.TORCH else table.HUGGINGFACE)
    )
    shown = dict(zip(("source", "target"), table.PATH_FLAGS[name], strict=True))
    for dest, text in words.COMMANDS[name].paths.items():
        if name == table.CONVERT:
            groups[dest].add_argument(dest, metavar=shown[dest], nargs="?", default=SUPPRESS, help=text)
        else:
            groups[dest].add_argument(shown[dest], dest=dest, metavar="PATH", default=SUPPRESS, help=text)
    if name == table.CONVERT:
        shown["to"] = "--to"
        groups["target"].add_argument("--to", choices=to, default=SUPPRESS, help="(required) format of the target")
    elif table.PAIRS[name][1] == table.TORCH:
        shown["to"] = "--target-format"
        how = "format of the target, by the names of Megatron-LM's --ckpt-format (default: %(default)s)"
        groups["target"].add_argument("--target-format", dest="to", choices=to, default=table.TORCH, help=how)
    else:
        command.set_defaults(to=table.HUGGINGFACE)
    for dest, flags in _SAME_FLAGS.items():
        hidden = [flag for flag in flags if flag != shown.get(dest)]
        command.add_argument(*hidden, dest=dest, choices=to if dest == "to" else None, default=SUPPRESS, help=SUPPRESS)


def _add_options(groups: Mapping[str, Any], command: str) -> None:
    """The flags of a command's options."""
    for one, known in table.options_of(command):
        to = " or ".join(table.formats_of(known.to))
        text = known.help + (", such as 512MB or 2GiB" if table.kind_of(one) == "size" else "")
        text += f"; --to {to}" if command == table.CONVERT and to else ""
        _add_option(groups[known.group], one, known, text, command)


def _add_option(group: Any, one: Field[Any], known: table.Option, text: str, command: str) -> None:
    constants = [flag for flag, (name, *_, of) in _CONSTANTS.items() if name == one.name and command in of]
    flag, kind = table.flag_of(one), table.kind_of(one)
    default: Any = one.default
    spellings = (*known.short, flag)
    if kind == "switch":  # which the command line can switch off again where a job file has it on
        group.add_argument(*spellings, action="store_true", default=False, help=f"{text} (default: off)")
        off = f"--no-{flag[2:]}"
        group.add_argument(off, dest=one.name, action="store_false", default=SUPPRESS, help=SUPPRESS)
        return
    if constants and known.const is None:
        group = group.add_mutually_exclusive_group()
    shown = known.shown or (human_bytes(default) if kind == "size" else default)
    text += "" if shown is None else f" (default: {shown})"
    how: dict[str, Any] = {"dest": one.name, "default": default, "choices": known.choices}
    if not known.choices:
        how |= {"choices": None, "metavar": known.metavar or _TEXTS[kind][1], "type": value_of(kind)}
    if known.const:
        how |= {"nargs": "?", "const": known.const}
    group.add_argument(*spellings, help=text, **how)
    if (command, flag) in words.OLD_SPELLINGS:
        group.add_argument(words.OLD_SPELLINGS[command, flag], help=SUPPRESS, **(how | {"default": SUPPRESS}))
    for constant in constants:
        _, value, meaning, _ = _CONSTANTS[constant]
        group.add_argument(constant, dest=one.name, action="store_const", const=value, default=SUPPRESS, help=meaning)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line, see `parse_all`.

    Raises:
        UsageError, Problems: all that is wrong with them.
    """
    flags, problems = parse_all(argv)
    raise_together(problems)
    return flags


def parse_all(argv: Sequence[str]) -> tuple[argparse.Namespace, list[ConversionError]]:
    """The flags of the command line, with those of a `--config` file behind them, and all that is wrong with them.

    A flag with a wrong value has its default; of paths that are not given there is none, or None.

    Raises:
        UsageError: there is no such command, or its job file cannot be read.
    """
    parser, commands = build_parser()
    if argv[:1] == ["help"] or (len(argv) == 2 and argv[1] == "help" and argv[0] in commands):
        argv = [*(word for word in argv if word != "help"), "--help"]
    if argv and argv[0].startswith("-") and argv[0] not in parser._option_string_actions:
        what, expected = f"dist-convert: unrecognized arguments: {argv[0]}", f"a command first: {', '.join(commands)}"
        raise UsageError(what, expected=expected, remedy=f"see dist-convert --help{suggestion(argv[:1], parser)}")
    if not argv or argv[0].startswith("-"):
        return parser.parse_args(argv), []
    name, given = argv[0], argv[1:]
    if name not in commands:
        alike = [words.OTHER_NAMES[name]] if name in words.OTHER_NAMES else get_close_matches(name, commands, 1)
        perhaps = f"; perhaps {(alike or [table.CONVERT])[0]}" if alike or "/" in name else ""
        what = f"dist-convert: there is no command {name}"
        raise UsageError(what, expected=", ".join(commands), remedy=f"see dist-convert --help{perhaps}")
    command = commands[name]
    finder = Parser(prog=command.prog, add_help=False)
    finder.add_argument("--config", type=value_of("path"))
    problems: list[ConversionError] = []
    if name in table.COMMANDS and (config := finder.parse_known_args(given)[0].config):
        values, problems = flags_of_file(command, config, lambda word: suggestion([word], command))
        command.set_defaults(**values)
    flags, unknown, wrong = _parse_all(command, given)
    unknown_flags = [word for word in unknown if word.startswith("-")]
    if 0 < len(unknown_flags) < len(unknown):  # the value of one may have been taken for a path
        flags = _parse_all(command, _without(given, unknown_flags, takes_value=True))[0]
    problems += wrong
    more = f"see {command.prog} --help"
    named = {action.dest: action for action in command._actions if not action.option_strings}
    needed = {one: str(action.metavar or action.dest) for one, action in named.items()}
    if name in table.COMMANDS:
        needed = dict(zip(("source", "target"), table.PATH_FLAGS[name], strict=True)) | {"to": "--to"}
    tried = {word.partition("=")[0] for word in given}  # what is wrong with their values is told already
    missing = [shown for one, shown in needed.items() if getattr(flags, one, None) is None and shown not in tried]
    if unknown:
        unknown = unknown_flags or unknown  # else a wrong flag's value, too
        what = f"{command.prog}: unrecognized arguments: {' '.join(unknown)}"
        if name in table.PAIRS and len(unknown) == len(missing) and not unknown[0].startswith("-"):
            by_flags = (f"{flag} {quoted(path)}" for flag, path in zip(missing, unknown, strict=True))
            what = f"{command.prog} takes its paths by flags: {' '.join(by_flags)}"
        problems.append(UsageError(what, remedy=more + suggestion(unknown, command)))
    if name == table.CONVERT and not problems:  # where a path may also stand without a flag
        for dest in ("source", "target"):
            finder.add_argument(*_SAME_FLAGS[dest], dest=dest, type=table.expanded_path)
        flagged = vars(finder.parse_known_args(given)[0])
        for dest in ("source", "target"):
            if flagged[dest] not in (None, path := getattr(flags, dest, None)):
                what, found = f"{needed[dest]} is given twice", f"{path} and {flagged[dest]}"
                problems.append(UsageError(what, found=found, remedy="give one of them"))
    if missing and all(word.startswith("-") for word in unknown):  # else other words may be meant as the paths
        wanted = " and ".join([", ".join(missing[:-1]), missing[-1]] if missing[1:] else missing)
        problems.append(UsageError(f"{command.prog}: {wanted} must be given", remedy=more))
    flags.command = name
    return flags, problems


def _parse_all(
    command: ArgumentParser, given: Sequence[str]
) -> tuple[argparse.Namespace, list[str], list[ConversionError]]:
    """The flags of a command, what it does not know, and all that is wrong; argparse itself ends at the first."""
    left, problems = [*given], list[ConversionError]()
    while True:
        try:
            return (*command.parse_known_intermixed_args(left), problems)
        except UsageError as error:
            problems.append(error)
            wrong = str(getattr(error.__context__, "argument_name", None)).split("/")
            action = command._option_string_actions.get(wrong[0])
            shorter = _without(left, wrong, takes_value=action is not None and action.nargs != 0)
            if shorter == left:  # the error is no flag's
                raise_together(problems)
            left = shorter


def _without(given: Sequence[str], flags: Sequence[str], *, takes_value: bool) -> list[str]:
    """The words of a command line without some flags and their values."""
    found, is_value = [], False
    for word in given:
        is_flag = word.partition("=")[0] in flags
        if not is_flag and not (is_value and not word.startswith("--")):
            found.append(word)
        is_value = is_flag and takes_value and "=" not in word
    return found
