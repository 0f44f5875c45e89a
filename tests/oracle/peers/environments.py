"""Other converters, each with the packages that it needs beside the ones that are installed: pip fetches them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.oracle.conftest import kept

_TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers<0.23", "huggingface_hub<1", "einops")
#: Their newest versions for Python 3.11, and what they import of what they ask for; the rest needs CUDA.
PACKAGES = {
    "mbridge": ("mbridge==0.15.1", *_TRANSFORMERS_4),
    "mcore-bridge": (
        "mcore-bridge==1.6.5", "modelscope", "modelscope_hub", "cryptography", "cffi", "pycparser", "peft", "einops",
        "pillow", "datasets", "dill", "multiprocess", "xxhash", "pyarrow", "pandas", "python-dateutil", "six",
    ),
    "megatron-bridge": (
        "megatron-bridge==0.3.1", *_TRANSFORMERS_4, "omegaconf", "antlr4-python3-runtime", "hydra-core", "six", "regex",
    ),
}  # fmt: skip


def packages_of(tool: str) -> Path:
    """The directory of a converter's packages, made once."""

    def install(directory: Path) -> None:
        flags = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(directory)]
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, *PACKAGES[tool]], check=True)

    return kept(f"packages-{tool}", str(PACKAGES[tool]), install, Path(__file__).parent / "nothing")
