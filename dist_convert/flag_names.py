"""Which flag was meant by one that a command does not have."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

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
