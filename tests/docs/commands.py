"""Finds the commands in README.md and the pages of docs/, runs them, and compares what they print with what is shown.

A command begins with "$ ", and what follows it in its block, up to the next command or a picture of files, is its
output. A line "..." stands for any lines, "..." within a line for anything. Times, sizes, rates, digests and
floating-point values are compared by their form only.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))

#: What differs from run to run; a number in its place.
_MASKED = (
    (r"[0-9a-f]{16}", "N"),
    (r"-?\d+(\.\d+)? ?(GB/s|MB/s|kB/s|[kMGT]?B\b|s\b|min\b)", "N"),
    (r"-?\d+\.\d+", "N"),
    (r"0x[0-9a-f]+", "N"),
    (r"\d+ (config )?fields", "N fields"),  # families bring theirs
    (r" +", " "),
)


@dataclass(frozen=True)
class Shown:
    """A command and the lines that a page shows below it."""

    page: str
    command: str
    output: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.command[:60]}"


def blocks(page: Path) -> list[str]:
    """The code of a page that is no program of Python, YAML or others."""
    return [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S) if not kind]


def shown_commands(page: Path) -> Iterator[Shown]:
    """The commands of a page whose output it shows."""
    for block in blocks(page):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield Shown(page.name, " ".join(command.split()), tuple(_of_the_command(output)))


def _of_the_command(output: str) -> Iterator[str]:
    """Lines up to a picture of files, which a block may have at its end."""
    lines = output.rstrip("\n").split("\n")
    for number, line in enumerate(lines):
        if not line and any(one.startswith(("├", "└")) for one in lines[number:]):
            return
        yield line


def lines_of_dist_convert() -> list[tuple[str, list[str]]]:
    """Each command line of this program on any page, as (page, its arguments)."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0]
                called = re.match(r"(\$ )?(?:srun )?(?:torchrun .*?-m dist_convert|dist-convert) (?!\.\.\.)(.*)", line)
                if called and "..." not in called[2]:
                    found.append((page.name, shlex.split(called[2])))
    return found


def run(shown: Shown, directory: Path, environment: Mapping[str, str]) -> str:
    """What a command prints, standard error and output, in the order in which it comes.

    A run that is shown as one that a signal stops gets it when it has written something.
    """
    command = shown.command.replace("/tmp/", f"{directory}/tmp/")
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}" if "|" not in command else command],
        cwd=directory, env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        if "stopped by SIGTERM" in shown.output:
            while process.poll() is None and not list(directory.glob("**/*.partial/.journal/run-*")):
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        return process.stdout.read().replace(f"{directory}/tmp/", "/tmp/")


def differs(found: str, expected: tuple[str, ...]) -> bool:
    """Whether what was printed is not what the page shows."""
    pattern = ""
    for line in expected:
        shown = re.escape(_masked(line.replace("...", "\0"))).replace("\0", ".*")
        pattern += "(?:.*\\n)*?" if line == "..." else f"{shown}\\n"
    return re.fullmatch(pattern, _masked(found.rstrip("\n") + "\n")) is None


def _masked(text: str) -> str:
    for pattern, placeholder in _MASKED:
        text = re.sub(pattern, placeholder, text)
    return text
