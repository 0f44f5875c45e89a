"""What gloo needs for a conversion's messages and nothing else: `gloo_alone.py REPORT` is a rank of torchrun.

`REPORT/messages.json` has, for each rank, its team's messages of each step: sender, receiver, bytes. All of them pass
between the same two buffers, those of a step at the same time. `REPORT/rankN.json` is written as by `timed_rank`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests.benchmarks.timed_rank import peak_bytes


def pass_messages(messages: Sequence[Sequence[int]], send: torch.Tensor, received: torch.Tensor) -> int:
    """Send and receive what is this rank's of a step's messages; how many bytes it received."""
    works, sent, got = [], 0, 0
    for sender, receiver, size_bytes in messages:
        if sender == dist.get_rank():
            works.append(dist.isend(send[sent : sent + size_bytes], receiver))
            sent += size_bytes
        elif receiver == dist.get_rank():
            works.append(dist.irecv(received[got : got + size_bytes], sender))
            got += size_bytes
    for work in works:
        if work is not None:
            work.wait()
    return got


if __name__ == "__main__":
    report = Path(sys.argv[1])
    dist.init_process_group("gloo")
    steps: list[list[list[int]]] = json.loads((report / "messages.json").read_text())[dist.get_rank()]
    most_bytes = max((sum(size_bytes for *_, size_bytes in step) for step in steps), default=0)
    send, received = torch.ones(most_bytes, dtype=torch.uint8), torch.zeros(most_bytes, dtype=torch.uint8)
    dist.barrier()
    began, cpu_seconds = time.monotonic(), time.process_time()
    received_bytes = sum(pass_messages(step, send, received) for step in steps)
    seen = {
        "moved": [began, time.monotonic()],
        "moved_cpu_seconds": time.process_time() - cpu_seconds,
        "gathered_bytes": received_bytes,
        "peak_bytes": peak_bytes(),
    }
    (report / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
