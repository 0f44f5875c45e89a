"""What is wrong with the paths that a command was given, as far as names of files tell it: before torch is imported."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_convert.errors import UsageError, below, called, collected, raise_together
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.huggingface.config import config_of_like
from dist_convert.formats.huggingface.hub import repository_and_revision
from dist_convert.formats.huggingface.read import CONFIG_FILE, find_weights, is_huggingface, read_config
from dist_convert.formats.megatron.iterations import no_iteration, tracked_name
from dist_convert.formats.megatron.target_args import read_training_args
from dist_convert.formats.meta.params import weights_files
from dist_convert.formats.tokenizer.find import named_tokenizer
from dist_convert.models.catalog import NAME_FLAG
from dist_convert.options import HUGGINGFACE, PAIRS, TORCH, Options, TokenizerJob, VerifyJob
from dist_convert.read.source import no_directory
from dist_convert.write.partial import refuse_unfinished


def check_paths(job: Options | VerifyJob | TokenizerJob) -> None:
    """Refuse paths that hold nothing to work with, where no other rank could see them.

    Raises:
        ConversionError: all that the command itself would say of them after its start.
    """
    if isinstance(job, TokenizerJob):
        _check_tokenizer(job)
        return
    if isinstance(job, VerifyJob):
        sides = (("A", job.a, job.ckpt_dir_name_a), ("B", job.b, job.ckpt_dir_name_b))
        checks: list[Callable[[], object]] = [partial(_check_side, *side) for side in sides]
    else:
        path = Path(job.source)
        wrong = collected([partial(_check_source, job)]) if job.source else []
        is_unknown = bool(wrong) or not job.source
        has_args = is_unknown or (path.is_dir() and not is_huggingface(path))
        checks = [partial(raise_together, wrong)]
        if job.tokenizer is not None and has_args and not os.path.lexists(job.tokenizer):
            checks.append(partial(named_tokenizer, job.tokenizer, "--tokenizer"))
        if job.source_margs_file is not None and (is_unknown or not has_args):
            checks.append(partial(read_training_args, job.source_margs_file))
    if job.like is not None:
        checks.append(partial(config_of_like, job.like))
    raise_together(collected(checks))


def _check_side(letter: str, path: Path, name: str | None) -> None:
    with called(f"{letter} ({path})"):
        check_checkpoint(path, name, f"{NAME_FLAG}-{letter.lower()}")


def _check_source(job: Options) -> None:
    kind, path = PAIRS.get(job.command, ("",))[0], Path(job.source)
    if kind == TORCH or path.is_dir():
        check_checkpoint(path, job.ckpt_dir_name, kind=kind)
        return
    refuse_unfinished(path, job.ckpt_dir_name)
    refuse_foreign(path)
    repository_and_revision(job.source)


def check_checkpoint(path: Path, name: str | None = None, name_flag: str = NAME_FLAG, *, kind: str = "") -> None:
    """Refuse a path that holds no checkpoint.

    Args:
        path: a directory of any format, or the root or an iteration of a Megatron checkpoint.
        name: of the iteration, where `name_flag` was given.
        kind: its format, where the command is bound to one.

    Raises:
        ConversionError: see `open_checkpoint`.
    """
    refuse_unfinished(path, name)
    refuse_foreign(path)
    if not path.is_dir():
        raise no_directory(path, "checkpoint")
    if weights_files(path):
        return
    if kind == HUGGINGFACE or (not kind and is_huggingface(path)):
        with below(path):
            find_weights(path)
            read_config(path)
    else:
        name = name or tracked_name(path, name_flag)
        if name is None or not (path / name).is_dir():
            raise no_iteration(path, name, name_flag)
        refuse_foreign(path / name)


def _check_tokenizer(job: TokenizerJob) -> None:
    refuse_foreign(job.target)
    if not (job.target / CONFIG_FILE).is_file():
        refuse_unfinished(job.target)
        what, expected = "DST is not a converted model", f"a Hugging Face directory with {CONFIG_FILE}"
        found = f"no {CONFIG_FILE}" if job.target.is_dir() else "no such directory"
        raise UsageError(what, job.target, expected, found, remedy="give the --save-path of the conversion")
    if not os.path.lexists(job.source):
        named_tokenizer(job.source, "SRC")
