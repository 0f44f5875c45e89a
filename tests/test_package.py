"""What an index gets: a source archive, and a wheel that works where nothing of the repository is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from dist_convert.records import __version__
from tests.checkpoints import Model, make
from tests.distributed.launching import REPOSITORY, environment

ADDRESS = "https://example.org/dist_convert"


def build(what: str, source: Path, target: Path) -> Path:
    """The archive that the build backend makes of a directory."""
    target.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    env = environment(DIST_CONVERT_REPOSITORY=ADDRESS, PYTHONPATH="")
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


def test_a_wheel_made_of_the_source_archive_converts_elsewhere_and_its_links_are_absolute(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77, which pyproject.toml asks for")
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for file in files.splitlines():
        if (REPOSITORY / file).is_file() and not file.startswith("tests/"):
            (tmp_path / "clone" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / file, tmp_path / "clone" / file)
    sdist = build("sdist", tmp_path / "clone", tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert {"CHANGELOG.md", "docs/flags.md", "configs", "launch/demo.sh"} <= {
        path.relative_to(source).as_posix() for path in source.rglob("*")
    }

    wheel = build("wheel", source, tmp_path / "wheel")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    done = subprocess.run(install, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (site / "dist_convert" / "py.typed").is_file()
    installed = {path.name for path in site.iterdir()}
    assert installed == {"bin", "dist_convert", f"dist_convert-{__version__}.dist-info"}
    said = subprocess.run(
        [site / "bin/dist-convert", "--version"], cwd=tmp_path, env=environment(PYTHONPATH=str(site)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout == f"dist-convert {__version__}\n", said.stderr
    metadata = Parser().parsestr(next(site.glob("*/METADATA")).read_text())
    links = re.findall(r"\]\((?!#)([^)]+)\)", str(metadata.get_payload()))
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"{ADDRESS}/blob/HEAD/docs/flags.md" in links
    assert f"{ADDRESS}/raw/HEAD/docs/resumed.svg" in links

    make(tmp_path / "in", Model(layers=1))
    paths = [tmp_path / "in", tmp_path / "out"]
    command = [site / "bin/dist-convert", "convert", *paths, "--to", "huggingface"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", "-q"],
        cwd=site, env=environment(PYTHONPATH=str(site)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == str(tmp_path / "out")


def test_the_form_for_a_model_asks_for_what_inspect_says_and_the_workflow_runs_ci() -> None:
    form = yaml.safe_load((REPOSITORY / ".github/ISSUE_TEMPLATE/model.yml").read_text())
    asked = {part["id"]: part for part in form["body"]}
    assert "inspect --json" in asked["inspect"]["attributes"]["label"]
    assert asked["inspect"]["validations"] == {"required": True}
    steps = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert {"run": ".ci/run"} in steps
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checked = (REPOSITORY / "launch/test.sh").read_text()
    assert [hook["id"] for hook in hooks if hook["entry"].split()[0] not in checked] == []
