"""What timings depend on: the machine, the packages, and how `cp` copies here."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dist_convert"
COPY = ("cp", "-r", "--reflink=never")


def describe(directory: Path) -> list[str]:
    """Lines about the machine.

    Args:
        directory: where sources and targets are.
    """
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    file_system = _first_line(["df", "--output=fstype", str(directory)], line=1)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    return [
        f"{os.cpu_count()} cores, {memory_gb:.0f} GB of memory, {platform.system()} {platform.release()}; "
        f"sources and targets on {file_system}",
        f"Python {platform.python_version()}, {packages}; {_first_line(['cp', '--version'])}",
        _how_cp_copies(directory),
    ]


def code_digest() -> str:
    """Names the code that is timed."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _first_line(command: list[str], line: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines()[line:] or ["unknown"])[0].strip()


def _how_cp_copies(directory: Path) -> str:
    """Which system calls carry the bytes of a file of 8 MiB: a `cp` that shares blocks would be no copy."""
    copy = " ".join(COPY)
    if shutil.which("strace") is None:
        return f"how {copy} copies was not looked at: strace is not installed"
    with tempfile.TemporaryDirectory(dir=directory) as made:
        source, target, log = (Path(made) / name for name in ("source", "target", "log"))
        source.write_bytes(os.urandom(8 << 20))
        traced = "trace=read,write,pread64,pwrite64,copy_file_range,sendfile,splice,ioctl,mmap"
        command = ["strace", "-f", "-y", "-e", traced, "-o", str(log), *COPY, str(source), str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return f"how {copy} copies was not looked at: strace may not trace here"
        calls: Counter[str] = Counter()
        moved_bytes: Counter[str] = Counter()
        for line in log.read_text().splitlines():
            found = re.match(r"\d+ +(\w+)\((.*)\) += (\w+)", line)
            if found and (str(source) in found[2] or str(target) in found[2]):
                calls[found[1]] += 1
                moved_bytes[found[1]] += int(found[3]) if found[3].isdigit() else 0
    seen = ", ".join(f"{count} {name} of {moved_bytes[name] / 2**20:.0f} MiB together" for name, count in calls.items())
    return f"{copy} copies a file of 8 MiB, says strace, with {seen}"
