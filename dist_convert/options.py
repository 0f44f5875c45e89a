"""What a conversion can be asked for: one table, from which flags, job files, help, API and fingerprint follow.

A field's name is the flag's, with the unit that the flag's value has. Sizes are in bytes. Paths are as this rank sees
them (`{rank}` and its like already filled in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from dist_convert.errors import ConversionError, UsageError, raise_together

HUGGINGFACE, TORCH, TORCH_DIST = "huggingface", "torch", "torch_dist"
#: What a checkpoint can become.
FORMATS = (HUGGINGFACE, TORCH)
#: An iteration without a number.
RELEASE = "release"
#: The commands that convert: of every format into any, and the two that are bound to a pair, by (source, target).
CONVERT = "convert"
PAIRS = {"megatron-to-hf": (TORCH, HUGGINGFACE), "hf-to-megatron": (HUGGINGFACE, TORCH)}
COMMANDS = (CONVERT, *PAIRS)

#: `target_params_dtype` in safetensors names; `keep` leaves every tensor as it is stored.
TARGET_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "keep": None}
SOURCE_MODEL_TYPES = ("llama2", "llama3", "llama3.1", "mistral", "mixtral")
#: Spellings of norms and of experts in a Megatron checkpoint.
TRANSFORMER_IMPLS = ("local", "transformer_engine", "habana")
EXPERT_LAYOUTS = ("sequential", "te-grouped", "grouped", "habana-dynamic")
#: What `verify` compares: every block, or a share.
VERIFICATIONS = ("full", "sample")
SAMPLE = Fraction(1, 16)
LOG_FORMATS = ("text", "json")
#: What is far larger does not fit into the libraries' counters.
MOST_SECONDS = 1_000_000

Kind = Literal["text", "path", "count", "iteration", "size", "seconds", "switch", "repository"]


@dataclass(frozen=True)
class Option:
    """What is known of one field of `Options`.

    Attributes:
        help: a fragment for `--help`; where the commands differ, by their names.
        group: under which it is listed.
        source, to: the formats of conversions that have it.
        kind: of its values.
        shown: the default, in the words of the help.
        choices: of a text.
        flags: other names than the field's, by the command.
        metavar: of its value in the help.
        const: the value that a flag without a value stands for, where it may have none.
        constants: by the command, further flags that stand for a value each, and what the help says of them.
        is_free: no byte of the target depends on it, so that it may change from one run to the next without a word.
    """

    help: str | Mapping[str, str]
    group: Literal["source", "target", "run"]
    source: tuple[str, ...] = FORMATS
    to: tuple[str, ...] = FORMATS
    kind: Kind = "text"
    shown: str = ""
    choices: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] | None = None
    metavar: str | None = None
    const: str | None = None
    constants: Mapping[str, Mapping[str, tuple[str | None, str]]] | None = None
    is_free: bool = False


def _option(default: Any, help: str | Mapping[str, str], group: Literal["source", "target", "run"], **how: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, group, **how)})


def _to_hf(default: Any, help: str, group: Literal["source", "target", "run"], **how: Any) -> Any:
    return _option(default, help, group, to=(HUGGINGFACE,), **how)


def _to_torch(default: Any, help: str, group: Literal["source", "target", "run"], **how: Any) -> Any:
    return _option(default, help, group, to=(TORCH,), **how)


def _of_torch(default: Any, help: str, group: Literal["source", "target", "run"], **how: Any) -> Any:
    return _option(default, help, group, source=(TORCH,), **how)


@dataclass(frozen=True)
class Options:
    """One conversion; see the help of each field. `command` is how it was asked for, in whose words errors speak."""

    to: str
    command: str = field(default=CONVERT, kw_only=True)
    source: str = _option(
        "",
        {
            CONVERT: "checkpoint of either kind: root or iteration of Megatron's, Hugging Face directory, or a hub id "
            "(org/name[@revision])",
            "megatron-to-hf": "(required) root of the Megatron checkpoint",
            "hf-to-megatron": "(required) Hugging Face directory, or a hub id (org/name[@revision])",
        },
        "source",
        flags={"megatron-to-hf": ("--load-path",), "hf-to-megatron": ("--load-dir",)},
        metavar="PATH",
    )
    ckpt_dir_name: str | None = _of_torch(
        None, "iteration directory, such as iter_0000004", "source", shown="the tracker file", metavar="NAME"
    )
    source_model_type: str | None = _to_hf(
        None,
        "decides special tokens of a tokenizer.model; else checked against the checkpoint's args, which win",
        "source",
        source=(TORCH,),
        shown="from the args",
        choices=SOURCE_MODEL_TYPES,
    )
    source_margs_file: Path | None = _to_torch(
        None,
        "source_megatron_args.json of an earlier conversion",
        "source",
        source=(HUGGINGFACE,),
        kind="path",
        shown="args follow from config.json",
        metavar="FILE",
    )
    load_capacity_bins: bool = _to_torch(
        False, "take over capacity_bins.pt (same grid only)", "source", source=(HUGGINGFACE,), kind="switch"
    )
    true_vocab_size: int | None = _option(
        None,
        "tokens without padding; a Hugging Face model's are checked against it",
        "source",
        kind="count",
        shown="args, then tokenizer",
        metavar="N",
    )
    tokenizer: Path | None = _of_torch(
        None,
        "directory, tokenizer.model, or org/name of a model in the hub's cache",
        "source",
        kind="path",
        shown="what the args name, here or beside the checkpoint",
        metavar="PATH",
    )
    tokenizer_model: str | None = _to_torch(
        None, "path or hub id (org/name), for the args", "source", shown="the model's own", metavar="PATH"
    )
    tokenizer_type: str | None = _to_torch(
        None, "Megatron's name of its kind", "source", shown="by the model", metavar="NAME"
    )
    habana_imported_experts: bool = _of_torch(
        False,
        "read Mixtral experts as Habana's own HF-to-Megatron converter wrote them at TP > 1: gate and up not "
        "interleaved over ranks. Use it only on a checkpoint that came straight from that converter, never on one "
        "that was trained since",
        "source",
        kind="switch",
    )
    accept_differing_copies: bool = _of_torch(
        False,
        "where copies of one parameter differ, take that of the lowest rank; a head that is not the embedding that it "
        "is tied to becomes one of its own",
        "source",
        kind="switch",
    )
    accept_shard_order: bool = _of_torch(
        False,
        "believe the names of rank directories where the args in them contradict these, or where two hold the same",
        "source",
        kind="switch",
    )
    target: Path = _option(
        Path(),
        {
            CONVERT: "what is made: a Hugging Face directory, or the root of a Megatron checkpoint",
            "megatron-to-hf": "(required) Hugging Face directory to be made",
            "hf-to-megatron": "(required) root of the Megatron checkpoint",
        },
        "target",
        flags={"megatron-to-hf": ("--save-path",), "hf-to-megatron": ("--save-dir",)},
        metavar="PATH",
    )
    save_per_node: bool = _to_hf(
        False,
        "the target lies on each node's own disk: a node gets some of the weights files whole, and all files that are "
        "no weights; all nodes' directories copied into one are the model",
        "target",
        kind="switch",
        is_free=True,
    )
    iteration: int | str | None = _to_torch(
        None,
        "number of the iteration",
        "target",
        kind="iteration",
        shown="the source's, else 1",
        metavar="N",
        constants={
            command: {"--release": (RELEASE, "write a release instead of an iteration")} for command in COMMANDS
        },
    )
    target_tensor_parallel_size: int | None = _to_torch(
        None, "tensor parallel ranks", "target", kind="count", shown="the source's, else 1", metavar="N"
    )
    target_pipeline_parallel_size: int | None = _to_torch(
        None, "pipeline parallel ranks", "target", kind="count", shown="the source's, else 1", metavar="N"
    )
    target_virtual_pipeline_parallel_size: int | None = _to_torch(
        None,
        "virtual stages",
        "target",
        kind="count",
        shown="those of a source whose pipeline is kept, else 1",
        metavar="N",
    )
    num_layers_per_virtual_pipeline_stage: int | None = _to_torch(
        None, "the same, by layers of a stage", "target", kind="count", metavar="N"
    )
    target_expert_parallel_size: int | None = _to_torch(
        None,
        "expert parallel ranks",
        "target",
        kind="count",
        shown="a Megatron source's, else 1",
        metavar="N",
        flags={  # as the old tool spells it
            "hf-to-megatron": ("--target-expert-parallel-size", "--target-expert-paralell-size")
        },
    )
    target_expert_tensor_parallel_size: int | None = _to_torch(
        None, "tensor parallel ranks within an expert", "target", kind="count", shown="the tensor size", metavar="N"
    )
    decoder_first_pipeline_num_layers: int | None = _to_torch(
        None, "layers of the first stage", "target", kind="count", shown="even", metavar="N"
    )
    decoder_last_pipeline_num_layers: int | None = _to_torch(
        None, "layers of the last stage", "target", kind="count", shown="even", metavar="N"
    )
    pipeline_model_parallel_layout: str | None = _to_torch(
        None, "stages one by one, such as Ettt|(tttt|)*2ttL", "target", shown="even", metavar="LAYOUT"
    )
    target_ranks_per_node: int | None = _to_torch(
        None,
        "the target lies on each node's own disk, and training will run N processes on each of these nodes: a node "
        "gets the rank directories that its processes load",
        "target",
        kind="count",
        shown="the target is shared",
        metavar="N",
    )
    make_vocab_size_divisible_by: int | None = _to_torch(
        None,
        "the vocabulary is padded to a multiple of it on every tensor parallel rank",
        "target",
        kind="count",
        shown="a Megatron source's, else 128",
        metavar="N",
    )
    vocab_padding: str = _to_torch(
        "last-row", "what padding rows hold", "target", shown="last-row", choices=("last-row", "zeros")
    )
    target_params_dtype: str | None = _option(
        None,
        "dtype of the weights stored in the dtype of most; others keep theirs",
        "target",
        shown="bf16 from Megatron to Hugging Face, else keep",
        choices=tuple(TARGET_DTYPES),
        constants={
            "hf-to-megatron": {
                "--bf16": ("bf16", "the same as --target-params-dtype bf16"),
                "--fp16": ("fp16", "the same as --target-params-dtype fp16"),
            }
        },
    )
    allow_overflow: bool = _option(
        False, "accept values that become infinite in fp16", "target", kind="switch", is_free=True
    )
    max_shard_size_bytes: int = _to_hf(5_000_000_000, "of a weights file, at most", "target", kind="size", shown="5GB")
    saver_transformer_impl: str | None = _to_torch(
        None,
        "spelling of the norms",
        "target",
        shown="a Megatron source's, else transformer_engine",
        choices=TRANSFORMER_IMPLS,
    )
    expert_layout: str | None = _to_torch(
        None,
        "spelling of the experts",
        "target",
        shown="a Megatron source's, else sequential",
        choices=EXPERT_LAYOUTS,
    )
    instruct: bool = _to_hf(
        False,
        "write end-of-turn tokens, sampling defaults, chat template of an instruct model",
        "target",
        source=(TORCH,),
        kind="switch",
    )
    save_capacity_bins: bool = _to_hf(
        False, "write Habana's capacity_bins.pt", "target", source=(TORCH,), kind="switch"
    )
    overwrite: bool = _option(
        False,
        "replace an existing target, of a Megatron checkpoint this iteration",
        "target",
        kind="switch",
        is_free=True,
    )
    push_to_hub: str | None = _to_hf(
        None,
        "upload the finished directory to this repository, which is made if it is not there",
        "target",
        kind="repository",
        shown="no upload",
        metavar="org/name",
        is_free=True,
    )
    private: bool = _to_hf(
        False,
        "with --push-to-hub: for members only; a public repository is refused",
        "target",
        kind="switch",
        is_free=True,
    )
    model_size: str | None = _to_torch(
        None, "such as llama3-70B: checked against the config", "target", source=(HUGGINGFACE,), metavar="NAME"
    )
    device: str = _option(
        "auto",
        "that collectives use",
        "run",
        shown="auto, what is there",
        choices=("auto", "cpu", "cuda", "hpu"),
        is_free=True,
    )
    placement: str = _option(
        "auto",
        "gather: each rank reads its own shards and the group gathers; direct: each rank reads what it writes",
        "run",
        shown="auto, direct on the CPU where every rank sees every file, else gather",
        choices=("auto", "gather", "direct"),
        is_free=True,
    )
    max_memory_per_rank_bytes: int = _option(
        1_000_000_000, "of the buffers of each rank", "run", kind="size", shown="1GB", is_free=True
    )
    timeout_seconds: int = _option(
        600,
        "that ranks wait for one of them that is silent",
        "run",
        kind="seconds",
        shown="600",
        metavar="SECONDS",
        is_free=True,
    )
    verify: str | None = _option(
        None,
        "compare what was written with the source before it gets its name: all of it, or a sample",
        "run",
        shown="off",
        choices=VERIFICATIONS,
        const="full",
        constants={command: {"--no-verify": (None, "do not (default: as the job file says)")} for command in COMMANDS},
        is_free=True,
    )
    trace: Path | None = _option(
        None,
        "write down where the time of every rank goes, in Chrome's trace format",
        "run",
        kind="path",
        shown="off",
        metavar="FILE",
        is_free=True,
    )
    log_format: str = _option(
        "text",
        "text for people, or a JSON object a line for programs: notes, progress, the report or the error",
        "run",
        shown="text",
        choices=LOG_FORMATS,
        is_free=True,
    )
    log_interval_seconds: int = _option(
        30,
        "between two lines of progress where standard error is no terminal",
        "run",
        kind="seconds",
        shown="30",
        metavar="SECONDS",
        is_free=True,
    )
    dry_run: bool = _option(
        False, "show what each rank would do; exit 0 if it would start", "run", kind="switch", is_free=True
    )
    verbose: bool = _to_torch(
        False, "say where each of the target's args comes from", "run", kind="switch", is_free=True
    )


def options_of(command: str) -> Iterator[tuple[Field[Any], Option]]:
    """The fields that a command has, and what is known of each."""
    source, to = PAIRS.get(command, ("", ""))
    for one, known in _options():
        if command == CONVERT or (source in known.source and to in known.to):
            yield one, known


def _options() -> Iterator[tuple[Field[Any], Option]]:
    yield from ((one, one.metadata["option"]) for one in fields(Options) if "option" in one.metadata)


def flag_of(one: Field[Any], command: str) -> str:
    """The flag of a field in a command; source and target are arguments without a flag in `convert`."""
    known: Option = one.metadata["option"]
    if command == CONVERT and one.name in POSITIONAL:
        return POSITIONAL[one.name]
    own = "--" + one.name.removesuffix("_bytes").removesuffix("_seconds").replace("_", "-")
    return (known.flags or {}).get(command, (own,))[0]


#: How `convert` calls its two arguments.
POSITIONAL = {"source": "SRC", "target": "DST"}


def path_flags(options: Options) -> tuple[str, str]:
    """What named the source and the target, for messages."""
    source, target = (one for one, _ in _options() if one.name in POSITIONAL)
    return flag_of(source, options.command), flag_of(target, options.command)


def given_flags(options: Options) -> frozenset[str]:
    """The flags that differ from their defaults, such as "--target-params-dtype"."""
    found = set()
    for one, known in options_of(options.command):
        value = getattr(options, one.name)
        if value != one.default:
            constants = (known.constants or {}).get(options.command, {})
            said = (flag for flag, (const, _) in constants.items() if const == value and known.kind == "iteration")
            found.add(next(said, flag_of(one, options.command)))
    return frozenset(found)


def check_together(options: Options) -> None:
    """Refuse options that have no meaning without another, or exclude each other.

    Raises:
        UsageError
    """
    if options.private and not options.push_to_hub:
        raise UsageError("nothing is uploaded", found="--private", remedy="add --push-to-hub org/name")
    if options.push_to_hub and options.save_per_node:
        raise UsageError(
            "no node has all files to upload",
            found="--push-to-hub with --save-per-node",
            remedy="convert without --push-to-hub, copy the nodes' directories into one DIRECTORY, then: dist-convert "
            f"push DIRECTORY {options.push_to_hub}",
        )
    sayings = ("pipeline_model_parallel_layout", "target_virtual_pipeline_parallel_size",
               "num_layers_per_virtual_pipeline_stage")  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name in sayings if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError(
            "two flags say how many virtual stages there are", found=" and ".join(given), remedy="give one of them"
        )


#: Kinds of values -> what they are, and how that is told.
_KINDS: Mapping[Kind, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "repository": ("text", lambda value: isinstance(value, str)),
    "path": ("a path", lambda value: isinstance(value, Path)),
    "switch": ("True or False", lambda value: isinstance(value, bool)),
    "count": ("a whole number of 1 or more", lambda value: type(value) is int and value > 0),
    "size": ("bytes, or text with a unit", lambda value: type(value) is int and value > 0),
    "seconds": (f"whole seconds up to {MOST_SECONDS}", lambda value: type(value) is int and 0 < value <= MOST_SECONDS),
    "iteration": (
        f"a whole number of 0 or more, or {RELEASE!r}",
        lambda value: value == RELEASE or (type(value) is int and value >= 0),
    ),
}


def check_values(options: Options) -> None:
    """Refuse values that the command line would not take, for options that come from a program.

    Raises:
        UsageError: all of them together; see `check_together`.
    """
    problems: list[ConversionError] = []
    for one, known in _options():
        value = getattr(options, one.name)
        if value == one.default or one.name in POSITIONAL:
            continue
        expected, fits = _KINDS[known.kind]
        if known.choices:
            expected = " or ".join(map(repr, known.choices))
        if value not in known.choices if known.choices else not fits(value):
            problems.append(UsageError(f"{one.name} has a wrong value", expected=expected, found=repr(value)))
    raise_together(problems)
    check_together(options)


def check_applies(options: Options, source: str) -> None:
    """Refuse options that have no meaning between two formats.

    Args:
        options: as they were given.
        source: the format of the source.

    Raises:
        UsageError: all of them together.
    """
    idle = [
        flag_of(one, options.command)
        for one, known in options_of(options.command)
        if getattr(options, one.name) != one.default and not (source in known.source and options.to in known.to)
    ]
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: no meaning in a conversion from {source} to {options.to}",
            remedy="leave it out" if len(idle) == 1 else "leave them out",
        )


def fingerprint(options: Options, source: str) -> dict[str, Any]:
    """What was asked for as far as the target depends on it, by the fields' names, in JSON values.

    Args:
        options: with what stands where they say nothing.
        source: the format of the source.
    """
    values = {
        one.name: getattr(options, one.name)
        for one, known in _options()
        if source in known.source and options.to in known.to and not known.is_free
    }
    return {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}


@dataclass(frozen=True)
class VerifyJob:
    """A comparison of two checkpoints. Field names are the flags' names; see `--help` for each.

    Sizes are in bytes. Paths are as this rank sees them (`{rank}` and its like already filled in).
    """

    a: Path
    b: Path
    ckpt_dir_name_a: str | None = None
    ckpt_dir_name_b: str | None = None
    habana_imported_experts_a: bool = False
    habana_imported_experts_b: bool = False
    true_vocab_size: int | None = None
    sample: Fraction = Fraction(1)
    max_memory_per_rank_bytes: int = 1_000_000_000
    json: bool = False
    timeout_seconds: int = 600


@dataclass(frozen=True)
class TokenizerJob:
    """One tokenizer for a model that is converted already. Field names are the flags' names; see `--help` for each."""

    source: Path
    target: Path
    source_model_type: str | None = None
    instruct: bool = False
    overwrite: bool = False
