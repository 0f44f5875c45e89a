"""JSON objects from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, SourceError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptFile: it holds something else.
        SourceError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError("cannot read the file", file=str(path), found=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile("not valid JSON", file=str(path), found=str(error)) from error
    if not isinstance(data, dict):
        raise CorruptFile("not a JSON object", file=str(path), found=type(data).__name__)
    return data
