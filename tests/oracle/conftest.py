"""Checkpoints and logits by the real megatron-core, made once for all tests of this folder, and kept for the next run.

What is made depends on nothing but the scripts here and the packages' versions, and is kept under their hash, outside
of the checkout: `$DIST_CONVERT_TEST_CACHE`, else `~/.cache/dist_convert-tests`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.distributed.launching import REPOSITORY, environment, start_ranks, wait_as_torchrun
from tests.oracle.families.cases import FULL_CASES, TO_HUGGINGFACE, Case

#: Runs a script of this folder on N ranks with arguments.
Ranks = Callable[..., None]
#: All that the scripts import and all that takes long of it, once for their ranks.
IMPORTED = ("torch.distributed", "megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.optimizer")

#: Ranks for every case of families.
FAMILY_RANKS = 4
#: The cases that are made together by default; all of one model are a set of its name.
FEW = "few"


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Run one of the scripts that need megatron-core, on that many ranks."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install -e '.[test]')")
    return partial(run_scripts, IMPORTED)


def run_scripts(imported: tuple[str, ...], script: str, ranks: int, *arguments: object) -> None:
    """Run a script of this folder on ranks that are forked with what is imported."""
    program = [script, *map(str, arguments)]
    env = environment(PYTHONPATH=os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY))))
    with ExitStack() as stack:
        started = start_ranks(stack, [program] * ranks, [env], imported)
        wait_as_torchrun(started)
        ended = [rank.finish() for rank in started]
        # Those that were told to end because another failed come last.
        for one in sorted(ended, key=lambda one: one.returncode == -signal.SIGTERM):
            assert one.returncode == 0, one.stderr[-4000:]


@pytest.fixture(scope="session")
def oracle(ranks: Ranks) -> Path:
    """A directory with CASE/iter_0000004/... and CASE/oracle.pt for every case, written by 8 ranks."""
    return kept("oracle", "", lambda directory: ranks("megatron_writer", 8, directory))


@pytest.fixture(scope="session")
def made(ranks: Ranks) -> Callable[[str], Path]:
    """Set of cases -> directory with hf/MODEL and the checkpoints CASE by Megatron-Core, kept for the next run."""
    from tests.oracle.families import huggingface

    def make(cases: Sequence[Case], directory: Path) -> None:
        for model in {case.model for case in cases}:
            huggingface.save(model, directory / "hf" / model.name)
        ranks("tests.oracle.families.program", FAMILY_RANKS, "make", directory, *(case.name for case in cases))

    @cache
    def of(which: str) -> Path:
        cases = family_cases(which, TO_HUGGINGFACE)
        folder, packages = Path(huggingface.__file__).parent, ("transformers", "safetensors")
        return kept(
            f"families-{which}",
            str([version(package) for package in packages]),
            lambda directory: make(cases, directory),
            folder,
        )

    return of


#: A format of FSDP's and a case of `cases.py`.
FSDP_CASES = (
    "torch_dcp:llama-tp1", "torch_dcp:mixtral-tp1", "fsdp_dtensor:llama-tp1", "fsdp_dtensor:llama-tp2",
    "fsdp_dtensor:llama-tied", "fsdp_dtensor:llama-linear-bias-tp2", "fsdp_dtensor:llama-padded-vocab-tp4",
    "fsdp_dtensor:mixtral-ep2", "fsdp_dtensor:mixtral-tp2-ep2",
)  # fmt: skip
EINOPS = "einops==0.8.2"


def einops() -> str:
    """Where einops is, which Megatron's own FSDP needs; for `run_scripts` to import from."""

    def install(directory: Path) -> None:
        flags = ["--quiet", "--no-deps", "--target", str(directory)]
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, EINOPS], check=True)

    return f"{kept('einops', EINOPS, install, Path(__file__).parent / 'fsdp')}/"


@pytest.fixture(scope="session")
def fsdp() -> Path:
    """A directory with FORMAT/CASE, which four ranks of the installed Megatron-Core save: see `fsdp.program`."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install -e '.[test]')")
    here = Path(__file__).parent
    scripts = [path.read_text() for path in sorted(here.glob("megatron_*.py"))]
    make = partial(run_scripts, (einops(), *IMPORTED), "tests.oracle.fsdp.program", 4)
    return kept("fsdp", f"{FSDP_CASES} {scripts}", lambda directory: make(directory, *FSDP_CASES), here / "fsdp")


def family_cases(which: str, few: Sequence[Case]) -> Sequence[Case]:
    """The cases of a set."""
    return few if which == FEW else [case for case in FULL_CASES if case.model.name == which]


def kept(name: str, more: str, make: Callable[[Path], None], folder: Path = Path(__file__).parent) -> Path:
    """A directory that is made once for these scripts and packages.

    Args:
        name: of what it holds.
        more: what it depends on besides.
        make: fills a directory that does not exist yet, or is empty.
        folder: where the scripts are.
    """
    digest = hashlib.sha256(more.encode())
    for script in sorted(folder.glob("*.py")):
        if not script.name.startswith(("test_", "conftest")):
            digest.update(script.read_bytes())
    versions = [f"{package} {version(package)}" for package in ("megatron-core", "torch")]
    digest.update(f"{versions} {sys.version_info[:2]}".encode())
    cache = Path(os.environ.get("DIST_CONVERT_TEST_CACHE", Path.home() / ".cache" / "dist_convert-tests"))
    directory = cache / f"{name}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes it, others wait
        if not directory.is_dir():
            fresh = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
            make(fresh)
            fresh.rename(directory)
        os.utime(directory)
        for old in cache.glob(f"{name}-*"):  # of other scripts or versions, and of runs that were stopped
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    return directory


_KEPT_SECONDS = 7 * 24 * 3600
