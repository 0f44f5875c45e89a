"""The training arguments of a Megatron target.

What an argument means: docs/formats.md, "Arguments that decide the model" and "Splitting over ranks". They come from
the model (config.json), from the flags, from a file of the training that the model came from (`--source-margs-file`),
and from defaults.
"""

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
from dist_convert.formats.megatron.grid import SIZES, Chunk, Grid
from dist_convert.formats.pickles import Named
from dist_convert.models import FAMILIES
from dist_convert.models.keys import pins_of, to_arg
from dist_convert.models.schema import Architecture, LinearScaling, RopeScaling, YarnScaling
from dist_convert.options import MTP_LAYER_NAMES, TORCH, TORCH_DIST, VIRTUAL_STAGE_FLAGS, Options, given_flags
from dist_convert.read.source import read_json
from dist_convert.records import JsonObject

#: Where a value can be from.
CONFIG, MARGS, DEFAULT, SOURCE = "config.json", "--source-margs-file", "default", "the source's args"
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


@dataclass(frozen=True)
class TargetDialect:
    """Spelling of a target: of its norms ("local", "transformer_engine", "habana"), of its experts, and of the layer in
    a layer of multi-token prediction."""

    norms: str = "transformer_engine"
    experts: str = "sequential"
    mtp: str = MTP_LAYER_NAMES[0]


@dataclass(frozen=True)
class MegatronSource:
    """What a Megatron source says of itself, which its target keeps where no flag says otherwise.

    Attributes:
        args: its training arguments.
        grid, chunks: its parallel sizes, and its layers by chunk.
        iteration: its number; None for a release.
        dialect: how it spells norms and experts.
    """

    args: JsonObject
    grid: Grid
    chunks: tuple[Chunk, ...]
    iteration: int | None
    dialect: TargetDialect


@dataclass(frozen=True)
class TargetInputs:
    """What files say of a target beside the flags: the margs file, the tokenizer's, and a Megatron source.

    Attributes:
        training_args: content of the margs file, if one was given.
        tokenizer_model, tokenizer_type: see `target_tokenizer`.
        vocab: tokens without padding; None where nobody says.
        own: what a Megatron source says of itself.
        carried: file name to content, see `huggingface.open`.
        tokens: of the tokenizer; None where it is not here.
    """

    training_args: JsonObject | None
    tokenizer_model: str | None
    tokenizer_type: str | None
    carried: Mapping[str, JsonObject]
    vocab: int | None = None
    own: MegatronSource | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Settings:
    """What a target is to be, whoever says so: the flags, its Megatron source or its margs file, or the defaults.

    Attributes:
        iteration: its number; None for a release.
        divisible_by: what the padded vocabulary is a multiple of, on each tensor parallel rank.
        dialect: how norms and experts are spelled.
        grid: its parallel sizes.
        chunks: its layers by chunk.
        keeps_pipeline: they are those of a Megatron source, and so are the arguments that describe them.
    """

    iteration: int | None
    divisible_by: int
    dialect: TargetDialect
    grid: Grid
    chunks: tuple[Chunk, ...]
    keeps_pipeline: bool = False


def _all_from(origin: str, **values: object) -> Found:
    return {name: (value, origin) for name, value in values.items()}


def default_values(a: Architecture, tokenizer_model: str | None) -> Found:
    """What a margs file may say better: how training went, not what the model is."""
    is_bare = tokenizer_model is not None and tokenizer_model.endswith(".model") and a.vocab <= 128000
    bare_type = "GPTSentencePieceTokenizer" if a.experts else "Llama2Tokenizer"
    found = _all_from(
        DEFAULT,
        seq_length=min(a.max_positions, 32768 if a.experts else 4096),
        micro_batch_size=1,
        global_batch_size=128 if a.experts else 1024,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        context_parallel_size=1,
        tokenizer_model=None,
        tokenizer_type=bare_type if is_bare else "HuggingFaceTokenizer",
    )
    if a.experts:
        found |= _all_from(DEFAULT, moe_router_load_balancing_type="aux_loss")
        found |= _all_from(CONFIG, moe_aux_loss_coeff=a.router_aux_loss)
    return found


def model_values(a: Architecture) -> dict[str, object]:
    """What config.json decides, with what it implies in Megatron's words."""
    family = FAMILIES[a.family]
    facts = {key.arg: to_arg(key, a) for key in family.keys if key.arg}
    written = (pin for pin in pins_of(family) if pin.is_written and (not pin.when or facts.get(pin.when)))
    pinned = {pin.arg: pin.allowed[0] for pin in written}
    rope = rope_values(a)
    return {
        **facts,
        **pinned,
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


def parallel_values(job: Options, a: Architecture, settings: Settings, given: Collection[str]) -> Found:
    """Parallel sizes, and how the pipeline is cut; `given` are the flags that the user gave."""
    grid, pipeline = settings.grid, settings.grid.pipeline
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    layout, virtual = job.pipeline_model_parallel_layout, grid.virtual_pipeline if grid.virtual_pipeline > 1 else None
    says_virtual = next((flag for flag in VIRTUAL_STAGE_FLAGS if flag in given), VIRTUAL_STAGE_FLAGS[0])
    is_even = (first, last, layout) == (None, None, None)
    expert_tensor = grid.expert_tensor if a.experts else grid.tensor
    stage_ranks = math.lcm(grid.tensor, grid.expert * expert_tensor)
    return (
        _all_from("flag --target-tensor-parallel-size", tensor_model_parallel_size=grid.tensor)
        | _all_from(
            "flag --target-pipeline-parallel-size",
            pipeline_model_parallel_size=pipeline,
            transformer_pipeline_model_parallel_size=pipeline,
        )
        | _all_from(
            f"flag {says_virtual}",
            virtual_pipeline_model_parallel_size=virtual,
            # Megatron-LM takes the one where stages are even and the other where they are not, and never both.
            num_layers_per_virtual_pipeline_stage=settings.chunks[0].layers if virtual and is_even else None,
            num_virtual_stages_per_pipeline_rank=virtual if not is_even and layout is None else None,
        )
        | _all_from("flag --target-expert-parallel-size", expert_model_parallel_size=grid.expert)
        | _all_from("flag --target-expert-tensor-parallel-size", expert_tensor_parallel_size=expert_tensor)
        | _all_from(
            "the parallel sizes",
            # Megatron-LM refuses experts and tensor parallelism without it.
            sequence_parallel=bool(a.experts) and grid.tensor > 1,
            world_size=pipeline * stage_ranks,
            data_parallel_size=stage_ranks // grid.tensor,
        )
        | _all_from("flag --decoder-first-pipeline-num-layers", decoder_first_pipeline_num_layers=first)
        | _all_from("flag --decoder-last-pipeline-num-layers", decoder_last_pipeline_num_layers=last)
        | _all_from("flag --pipeline-model-parallel-layout", pipeline_model_parallel_layout=layout)
        | _all_from(DEFAULT, account_for_embedding_in_pipeline_split=False, account_for_loss_in_pipeline_split=False)
    )


def run_values(to: str, iteration: int | None, *, is_trained: bool) -> Found:
    """What is true of the files: no optimizer, no random state, and no samples seen where nothing was trained."""
    values: dict[str, object] = {"ckpt_format": to, "use_dist_ckpt": to != TORCH}
    values |= {} if to == TORCH else {"async_save": False}
    values |= dict.fromkeys(("no_save_optim", "no_save_rng"), True)
    if not is_trained:
        values |= dict.fromkeys(("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"), 0)
    flag = "--release" if iteration is None else "--iteration"
    return _all_from(DEFAULT, **values) | _all_from(f"flag {flag}", iteration=iteration or 0)


def spelling_values(job: Options, a: Architecture, dialect: TargetDialect, own: MegatronSource | None) -> Found:
    """Which classes of norms and experts the tensors' names belong to, where a Megatron source's args do not say so."""
    found = {}
    is_silent = job.to == TORCH_DIST and own is not None and own.args.get("transformer_impl") is None
    if own is None or dialect.norms != own.dialect.norms or is_silent:
        impl = "local" if dialect.norms == "local" else "transformer_engine"  # what Habana's modules go by, too
        stored_as_gamma = {"apply_layernorm_1p": False} if own else {}
        found = _all_from("flag --saver-transformer-impl", transformer_impl=impl, **stored_as_gamma)
    if not a.experts:
        return found
    of_experts = expert_values(dialect.experts, a)
    if own and dialect.experts == own.dialect.experts:
        # A kept layout is written in one variant of it, and the rest of what the source's args say of it holds.
        return found | {name: of_experts[name] for name in _VARIANTS if name in own.args}
    return found | of_experts


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
    # Habana's dynamic experts take the one width, all others the other.
    widths = _all_from(CONFIG, ffn_hidden_size=a.ffn, moe_ffn_hidden_size=a.expert_width)
    return _all_from("flag --expert-layout", **values) | widths


#: Which variant of a layout the experts' tensors have.
_VARIANTS = ("moe_permuted_weights", "moe_fused_weights", "moe_single_grouped_weight")
_UNTIED = "untie_embeddings_and_output_weights"

#: Not an argument: in `target_megatron_args.json` it says where each of them is from.
ORIGINS = "origins_of_arguments"
#: Likewise: what training has to be started with.
TRAINING_FLAGS = "training_flags"

#: Sizes of the grid that a margs file gives where no flag does.
TAKEN_SIZES = (*SIZES[:2], "transformer_pipeline_model_parallel_size")

_TORCH_DTYPES = {*TORCH_NAMES.values(), "float8_e4m3fn", "float8_e5m2", "uint8", "int8", "int32", "int64"}
#: What JSON and the reader made of objects of Megatron and Python: enum members, functions, classes, anything else.
_OBJECT = re.compile(
    r"(AttnBackend|ModelType|\w*CudaGraph(Scope|Module)|Signals)\.\w+"
    r"|<(function|class|bound method|module) .*>|<[\w.]+ object at 0x\w+>|<\w+(\.\w+)+>"
)


@dataclass(frozen=True)
class TargetArgs:
    """The attributes of the target's `args`, by name in alphabetical order.

    Attributes:
        values: plain Python values and torch's dtypes, by name.
        origins: where each value is from, in words; also of arguments that were dropped.
    """

    values: dict[str, object]
    origins: dict[str, str]


def read_training_args(path: Path) -> JsonObject:
    """The training arguments in a `source_megatron_args.json`; a UsageError where there is no such file."""
    if not path.is_file():
        remedy = "give its right path, or leave the flag out: then arguments follow from config.json"
        raise UsageError("the file of --source-margs-file does not exist", path, remedy=remedy)
    return {name: value for name, value in read_json(path).items() if name not in (ORIGINS, TRAINING_FLAGS)}


def target_args(
    job: Options, given: TargetInputs, architecture: Architecture, settings: Settings, params_dtype: str | None
) -> TargetArgs:
    """Everything that Megatron-LM needs to go on from the target with --use-checkpoint-args.

    Of a Megatron source's own arguments all are kept but those of the target's layout. A margs file never overrules the
    model or the target. `params_dtype` is the safetensors name of most weights; None where the source's args hold.

    Raises:
        UnsupportedModel: the margs file describes a model that the weights are not of.
    """
    own, flags = given.own, given_flags(job)
    origins = {}
    excluded = frozenset[str]()
    found, fixed = Found(), Found()
    said, whose = (own.args, SOURCE) if own else (given.training_args or {}, MARGS)
    if own is None:
        found = default_values(architecture, given.tokenizer_model)
        excluded = MIXTRAL_EXCLUDED if architecture.experts else LLAMA_EXCLUDED
        fixed = _all_from(CONFIG, **model_values(architecture))
    for name, value in sorted(said.items()):
        if name in excluded:
            origins[name] = f"not taken from {whose}: it is of the run that saved the file"
        elif value is None and name in found:
            continue
        elif _is_object(value):
            origins[name] = f"dropped: {value} of {whose} is an object that only Megatron can make"
        else:
            found[name] = _with_dtype(value), whose
    fixed |= _all_from(CONFIG, vocab_size=given.vocab) if given.vocab else {}
    padding = {"padded_vocab_size": architecture.padded_vocab, "make_vocab_size_divisible_by": settings.divisible_by}
    fixed |= _all_from("flag --make-vocab-size-divisible-by", **padding)
    if params_dtype:
        is_16_bits = {"bf16": params_dtype == "BF16", "fp16": params_dtype == "F16"}
        dtype = f"torch.{TORCH_NAMES[params_dtype]}"
        fixed |= _all_from("flag --target-params-dtype", params_dtype=dtype, **is_16_bits)
    fixed |= parallel_values(job, architecture, settings, flags)
    fixed |= run_values(job.to, settings.iteration, is_trained=own is not None)
    fixed |= spelling_values(job, architecture, settings.dialect, own)
    if own:
        fixed |= _kept_values(own.args, architecture, settings)
    tokenizer = {"tokenizer_model": given.tokenizer_model, "tokenizer_type": given.tokenizer_type}
    for name, value in tokenizer.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            fixed[name] = value, f"flag {flag}" if flag in flags else "the model's own"
    for name, (value, origin) in fixed.items():
        flag = origin.removeprefix("flag ")
        if flag != origin and flag not in flags:
            is_theirs = (own is not None or name in TAKEN_SIZES) and name in said and said[name] == value
            origin = whose if is_theirs else f"default of {flag}"
        theirs = found.get(name, (value, DEFAULT))
        differs = theirs[1] == whose and plain(theirs[0]) != plain(value)
        found[name] = _with_dtype(value), f"{origin} (not {theirs[0]}, as {whose} says)" if differs else origin
    origins |= {name: origin for name, (_, origin) in found.items()}
    args = TargetArgs({name: found[name][0] for name in sorted(found)}, dict(sorted(origins.items())))
    family, written = FAMILIES[architecture.family], plain(args.values)
    described = architecture_from_args(written, vocab=given.vocab, file=whose, family=family, trusts_factor=True)
    # A margs file may know the loss of training better.
    if described != replace(architecture, vocab=described.vocab, router_aux_loss=described.router_aux_loss):
        raise PlanError("the target's args describe another model", expected=architecture, found=described)
    return args


def _kept_values(own: JsonObject, a: Architecture, settings: Settings) -> Found:
    """Arguments of the layout that a source's own decide, where it stays or has nothing to do with it."""
    found: Found = {}
    if a.tied == bool(own.get(_UNTIED)):
        found[_UNTIED] = not a.tied, "the tensors"
    if settings.grid.tensor > 1 and own.get("sequence_parallel"):
        found["sequence_parallel"] = True, SOURCE
    if settings.keeps_pipeline:
        found |= {name: (own[name], SOURCE) for name in PIPELINE_LAYOUT if name in own}
    return found


#: What the layers of stages that are not alike follow from, besides the pipeline parallel size.
PIPELINE_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


def _is_object(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_object, value))
    return isinstance(value, str) and _OBJECT.fullmatch(value) is not None


def is_torch_dtype(value: object) -> bool:
    """Whether a value of args is a dtype that they may have."""
    return isinstance(value, Named) and value.module == "torch" and value.name in _TORCH_DTYPES


def _with_dtype(value: Any) -> object:
    if isinstance(value, str) and value.startswith("torch.") and is_torch_dtype(dtype := Named("torch", value[6:])):
        return dtype
    return value


def plain(value: object) -> Any:
    """Arguments as JSON has them; what that cannot hold is text, `torch.bfloat16`."""
    return json.loads(json.dumps(value, default=str))


def target_args_json(args: TargetArgs, flags: Sequence[str] = ()) -> str:
    """The content of `target_megatron_args.json`: every argument, and below it where each argument is from.

    `flags` are those of `training_flags`, where there are any.
    """
    beside: dict[str, object] = {ORIGINS: args.origins} | ({TRAINING_FLAGS: list(flags)} if flags else {})
    return json.dumps({**args.values, **beside}, indent=2, default=str) + "\n"


def describe_origins(args: TargetArgs) -> list[str]:
    """One line for each argument: its value and where that is from."""
    width, values = max(map(len, args.origins)), {name: f"{value}  <- " for name, value in args.values.items()}
    return [f"{name:{width}}  {values.get(name, '')}{args.origins[name]}" for name in sorted(args.origins)]


def padded_vocab(vocab: int, divisible_by: int, tensor: int) -> int:
    """Rows of the embedding in Megatron: `vocab` rounded up to a multiple of `divisible_by` x `tensor`."""
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
    asked: str | None, asked_type: str | None, load_dir: str, directory: Path, training_args: JsonObject | None
) -> tuple[str | None, str | None]:
    """`tokenizer_model` and `tokenizer_type` of the target, which go together.

    The model is a path that training finds from anywhere or a name on the hub; a type of None is left to the margs file
    or to the family.

    Args:
        asked, asked_type: by `--tokenizer-model` and `--tokenizer-type`.
        load_dir, directory: of the model as the user gave it, a directory or a hub id; and where its files are.
        training_args: content of the margs file, if one was given.
    """
    kind = asked_type or (training_args or {}).get("tokenizer_type") or _HUGGING_FACE
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
