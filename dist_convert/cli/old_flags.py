"""Flags of Habana's `convert.py` that command lines in use today still have, and what they mean here."""

from __future__ import annotations

import argparse
from typing import Any

#: Flag -> why it means nothing any more, and what argparse is to know of its values.
_OLD_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--model-type": ("the model is always GPT", {"choices": ("GPT",)}),
    "--loader": ("the config tells the family", {"choices": ("llama_mistral", "mixtral_hf")}),
    "--saver": ("the target is always Megatron-Core's", {"choices": ("mcore", "core")}),
    "--checkpoint-type": ("the files tell", {"choices": ("hf", "meta")}),
    "--loader-transformer-impl": ("the source has one spelling", {"choices": ("local", "transformer_engine")}),
    "--max-queue-size": ("there is no queue", {"type": int, "metavar": "N"}),
    "--no-checking": ("the plan is always checked", {"action": "store_const", "const": True}),
    "--megatron-path": ("Megatron is not needed", {"metavar": "DIR"}),
    "--vocab-file": ("the config has the vocabulary's size", {"metavar": "FILE"}),
}

#: (command, flag) -> how the old tool spells it.
OLD_SPELLINGS = {("hf-to-megatron", "--target-expert-parallel-size"): "--target-expert-paralell-size"}


def add_old_flags(command: argparse.ArgumentParser) -> None:
    """Accept the flags of the old tool that have no part in ours."""
    for flag, (_, values) in _OLD_FLAGS.items():
        command.add_argument(flag, help=argparse.SUPPRESS, **values)


def notes_on_old_flags(flags: argparse.Namespace) -> list[str]:
    """One line for each flag that was given and means nothing any more."""
    given = [flag for flag in _OLD_FLAGS if getattr(flags, flag[2:].replace("-", "_"), None) is not None]
    notes = [f"{flag} has no effect: {_OLD_FLAGS[flag][0]}" for flag in given]
    if given and flags.saver_transformer_impl in (None, "transformer_engine"):
        notes.append("norms get the names of NVIDIA's Transformer Engine; Gaudi needs --saver-transformer-impl habana")
    return notes
