"""The training arguments of a Megatron target.

What an argument means: docs/formats.md, "Arguments that decide the model". They come from the model (config.json), from
the flags, from a file of the training that the model came from (`--source-margs-file`), and from defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.layout import Grid
from dist_convert.metadata.hf_config import TORCH_NAMES
from dist_convert.metadata.megatron_args import architecture_from_args
from dist_convert.metadata.target_values import (
    CONFIG,
    DEFAULT,
    LLAMA_EXCLUDED,
    MARGS,
    MIXTRAL_EXCLUDED,
    default_values,
    expert_values,
    model_values,
    parallel_values,
    precision_values,
    run_values,
    vocabulary_values,
)
from dist_convert.models.architecture import Architecture
from dist_convert.read.json_file import read_json

EXPERT_LAYOUTS = ("sequential", "te-grouped", "grouped", "habana-dynamic")
TRANSFORMER_IMPLS = ("local", "transformer_engine", "habana")

#: Not an argument: in `target_megatron_args.json` it says where each of them is from.
ORIGINS = "origins_of_arguments"

#: Sizes of the grid that a margs file gives where no flag does.
TAKEN_SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size",
)  # fmt: skip

_TORCH_DTYPES = {*TORCH_NAMES.values(), "float8_e4m3fn", "float8_e5m2", "uint8", "int8", "int32", "int64"}
#: What JSON and the reader made of objects of Megatron and Python: enum members, functions, classes, anything else.
_OBJECT = re.compile(
    r"(AttnBackend|ModelType|\w*CudaGraph(Scope|Module)|Signals)\.\w+"
    r"|<(function|class|bound method|module) .*>|<[\w.]+ object at 0x\w+>|<\w+(\.\w+)+>"
)


@dataclass(frozen=True)
class TorchDtype:
    """Stands for a `torch.dtype`, so that planning needs no torch: "bfloat16" for `torch.bfloat16`."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass(frozen=True)
class TargetArgs:
    """The attributes of the target's `args`, by name in alphabetical order.

    Attributes:
        values: plain Python values and `TorchDtype`.
        origins: where each value is from, in words; also of arguments that were dropped.
    """

    values: dict[str, object]
    origins: dict[str, str]


def read_margs(path: Path) -> dict[str, Any]:
    """The training arguments in a `source_megatron_args.json`.

    Raises:
        UsageError: there is no such file.
        CorruptFile: it holds something else.
    """
    if not path.is_file():
        raise UsageError(
            "the file of --source-margs-file does not exist",
            file=str(path),
            remedy="give its right path, or leave the flag out: then arguments follow from config.json",
        )
    return {name: value for name, value in read_json(path).items() if name != ORIGINS}


def target_args(
    architecture: Architecture,
    *,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    params_dtype: str,
    iteration: int | None,
    vocab: int,
    make_vocab_size_divisible_by: int,
    margs: Mapping[str, Any] | None,
    tokenizer_model: str | None,
    tokenizer_type: str | None,
    transformer_impl: str = "transformer_engine",
    expert_layout: str = "sequential",
    first: int | None = None,
    last: int | None = None,
    layout: str | None = None,
    given: Collection[str] = (),
) -> TargetArgs:
    """Everything that Megatron-LM needs to go on from the target with --use-checkpoint-args.

    Args:
        architecture: the model.
        grid: parallel sizes of the target.
        stages: layers of each chunk, see `stage_layers`.
        params_dtype: safetensors name, "BF16".
        iteration: None for a release.
        vocab: true size, without padding.
        make_vocab_size_divisible_by: what the padded size is a multiple of, on each tensor parallel rank.
        margs: content of the margs file, if one was given. It never overrules the model or the target.
        tokenizer_model: see `target_tokenizer`.
        tokenizer_type: as given by the flag.
        transformer_impl: one of `TRANSFORMER_IMPLS`.
        expert_layout: one of `EXPERT_LAYOUTS`; matters for experts only.
        first, last, layout: the uneven pipeline that was asked for.
        given: the flags that the user gave; what others decide is said to be their default.

    Raises:
        UnsupportedModel: the margs file describes a model that the weights are not of.
    """
    found = default_values(architecture, tokenizer_model)
    origins = {}
    excluded = MIXTRAL_EXCLUDED if architecture.experts else LLAMA_EXCLUDED
    for name, value in sorted((margs or {}).items()):
        if name in excluded:
            origins[name] = f"not taken from {MARGS}: it is of the run that saved the file"
        elif value is None and name in found:
            continue
        elif _is_object(value):
            origins[name] = f"dropped: {value} of {MARGS} is an object that only Megatron can make"
        else:
            found[name] = _with_dtype(value), MARGS
    fixed = {name: (value, CONFIG) for name, value in model_values(architecture).items()}
    fixed |= vocabulary_values(architecture, vocab, make_vocab_size_divisible_by) | precision_values(params_dtype)
    fixed |= parallel_values(architecture, grid, stages, first, last, layout, given) | run_values(
        iteration, transformer_impl
    )
    if architecture.experts:
        fixed |= expert_values(expert_layout)
    if tokenizer_model is not None:
        fixed["tokenizer_model"] = tokenizer_model, _of_flag("--tokenizer-model", given, "the model's own")
    if tokenizer_type is not None:
        fixed["tokenizer_type"] = tokenizer_type, _of_flag("--tokenizer-type", given, "the model's own")
    for name, (value, origin) in fixed.items():
        if origin.startswith("flag "):
            flag = origin.removeprefix("flag ")
            is_theirs = margs is not None and name in TAKEN_SIZES and margs.get(name) == value
            origin = _of_flag(flag, given, MARGS if is_theirs else f"default of {flag}")
        theirs = found.get(name, (value, DEFAULT))
        differs = theirs[1] == MARGS and _plain(theirs[0]) != _plain(value)
        found[name] = _with_dtype(value), f"{origin} (not {theirs[0]}, as {MARGS} says)" if differs else origin
    origins |= {name: origin for name, (_, origin) in found.items()}
    args = TargetArgs({name: found[name][0] for name in sorted(found)}, dict(sorted(origins.items())))
    architecture_from_args(json.loads(args_json(args)), vocab=vocab, file=MARGS)
    return args


def _of_flag(flag: str, given: Collection[str], otherwise: str) -> str:
    return f"flag {flag}" if flag in given else otherwise


def _is_object(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_object, value))
    return isinstance(value, str) and _OBJECT.fullmatch(value) is not None


def _with_dtype(value: Any) -> object:
    if isinstance(value, str) and value.startswith("torch.") and value[6:] in _TORCH_DTYPES:
        return TorchDtype(value[6:])
    return value


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str))


def args_json(args: TargetArgs) -> str:
    """Every argument in JSON; what that cannot hold is text, `torch.bfloat16`."""
    return json.dumps(args.values, default=str)


def target_margs_json(args: TargetArgs) -> str:
    """The content of `target_megatron_args.json`: as `args_json`, and below it where each argument is from."""
    return json.dumps({**args.values, ORIGINS: args.origins}, indent=2, default=str) + "\n"


def describe_origins(args: TargetArgs) -> str:
    """One line for each argument: its value and where that is from."""
    names = sorted(args.origins)
    width = max(map(len, names))
    return "\n".join(
        f"{name:{width}}  {args.values[name]!s}  <- {args.origins[name]}"
        if name in args.values
        else f"{name:{width}}  {args.origins[name]}"
        for name in names
    )


def padded_vocab(vocab: int, divisible_by: int, tensor: int) -> int:
    """Rows of the embedding in Megatron: `vocab` rounded up to a multiple of `divisible_by` x `tensor`.

    Raises:
        UsageError: not a multiple that can be.
    """
    if min(divisible_by, tensor) < 1:
        raise UsageError(
            "the vocabulary cannot be padded",
            expected="--make-vocab-size-divisible-by and --target-tensor-parallel-size of 1 or more",
            found=f"{divisible_by} and {tensor}",
        )
    return -(-vocab // (divisible_by * tensor)) * divisible_by * tensor
