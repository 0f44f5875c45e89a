"""Packages that only some tokenizers need."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dist_convert.errors import MissingPackage


def require(module: str, path: Path) -> None:
    """Check that a module is there, without importing it.

    Args:
        module: top-level package, or one inside a top-level package.
        path: of the tokenizer file that needs it.

    Raises:
        MissingPackage
    """
    top = module.partition(".")[0]
    if find_spec(top) is None or find_spec(module) is None:
        package = {"google": "protobuf"}.get(top, top)
        raise MissingPackage(
            f"building a tokenizer from this file needs the package {package}",
            file=str(path),
            remedy=f"pip install {package}, or give the directory of a Hugging Face tokenizer",
        )
