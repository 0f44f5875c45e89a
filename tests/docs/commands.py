"""Finds the commands in README.md and the pages of docs/, and runs them.

A block of a page is `console`, commands that begin with "$ " and what each prints; `bash`, commands alone; a language;
or `text`, which has no command. What a `console` shows is compared with what is printed: a line "..." stands for any
lines, "..." within a line for anything, and of times, sizes, rates, digests and floating-point values only the form
counts. A command that is not run stands in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))

#: What differs from run to run; a number in its place.
_MASKED = (
    (r"[0-9a-f]{16}", "N"),
    (r"-?\d+(\.\d+)? ?(GB/s|MB/s|kB/s|[kMGT]?B\b|s\b|min\b)", "N"),
    (r"-?\d+\.\d+", "N"),
    (r"0x[0-9a-f]+", "N"),
    (r"\d+ (config )?fields", "N fields"),  # families bring theirs
    (r"rank \d+ was", "rank N was"),  # whichever is found first
    (r" +", " "),
)


INSTALL = "test_the_lines_that_install_it_do_so_in_a_fresh_environment runs it"
LANGUAGES = ("console", "bash", "text", "python", "yaml", "dockerfile")
#: How commands begin that are not run, and why not.
NOT_RUN = {
    "sudo apt-get": "it changes the machine",
    "git clone": INSTALL,
    "python3 -m venv": INSTALL,
    "pip install torch": INSTALL,
    "pip install -e . ": INSTALL,
    "pip install -e '.[hpu]'": "Intel's packages are made for Gaudi",
    "launch/demo.sh": "tests/launch/test_demo.py runs it in a fresh clone",
    "launch/test.sh": "it is what runs this",
    "python -m pytest -m gpu": "it needs a GPU for each rank",
    "sbatch": "it needs Slurm; tests/launch/test_slurm.py runs what it starts",
    "export MASTER_": "it needs Slurm; tests/launch/test_slurm.py runs these lines",
    "srun": "it needs Slurm; tests/launch/test_slurm.py runs such lines",
    "cd /shared/dist_convert": "it needs Slurm; tests/launch/test_slurm.py runs this script",
    "bash launch/slurm.sbatch": "it needs Slurm; tests/launch/test_slurm.py runs this script",
    "kubectl": "it needs Kubernetes; tests/launch/test_kubernetes.py checks the jobs",
    'MOUNTS="': "it needs docker and Gaudi; tests/launch/test_scripts.py checks what docker gets",
    "HABANA_VISIBLE_DEVICES=": "it needs docker and Gaudi; tests/launch/test_scripts.py checks what docker gets",
    "python tests/benchmarks/bench.py": "it measures for a quarter of an hour",
    "echo 120000 >": "it changes the kernel's settings",
}
#: What pages name, and what is taken in a directory of tests, whose path is $PLACE; $N is the number of a node.
TAKEN = (
    (r"(?<![\w./}])SRC(?= )", "/ckpts/llama"),
    (r"(?<![\w./}])DST(?= )", "/out/dst"),
    (r"rsync -a (\S+)/ (\S+)/", r"mkdir -p \2 && cp -a \1/. \2"),
    (r"\$node:/local/", "$PLACE/$node/"),
    (r"(?<![\w./}])/local/", "$PLACE/node$N/"),
    (r"(?<![\w./}:])/(ckpts|out|hf|models|shared|tmp)/", r"$PLACE/\1/"),
    (r" configs/", " $PLACE/configs/"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
    (r"--master-addr node0 --master-port 29500", "--master-addr 127.0.0.1 --master-port $PORT"),
)
#: The same for single pages.
TAKEN_OF_PAGE = {
    "hub.md": ((r"/ckpts/llama", "/ckpts/of-hub"),),
    "tokenizers.md": ((r"/out/llama-hf", "/out/llama3-hf"),),
}


@dataclass(frozen=True)
class Command:
    """A command of a page as it stands there, and the lines that the page shows below it; None where it shows none."""

    page: str
    text: str
    output: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.text.split())[:60]}"

    @property
    def why_not_run(self) -> str:
        """The reason, "" for one that is run."""
        return next((why for begin, why in NOT_RUN.items() if f"{self.text} ".startswith(begin)), "")

    def taken(self, directory: Path) -> str:
        """The command with what is in a directory of tests for what the page names."""
        text = self.text
        for pattern, here in (*TAKEN_OF_PAGE.get(self.page, ()), *TAKEN):
            text = re.sub(pattern, here, text)
        return text.replace("$PLACE", str(directory))


def arguments_of(command: str) -> list[str] | None:
    """What dist_convert gets from a command, by whichever launcher; None where it is not called."""
    called = re.search(r"(?:dist-convert|-m dist_convert|launch/(?:local|gaudi-docker)\.sh|slurm\.sbatch) ", command)
    if called is None:
        return None
    rest = command[called.end() :].partition("||")[0].replace('"$@"\' rank ', "")
    return shlex.split(rest, comments=True)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page in some languages."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.M | re.S)
    return [dedent(code) for _, kind, code in found if kind in languages]


def languages_of(page: Path) -> list[str]:
    """The language of each block of a page."""
    return re.findall(r"^ *```(\w*)\n.*?^ *```$", page.read_text(), re.M | re.S)


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page, in their order."""
    found = re.findall(r"^( *)```(bash|console)\n(.*?)^\1```$", page.read_text(), re.M | re.S)
    for _, kind, code in found:
        text = dedent(code).replace("\\\n", " ")
        if kind == "bash":
            yield from (Command(page.name, command) for command in _split(text))
            continue
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield Command(page.name, " ".join(command.split()), tuple(_of_the_command(output)) if output else None)


def _split(code: str) -> Iterator[str]:
    """Commands of a script: lines, and more where bash says that one is not complete."""
    held = ""
    for line in code.splitlines():
        held += line
        if not held.strip() or held.startswith("#"):
            held = ""
            continue
        checked = subprocess.run(["bash", "-n", "-c", held], capture_output=True, text=True, check=False)
        if checked.returncode or held.endswith(("||", "|")):
            held += "\n"
            continue
        yield held
        held = ""
    assert not held, held


def _of_the_command(output: str) -> Iterator[str]:
    """Lines up to a picture of files, which a block may have at its end."""
    lines = output.rstrip("\n").split("\n")
    for number, line in enumerate(lines):
        if not line and any(one.startswith(("├", "└")) for one in lines[number:]):
            return
        yield line


def run(command: Command, directory: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """The exit code of a command, and what it prints, standard error and output, in the order in which it comes.

    A run that is shown as one whose ranks are killed loses them when it has written something. One for each of two
    nodes is started twice at once.
    """
    text = command.taken(directory)
    nodes = ("0", "1") if "$N" in text else ("0",)
    started = []
    for node in nodes:
        started.append(
            subprocess.Popen(
                ["bash", "-c", f"exec {text}" if text.startswith("dist-convert") else text],
                cwd=directory, env={**os.environ, **environment, "N": node},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    with ExitStack() as stack:
        for process in started:
            stack.enter_context(process)
        if command.output and any("SIGKILL" in line for line in command.output):
            journals = "**/*.partial/.journal/run-*"
            while started[0].poll() is None and not any(one.stat().st_size > 5000 for one in directory.glob(journals)):
                time.sleep(0.01)
            for rank in Path(f"/proc/{started[0].pid}/task/{started[0].pid}/children").read_text().split():
                os.kill(int(rank), signal.SIGKILL)
        printed = [process.stdout.read() for process in started if process.stdout is not None]
    codes = [process.returncode for process in started]
    return max(codes, key=abs), "".join(printed).replace(f"{directory}/tmp/", "/tmp/")


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
