"""Records the sums and the transcripts anew."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden.cases import TO_HF, TO_MEGATRON, WHOLE, sums_to_hf, sums_to_megatron, whole_sums
from tests.golden.transcripts import TRANSCRIPTS, transcript

HERE = Path(__file__).parent

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        to_hf = {name: sums_to_hf(case, root / "to_hf" / name) for name, case in TO_HF.items()}
        to_megatron = {name: sums_to_megatron(c, root / "to_megatron" / name) for name, c in TO_MEGATRON.items()}
        whole = {name: whole_sums(case, root / "whole" / name) for name, case in WHOLE.items()}
        for name in TRANSCRIPTS:
            (HERE / f"{name}.txt").write_text(transcript(name, root / "transcripts" / name))
    sums = {"to_hf": to_hf, "to_megatron": to_megatron, "whole": whole}
    (HERE / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")
