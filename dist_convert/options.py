"""What a command can be asked for: one table, from which flags, job files, help, API and fingerprint follow.

A field's name is the flag's, with the unit that the flag's value has. Sizes are in bytes. Paths are as this rank sees
them (`{rank}` and its like already filled in).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dist_convert.errors import UsageError, raise_together

HUGGINGFACE, TORCH, TORCH_DIST, DCP, META = "huggingface", "torch", "torch_dist", "dcp", "meta"
#: What Megatron-LM saves with torch's FSDP2, and with its own FSDP.
TORCH_DCP, FSDP_DTENSOR = "torch_dcp", "fsdp_dtensor"
#: What a checkpoint can become.
FORMATS = (HUGGINGFACE, TORCH, TORCH_DIST, DCP)
#: Any format of Megatron's that is written, any that is read, any that has no config.json of its own, any that may lack
#: one, any with Hugging Face's names, and any without training arguments.
MEGATRON, TRAINED, BARE, UNSAID, NAMED, ARGLESS = "megatron", "trained", "bare", "unsaid", "named", "argless"
_TRAINED = (TORCH, TORCH_DIST, TORCH_DCP, FSDP_DTENSOR)
_KINDS_OF_FORMATS = {
    MEGATRON: (TORCH, TORCH_DIST),
    TRAINED: _TRAINED,
    BARE: (*_TRAINED, META),
    UNSAID: (*_TRAINED, META, DCP),
    NAMED: (HUGGINGFACE, DCP),
    ARGLESS: (HUGGINGFACE, DCP, META),
}
#: An iteration without a number.
RELEASE = "release"
#: The commands that convert: of every format into any, and the two that are bound to a pair, by (source, target).
CONVERT = "convert"
PAIRS = {"megatron-to-hf": (TORCH, HUGGINGFACE), "hf-to-megatron": (HUGGINGFACE, TORCH)}
COMMANDS = (CONVERT, *PAIRS)
#: What they call the source and the target in help and errors; each takes the others' flags, too.
PATH_FLAGS = {
    CONVERT: ("SRC", "DST"),
    "megatron-to-hf": ("--load-path", "--save-path"),
    "hf-to-megatron": ("--load-dir", "--save-dir"),
}

#: `target_params_dtype` in safetensors names; `keep` leaves every tensor as it is stored.
TARGET_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "keep": None}
SOURCE_MODEL_TYPES = ("llama2", "llama3", "llama3.1", "mistral", "mixtral")
#: Spellings of norms and of experts in a Megatron checkpoint.
TRANSFORMER_IMPLS = ("local", "transformer_engine", "habana")
MTP_LAYER_NAMES = ("transformer_layer", "mtp_model_layer")
EXPERT_LAYOUTS = ("sequential", "te-grouped", "grouped", "habana-dynamic")
#: Flags that say how many virtual stages there are, of which one can be given.
VIRTUAL_STAGE_FLAGS = (
    "--target-virtual-pipeline-parallel-size", "--num-layers-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
)  # fmt: skip
#: Of the blocks, what `verify` compares where it is asked for a share of them and is not told which.
SAMPLE = Fraction(1, 16)
#: What is far larger does not fit into the libraries' counters.
MOST_SECONDS = 1_000_000
#: Larger than any grid, any vocabulary, any disk and any base of rotary frequencies: an oversight, which no header and
#: no loop is to learn of.
MOST_COUNT, MOST_BYTES, MOST_NUMBER = 10_000_000, 10**18, 10**12

Group = Literal["source", "target", "run"]
Kind = Literal["text", "path", "count", "iteration", "size", "seconds", "switch", "repository", "share", "number"]


@dataclass(frozen=True)
class Option:
    """What is known of one field of a command's options.

    Attributes:
        group: under which the help lists it.
        help: a fragment for `--help`, which starts with a noun or a verb.
        short: its flag's other spellings.
        source, to: the one format of conversions that have it, or a kind of them; "" where any may have it.
        kind: of its values; "" where the field's type and unit say it.
        shown: the default, in the words of the help; "" for the value itself.
        choices: of a text.
        metavar: of its value in the help, where that of its kind says too little.
        const: the value that a flag without a value stands for, where it may have none.
        is_free: no byte of the target depends on it, so that it may change from one run to the next without a word.
    """

    group: Group
    help: str
    short: tuple[str, ...] = ()
    source: str = ""
    to: str = ""
    kind: Kind | Literal[""] = ""
    shown: str = ""
    choices: tuple[str, ...] = ()
    metavar: str = ""
    const: str | Fraction | None = None
    is_free: bool = False

    def applies(self, source: str, to: str) -> bool:
        """Whether a conversion between these formats has it."""
        pairs = ((self.source, source), (self.to, to))
        return all(not wanted or found in formats_of(wanted) for wanted, found in pairs)


def formats_of(wanted: str) -> tuple[str, ...]:
    """The formats of a kind, or the one that is named itself."""
    return _KINDS_OF_FORMATS.get(wanted, (wanted,))


def _option(group: Group, help: str, default: Any = None, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help, **known)})


_source, _of_megatron = partial(_option, "source"), partial(_option, "source", source=TRAINED)
_of_bare = partial(_option, "source", source=BARE)
_target, _run = partial(_option, "target"), partial(_option, "run", is_free=True)
_to_hf, _to_megatron = partial(_option, "target", to=HUGGINGFACE), partial(_option, "target", to=MEGATRON)

#: Help that two commands share.
_TIMEOUT = "seconds to wait for a rank that does not respond"
_INTERVAL = "seconds between lines of progress where standard error is not a terminal"


@dataclass(frozen=True)
class Options:
    """One conversion; see the help of each field. `command` is how it was asked for, in whose words errors speak."""

    to: str
    source: str = ""
    target: Path = Path()
    command: str = field(default=CONVERT, kw_only=True)

    ckpt_dir_name: str | None = _of_megatron("iteration directory, such as iter_0000004", shown="the tracker file")
    source_model_type: str | None = _of_bare(
        "model whose special tokens a tokenizer.model gets; elsewhere compared with the checkpoint's args, which win",
        to=HUGGINGFACE,
        shown="from the args",
        choices=SOURCE_MODEL_TYPES,
    )
    source_margs_file: Path | None = _source(
        "source_megatron_args.json of an earlier conversion",
        source=ARGLESS,
        to=MEGATRON,
        shown="args follow from config.json",
    )
    load_capacity_bins: bool = _source(
        "take over Habana's capacity_bins.pt (same grid only)", False, source=ARGLESS, to=TORCH
    )
    true_vocab_size: int | None = _source(
        "vocabulary size without padding; must agree with a Hugging Face source", shown="args, then tokenizer"
    )
    tokenizer: Path | None = _of_bare(
        "directory, tokenizer.model, or org/name of a model in the hub's cache",
        shown="what the args name, here or beside the checkpoint",
    )
    tokenizer_model: str | None = _source(
        "path or hub id (org/name) that the target's args name", to=MEGATRON, shown="the model's own", metavar="PATH"
    )
    tokenizer_type: str | None = _source("Megatron's name for the kind of tokenizer", to=MEGATRON, shown="by the model")
    drop_mtp: bool = _source(
        "skip the layers of multi-token prediction, which only DeepSeek-V3 and GLM-4.5 can hold", False
    )
    like: Path | None = _source(
        "config.json of the model, or its directory: tells what the checkpoint does not, such as the family",
        source=UNSAID,
        shown="the args, or for dcp the config.json there",
    )
    rope_theta: float | None = _of_bare("base of the rotary frequencies", shown="the args' rotary_base")
    rope_scaling_factor: float | None = _of_bare(
        "factor by which Llama 3.1 scales rotary frequencies", shown="8 where the args say that it does"
    )
    habana_imported_experts: bool = _source(
        "read Mixtral experts as Habana's own HF-to-Megatron converter wrote them at TP > 1: gate and up not "
        "interleaved over ranks. Use it only on a checkpoint that came straight from that converter, never on one "
        "that was trained since",
        False,
        source=TORCH,
    )
    accept_differing_copies: bool = _source(
        "use the lowest rank's copy where copies of one parameter differ; a head that differs from its tied embedding "
        "becomes a separate head",
        False,
        source=TORCH,
    )
    accept_shard_order: bool = _source(
        "trust the names of rank directories where their args contradict them, or where two hold the same",
        False,
        source=TORCH,
    )

    save_per_node: bool = _to_hf(
        "write to each node's own disk: a share of the weights files, each of them whole, and all other files; copy "
        "the nodes' directories into one afterwards",
        False,
        is_free=True,
    )
    iteration: int | str | None = _to_megatron("number of the iteration", shown="the source's, else 1")
    target_tensor_parallel_size: int | None = _to_megatron(
        "tensor parallel ranks", short=("--tp", "--tensor-model-parallel-size"), shown="the source's, else 1"
    )
    target_pipeline_parallel_size: int | None = _to_megatron(
        "pipeline parallel ranks", short=("--pp", "--pipeline-model-parallel-size"), shown="the source's, else 1"
    )
    target_virtual_pipeline_parallel_size: int | None = _to_megatron(
        "virtual stages of each pipeline rank",
        short=("--vpp", "--num-virtual-stages-per-pipeline-rank"),
        shown="those of a source whose pipeline is kept, else 1",
    )
    num_layers_per_virtual_pipeline_stage: int | None = _to_megatron(
        "layers of a virtual stage, in place of the number of stages", shown="see above"
    )
    target_expert_parallel_size: int | None = _to_megatron(
        "expert parallel ranks", short=("--ep", "--expert-model-parallel-size"), shown="a Megatron source's, else 1"
    )
    target_expert_tensor_parallel_size: int | None = _to_megatron(
        "tensor parallel ranks within an expert",
        short=("--etp", "--expert-tensor-parallel-size"),
        shown="the tensor size",
    )
    decoder_first_pipeline_num_layers: int | None = _to_megatron("layers of the first stage", shown="even")
    decoder_last_pipeline_num_layers: int | None = _to_megatron("layers of the last stage", shown="even")
    pipeline_model_parallel_layout: str | None = _to_megatron(
        "stages one by one, such as Ettt|(tttt|)*2ttL", shown="even", metavar="LAYOUT"
    )
    target_ranks_per_node: int | None = _target(
        "write to each node's own disk the rank directories that its N training processes load",
        to=TORCH,
        shown="the target is shared",
    )
    make_vocab_size_divisible_by: int | None = _to_megatron(
        "multiple to which the vocabulary is padded on every tensor parallel rank",
        shown="a Megatron source's, else 128",
    )
    vocab_padding: str = _to_megatron("content of the padding rows", "last-row", choices=("last-row", "zeros"))
    target_params_dtype: str | None = _target(
        "dtype of the weights; tensors whose dtype is not that of most weights keep theirs",
        shown="bf16 from Megatron to Hugging Face, else keep",
        choices=tuple(TARGET_DTYPES),
    )
    allow_overflow: bool = _target("accept values that become infinite in fp16", False, is_free=True)
    max_shard_size_bytes: int = _target("largest size of a weights file", 5_000_000_000, to=NAMED)
    saver_transformer_impl: str | None = _to_megatron(
        "names of the norm layers", shown="a Megatron source's, else transformer_engine", choices=TRANSFORMER_IMPLS
    )
    expert_layout: str | None = _to_megatron(
        "layout and names of the experts", shown="a Megatron source's, else sequential", choices=EXPERT_LAYOUTS
    )
    mtp_layer_name: str | None = _target(
        "name of the transformer layer in a layer of multi-token prediction; Megatron-Core after 0.16 needs "
        "mtp_model_layer",
        to=TORCH,
        shown="a Megatron source's, else transformer_layer",
        choices=MTP_LAYER_NAMES,
    )
    instruct: bool = _to_hf(
        "write the end-of-turn tokens, sampling defaults and chat template of an instruct model", False, source=BARE
    )
    save_capacity_bins: bool = _to_hf("write Habana's capacity_bins.pt", False, source=TORCH)
    overwrite: bool = _target(
        "replace an existing target, or this iteration of a Megatron checkpoint", False, is_free=True
    )
    push_to_hub: str | None = _to_hf(
        "upload the finished directory to this repository; create it if it does not exist",
        kind="repository",
        shown="no upload",
        is_free=True,
    )
    private: bool = _to_hf("create the repository as private; refuse one that is public", False, is_free=True)
    keep_paths: bool = _to_hf(
        "upload conversion.json and source_megatron_args.json with full paths, not only the last name of each",
        False,
        is_free=True,
    )
    model_size: str | None = _to_megatron(
        "model that the source must be, such as llama3-70B; checked against its config", source=ARGLESS
    )

    device: str = _run(
        "device that collectives use", "auto", shown="auto: what is there", choices=("auto", "cpu", "cuda", "hpu")
    )
    placement: str = _run(
        "placement of reads. gather: a rank reads its own shards and sends; direct: a rank reads what it writes",
        "auto",
        shown="auto: direct on the CPU where every rank sees every file, else gather",
        choices=("auto", "gather", "direct"),
    )
    max_memory_per_rank_bytes: int = _run("memory for the buffers of each rank", 1_000_000_000)
    read_ahead: int | None = _run(
        "blocks of 4 MiB that the operating system is asked to read ahead for each rank",
        shown="8 across a network; none on a local disk, where Linux reads ahead by itself",
    )
    timeout_seconds: int = _run(_TIMEOUT, 600)
    verify: str | None = _run(
        "compare the result, or a sample of it, with the source before the target gets its name",
        shown="off",
        choices=("full", "sample"),
        const="full",
    )
    trace: Path | None = _run("write a timeline of every rank to this file, in Chrome's trace format", shown="off")
    log_format: str = _run(
        "format of the log on standard error: text, or one JSON object a line", "text", choices=("text", "json")
    )
    log_interval_seconds: int = _run(_INTERVAL, 30)
    json: bool = _run("print the report, or the plan of a dry run, as JSON on standard output", False)
    quiet: bool = _run("print only warnings and errors", False, short=("-q",))
    verbose: bool = _run(
        "show the times and memory of the ranks, and where each of a target's args comes from", False, short=("-v",)
    )
    strict: bool = _run("treat warnings as errors, before anything is written", False)
    dry_run: bool = _run("show what each rank would do and write nothing; exit 0 if the conversion would start", False)


@dataclass(frozen=True)
class VerifyJob:
    """A comparison of two checkpoints; see the help of each field."""

    a: Path
    b: Path
    ckpt_dir_name_a: str | None = _source("iteration directory of A", shown="the tracker file")
    ckpt_dir_name_b: str | None = _source("iteration directory of B", shown="the tracker file")
    habana_imported_experts_a: bool = _source(
        "read A's experts as Habana's own HF-to-Megatron converter wrote them at TP > 1", False
    )
    habana_imported_experts_b: bool = _source(
        "read B's experts as Habana's own HF-to-Megatron converter wrote them at TP > 1", False
    )
    true_vocab_size: int | None = _source("vocabulary size without padding", shown="args, tokenizer, the other side")
    like: Path | None = _source(
        "config.json of the model, or its directory, for a checkpoint that does not say what it is", shown="none"
    )
    sample: Fraction = _run(
        f"compare a share of the blocks ({SAMPLE} without a value), always the same ones, and the first and last block "
        "of every tensor",
        Fraction(1),
        shown="all",
        const=SAMPLE,
    )
    max_memory_per_rank_bytes: int = _run("memory for the buffers of each rank", 1_000_000_000)
    timeout_seconds: int = _run(_TIMEOUT, 600)
    log_interval_seconds: int = _run(_INTERVAL, 30)
    json: bool = _run("print JSON, with every difference, instead of text", False)
    quiet: bool = _run("print only the result, no progress", False, short=("-q",))


@dataclass(frozen=True)
class TokenizerJob:
    """One tokenizer for a model that is converted already; see the help of each field."""

    source: Path
    target: Path
    source_model_type: str | None = _source(
        "model whose special tokens and chat format a tokenizer.model gets",
        shown="what config.json suggests",
        choices=SOURCE_MODEL_TYPES,
    )
    true_vocab_size: int | None = _target(
        "rows of the vocabulary to keep; weights files with more rows, which are padding, are written again",
        shown="all",
    )
    instruct: bool = _target("add the chat template, end-of-turn tokens and sampling of an instruct model", False)
    overwrite: bool = _target("replace an existing tokenizer", False)


#: What commands that do not convert have of the options of one.
_SOME = {"inspect": ("ckpt_dir_name", "like"), "push": ("private", "keep_paths"), "models": (), "completion": ()}


def options_of(command: str) -> Iterator[tuple[Field[Any], Option]]:
    """The fields that a command has, or the function `open`, and what is known of each."""
    for one, known in _known({"verify": VerifyJob, "tokenizer": TokenizerJob}.get(command, Options)):
        if command == "open":
            is_its = known.group == "source" and not known.to
        elif command in _SOME:
            is_its = one.name in _SOME[command]
        else:
            is_its = command not in PAIRS or known.applies(*PAIRS[command])
        if is_its:
            yield one, known


def _known(job: Any) -> Iterator[tuple[Field[Any], Option]]:
    yield from ((one, one.metadata["option"]) for one in fields(job) if "option" in one.metadata)


def given(job: Options | VerifyJob) -> Iterator[tuple[Field[Any], Option]]:
    """The fields whose values are not the defaults, and what is known of each."""
    yield from ((one, known) for one, known in _known(job) if getattr(job, one.name) != one.default)


def plain_name(name: str) -> str:
    """A field's name without its unit, as the flags and the functions of the package have it."""
    return name.removesuffix("_bytes").removesuffix("_seconds")


def flag_of(one: Field[Any]) -> str:
    """The flag of a field."""
    return "--" + plain_name(one.name).replace("_", "-")


_KINDS_OF_TYPES: Mapping[str, Kind] = {
    "bool": "switch",
    "int | None": "count",
    "float | None": "number",
    "int | str | None": "iteration",
    "Fraction": "share",
    "Path | None": "path",
    "str": "text",
    "str | None": "text",
}


def kind_of(one: Field[Any]) -> Kind:
    """The kind of a field's values: what is known of it, or what its unit and its type say."""
    known: Option = one.metadata["option"]
    if known.kind:
        return known.kind
    if one.name.endswith("_bytes"):
        return "size"
    return "seconds" if one.name.endswith("_seconds") else _KINDS_OF_TYPES[str(one.type)]


#: Kinds of values -> what they are, and how that is told.
KINDS: Mapping[Kind, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "repository": ("text", lambda value: isinstance(value, str)),
    "path": ("a path", lambda value: isinstance(value, Path)),
    "switch": ("True or False", lambda value: isinstance(value, bool)),
    "number": (
        f"a number above 0, up to {MOST_NUMBER}",
        lambda value: type(value) in (int, float) and 0 < value <= MOST_NUMBER,
    ),
    "count": (f"a whole number from 1 to {MOST_COUNT}", lambda value: type(value) is int and 0 < value <= MOST_COUNT),
    "size": (
        "bytes, or text with a unit, up to an exabyte",
        lambda value: type(value) is int and 0 < value <= MOST_BYTES,
    ),
    "seconds": (f"whole seconds up to {MOST_SECONDS}", lambda value: type(value) is int and 0 < value <= MOST_SECONDS),
    "iteration": (
        f"a whole number of 0 or more and at most 18 digits, or {RELEASE!r}",
        lambda value: value == RELEASE or (type(value) is int and 0 <= value < 10**18),
    ),
    "share": (
        "a share above 0 and up to 1, such as 1/16 or 0.05",
        lambda value: isinstance(value, Fraction) and 0 < value <= 1,
    ),
}


def check_values(job: Options | VerifyJob) -> None:
    """Refuse values of options from a program that the command line would not take, all of them together."""
    problems = []
    for one, known in given(job):
        value = getattr(job, one.name)
        expected, fits = KINDS[kind_of(one)]
        if known.choices:
            expected = " or ".join(map(repr, known.choices))
        if not (value in known.choices if known.choices else fits(value)):
            problems.append(UsageError(f"{one.name} has a wrong value", expected=expected, found=repr(value)))
    raise_together(problems)


def expanded_path(path: str | os.PathLike[str]) -> str:
    """A path in which ~ is the home directory; a UsageError where it is empty, or none that a system can have."""
    text = os.fspath(path)
    if not text:
        raise UsageError("a path is empty: is a variable unset?", remedy="give a path")
    try:
        octets = os.fsencode(text)
    except UnicodeEncodeError:
        octets = b"\0"
    if b"\0" in octets:
        raise UsageError("a path has characters that no path can have", found=repr(text), remedy="give another path")
    if (longest := max(map(len, octets.split(b"/")))) > _NAME_BYTES or len(octets) >= _PATH_BYTES:
        found = f"{len(octets):,} bytes, and {longest:,} between slashes"
        expected = f"less than {_PATH_BYTES:,} bytes, and at most {_NAME_BYTES} between slashes"
        raise UsageError("a path is too long", text, expected, found, remedy="give a shorter path")
    return os.path.expanduser(text)


#: Linux' limits: of a path with the zero behind it, and of a name in it.
_PATH_BYTES, _NAME_BYTES = 4096, 255


def check_together(options: Options) -> None:
    """Refuse options that have no meaning without another, or exclude each other, all of them together."""
    problems = []
    for flag, is_given in {"--private": options.private, "--keep-paths": options.keep_paths}.items():
        if is_given and not options.push_to_hub:
            problems.append(UsageError("nothing is uploaded", found=flag, remedy="add --push-to-hub org/name"))
    if options.push_to_hub and options.save_per_node:
        problems.append(
            UsageError(
                "no node has all files to upload",
                found="--push-to-hub with --save-per-node",
                remedy="convert without --push-to-hub, copy the nodes' directories into one DIRECTORY, then: "
                f"dist-convert push DIRECTORY {options.push_to_hub}",
            )
        )
    said = [flag for flag in VIRTUAL_STAGE_FLAGS if flag in given_flags(options)]
    if len(said) > 1:
        what = "two flags say how many virtual stages there are"
        problems.append(UsageError(what, found=" and ".join(said), remedy="give one of them"))
    raise_together(problems)


def given_flags(options: Options) -> list[str]:
    """The flags that differ from their defaults, such as "--target-params-dtype"."""
    flags = [flag_of(one) for one, _ in given(options)]
    return ["--release" if flag == "--iteration" and options.iteration == RELEASE else flag for flag in flags]


def check_applies(options: Options, source: str) -> None:
    """Refuse options that have no meaning for a source of this format, all of them together."""
    idle = [flag_of(one) for one, known in given(options) if not known.applies(source, options.to)]
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: no effect in a conversion from {source} to {options.to}",
            remedy="leave it out" if len(idle) == 1 else "leave them out",
        )


def fingerprint(options: Options, source: str) -> dict[str, Any]:
    """What is asked for as far as the target depends on it, by the fields' names, in JSON values."""
    values = {
        one.name: getattr(options, one.name)
        for one, known in _known(Options)
        if known.applies(source, options.to) and not known.is_free
    }
    return {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}
