"""What the commands are for: the words of their help, with three examples each, and what others call them.

Habana's `convert.py` has flags that command lines in use today still have; here is what they mean.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """The words of one command.

    Attributes:
        usage: its arguments, in one line.
        help: what it does, for the list of commands.
        paths: their names in its namespace, and what they are.
        examples: of its arguments.
        more: what the description says after that.
        ranks: several ranks can share the work.
    """

    usage: str
    help: str
    paths: Mapping[str, str]
    examples: tuple[str, str, str]
    more: str = ""
    ranks: bool = False

    @property
    def description(self) -> str:
        shared = " With --ranks or torchrun, several ranks share the work." if self.ranks else ""
        return f"{self.help[0].upper()}{self.help[1:]}.{self.more}{shared}"


COMMANDS: Mapping[str, Command] = {
    "convert": Command(
        "SRC DST --to {huggingface,torch,torch_dist,dcp} [FLAG ...]",
        "convert a checkpoint to another format, grid, dtype or size of files",
        {
            "source": "root or iteration of a Megatron checkpoint, directory of Hugging Face or PyTorch DCP, Meta's "
            "files, or a hub id (org/name)",
            "target": "Hugging Face or DCP directory, or root of a Megatron checkpoint, to create",
        },
        (
            "/ckpts/llama /out/llama-hf --to huggingface --ranks 4",
            "/hf/llama /ckpts/llama --to torch --tp 8 --pp 4 --dry-run",
            "/ckpts/llama /ckpts/llama-tp1 --to torch_dist --tp 1 --pp 1",
        ),
        " The format of the source is detected.",
        ranks=True,
    ),
    "megatron-to-hf": Command(
        "--load-path PATH --save-path PATH [FLAG ...]",
        "convert a Megatron checkpoint to a Hugging Face directory",
        {
            "source": "(required) root of the Megatron checkpoint",
            "target": "(required) Hugging Face directory to create",
        },
        (
            "--load-path /ckpts/llama --save-path /out/llama-hf --ranks 4",
            "--load-path /ckpts/llama --save-path /out/llama-hf --ckpt-dir-name iter_0004000 --verify",
            "--config job.yaml --dry-run",
        ),
        ranks=True,
    ),
    "hf-to-megatron": Command(
        "--load-dir PATH --save-dir PATH [FLAG ...]",
        "convert a Hugging Face model to a Megatron checkpoint at any parallel grid",
        {
            "source": "(required) Hugging Face directory, or a hub id (org/name[@revision])",
            "target": "(required) root of the Megatron checkpoint",
        },
        (
            "--load-dir /hf/llama --save-dir /ckpts/llama --tp 8 --pp 4",
            "--load-dir org/name --save-dir /ckpts/llama --tp 2 --target-format torch_dist",
            "--load-dir /hf/mixtral --save-dir /ckpts/mixtral --tp 2 --ep 8 --bf16 --ranks 4",
        ),
        ranks=True,
    ),
    "verify": Command(
        "A B [FLAG ...]",
        "compare two checkpoints of any format: exit code 0 if they hold the same model, else 1",
        {"a": "first checkpoint: what B was made from", "b": "second checkpoint"},
        (
            "/ckpts/llama /out/llama-hf",
            "/ckpts/llama /out/llama-hf --sample --ranks 4",
            "/hf/llama /ckpts/llama --json",
        ),
        " Compares every tensor bit for bit (A is rounded to B's dtype where they differ), all copies within each "
        "checkpoint, the config and the vocabulary.",
        ranks=True,
    ),
    "inspect": Command(
        "PATH [FLAG ...]",
        "describe a checkpoint of any format from its headers",
        {"path": "Megatron checkpoint, directory of Hugging Face or PyTorch DCP, or Meta's files"},
        ("/ckpts/llama", "/ckpts/llama --ckpt-dir-name iter_0004000", "/hf/llama --json"),
    ),
    "models": Command(
        "[--json]",
        "list the model families that can be converted, and those that are refused and why",
        {},
        ("> models.txt", "--json", "--json > models.json"),
    ),
    "tokenizer": Command(
        "SRC DST [FLAG ...]",
        "add a tokenizer to a converted model, copied or built",
        {
            "source": "directory of a Hugging Face tokenizer; tokenizer.model of Llama 2, Llama 3, Mistral or Mixtral, "
            "or its directory; or org/name of a model in the hub's cache",
            "target": "directory of the converted model",
        },
        (
            "/hf/llama /out/llama-hf",
            "/tokenizers/llama3/tokenizer.model /out/llama-hf --instruct",
            "org/name /out/llama-hf --overwrite",
        ),
        " Updates the special ids in config.json and generation_config.json; weights stay as they are.",
    ),
    "push": Command(
        "DIRECTORY org/name [FLAG ...]",
        "upload a finished Hugging Face directory, or the files that the hub lacks",
        {"directory": "finished Hugging Face directory"},
        ("/out/llama-hf org/name", "/out/llama-hf org/name --private", ". org/name"),
    ),
    "completion": Command(
        "{bash,zsh,tcsh}",
        "print the completion script of a shell",
        {},
        (
            "bash > ~/.local/share/bash-completion/completions/dist-convert",
            "zsh > ~/.zfunc/_dist-convert",
            "tcsh > ~/.dist-convert.tcsh",
        ),
    ),
}

#: What others call a command, and what it is called here.
OTHER_NAMES = {"compare": "verify", "diff": "verify", "check": "verify", "info": "inspect", "show": "inspect"} | {
    "describe": "inspect", "upload": "push", "reshard": "convert", "to-hf": "megatron-to-hf",
    "to-megatron": "hf-to-megatron",
}  # fmt: skip
#: What others call a flag, and the option here, or the flag and its value; "" where none here means the same.
OTHER_FLAGS = {
    "--input": "source", "--input-dir": "source", "--model": "source", "--load": "source",
    "--output": "target", "--output-dir": "target", "--out": "target", "--save": "target",
    "--format": "to", "--ckpt-format": "to", "--saver": "to", "--ckpt-step": "ckpt_dir_name", "--hf-config": "like",
    "--nproc": "ranks", "--nproc-per-node": "ranks", "--num-processes": "ranks", "-v": "--version",
    "--bf16": "--target-params-dtype bf16", "--fp16": "--target-params-dtype fp16",
    "--fp32": "--target-params-dtype fp32", "--torch-dtype": "target_params_dtype",
    "--load-format": "", "--num-layers": "", "--model-type": "",
}  # fmt: skip
#: What others call a format, and what it is called here.
OTHER_FORMATS = {
    "hf": "huggingface", "transformers": "huggingface", "safetensors": "huggingface",
    "megatron": "torch_dist or torch", "mcore": "torch_dist or torch",
}  # fmt: skip

#: Flag -> why it means nothing any more, and what argparse is to know of its values.
_OLD_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--model-type": ("the model is always GPT", {"choices": ("GPT",)}),
    "--loader": ("the config tells the family", {"choices": ("llama_mistral", "mixtral_hf")}),
    "--saver": ("the target is always Megatron-Core's", {"choices": ("mcore", "core")}),
    "--checkpoint-type": ("the files tell", {"choices": ("hf", "meta")}),
    "--loader-transformer-impl": ("the source is a Hugging Face model", {"choices": ("local", "transformer_engine")}),
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
