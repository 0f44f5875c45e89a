"""README.md and docs/ show what the commands do; what is generated is current, and every link leads somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_convert.cli.flags import options_from_flags, parse
from dist_convert.options import COMMANDS as CONVERTING
from dist_convert.ranks.log import Log
from dist_convert.records import __version__
from tests.checkpoints import Model, make
from tests.distributed.launching import free_port
from tests.docs.__main__ import GENERATED
from tests.docs.commands import (
    INSTALL,
    LANGUAGES,
    NOT_RUN,
    PAGES,
    REPOSITORY,
    Command,
    arguments_of,
    blocks,
    commands_of,
    differs,
    languages_of,
    run,
)
from tests.docs.inputs import make_demo, make_large, make_llama, make_named, make_plain
from tests.docs.pictures import DOCS
from tests.full_size import make_sparse_megatron
from tests.hub_stand_in import Hub, Repository, serving
from tests.oracle.conftest import kept
from tests.plan.headers import FULL_SIZE
from tests.warm import Process

COMMANDS = [command for page in PAGES for command in commands_of(page)]
RUN = [command for command in COMMANDS if not command.why_not_run]
#: What takes many seconds: ranks of torchrun each import torch, and a benchmark measures.
SLOW = ("torchrun", "launch/local.sh", "mixtral", "benchmarks")
#: Pages with programs of Python that need nothing but what `place` has.
PROGRAMS = [page for page in PAGES if page.name in ("README.md", "python.md")]


def parameters(commands: list[Command], slow: tuple[str, ...]) -> list[Any]:
    marks = [pytest.mark.slow if any(word in one.text for word in slow) else [] for one in commands]
    return [pytest.param(one, marks=mark, id=str(one)) for one, mark in zip(commands, marks, strict=True)]


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == GENERATED[name](), "python -m tests.docs makes it anew"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_of_a_page_says_what_it_is_and_only_those_of_a_shell_have_commands(page: Path) -> None:
    assert set(languages_of(page)) <= set(LANGUAGES)
    for block in blocks(page, "text"):
        assert not re.search(r"^\s*(\$ |dist-convert |torchrun |launch/|pip |python )", block, re.M)


@pytest.mark.parametrize("begin", NOT_RUN)
def test_what_is_not_run_is_on_a_page(begin: str) -> None:
    assert any(f"{command.text} ".startswith(begin) for command in COMMANDS)


@pytest.mark.parametrize("command", [one for one in COMMANDS if arguments_of(one.text)], ids=str)
def test_the_flags_of_each_command_on_a_page_are_known(command: Command) -> None:
    parse(arguments_of(command.text) or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 120
    assert "<details" not in text
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text


@pytest.mark.parametrize("name", ["README.md", "docs/clusters.md", "docs/convert.md"])
def test_the_line_of_progress_on_a_page_is_what_a_log_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", iter((0.0, 0.0, 29.9)).__next__)
    log = Log(interval_seconds=0)
    with log.progress(141_000_000_000, "converting") as update:
        update(59_200_000_000)
        log.tick("moving step 1")
    line = capsys.readouterr().err.strip()[8:]
    assert line in (REPOSITORY / name).read_text()


#: Four cores for each of eight ranks, and a disk that has room for any model.
ON_A_LARGE_NODE = """
import os, sys

os.sched_getaffinity = lambda process: set(range(32))
os.statvfs = lambda path: os.statvfs_result((4096, 4096, 2**40, 2**40, 2**40, 0, 0, 0, 0, 255))
from dist_convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("size", ["8B", *(pytest.param(size, marks=pytest.mark.slow) for size in ("70B", "405B"))])
def test_the_memory_of_a_rank_in_the_readme_is_what_a_dry_run_says(size: str, tmp_path: Path) -> None:
    told = re.search(
        rf"^\| {size} \|.*\| 8 on one node \|.*\| (\d+) MB \|$", (REPOSITORY / "README.md").read_text(), re.M
    )
    assert told is not None
    (model,) = (name for name in FULL_SIZE if name.startswith(f"Llama-3.1-{size} "))
    make_sparse_megatron(tmp_path / "in", model)
    words = ["convert", tmp_path / "in", tmp_path / "out", "--to", "huggingface", "--ranks", "8", "--dry-run", "--json"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", ON_A_LARGE_NODE, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    most_bytes = max(rank["peak_memory_bytes"] for rank in json.loads(done.stdout)["ranks"])
    assert most_bytes / 1e6 == pytest.approx(int(told[1]), rel=0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the commands start from."""
    root = tmp_path_factory.mktemp("docs")
    (root / "tmp").mkdir()
    make_llama(root)
    return root


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_the_programs_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path) -> None:
    make_llama(tmp_path)
    make_plain(tmp_path)
    code = re.sub(r'"/(ckpts|out|hf)/', rf'"{tmp_path}/\1/', "\n".join(blocks(page, "python")))
    (tmp_path / "program.py").write_text(code)
    program = [sys.executable, tmp_path / "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written_bytes, *rest = re.split(r"[ \n]", done.stdout.strip(), maxsplit=1)
    assert written_bytes == "44376576"  # 22,188,288 elements in bf16
    if page.name == "README.md":
        assert rest[0].endswith("\ntorch.Size([256])\nTrue"), done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the package in it, which borrows the packages that are here already.

    `test_the_lines_that_install_it_do_so_in_a_fresh_environment` makes one that borrows none.
    """
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    install = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, str(REPOSITORY)], check=True, cwd=venv)
    torchrun = venv / "bin/torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {venv}/bin/python -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    return venv / "bin"


@pytest.fixture(scope="module")
def demo(place: Path) -> Path:
    """The demo's model is there, too."""
    program = REPOSITORY / "launch" / "demo_inputs.py"
    fetch = [sys.executable, str(program)]
    model = kept("smollm2", program.read_text(), lambda work: subprocess.run([*fetch, str(work)], check=True) and None)
    make_demo(place, model / "smollm2-hf")
    for name in ("tests", "launch"):
        (place / name).symlink_to(REPOSITORY / name)
    make_large(place)
    make_named(place)
    return place


@pytest.fixture(scope="module")
def hub(demo: Path) -> Iterator[Hub]:
    """The hub has a model, org/name, until another is uploaded under that name."""
    files = {path.name: path.read_bytes() for path in (demo / "hf/Meta-Llama-3-70B").iterdir()}
    user = {"name": "alice", "type": "user", "orgs": [{"name": "org"}]}
    with serving(Hub({"org/name": Repository(files)}, {"hf_of_alice": user})) as found:
        yield found


@pytest.mark.parametrize("shown", parameters([one for one in RUN if one.output is not None], ("benchmarks",)))
def test_a_page_shows_what_a_command_prints(shown: Command, demo: Path, fresh: Path) -> None:
    _, found = run(shown, demo, environment_of(fresh))
    assert shown.output is not None
    expected = "\n".join(shown.output)
    assert not differs(found, shown.output), f"$ {shown.text}\n{found}\n--- {shown.page} shows:\n{expected}"


def environment_of(programs: Path) -> dict[str, str]:
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"), "PYTHONPATH": ""}
    return {**path, "OMP_NUM_THREADS": "1", "PORT": str(free_port())}


@pytest.mark.parametrize("command", parameters([one for one in RUN if one.output is None], SLOW))
def test_a_command_without_output_on_its_page_does_what_it_says(
    command: Command, demo: Path, fresh: Path, hub: Hub
) -> None:
    words = arguments_of(command.taken(demo))
    if words and (flags := parse(words)).command in CONVERTING:
        shutil.rmtree(options_from_flags(flags).target, ignore_errors=True)  # an earlier command has made it
    if words and words[0] == "push":
        hub.repositories.clear()
    if not words or not command.text.startswith("dist-convert"):
        code, printed = run(command, demo, environment_of(fresh))
        assert code == 0, printed
        return
    env = hub.environment(demo / "home", PYTHONPATH=str(REPOSITORY), HF_TOKEN="hf_of_alice")
    done = Process(["-m", "dist_convert", *words], env, demo).finish()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_lines_that_install_it_do_so_in_a_fresh_environment(tmp_path: Path) -> None:
    lines = [one.text for one in COMMANDS if one.why_not_run == INSTALL]
    path = os.pathsep.join(one for one in os.environ["PATH"].split(os.pathsep) if "venv" not in one)
    env = {**os.environ, "PATH": path, "PYTHONPATH": "", "REPOSITORY": str(REPOSITORY)}
    make(tmp_path / "in", Model())
    does = f"cd {tmp_path}; dist-convert --version; dist-convert convert in out --to huggingface --verify"
    script = "\n".join(["set -e", *lines, does])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"dist-convert {__version__}"
    assert "\ndone: " in done.stderr
