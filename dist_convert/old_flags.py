"""Flags of Habana's `convert.py` that command lines in use today still have, and what they mean here."""

from __future__ import annotations

import argparse

from dist_convert.errors import UsageError
from dist_convert.models.architecture import Architecture

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

#: --model-size -> layers and hidden size.
_SIZES = {
    "llama2-7B": (32, 4096), "llama2-13B": (40, 5120), "llama2-70B": (80, 8192),
    "llama3-8B": (32, 4096), "llama3-70B": (80, 8192), "mistral-7B": (32, 4096), "yi-34B": (60, 7168),
}  # fmt: skip


def add_old_flags(command: argparse.ArgumentParser) -> None:
    """Accept the flags of the old tool that have no part in ours."""
    old = command.add_argument_group("accepted for command lines of Habana's convert.py")
    old.add_argument("--model-type", choices=("GPT",))
    old.add_argument("--loader", choices=("llama_mistral", "mixtral_hf"))
    old.add_argument("--saver", choices=("mcore", "core"))
    old.add_argument("--loader-transformer-impl", choices=("local", "transformer_engine"))
    old.add_argument("--checkpoint-type", choices=("hf", "meta"))
    old.add_argument("--max-queue-size", type=int)
    old.add_argument("--no-checking", action="store_const", const=True)
    old.add_argument("--megatron-path")
    old.add_argument("--vocab-file")
    old.add_argument("--model-size", help="checked against the config")


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
    given = (name for name in _WITHOUT_MEANING if getattr(flags, name, None) is not None)
    return [f"--{name.replace('_', '-')} has no effect: {_WITHOUT_MEANING[name]}" for name in given]


def check_model_size(model_size: str | None, architecture: Architecture) -> None:
    """Compare `--model-size` with the config.

    Raises:
        UsageError: they name different models, or the size is unknown.
    """
    if model_size is None or model_size == "qwen2.5":
        return
    expected = _SIZES.get(model_size.removesuffix("f"))
    if expected is None:
        raise UsageError("unknown --model-size", expected=", ".join(_SIZES), found=model_size)
    if expected != (architecture.layers, architecture.hidden):
        raise UsageError(
            "--model-size is not the model in --load-dir",
            expected=f"{model_size}: {expected[0]} layers, hidden size {expected[1]}",
            found=f"{architecture.layers} layers, hidden size {architecture.hidden}",
            remedy="give the right --load-dir, or leave --model-size out",
        )
