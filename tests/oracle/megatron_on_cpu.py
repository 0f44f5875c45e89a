"""Lets megatron-core 0.13 to 0.19 run without CUDA, Transformer Engine and compiled kernels."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from typing import Any

import torch
import torch._dynamo
import torch.overrides
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils


class CpuGroupedGemm:
    """Stands in for the CUDA kernel package `grouped_gemm`, which the legacy GroupedMLP calls."""

    @staticmethod
    def gmm(
        rows: torch.Tensor, weights: torch.Tensor, rows_per_weight: torch.Tensor, trans_b: bool = False
    ) -> torch.Tensor:
        """Multiply consecutive blocks of rows with one weight matrix each."""
        assert not trans_b
        blocks = rows.split(rows_per_weight.tolist())
        return torch.cat([block @ weight for block, weight in zip(blocks, weights, strict=True)])


class CudaIsCpu(torch.overrides.TorchFunctionMode):
    """Within it tensors that are asked for on CUDA are made on the CPU, and those of the CPU have CUDA's types."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:  # the optimizer wants parameters on CUDA
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def _results_queue(*_: object) -> multiprocessing.Queue:
    queue = multiprocessing.get_context("fork").Queue()
    queue.get_nowait = functools.partial(queue.get, timeout=60)  # type: ignore[method-assign]
    return queue


def make_megatron_run_on_cpu() -> None:
    """Replace what megatron-core takes from CUDA whatever its configuration says."""
    torch._dynamo.config.disable = True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.current_stream = lambda *_, **__: None  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # not a server that takes seconds to start
        setattr(filesystem_async, name, _results_queue)
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # type: ignore[method-assign]
    moe_utils.te_general_gemm = None  # 0.16.1 leaves the name undefined without Transformer Engine
    with contextlib.suppress(ImportError):  # 0.19 has no legacy GroupedMLP
        from megatron.core.transformer.moe import grouped_gemm_util

        grouped_gemm_util.grouped_gemm = grouped_gemm_util.ops = CpuGroupedGemm
