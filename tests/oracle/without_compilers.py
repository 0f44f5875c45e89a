"""Imported before a Megatron-Core that is not the oracle's own: has what some versions import, and use on GPUs only."""

from __future__ import annotations

import sys
import typing
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.utils._triton
import typing_extensions


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Decorates a function, with or without arguments, with nothing."""
    return function if callable(function) else lambda decorated: decorated


def _stand_in(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members, __path__=[], __file__=name)  # `inspect` asks every module for a file
    sys.modules[name] = module
    return module


numpy.product = numpy.prod  # type: ignore[attr-defined]  # numpy 1 had it, and versions before 0.16 call it
typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.12 has it, and 0.19 asks for that
torch.compile = _as_it_is
torch.utils._triton.has_triton_package = lambda: False
# Megatron-Core from 0.17 on, and torchtitan, define kernels wherever they are imported.
_language = _stand_in("triton.language", __getattr__=lambda _: _as_it_is)
_decorators = {"jit": _as_it_is, "autotune": lambda *_, **__: _as_it_is, "heuristics": lambda *_, **__: _as_it_is}
_stand_in("triton", __version__="0", Config=dict, language=_language, **_decorators)
