"""Job files: the flags of a command in YAML, read and written."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, SourceError, UsageError
from dist_convert.options import Options, flag_of, given, kind_of
from dist_convert.read.source import read_small_file


def flags_of_file(
    parser: ArgumentParser, path: Path, suggestion: Callable[[str], str]
) -> tuple[dict[str, Any], list[ConversionError]]:
    """The values that a job file gives to a command, by their names in its parser's namespace, and what is wrong.

    It maps flags to values; `true` is a flag without a value, `false` and nothing are no flag.

    Args:
        suggestion: what to add to the remedy for an unknown flag.

    Raises:
        UsageError: it cannot be read.
    """
    words: list[str] = []
    problems: list[ConversionError] = []
    for key, value in _read(path).items():
        if isinstance(value, list | dict):  # of which aliases may make far more than the file has bytes
            problems.append(UsageError(f"{key} cannot be a {type(value).__name__}", file=str(path)))
            continue
        if any(isinstance(one, int) and one.bit_length() > 64 for one in (key, value)):  # their digits are not printed
            problems.append(UsageError("a number with more than 64 bits", file=str(path)))
            continue
        found = f"{key}: {'true' if value is True else value}"
        flag = "--" + str(key).replace("_", "-")
        word, what, remedy = flag if value is True else f"{flag}={value}", "", ""
        if flag == "--config":
            what = "a job file cannot name another one"
        elif value is None or value is False:
            continue
        else:
            what, remedy = _wrong(parser, key, word, suggestion)
        if what:
            problems.append(UsageError(what, file=str(path), found=found, remedy=remedy))
        else:
            words.append(word)
    try:
        return vars(parser.parse_args(words)), problems  # together, as some exclude each other
    except UsageError as error:
        return {}, [*problems, UsageError(error.what, file=str(path), remedy=error.remedy)]


def _wrong(parser: ArgumentParser, key: object, word: str, suggestion: Callable[[str], str]) -> tuple[str, str]:
    """What is wrong with one flag of a file, and the remedy; "" for nothing."""
    try:
        _, unknown = parser.parse_known_args([word])
    except UsageError as error:
        if "ignored explicit argument" in error.what:
            return f"{key} must be true or false", error.remedy
        return (error.what if "=" in word else f"{key} needs a value"), error.remedy
    if unknown:
        return f"{parser.prog} has no flag for the key {key}", f"see {parser.prog} --help{suggestion(word)}"
    return "", ""


#: A flag a line; YAML takes many times its size in memory.
_MAX_JOB_BYTES = 100_000


def _read(path: Path) -> dict[Any, Any]:
    import yaml  # only here: most runs have no job file

    try:
        data = yaml.safe_load(read_small_file(path, _MAX_JOB_BYTES).decode("utf-8"))
    except (SourceError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.found if isinstance(error, SourceError) else error
        raise UsageError(
            "cannot read the job file", file=str(path), found=str(reason), remedy="check --config on every node"
        ) from error
    if not isinstance(data, dict):
        expected = "flag: value, a line each"
        raise UsageError("not a job file", file=str(path), expected=expected, found=type(data).__name__)
    return data


def job_file(job: Options, **besides: object) -> str:
    """The job file of a conversion, for any of the commands that convert to its format.

    Args:
        besides: what stands in it besides the options, such as the source.
    """
    import yaml

    found: dict[str, object] = {"to": job.to, "source": job.source, "target": str(job.target), **besides}
    for one, _ in given(job):
        value = getattr(job, one.name)
        shown = (
            f"{value}B" if kind_of(one) == "size" else value if isinstance(value, bool | int | float) else str(value)
        )
        found[flag_of(one)[2:]] = shown
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
