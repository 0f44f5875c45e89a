"""Records the sums and the transcripts anew."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.golden.cases import TO_HF, TO_MEGATRON, sums_to_hf, sums_to_megatron
from tests.golden.transcripts import TRANSCRIPTS, transcript

HERE = Path(__file__).parent

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        to_hf = {name: sums_to_hf(case, root / "to_hf" / name) for name, case in TO_HF.items()}
        to_megatron = {name: sums_to_megatron(c, root / "to_megatron" / name) for name, c in TO_MEGATRON.items()}
        for name in TRANSCRIPTS:
            (HERE / f"{name}.txt").write_text(transcript(name, root / "transcripts" / name))
    sums = {"torch": torch.__version__, "to_hf": to_hf, "to_megatron": to_megatron}
    (HERE / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")
