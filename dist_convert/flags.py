"""The flags of every command, on the command line and in YAML files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_convert.errors import UsageError
from dist_convert.flag_names import suggestion
from dist_convert.flag_values import positive, repository, seconds, size
from dist_convert.flags_ranks import add_ranks
from dist_convert.job import DEVICES, PLACEMENTS, SOURCE_MODEL_TYPES, TARGET_DTYPES, VERIFICATIONS, Job
from dist_convert.job_file import flags_of_file
from dist_convert.rank_numbers import with_numbers
from dist_convert.version import __version__

#: Flags without which no command that has them can start.
_REQUIRED = ("--load-path", "--save-path", "--load-dir", "--save-dir")


class Parser(argparse.ArgumentParser):
    """Raises its errors instead of exiting, so that one rank prints them; knows flags by their whole names only."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def add_switch(group: Any, flag: str, help_text: str) -> None:
    """A flag that is off, and that the command line can switch off again where a job file has it on."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=f"{help_text} (default: off)")


def add_size(group: Any, flag: str, default: str, help_text: str) -> None:
    """A flag that takes a size in bytes."""
    shown = f"{help_text}, such as 512MB or 2GiB (default: {default})"
    group.add_argument(flag, metavar="SIZE", type=size, default=default, help=shown)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    parser = Parser(prog="dist-convert", description="Convert checkpoints between Megatron-LM and Hugging Face.")
    parser.add_argument("--version", action="version", version=f"dist-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from dist_convert.flags_push import add_push
    from dist_convert.flags_to_megatron import add_hf_to_megatron  # they use the types above
    from dist_convert.flags_tokenizer import add_tokenizer_command
    from dist_convert.flags_verify import add_verify

    _add_megatron_to_hf(commands)
    add_hf_to_megatron(commands)
    add_tokenizer_command(commands)
    add_push(commands)
    add_verify(commands)
    inspect = commands.add_parser("inspect", help="describe a checkpoint of either kind from its headers")
    inspect.add_argument("path", type=Path, help="a Megatron checkpoint or a Hugging Face directory")
    inspect.add_argument(
        "--ckpt-dir-name", metavar="NAME", help="iteration directory (default: what the tracker file says)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON (default: text)")
    return parser, commands.choices


def _add_megatron_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "megatron-to-hf",
        help="convert a Megatron checkpoint to a Hugging Face directory",
        description="Convert a Megatron checkpoint to a Hugging Face directory. --ranks or torchrun share the work "
        "among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in --load-path and --save-path are replaced by this rank's numbers.",
    )
    source = command.add_argument_group("source")
    source.add_argument("--load-path", metavar="PATH", help="(required) root of the Megatron checkpoint")
    source.add_argument(
        "--ckpt-dir-name", metavar="NAME", help="iteration directory, such as iter_0000004 (default: the tracker file)"
    )
    said = (
        "decides special tokens of a tokenizer.model; else checked against the checkpoint's args, which win (default: "
        "from the args)"
    )
    source.add_argument("--source-model-type", choices=SOURCE_MODEL_TYPES, help=said)
    source.add_argument(
        "--true-vocab-size", metavar="N", type=positive, help="tokens without padding (default: args, then tokenizer)"
    )
    which = (
        "directory, tokenizer.model, or org/name of a model in the hub's cache (default: what the args name, here or "
        "beside the checkpoint)"
    )
    source.add_argument("--tokenizer", metavar="PATH", type=Path, help=which)
    add_switch(
        source,
        "--habana-imported-experts",
        "read Mixtral experts as Habana's own HF-to-Megatron converter wrote them at TP > 1: gate and up not "
        "interleaved over ranks. Use it only on a checkpoint that came straight from that converter, never on one "
        "that was trained since",
    )
    target = command.add_argument_group("target")
    target.add_argument("--save-path", metavar="PATH", help="(required) Hugging Face directory to be made")
    add_switch(
        target,
        "--save-per-node",
        "--save-path lies on each node's own disk: a node gets some of the weights files whole, and all files that are "
        "no weights; all nodes' directories copied into one are the model",
    )
    target.add_argument(
        "--target-params-dtype",
        choices=tuple(TARGET_DTYPES),
        default="bf16",
        help="dtype of the weights stored in the checkpoint's params dtype; others keep theirs (default: bf16)",
    )
    add_switch(target, "--allow-overflow", "accept values that become infinite in fp16")
    add_size(target, "--max-shard-size", "5GB", "of a weights file, at most")
    add_switch(target, "--instruct", "write end-of-turn tokens, sampling defaults, chat template of an instruct model")
    add_switch(target, "--save-capacity-bins", "write Habana's capacity_bins.pt")
    add_switch(target, "--overwrite", "replace an existing target")
    target.add_argument(
        "--push-to-hub",
        metavar="org/name",
        type=repository,
        help="upload the finished directory to this repository, which is made if it is not there (default: no upload)",
    )
    add_switch(target, "--private", "with --push-to-hub: for members only; a public repository is refused")
    add_run_flags(command)


def add_timeout(group: Any) -> None:
    """How long ranks wait for each other."""
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        dest="timeout_seconds",
        type=seconds,
        default=600,
        help="that ranks wait for one of them that is silent (default: 600)",
    )


def add_run_flags(command: argparse.ArgumentParser) -> None:
    """Flags that both directions have."""
    run = command.add_argument_group("run")
    run.add_argument(
        "--device", choices=DEVICES, default="auto", help="that collectives use (default: auto, what is there)"
    )
    run.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="auto",
        help="gather: each rank reads its own shards and the group gathers; direct: each rank reads what it writes "
        "(default: auto, direct on the CPU where every rank sees every file, else gather)",
    )
    add_ranks(run)
    add_size(run, "--max-memory-per-rank", "1GB", "of the buffers of each rank")
    add_timeout(run)
    run.add_argument(
        "--verify",
        nargs="?",
        choices=VERIFICATIONS,
        const="full",
        help="compare what was written with the source before it gets its name: all of it, or a sample (default: off)",
    )
    run.add_argument(
        "--no-verify", dest="verify", action="store_const", const=None, help="do not (default: as the job file says)"
    )
    run.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write down where the time of every rank goes, in Chrome's trace format (default: off)",
    )
    add_switch(run, "--dry-run", "show what each rank would do; exit 0 if it would start")
    run.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML file with any of these flags; the command line wins"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line, with those of a `--config` file behind them.

    Raises:
        UsageError: an unknown flag or a wrong value, on the command line or in the file, or no source or target.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args([*argv[1:]])[0].config
    parser, commands = build_parser()
    if config and argv[0] in ("megatron-to-hf", "hf-to-megatron"):
        commands[argv[0]].set_defaults(**flags_of_file(commands[argv[0]], config))
    flags, unknown = parser.parse_known_args([*argv])
    program = f"dist-convert {flags.command}"
    if unknown:
        known = [flag for action in commands[flags.command]._actions for flag in action.option_strings]
        raise UsageError(
            f"{program}: unrecognized arguments: {' '.join(unknown)}",
            remedy=f"see {program} --help{suggestion(unknown, known)}",
        )
    missing = [flag for flag in _REQUIRED if getattr(flags, flag[2:].replace("-", "_"), "") is None]
    if missing:  # checked here: argparse would name these first, and hide a misspelt one
        raise UsageError(f"{program}: {' and '.join(missing)} must be given", remedy=f"see {program} --help")
    return flags


def job_from_flags(flags: argparse.Namespace) -> Job:
    """The job of `megatron-to-hf`.

    Raises:
        UsageError: a flag that has no meaning without another.
    """
    if flags.private and not flags.push_to_hub:
        raise UsageError("nothing is uploaded", found="--private", remedy="add --push-to-hub org/name")
    if flags.push_to_hub and flags.save_per_node:
        raise UsageError(
            "no node has all files to upload",
            found="--push-to-hub with --save-per-node",
            remedy="convert without --push-to-hub, copy the nodes' directories into one DIRECTORY, then: dist-convert "
            f"push DIRECTORY {flags.push_to_hub}",
        )
    return Job(
        load_path=Path(with_numbers(flags.load_path)),
        save_path=Path(with_numbers(flags.save_path)).resolve(),
        save_per_node=flags.save_per_node,
        ckpt_dir_name=flags.ckpt_dir_name,
        target_params_dtype=flags.target_params_dtype,
        source_model_type=flags.source_model_type,
        instruct=flags.instruct,
        save_capacity_bins=flags.save_capacity_bins,
        max_shard_size_bytes=flags.max_shard_size,
        true_vocab_size=flags.true_vocab_size,
        tokenizer=flags.tokenizer,
        habana_imported_experts=flags.habana_imported_experts,
        allow_overflow=flags.allow_overflow,
        device=flags.device,
        placement=flags.placement,
        max_memory_per_rank_bytes=flags.max_memory_per_rank,
        dry_run=flags.dry_run,
        overwrite=flags.overwrite,
        push_to_hub=flags.push_to_hub,
        private=flags.private,
        timeout_seconds=flags.timeout_seconds,
        verify=flags.verify,
        trace=flags.trace,
    )
