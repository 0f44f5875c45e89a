"""Values of flags, checked."""

from __future__ import annotations

import argparse

from dist_convert.errors import UsageError
from dist_convert.units import parse_bytes

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
