"""Job files: the flags of a command in YAML, read and written."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from dist_convert.errors import ConversionError, SourceError, UsageError
from dist_convert.options import Options, flag_of, given, kind_of
from dist_convert.read.yaml_file import read_yaml
from dist_convert.records import JsonObject


def flags_of_file(
    parser: ArgumentParser, path: Path, suggestion: Callable[[str], str]
) -> tuple[JsonObject, list[ConversionError]]:
    """The values that a job file gives to a command, by their names in its parser's namespace, and what is wrong.

    It maps flags to values; `true` is a flag without a value, `false` and nothing are no flag.

    Args:
        suggestion: what to add to the remedy for an unknown flag.

    Raises:
        UsageError: it cannot be read.
    """
    words: list[str] = []
    problems: list[ConversionError] = []
    key_of: dict[str, str] = {}
    for key, value in _read(path).items():
        try:
            for word in _words(parser, key, value, suggestion):
                option = parser._option_string_actions[word.partition("=")[0]].dest
                if (other := key_of.setdefault(option, key)) != key:
                    raise UsageError(f"{other} and {key} are one option", remedy="give one of them")
                words.append(word)
        except UsageError as error:
            error.file = str(path)
            problems.append(error)
    return vars(parser.parse_args(words)), problems


def _words(parser: ArgumentParser, key: str, value: object, suggestion: Callable[[str], str]) -> list[str]:
    """What the command line would have for one key of a file; raises UsageError for what is wrong with it."""
    if isinstance(value, list | dict):
        raise UsageError(f"{key} cannot be a {type(value).__name__}")
    flag = "--" + key.replace("_", "-")
    found = f"{key}: {'true' if value is True else value}"
    if flag == "--config":
        raise UsageError("a job file cannot name another one", found=found)
    if value is None or value is False:
        return []
    word = flag if value is True else f"{flag}={value}"
    try:
        _, unknown = parser.parse_known_args([word])
    except UsageError as error:
        what = error.what if "=" in word else f"{key} needs a value"
        if "ignored explicit argument" in error.what:
            what = f"{key} must be true or false"
        raise UsageError(what, found=found, remedy=error.remedy) from error
    if unknown or flag not in parser._option_string_actions:  # such as "--", behind which nothing is a flag
        remedy = f"see {parser.prog} --help{suggestion(word)}"
        raise UsageError(f"{parser.prog} has no flag for the key {key}", found=found, remedy=remedy)
    return [word]


#: A flag a line; YAML takes many times its size in memory.
_MAX_JOB_BYTES = 100_000


def _read(path: Path) -> JsonObject:
    try:
        return read_yaml(path, _MAX_JOB_BYTES, numbers=False)
    except SourceError as error:
        remedy = "check --config on every node"
        raise UsageError(
            "cannot read the job file", path, expected=error.expected, found=error.found, remedy=remedy
        ) from error


def job_file(job: Options, **besides: object) -> str:
    """The job file of a conversion, for any of the commands that convert to its format.

    Args:
        besides: what stands in it besides the options, such as the source.
    """
    import yaml

    found: dict[str, object] = {"to": job.to, "source": job.source, "target": str(job.target), **besides}
    for one, _ in given(job):
        value = getattr(job, one.name)
        if kind_of(one) == "size":
            value = f"{value}B"
        found[flag_of(one)[2:]] = value if isinstance(value, bool | int | float) else str(value)
    return yaml.safe_dump(found, sort_keys=False)  # in ASCII, whatever it is printed to
