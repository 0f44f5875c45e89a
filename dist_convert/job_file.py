"""Flags from a YAML file (`--config`), which the command line overrules."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.flag_names import suggestion


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
