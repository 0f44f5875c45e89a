"""Converts checkpoints of Megatron-LM and Hugging Face, streamed by many ranks.

The command line is `dist-convert` (or `python -m dist_convert`). The same from Python: `convert`, `verify`, `inspect`,
and `open`, which reads a checkpoint of any kind lazily (docs/python.md). Nothing is printed, no signal is caught, and
errors are the exceptions of `dist_convert.errors`. Heavy imports come with the first call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_convert import errors
from dist_convert import options as table
from dist_convert.errors import ConversionError
from dist_convert.records import __version__, parse_bytes

__all__ = ["ConversionError", "__version__", "convert", "errors", "inspect", "open", "verify"]

if TYPE_CHECKING:
    import torch

    from dist_convert.compare.outcome import Outcome
    from dist_convert.formats.weights import Weights
    from dist_convert.move.report import Report
    from dist_convert.ranks.collectives import ProcessGroup


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    ranks: int | None = None,
    group: ProcessGroup | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Report:
    """Convert a checkpoint of any kind, as `dist-convert convert` does.

    Args:
        source: root or iteration of a Megatron checkpoint, Hugging Face directory, or hub id (org/name[@revision]).
        target: the Hugging Face directory that is made, or the root of the Megatron checkpoint.
        to: the target's format, "huggingface", "torch", "torch_dist" or "dcp".
        ranks: processes on this machine that share the work, none a fork of this one. None: this one alone.
        group: the process group of this program whose ranks share the work; each of them calls this function.
        on_progress: is called now and then, from any thread, with the bytes done and those of the whole conversion;
            then with those of the comparison that `verify` asks for. In a `group`, with the bytes that this rank has
            done.
        cancel: is asked now and then whether to end; the same call goes on later.
        options: those of the command, by their names with underscores: `target_tensor_parallel_size=4`. Sizes are
            bytes or text with a unit, `max_shard_size="2GB"`. `iteration` may be "release".

    Returns:
        What was done, or of a dry run what would be.

    Raises:
        ConversionError: see `dist_convert.errors`; what is not complete never has the target's name.
        TypeError: an option that the command does not have.
    """
    if to not in table.FORMATS:
        raise errors.UsageError("no such format", expected=" or ".join(table.FORMATS), found=repr(to))
    job = table.Options(
        to, table.expanded_path(source), Path(os.path.realpath(_path(target))), **_values(table.CONVERT, options)
    )
    table.check_values(job)
    table.check_together(job)
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        raise errors.UsageError("ranks has a wrong value", expected="a whole number of 1 or more", found=repr(ranks))
    if ranks is not None and group is not None:
        raise errors.UsageError("ranks and group exclude each other", found="ranks and group", remedy="give one")
    if job.push_to_hub and (ranks is None or ranks < 2):
        remedy = "give ranks=2 or more, or upload the finished directory with: dist-convert push"
        raise errors.UsageError("push_to_hub needs separate ranks", found=f"ranks={ranks}", remedy=remedy)
    if ranks is not None and ranks > 1:
        from dist_convert.cli.child import convert_in_ranks

        return convert_in_ranks(job, ranks, on_progress, cancel)
    from dist_convert.move.convert import convert as convert_job
    from dist_convert.ranks.channel import Embedded
    from dist_convert.ranks.collectives import alone, joined_group

    with contextlib.nullcontext(alone()) if group is None else joined_group(group, job.timeout_seconds) as world:
        return convert_job(job, world, Embedded(on_progress, cancel))


def _path(path: str | os.PathLike[str]) -> Path:
    return Path(table.expanded_path(path))


def _values(command: str, given: Mapping[str, Any], *besides: str) -> dict[str, Any]:
    """The options of a command by the names of their fields; those besides are none of its function's."""
    its = [(one, told) for one, told in table.options_of(command) if one.name not in besides]
    known = {table.plain_name(one.name): one for one, _ in its}
    also = {short.removeprefix("--").replace("-", "_"): one for one, told in its for short in told.short}
    values = {}
    for name, value in given.items():
        one = known.get(table.plain_name(name)) or also.get(name)
        if one is not None and one.name in values:
            raise TypeError(f"{command}() got {name!r} and another name of the same option")
        if one is None:
            raise TypeError(f"{command}() has no option {name!r}; it has {', '.join(known)}")
        if table.kind_of(one) == "path" and value is not None:
            value = _path(value)
        elif table.kind_of(one) == "size" and isinstance(value, str):
            with contextlib.suppress(errors.UsageError):  # which `check_values` raises with the option's name
                value = parse_bytes(value)
        values[one.name] = value
    return values


def open(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Weights:
    """Open a checkpoint of any kind; only headers are read. Use it as `safetensors.safe_open`.

    Args:
        path: root or iteration of a Megatron checkpoint, Hugging Face directory, DCP or Meta's files; no hub id.
        dtype: of all tensors, "bfloat16" or `torch.bfloat16`; None: as they are stored.
        device: where tensors are put.
        options: those of `convert` that say how a source is read, whatever becomes of it: `ckpt_dir_name`, `like`,
            `tokenizer`, `true_vocab_size`, `drop_mtp` and others.

    Raises:
        ConversionError: no checkpoint, an incomplete or a damaged one, or no supported model.
        TypeError: another option.
    """
    from dist_convert.formats.weights import open_weights

    directory = os.path.abspath(_path(path))  # the program may change its own while this one is open
    job = table.Options(table.HUGGINGFACE, directory, **_values("open", options))
    table.check_values(job)
    return open_weights(job, dtype, device)


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    sample: Fraction | float = 1,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Outcome:
    """Compare two checkpoints of any kind, as `dist-convert verify` does; `is_same` of what it returns is the answer.

    Args:
        a, b: the checkpoints; A is rounded to B's dtype where they differ.
        sample: the share of the blocks that is compared.
        on_progress, cancel: see `convert`.
        options: those of the command, by their names with underscores.

    Raises:
        ConversionError: see `dist_convert.errors`.
    """
    from dist_convert.compare.verify import verify as verify_job
    from dist_convert.ranks.channel import Embedded
    from dist_convert.ranks.collectives import alone

    share: Any = sample
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # of what is no share, which `check_values` tells
        share = Fraction(sample).limit_denominator(1_000_000)
    values = _values("verify", options, "sample", "json", "quiet", "log_interval_seconds", "timeout_seconds")
    job = table.VerifyJob(_path(a), _path(b), sample=share, **values)
    table.check_values(job)
    world = alone()
    return verify_job(job, world, Embedded(on_progress, cancel))


def inspect(
    path: str | os.PathLike[str], ckpt_dir_name: str | None = None, *, like: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Describe a checkpoint from its headers, as `dist-convert inspect --json` does; an incomplete one, too.

    Raises:
        ConversionError: no checkpoint, or a damaged one.
    """
    from dist_convert.formats.describe import inspect_checkpoint

    return inspect_checkpoint(_path(path), ckpt_dir_name, None if like is None else _path(like))
