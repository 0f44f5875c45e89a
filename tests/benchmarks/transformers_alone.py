"""What a user does without a converter: `transformers_alone.py REPORT SOURCE TARGET` loads a model and saves it again.

`REPORT/rank0.json` is written as by `timed_rank`. The data phase is loading and saving; importing comes before it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.timed_rank import peak_bytes

if __name__ == "__main__":
    report, source, target = sys.argv[1:]
    began, cpu_seconds = time.monotonic(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)
    ended = time.monotonic()
    seen = {
        "moved": [began, ended],
        "moved_cpu_seconds": time.process_time() - cpu_seconds,
        "gathered_bytes": 0,
        "peak_bytes": peak_bytes(),
    }
    (Path(report) / "rank0.json").write_text(json.dumps(seen))
