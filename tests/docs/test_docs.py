"""README.md and docs/ show what the commands do; what is generated is current, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_convert.cli.flags import parse
from tests.docs.__main__ import GENERATED
from tests.docs.commands import PAGES, REPOSITORY, Shown, differs, lines_of_dist_convert, run, shown_commands
from tests.docs.inputs import make_demo, make_large, make_llama
from tests.docs.pictures import DOCS
from tests.oracle.conftest import kept

SHOWN = [shown for page in PAGES for shown in shown_commands(page)]
#: Measured by hand: it takes half an hour, and shows memory.
BY_HAND = ("tuning.md",)
QUICK = [shown for shown in SHOWN if "ckpts/llama" in shown.command]
OTHERS = [shown for shown in SHOWN if shown not in QUICK and shown.page not in BY_HAND]


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == GENERATED[name](), "python -m tests.docs makes it anew"


@pytest.mark.parametrize(("page", "words"), lines_of_dist_convert(), ids=lambda value: str(value)[:60])
def test_each_command_line_on_a_page_is_one(page: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("source: /in\ntarget: /out\nto: torch\n")
    parse([str(tmp_path / word) if word == "job.yaml" else word for word in words])


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the commands start from."""
    root = tmp_path_factory.mktemp("docs")
    (root / "tmp").mkdir()
    make_llama(root)
    return root


@pytest.mark.parametrize("shown", QUICK, ids=str)
def test_a_page_shows_what_a_command_prints(shown: Shown, place: Path) -> None:
    (place / "bin").mkdir(exist_ok=True)
    program = place / "bin" / "dist-convert"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dist_convert "$@"\n')
    program.chmod(0o755)
    check(shown, place, {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)})


def check(shown: Shown, place: Path, environment: dict[str, str]) -> None:
    found = run(shown, place, environment)
    expected = "\n".join(shown.output)
    assert not differs(found, shown.output), f"$ {shown.command}\n{found}\n--- {shown.page} shows:\n{expected}"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the package in it, and the packages that are here already."""
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
    make_large(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("shown", OTHERS, ids=str)
def test_a_page_shows_what_a_command_prints_in_a_fresh_environment(shown: Shown, demo: Path, fresh: Path) -> None:
    environment = {"PATH": f"{fresh}:{os.environ['PATH']}", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    check(shown, demo, environment)
