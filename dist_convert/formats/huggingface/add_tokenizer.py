"""`dist-convert tokenizer`: gives a converted model its tokenizer, or another one, and nothing else."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dist_convert.errors import TargetError, TargetExists, UsageError, shown_line
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.huggingface.config import published, with_special_ids
from dist_convert.formats.huggingface.read import ARGS_FILE, CONFIG_FILE, GENERATION_FILE
from dist_convert.formats.tokenizer.find import named_tokenizer
from dist_convert.formats.tokenizer.huggingface import TEMPLATES, files_of, write_tokenizer
from dist_convert.formats.tokenizer.record import notes_on_tokenizer, style_of, vocabulary_warnings
from dist_convert.options import TokenizerJob
from dist_convert.read.source import read_json
from dist_convert.write.files import replace_files
from dist_convert.write.manifest import renew_manifest
from dist_convert.write.partial import refuse_unfinished


def add_tokenizer(job: TokenizerJob) -> tuple[str, ...]:
    """Write the tokenizer into the model's directory and its special ids into the model's configs.

    Returns:
        The names of all files that are new or changed.

    Raises:
        UsageError: the source is no tokenizer, or the target no model.
        SourceError: the tokenizer cannot be converted.
        TargetExists: the target has a tokenizer, and `--overwrite` was not given.
        MissingPackage, TargetError
    """
    refuse_foreign(job.target)
    refuse_unfinished(job.target)
    if not (job.target / CONFIG_FILE).is_file():
        raise UsageError(
            "DST is not a converted model",
            file=str(job.target),
            expected=f"a Hugging Face directory with {CONFIG_FILE}",
            found=f"no {CONFIG_FILE}" if job.target.is_dir() else "no such directory",
            remedy="give the --save-path of the conversion",
        )
    config = read_json(job.target / CONFIG_FILE)
    tokenizer, old = named_tokenizer(job.source, "SRC"), files_of(job.target)
    path = tokenizer.path
    if path is not None and tokenizer.kind in ("huggingface", "slow") and path.resolve() == job.target.resolve():
        raise UsageError("SRC and DST are the same directory", file=str(path))
    if old and not job.overwrite:
        remedy = "replace it with --overwrite"
        raise TargetExists("the model has a tokenizer", file=str(job.target), found=", ".join(old), remedy=remedy)
    style = style_of(tokenizer, config, job)
    rows = int(config.get("vocab_size") or 0)
    args = read_json(job.target / ARGS_FILE) if (job.target / ARGS_FILE).is_file() else {}
    notes = notes_on_tokenizer(tokenizer, style, job.source_model_type)
    notes += vocabulary_warnings({"tokenizer": tokenizer.size, "args": args.get("vocab_size")}, rows, rows)
    print(*map(shown_line, notes), sep="\n", file=sys.stderr)

    generation = job.target / GENERATION_FILE
    changed = published(config, tokenizer.path) or with_special_ids(
        config, read_json(generation) if generation.is_file() else {}, tokenizer, style
    )
    with tempfile.TemporaryDirectory() as scratch:
        names = write_tokenizer(tokenizer, style, Path(scratch))
        contents = {name: (Path(scratch) / name).read_bytes() for name in names}
    contents |= {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in changed.items()}
    replace_files(job.target, contents)
    renew_manifest(job.target, gone=old, fresh=(*names, *changed))
    _remove(job.target, [name for name in old if name not in names])
    return (*names, *changed)


def _remove(target: Path, obsolete: Sequence[str]) -> None:
    """Remove what only the old tokenizer had, now that the new one is complete."""
    try:
        for name in obsolete:
            (target / name).unlink(missing_ok=True)
        if (target / TEMPLATES).is_dir() and not any((target / TEMPLATES).iterdir()):
            (target / TEMPLATES).rmdir()
    except OSError as error:
        raise TargetError(
            "the new tokenizer is written, but a file of the old one cannot be removed",
            file=str(error.filename or target),
            found=error.strerror or str(error),
            remedy="remove it, or repeat the command with --overwrite",
        ) from error
