"""Flags of Habana's `convert.py` that command lines in use today still have, and what they mean here."""

from __future__ import annotations

import argparse
from typing import Any

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

#: --model-size -> layers, hidden size, width of the MLP, vocabulary.
_SIZES = {
    "llama2-7B": (32, 4096, 11008, 32000), "llama2-13B": (40, 5120, 13824, 32000),
    "llama2-70B": (80, 8192, 28672, 32000), "llama3-8B": (32, 4096, 14336, 128256),
    "llama3-70B": (80, 8192, 28672, 128256), "mistral-7B": (32, 4096, 14336, 32000),
    "yi-34B": (60, 7168, 20480, 64000),
}  # fmt: skip


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
    found = (architecture.layers, architecture.hidden, architecture.ffn, architecture.vocab)
    if expected != found:
        raise UsageError(
            "--model-size is not the model in --load-dir",
            expected=f"{model_size}: layers, hidden size, MLP width and vocabulary {expected}",
            found=f"{found}",
            remedy="give the right --load-dir, or leave --model-size out",
        )
