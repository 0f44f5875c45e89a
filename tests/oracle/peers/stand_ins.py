"""Imported before Megatron-Core: stands in for Transformer Engine by modules that have its parameters, and no more."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import transformers  # noqa: F401  # which looks for triton, before there is a stand-in

import tests.oracle.without_compilers  # noqa: F401

Dtype = torch.dtype | None


def mark(parameter: torch.Tensor, dimension: int) -> None:
    """Say, as Megatron does, along which dimension tensor parallel ranks share a parameter."""
    vars(parameter).update(tensor_model_parallel=True, partition_dim=dimension, partition_stride=1)


def _add(module: torch.nn.Module, name: str, sizes: Sequence[int], dtype: Dtype, shared: int | None = None) -> None:
    parameter = torch.nn.Parameter(torch.empty(*sizes, dtype=dtype))
    if shared is not None:
        mark(parameter, shared)
    module.register_parameter(name, parameter)


class Linear(torch.nn.Module):
    """A matrix of a rank's size, or one for each expert, and a bias."""

    def __init__(
        self, in_features: int, out_features: int, *_: Any, tp_size: int = 1, parallel_mode: str | None = None,
        bias: bool = True, params_dtype: Dtype = None, experts: int = 0, **__: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.use_bias, self.te_return_bias = bias, False
        sizes, shared = [out_features, in_features], {"column": 0, "row": 1}.get(parallel_mode or "")
        if shared is not None:
            sizes[shared] //= tp_size
        for name in [f"weight{number}" for number in range(experts)] or ["weight"]:
            _add(self, name, sizes, params_dtype, shared)
        if bias:
            _add(self, "bias", sizes[:1], params_dtype, 0 if shared == 0 else None)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, *more: Any, **named: Any) -> None:
        super().__init__(in_features, *more, **named)
        _add(self, "layer_norm_weight", [in_features], named["params_dtype"])


class GroupedLinear(Linear):
    def __init__(self, num_gemms: int, *more: Any, **named: Any) -> None:
        super().__init__(*more, experts=num_gemms, **named)
        self.num_gemms, self.fp8, self.fp8_calibration = num_gemms, False, False
        self.fp8_meta = {"fp8_checkpoint": False}


class Other(torch.nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class RMSNorm(Other):
    def __init__(self, hidden_size: int, *_: Any, params_dtype: Dtype = None, **__: Any) -> None:
        super().__init__()
        _add(self, "weight", [hidden_size], params_dtype)


_KNOWN = {kind.__name__: kind for kind in (Linear, LayerNormLinear, GroupedLinear, RMSNorm)}


class _Finder(MetaPathFinder, Loader):
    """Finds every module of the package: capitalised names in one are classes, and others are modules."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        has_it = name.split(".")[0] == "transformer_engine" and not name.endswith(".cpu_offload")  # would be called
        return ModuleSpec(name, self, is_package=True) if has_it else None

    def exec_module(self, module: ModuleType) -> None:
        def member(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name.lstrip("_")[0].islower():
                return importlib.import_module(f"{module.__name__}.{name}")
            return _KNOWN.get(name) or vars(module).setdefault(name, type(name, (Other,), {}))

        vars(module).update(__getattr__=member, __version__="2.3.0")


sys.meta_path.insert(0, _Finder())
