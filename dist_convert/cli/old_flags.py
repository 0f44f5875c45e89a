"""Flags of Habana's `convert.py` that command lines in use today still have, and what they mean here."""

from __future__ import annotations

import argparse
from typing import Any

from dist_convert.errors import UsageError

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
    if given and flags.saver_transformer_impl in (None, "transformer_engine"):
        notes.append("norms get the names of NVIDIA's Transformer Engine; Gaudi needs --saver-transformer-impl habana")
    return notes
