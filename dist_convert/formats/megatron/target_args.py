"""The training arguments of a Megatron target.

What an argument means: docs/formats.md, "Arguments that decide the model" and "Splitting over ranks". They come from
the model (config.json), from the flags, from a file of the training that the model came from (`--source-margs-file`),
and from defaults.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import PlanError, UsageError
from dist_convert.formats.huggingface.config import TORCH_NAMES
from dist_convert.formats.megatron.args import (
    INTERPOLATION,
    PLAIN_YARN,
    ROUNDED,
    SHARED_YARN,
    YARN,
    architecture_from_args,
)
from dist_convert.formats.megatron.grid import Grid
from dist_convert.models import FAMILIES
from dist_convert.models.keys import pins_of, to_arg
from dist_convert.models.schema import Architecture, LinearScaling, RopeScaling, YarnScaling
from dist_convert.options import TORCH
from dist_convert.read.source import read_json

#: Where a value can be from.
CONFIG, MARGS, DEFAULT, PARALLEL = "config.json", "--source-margs-file", "default", "the parallel sizes"
SOURCE = "the source's args"
#: Flags that say how many virtual stages there are.
_VIRTUAL_FLAGS = (
    "--target-virtual-pipeline-parallel-size", "--num-layers-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
)  # fmt: skip

#: What Habana's loaders leave out of a margs file: it belongs to the run that is over, or to its machine. And
#: disable_bias_linear, from which Megatron-LM would set add_bias_linear anew.
LLAMA_EXCLUDED = frozenset({
    "sequence_parallel", "use_distributed_optimizer", "verify_checkpoint", "load", "use_rotary_position_embeddings",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size",
    "consumed_train_samples", "consumed_valid_samples", "tokenizer_model", "disable_bias_linear",
})  # fmt: skip
MIXTRAL_EXCLUDED = LLAMA_EXCLUDED | {
    "expert_model_parallel_size", "expert_tensor_parallel_size", "encoder_num_layers", "encoder_seq_length",
    "start_weight_decay", "end_weight_decay", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
    "exp_avg_sq_dtype",
}  # fmt: skip

#: An argument's name -> its value, and in words where that is from.
Found = dict[str, tuple[object, str]]


def default_values(a: Architecture, tokenizer_model: str | None) -> Found:
    """What a margs file may say better: how training went, not what the model is."""
    is_bare = tokenizer_model is not None and tokenizer_model.endswith(".model") and a.vocab <= 128000
    bare_type = "GPTSentencePieceTokenizer" if a.experts else "Llama2Tokenizer"
    values: dict[str, object] = {
        "seq_length": min(a.max_positions, 32768 if a.experts else 4096),
        "micro_batch_size": 1,
        "global_batch_size": 128 if a.experts else 1024,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "context_parallel_size": 1,
        "tokenizer_model": None,
        "tokenizer_type": bare_type if is_bare else "HuggingFaceTokenizer",
    }
    found: Found = {name: (value, DEFAULT) for name, value in values.items()}
    if a.experts:
        found["moe_router_load_balancing_type"] = "aux_loss", DEFAULT
        found["moe_aux_loss_coeff"] = a.router_aux_loss, CONFIG
    return found


def model_values(a: Architecture) -> dict[str, object]:
    """What config.json decides, with what it implies in Megatron's words."""
    family = FAMILIES[a.family]
    facts = {key.arg: to_arg(key, a) for key in family.keys if key.arg}
    written = (pin for pin in pins_of(family) if pin.is_written and (not pin.when or facts.get(pin.when)))
    pinned = {pin.arg: pin.allowed[0] for pin in written}
    rope = rope_values(a)
    return (
        facts
        | pinned
        | {
            "group_query_attention": a.query_groups != a.heads,
            "add_position_embedding": True,  # argparse's default, which Megatron-LM compares on loading
            "rotary_base": int(a.rope_theta) if a.rope_theta == int(a.rope_theta) else a.rope_theta,
            **rope,
            **{name: rope[f"{PLAIN_YARN}{name}"] for name in SHARED_YARN if f"{PLAIN_YARN}{name}" in rope},
            "window_size": facts.get("window_size"),
            "apply_layernorm_1p": False,
            "num_experts": a.experts or None,
            "moe_ffn_hidden_size": a.expert_width if a.experts else None,
        }
    )


def rope_values(a: Architecture) -> dict[str, object]:
    """How rotary frequencies are scaled, each way in its own arguments."""
    scaling, is_latent = a.rope_scaling, FAMILIES[a.family].is_latent
    found: dict[str, object] = {
        "position_embedding_type": "rope",
        "use_rope_scaling": isinstance(scaling, RopeScaling),
        INTERPOLATION: int(scaling.factor) if isinstance(scaling, LinearScaling) else None,
    }
    if isinstance(scaling, YarnScaling):
        prefix = "" if is_latent else PLAIN_YARN
        said = {f"{prefix}{name}": value for name, value in zip(YARN, astuple(scaling)[:-1], strict=True)}
        kind = {"rope_type": "yarn"} if is_latent else {"position_embedding_type": "yarn", ROUNDED: scaling.truncate}
        return found | kind | said
    if is_latent:
        return found | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return found | {"rope_scaling_factor": scaling.factor if isinstance(scaling, RopeScaling) else 8.0}


#: Of what decides a model, what Megatron-LM takes from a checkpoint with --use-checkpoint-args (0.19.2).
_RESTORED = frozenset({
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "max_position_embeddings", "position_embedding_type", "add_position_embedding", "rotary_base",
    "rotary_percent", "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu",
    "untie_embeddings_and_output_weights", "apply_layernorm_1p", "normalization", "mtp_num_layers", "num_experts",
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "vocab_size",
    # Its flags of these are called otherwise.
    *(f"{PLAIN_YARN}{name}" for name in SHARED_YARN),
})  # fmt: skip
#: What training has where neither the checkpoint nor a flag says anything.
_TRAINING_DEFAULTS = {"norm_epsilon": 1e-5, "rope_scaling_factor": 8.0, "rotary_scaling_factor": 1.0} | {
    name: YARN[name] for name in ("beta_fast", "beta_slow", "original_max_position_embeddings")
}


def training_flags(a: Architecture) -> list[str]:
    """Flags that training needs beside --use-checkpoint-args, which does not restore all that decides the model."""
    values = model_values(a)
    found = ["--no-" + ROUNDED.replace("_", "-")] if values.get(ROUNDED) is False else []
    for name, value in sorted(values.items()):
        if name not in _RESTORED and value not in (None, False, _TRAINING_DEFAULTS.get(name)):
            flag = "--" + name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "")
            found.append(flag if value is True else f"{flag} {shlex.quote(text)}")
    return found


def vocabulary_values(a: Architecture, vocab: int | None, divisible_by: int) -> Found:
    """Sizes of the vocabulary, `vocab` without padding (docs/formats.md, "Vocabulary padding")."""
    known: Found = {"vocab_size": (vocab, CONFIG)} if vocab else {}
    return known | {
        "padded_vocab_size": (a.padded_vocab, "flag --make-vocab-size-divisible-by"),
        "make_vocab_size_divisible_by": (divisible_by, "flag --make-vocab-size-divisible-by"),
    }


def precision_values(params_dtype: str) -> Found:
    """The dtype of the weights, from its safetensors name."""
    values = {
        "params_dtype": f"torch.{TORCH_NAMES[params_dtype]}",
        "bf16": params_dtype == "BF16",
        "fp16": params_dtype == "F16",
    }
    return {name: (value, "flag --target-params-dtype") for name, value in values.items()}


def parallel_values(
    a: Architecture,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    first: int | None,
    last: int | None,
    layout: str | None,
    given: Collection[str] = (),
) -> Found:
    """Parallel sizes; `stages` and the rest are those of `target_args`."""
    says_virtual = next((flag for flag in _VIRTUAL_FLAGS if flag in given), _VIRTUAL_FLAGS[0])
    virtual = grid.virtual_pipeline if grid.virtual_pipeline > 1 else None
    is_even = (first, last, layout) == (None, None, None)
    expert_tensor = grid.expert_tensor if a.experts else grid.tensor
    stage_ranks = math.lcm(grid.tensor, grid.expert * expert_tensor)
    found: Found = {
        "tensor_model_parallel_size": (grid.tensor, "flag --target-tensor-parallel-size"),
        "pipeline_model_parallel_size": (grid.pipeline, "flag --target-pipeline-parallel-size"),
        "transformer_pipeline_model_parallel_size": (grid.pipeline, "flag --target-pipeline-parallel-size"),
        "virtual_pipeline_model_parallel_size": (virtual, f"flag {says_virtual}"),
        # Megatron-LM takes the one where stages are even and the other where they are not, and never both.
        "num_layers_per_virtual_pipeline_stage": (
            stages[0][0] if virtual and is_even else None,
            f"flag {says_virtual}",
        ),
        "num_virtual_stages_per_pipeline_rank": (
            virtual if not is_even and layout is None else None,
            f"flag {says_virtual}",
        ),
        "expert_model_parallel_size": (grid.expert, "flag --target-expert-parallel-size"),
        "expert_tensor_parallel_size": (expert_tensor, "flag --target-expert-tensor-parallel-size"),
        # Megatron-LM refuses experts and tensor parallelism without it.
        "sequence_parallel": (bool(a.experts) and grid.tensor > 1, PARALLEL),
        "world_size": (grid.pipeline * stage_ranks, PARALLEL),
        "data_parallel_size": (stage_ranks // grid.tensor, PARALLEL),
    }
    return found | {
        "decoder_first_pipeline_num_layers": (first, "flag --decoder-first-pipeline-num-layers"),
        "decoder_last_pipeline_num_layers": (last, "flag --decoder-last-pipeline-num-layers"),
        "pipeline_model_parallel_layout": (layout, "flag --pipeline-model-parallel-layout"),
        "account_for_embedding_in_pipeline_split": (False, DEFAULT),
        "account_for_loss_in_pipeline_split": (False, DEFAULT),
    }


def run_values(iteration: int | None, to: str, *, is_trained: bool) -> Found:
    """What is true of the files: no optimizer, no random state, and no samples seen where nothing was trained."""
    values: dict[str, object] = {"ckpt_format": to, "use_dist_ckpt": to != TORCH}
    values |= {} if to == TORCH else {"async_save": False}
    values |= dict.fromkeys(("no_save_optim", "no_save_rng"), True)
    if not is_trained:
        values |= dict.fromkeys(("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"), 0)
    return {name: (value, DEFAULT) for name, value in values.items()} | {
        "iteration": (iteration or 0, "flag --release" if iteration is None else "flag --iteration"),
    }


def norm_values(transformer_impl: str) -> Found:
    """Which class of norms the tensors' names belong to."""
    impl = "local" if transformer_impl == "local" else "transformer_engine"  # what Habana's modules go by, too
    return {"transformer_impl": (impl, "flag --saver-transformer-impl")}


def expert_values(layout: str, a: Architecture) -> Found:
    """Which class of experts the tensors' names belong to (docs/formats.md, "Experts"), of their width."""
    dynamic = layout == "habana-dynamic"
    values: dict[str, object] = {
        "moe_grouped_gemm": layout in ("te-grouped", "grouped"),
        "moe_use_legacy_grouped_gemm": layout == "grouped",
        "moe_single_grouped_weight": False,
        "moe_dynamic_hpu": dynamic,
        "moe_permuted_weights": dynamic,
        "moe_fused_weights": dynamic,
    } | ({"moe_capacity_bins_num": 0} if dynamic else {})
    of_layout: Found = {name: (value, "flag --expert-layout") for name, value in values.items()}
    # Habana's dynamic experts take the one, all others the other.
    return of_layout | {"ffn_hidden_size": (a.ffn, CONFIG), "moe_ffn_hidden_size": (a.expert_width, CONFIG)}


#: Which variant of a layout the experts' tensors have.
_VARIANTS = ("moe_permuted_weights", "moe_fused_weights", "moe_single_grouped_weight")
_UNTIED = "untie_embeddings_and_output_weights"

#: Not an argument: in `target_megatron_args.json` it says where each of them is from.
ORIGINS = "origins_of_arguments"
#: Likewise: what training has to be started with.
TRAINING_FLAGS = "training_flags"

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
    return {name: value for name, value in read_json(path).items() if name not in (ORIGINS, TRAINING_FLAGS)}


def target_args(
    architecture: Architecture,
    *,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    params_dtype: str | None,
    iteration: int | None,
    vocab: int | None,
    make_vocab_size_divisible_by: int,
    margs: Mapping[str, Any] | None,
    tokenizer_model: str | None,
    tokenizer_type: str | None,
    to: str = TORCH,
    own: Mapping[str, Any] | None = None,
    transformer_impl: str | None = "transformer_engine",
    expert_layout: str | None = "sequential",
    changes_experts: bool = True,
    first: int | None = None,
    last: int | None = None,
    layout: str | None = None,
    keeps_pipeline: bool = False,
    given: Collection[str] = (),
) -> TargetArgs:
    """Everything that Megatron-LM needs to go on from the target with --use-checkpoint-args.

    Args:
        architecture: the model.
        grid: parallel sizes of the target.
        stages: layers of each chunk, see `stage_layers`.
        params_dtype: safetensors name, "BF16"; None keeps what a Megatron source's args say.
        iteration: None for a release.
        vocab: true size, without padding; None where nobody says.
        make_vocab_size_divisible_by: what the padded size is a multiple of, on each tensor parallel rank.
        margs: content of the margs file, if one was given. It never overrules the model or the target.
        tokenizer_model: see `target_tokenizer`.
        tokenizer_type: as given by the flag.
        to: the target's format.
        own: the training arguments of a Megatron source, of which all are kept but those of the target's layout.
        transformer_impl: one of `options.TRANSFORMER_IMPLS`; None keeps the source's.
        expert_layout: one of `options.EXPERT_LAYOUTS`, which matters for experts only.
        changes_experts: it is not that of a Megatron source.
        first, last, layout: the uneven pipeline that was asked for.
        keeps_pipeline: the stages are the source's, as its own arguments describe them.
        given: the flags that the user gave; what others decide is said to be their default.

    Raises:
        UnsupportedModel: the margs file describes a model that the weights are not of.
    """
    origins: dict[str, str] = {}
    if own is None:
        found = default_values(architecture, tokenizer_model)
        excluded = MIXTRAL_EXCLUDED if architecture.experts else LLAMA_EXCLUDED
        said, whose = margs or {}, MARGS
        fixed = {name: (value, CONFIG) for name, value in model_values(architecture).items()}
    else:
        found, excluded, said, whose = {}, frozenset(), own, SOURCE
        fixed = {}
    for name, value in sorted(said.items()):
        if name in excluded:
            origins[name] = f"not taken from {whose}: it is of the run that saved the file"
        elif value is None and name in found:
            continue
        elif _is_object(value):
            origins[name] = f"dropped: {value} of {whose} is an object that only Megatron can make"
        else:
            found[name] = _with_dtype(value), whose
    fixed |= vocabulary_values(architecture, vocab, make_vocab_size_divisible_by)
    fixed |= precision_values(params_dtype) if params_dtype else {}
    if own is not None and architecture.tied == bool(own.get(_UNTIED)):
        fixed[_UNTIED] = not architecture.tied, "the tensors"
    parallel = parallel_values(architecture, grid, stages, first, last, layout, given)
    if own is not None:
        parallel |= _of_own(own, grid, architecture, keeps_pipeline=keeps_pipeline)
    fixed |= parallel | run_values(iteration, to, is_trained=own is not None)
    if transformer_impl:
        fixed |= norm_values(transformer_impl)
        if own is not None:  # the target's are stored as gamma
            fixed["apply_layernorm_1p"] = False, "flag --saver-transformer-impl"
    if architecture.experts and expert_layout:
        values = expert_values(expert_layout, architecture)
        # A kept layout is written in one variant of it, and the rest of what the source's args say of it holds.
        fixed |= values if changes_experts else {name: values[name] for name in _VARIANTS if name in (own or {})}
    if tokenizer_model is not None:
        fixed["tokenizer_model"] = tokenizer_model, _of_flag("--tokenizer-model", given, "the model's own")
    if tokenizer_type is not None:
        fixed["tokenizer_type"] = tokenizer_type, _of_flag("--tokenizer-type", given, "the model's own")
    for name, (value, origin) in fixed.items():
        if origin.startswith("flag "):
            flag = origin.removeprefix("flag ")
            is_theirs = (own is not None or name in TAKEN_SIZES) and name in said and said[name] == value
            origin = _of_flag(flag, given, whose if is_theirs else f"default of {flag}")
        theirs = found.get(name, (value, DEFAULT))
        differs = theirs[1] == whose and _plain(theirs[0]) != _plain(value)
        found[name] = _with_dtype(value), f"{origin} (not {theirs[0]}, as {whose} says)" if differs else origin
    origins |= {name: origin for name, (_, origin) in found.items()}
    args = TargetArgs({name: found[name][0] for name in sorted(found)}, dict(sorted(origins.items())))
    family, written = FAMILIES[architecture.family], json.loads(args_json(args))
    described = architecture_from_args(written, vocab=vocab, file=whose, family=family, trusts_factor=True)
    # A margs file may know the loss of training better.
    if described != replace(architecture, vocab=described.vocab, router_aux_loss=described.router_aux_loss):
        raise PlanError("the target's args describe another model", expected=architecture, found=described)
    return args


def _of_own(own: Mapping[str, Any], grid: Grid, a: Architecture, *, keeps_pipeline: bool) -> Found:
    """Arguments of the layout that a source's own decide, where it stays or has nothing to do with it."""
    found: Found = {}
    if grid.tensor > 1 and own.get("sequence_parallel"):
        found["sequence_parallel"] = True, SOURCE
    if keeps_pipeline:
        found |= {name: (own[name], SOURCE) for name in PIPELINE_LAYOUT if name in own}
    return found


#: What the layers of stages that are not alike follow from, besides the pipeline parallel size.
PIPELINE_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


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


def target_margs_json(args: TargetArgs, flags: Sequence[str] = ()) -> str:
    """The content of `target_megatron_args.json`: as `args_json`, and below it where each argument is from.

    `flags` are those of `training_flags`, where there are any.
    """
    beside: dict[str, object] = {ORIGINS: args.origins} | ({TRAINING_FLAGS: list(flags)} if flags else {})
    return json.dumps({**args.values, **beside}, indent=2, default=str) + "\n"


def describe_origins(args: TargetArgs) -> list[str]:
    """One line for each argument: its value and where that is from."""
    names = sorted(args.origins)
    width = max(map(len, names))
    return [
        f"{name:{width}}  {args.values[name]!s}  <- {args.origins[name]}"
        if name in args.values
        else f"{name:{width}}  {args.origins[name]}"
        for name in names
    ]


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


_HUGGING_FACE = "HuggingFaceTokenizer"
_OF_HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SENTENCEPIECE = "tokenizer.model"
#: Megatron's names of tokenizers that want a SentencePiece file.
_SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "GPTSentencePieceTokenizer", "SentencePieceTokenizer")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_name(text: str) -> bool:
    """Whether a name is that of a model on the hub, as far as it can be told from a path: org/name, or an old bare one.

    Not a file's name, nor what lies in a directory that is here.
    """
    path = Path(text)
    is_below = path.parent != Path() and path.parent.is_dir()
    return _HUB_NAME.fullmatch(text) is not None and path.suffix not in (".model", ".json") and not is_below


def target_tokenizer(
    asked: str | None, asked_type: str | None, load_dir: str, directory: Path, margs: Mapping[str, Any] | None
) -> tuple[str | None, str | None]:
    """`tokenizer_model` and `tokenizer_type` of the target, which go together.

    The model is a path that training finds from anywhere or a name on the hub; a type of None is left to the margs file
    or to the family.

    Args:
        asked: by `--tokenizer-model`.
        asked_type: by `--tokenizer-type`.
        load_dir: of the model as the user gave it, a directory or a hub id.
        directory: where its files are.
        margs: content of the margs file, if one was given.
    """
    kind = asked_type or (margs or {}).get("tokenizer_type") or _HUGGING_FACE
    place = Path(asked) if asked is not None else directory
    if asked is not None and not place.is_dir():
        return os.path.abspath(asked) if place.exists() else asked, asked_type
    if kind in _SENTENCEPIECE_TYPES and (place / _SENTENCEPIECE).is_file():
        return os.path.abspath(place / _SENTENCEPIECE), asked_type
    if kind in _SENTENCEPIECE_TYPES and asked_type is None:
        asked_type = kind = _HUGGING_FACE  # the margs file's type would look for a file that is not there
    if asked is not None:
        return os.path.abspath(asked), asked_type
    if kind == _HUGGING_FACE and any((directory / name).is_file() for name in _OF_HUGGING_FACE):
        return os.path.abspath(load_dir) if os.path.isdir(load_dir) else load_dir.partition("@")[0], asked_type
    return None, asked_type
