"""The flags of `hf-to-megatron`, those of Habana's `convert.py` included, and what the old ones mean here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dist_convert.cli.flags import add_run_flags, add_switch, positive, positive_or_zero, with_numbers
from dist_convert.errors import UsageError
from dist_convert.formats.torch.target_args import EXPERT_LAYOUTS, TRANSFORMER_IMPLS
from dist_convert.job import TARGET_DTYPES, ToMegatronJob

#: Flag -> why it means nothing any more.
_WITHOUT_MEANING = {
    "model_type": "the model is always GPT",
    "loader": "the config tells the family",
    "saver": "the target is always Megatron-Core's",
    "loader_transformer_impl": "the source has one spelling",
    "max_queue_size": "there is no queue",
    "no_checking": "the plan is always checked",
    "megatron_path": "Megatron is not needed",
    "vocab_file": "the config has the vocabulary's size",
}

#: Flag -> what argparse is to know of its values.
_OLD_FLAGS: dict[str, dict[str, Any]] = {
    "--model-type": {"choices": ("GPT",)},
    "--loader": {"choices": ("llama_mistral", "mixtral_hf")},
    "--saver": {"choices": ("mcore", "core")},
    "--loader-transformer-impl": {"choices": ("local", "transformer_engine")},
    "--max-queue-size": {"type": int, "metavar": "N"},
    "--no-checking": {"action": "store_const", "const": True},
    "--megatron-path": {"metavar": "DIR"},
    "--vocab-file": {"metavar": "FILE"},
}


def add_old_flags(command: argparse.ArgumentParser) -> None:
    """Accept the flags of the old tool that have no part in ours."""
    old = command.add_argument_group("accepted for command lines of Habana's convert.py")
    for flag, values in _OLD_FLAGS.items():
        meaning = f"no effect: {_WITHOUT_MEANING[flag[2:].replace('-', '_')]}"
        old.add_argument(flag, help=meaning, **values)
    old.add_argument("--checkpoint-type", choices=("hf", "meta"), help="hf; meta, original Llama files, is refused")
    old.add_argument("--model-size", metavar="NAME", help="such as llama3-70B: checked against the config")


def notes_on_old_flags(flags: argparse.Namespace) -> list[str]:
    """One line for each flag that was given and means nothing any more.

    Raises:
        UsageError: `--checkpoint-type meta`.
    """
    if flags.checkpoint_type == "meta":
        raise UsageError(
            "original Llama checkpoints (consolidated.*.pth) are not read yet",
            found="--checkpoint-type meta",
            remedy="convert them with transformers' convert_llama_weights_to_hf.py first",
        )
    given = [name for name in _WITHOUT_MEANING if getattr(flags, name, None) is not None]
    notes = [f"--{name.replace('_', '-')} has no effect: {_WITHOUT_MEANING[name]}" for name in given]
    if given and flags.saver_transformer_impl == "transformer_engine":
        notes.append("norms get the names of NVIDIA's Transformer Engine; Gaudi needs --saver-transformer-impl habana")
    return notes


VOCAB_PADDINGS = ("last-row", "zeros")


def add_hf_to_megatron(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    command = commands.add_parser(
        "hf-to-megatron",
        help="convert a Hugging Face model to a Megatron checkpoint",
        description="Convert a Hugging Face model to a Megatron checkpoint at any parallel grid. "
        "--ranks or torchrun share the work among ranks; alone it is one rank.",
        epilog="{rank}, {local_rank} and {node} in --save-dir are replaced by this rank's numbers.",
    )
    source = command.add_argument_group("source")
    source.add_argument(
        "--load-dir", metavar="DIR", help="(required) Hugging Face directory, or a hub id (org/name[@revision])"
    )
    source.add_argument(
        "--source-margs-file",
        metavar="FILE",
        type=Path,
        help="source_megatron_args.json of an earlier conversion (default: args follow from config.json)",
    )
    add_switch(source, "--load-capacity-bins", "take over capacity_bins.pt (same grid only)")
    source.add_argument(
        "--tokenizer-model", metavar="PATH", help="path or hub id (org/name), for the args (default: the model's own)"
    )
    source.add_argument("--tokenizer-type", metavar="NAME", help="Megatron's name of its kind (default: by the model)")
    target = command.add_argument_group("target")
    target.add_argument("--save-dir", metavar="DIR", help="(required) root of the Megatron checkpoint")
    which = target.add_mutually_exclusive_group()
    which.add_argument(
        "--iteration", metavar="N", type=positive_or_zero, default=1, help="number of the iteration (default: 1)"
    )
    which.add_argument(
        "--release", action="store_const", const=None, dest="iteration", help="write a release instead of an iteration"
    )
    for axis in ("tensor", "pipeline"):
        flag = f"--target-{axis}-parallel-size"
        target.add_argument(
            flag, type=positive, metavar="N", help=f"{axis} parallel ranks (default: the margs file's, else 1)"
        )
    experts = ("--target-expert-parallel-size", "--target-expert-paralell-size")
    target.add_argument(*experts, type=positive, metavar="N", help="expert parallel ranks (default: 1)")
    target.add_argument(
        "--target-expert-tensor-parallel-size",
        type=positive,
        metavar="N",
        help="tensor parallel ranks within an expert (default: the tensor size)",
    )
    target.add_argument(
        "--target-virtual-pipeline-parallel-size", type=positive, metavar="N", help="virtual stages (default: 1)"
    )
    target.add_argument(
        "--num-layers-per-virtual-pipeline-stage", type=positive, metavar="N", help="the same, by layers of a stage"
    )
    target.add_argument(
        "--decoder-first-pipeline-num-layers",
        type=positive,
        metavar="N",
        help="layers of the first stage (default: even)",
    )
    target.add_argument(
        "--decoder-last-pipeline-num-layers",
        type=positive,
        metavar="N",
        help="layers of the last stage (default: even)",
    )
    target.add_argument(
        "--pipeline-model-parallel-layout",
        metavar="LAYOUT",
        help="stages one by one, such as Ettt|(tttt|)*2ttL (default: even)",
    )
    target.add_argument(
        "--target-ranks-per-node",
        type=positive,
        metavar="N",
        help="--save-dir lies on each node's own disk, and training will run N processes on each of these nodes: a "
        "node gets the rank directories that its processes load (default: --save-dir is shared)",
    )
    target.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=128,
        metavar="N",
        help="the vocabulary is padded to a multiple of it on every tensor parallel rank (default: 128)",
    )
    target.add_argument("--true-vocab-size", metavar="N", type=positive, help="checked against the config")
    target.add_argument(
        "--vocab-padding", choices=VOCAB_PADDINGS, default="last-row", help="what padding rows hold (default: last-row)"
    )
    dtype = target.add_mutually_exclusive_group()
    dtype.add_argument(
        "--target-params-dtype",
        choices=tuple(TARGET_DTYPES),
        default="keep",
        help="dtype of the weights stored in the model's main dtype; others keep theirs (default: keep)",
    )
    dtype.add_argument(
        "--bf16",
        action="store_const",
        const="bf16",
        dest="target_params_dtype",
        help="the same as --target-params-dtype bf16",
    )
    dtype.add_argument(
        "--fp16",
        action="store_const",
        const="fp16",
        dest="target_params_dtype",
        help="the same as --target-params-dtype fp16",
    )
    add_switch(target, "--allow-overflow", "accept values that become infinite in fp16")
    target.add_argument(
        "--saver-transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default="transformer_engine",
        help="spelling of the norms (default: transformer_engine)",
    )
    target.add_argument(
        "--expert-layout",
        choices=EXPERT_LAYOUTS,
        default="sequential",
        help="spelling of the experts (default: sequential)",
    )
    add_switch(target, "--overwrite", "replace this iteration if it exists")
    add_run_flags(command)
    command.add_argument(
        "--verbose", action="store_true", help="say where each of the target's args comes from (default: off)"
    )
    add_old_flags(command)


def to_megatron_job_from_flags(flags: argparse.Namespace) -> ToMegatronJob:
    """The job of `hf-to-megatron`.

    Raises:
        UsageError: flags that exclude each other.
    """
    names = ToMegatronJob.__dataclass_fields__.keys() - {"max_memory_per_rank_bytes", "save_dir"}
    values = {name: getattr(flags, name) for name in names}
    sayings = ("pipeline_model_parallel_layout", "target_virtual_pipeline_parallel_size",
               "num_layers_per_virtual_pipeline_stage")  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name in sayings if values[name] is not None]
    if len(given) > 1:
        raise UsageError(
            "two flags say how many virtual stages there are", found=" and ".join(given), remedy="give one of them"
        )
    return ToMegatronJob(
        save_dir=Path(with_numbers(flags.save_dir)).resolve(),
        max_memory_per_rank_bytes=flags.max_memory_per_rank,
        **values,
    )
