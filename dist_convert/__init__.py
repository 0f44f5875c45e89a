"""Converts checkpoints of Megatron-LM and Hugging Face, streamed by many ranks.

The command line is `dist-convert` (or `python -m dist_convert`). The same from Python: `convert`, `verify`, `inspect`,
and `open`, which reads a checkpoint of any kind lazily (docs/python.md). What can go wrong is in `errors`.
"""

from dist_convert import errors
from dist_convert.errors import ConversionError
from dist_convert.python import convert, inspect, open, verify
from dist_convert.version import __version__

__all__ = ["ConversionError", "__version__", "convert", "errors", "inspect", "open", "verify"]
