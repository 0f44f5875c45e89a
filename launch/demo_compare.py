"""Compare two directories of safetensors files bit for bit: demo_compare.py ORIGINAL CONVERTED

Exits with 1 at the first tensor that is missing, or differs in dtype, shape or any bit. It reads with
safetensors alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of all files in a directory."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def main() -> None:
    """Compare names, then dtypes, shapes and bytes."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    original, converted = (read_tensors(Path(directory)) for directory in sys.argv[1:])
    if not original:
        sys.exit(f"{sys.argv[1]}: no tensors")
    if only_one_has := original.keys() ^ converted.keys():
        sys.exit(f"in one of the two only: {', '.join(sorted(only_one_has))}")
    for name, expected in original.items():
        found = converted[name]
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            sys.exit(f"{name}: expected {expected.dtype} {expected.shape}, found {found.dtype} {found.shape}")
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            sys.exit(f"{name}: the values differ")
    total_bytes = sum(tensor.nbytes for tensor in original.values())
    print(f"{len(original)} tensors, {total_bytes:,} bytes: equal bit for bit")


if __name__ == "__main__":
    main()
