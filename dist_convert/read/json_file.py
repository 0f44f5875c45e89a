"""JSON objects from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile
from dist_convert.read.small_file import read_small_file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptFile: it holds something else, or too much.
        SourceError: it cannot be read.
    """
    content = read_small_file(path)
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile("not valid JSON", file=str(path), found=str(error)) from error
    if not isinstance(data, dict):
        raise CorruptFile("not a JSON object", file=str(path), found=type(data).__name__)
    return data
