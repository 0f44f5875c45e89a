"""Converts checkpoints between Megatron-LM and Hugging Face, streamed by many ranks.

The command line is `dist-convert` (or `python -m dist_convert`). `inspect_checkpoint` reads headers only and needs
neither torch nor an accelerator.
"""

from dist_convert.describe import inspect_checkpoint
from dist_convert.errors import ConversionError
from dist_convert.options import Options
from dist_convert.version import __version__

__all__ = ["ConversionError", "Options", "__version__", "inspect_checkpoint"]
