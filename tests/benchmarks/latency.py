"""Measures what reading ahead is worth where each request takes long: `python tests/benchmarks/latency.py`.

A Llama checkpoint is converted to Hugging Face by one rank from a file system in user space, which answers each read of
128 KiB after so many milliseconds, up to 64 of them at a time. Nothing is in the page cache before a run. It needs root
and libfuse 3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.sources import GRIDS, make_megatron, model_near, parse_grid
from tests.distributed.launching import environment

ROUNDS = 5
#: In flight at a time; by itself Linux allows 12.
REQUESTS = 64
_CONNECTIONS = Path("/sys/fs/fuse/connections")


def serve(directory: str, mount_point: str, seconds: float) -> None:
    """Show a directory, read only, until it is unmounted."""
    from mfusepy import FUSE, Operations  # needs libfuse

    class SlowFileSystem(Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.lstat(directory + path)
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
            times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
            return {name: getattr(found, name) for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(directory + path)]

        def open(self, path: str, flags: int) -> int:
            return os.open(directory + path, flags)

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            time.sleep(seconds)
            return os.pread(fh, size, offset)

    FUSE(SlowFileSystem(), mount_point, foreground=True, ro=True, max_threads=REQUESTS, max_idle_threads=REQUESTS)


@contextmanager
def mounted(directory: Path, mount_point: Path, milliseconds: float) -> Iterator[None]:
    """Within it, the directory is seen at the mount point, as slow as that."""
    mount_point.mkdir()
    words = [sys.executable, __file__, "--serve", str(directory), str(mount_point), str(milliseconds / 1000)]
    with subprocess.Popen(words) as server:
        try:
            while not mount_point.is_mount():
                if server.poll() is not None:
                    sys.exit("the file system could not be mounted")
                time.sleep(0.05)
            if not any(_CONNECTIONS.iterdir()):
                subprocess.run(["mount", "-t", "fusectl", "none", str(_CONNECTIONS)], check=True)
            connection = _CONNECTIONS / str(os.minor(mount_point.stat().st_dev))
            for limit in ("max_background", "congestion_threshold"):
                (connection / limit).write_text(str(REQUESTS))
            yield
        finally:
            subprocess.run(["umount", str(mount_point)], check=False)
    mount_point.rmdir()


def seconds_of(source: Path, target: Path, blocks: int) -> float:
    """From the first byte to the last."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    words = [sys.executable, "-m", "dist_convert", "convert", str(source), str(target), "--to", "huggingface"]
    words += ["--ranks", "1", "--device", "cpu", "--overwrite", "--json", "-q", "--read-ahead", str(blocks)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return max(float(profile["moved"]) for profile in json.loads(done.stdout)["profiles"])


def main() -> int:
    """Measure, print the table; 1 if latency costs more than a tenth at 8 blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0, help="of the model, in bf16 (default: 1)")
    parser.add_argument("--milliseconds", type=float, default=5.0, help="for each request (default: 5)")
    parser.add_argument("--serve", nargs=3, metavar=("DIRECTORY", "MOUNT_POINT", "SECONDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], given.serve[1], float(given.serve[2]))
        return 0
    with tempfile.TemporaryDirectory() as made:
        source, target, grid = Path(made) / "source", Path(made) / "target", parse_grid(GRIDS["llama"])
        make_megatron(source, model_near("llama", int(given.size_gb * 1e9), grid), grid)
        found: dict[tuple[float, int], list[float]] = {}
        for _ in range(ROUNDS):
            for milliseconds, blocks in ((0.0, 8), (given.milliseconds, 1), (given.milliseconds, 8)):
                with mounted(source, Path(made) / "mounted", milliseconds):
                    seconds = seconds_of(Path(made) / "mounted", target, blocks)
                found.setdefault((milliseconds, blocks), []).append(seconds)
    quick = statistics.median(found[0.0, 8])
    for (milliseconds, blocks), seconds_each in found.items():
        median = statistics.median(seconds_each)
        print(f"{milliseconds:4.1f} ms a request, {blocks} blocks ahead: {median:6.2f} s, {median / quick:5.2f} x")
    return 0 if statistics.median(found[given.milliseconds, 8]) <= 1.1 * quick else 1


if __name__ == "__main__":
    sys.exit(main())
