"""`dist-convert tokenizer`: gives a converted model its tokenizer, or another one, and nothing else."""

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_convert.errors import TargetError, TargetExists, UsageError, below, shown_line
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.huggingface.config import architecture_from_config, with_special_ids
from dist_convert.formats.huggingface.read import ARGS_FILE, CONFIG_FILE, GENERATION_FILE, read_config
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
        UsageError: the source is no tokenizer, or the target no model, or one with fewer rows than it shall keep.
        SourceError: the tokenizer cannot be converted, or the target's config is no model's.
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
    config = read_config(job.target)
    with below(job.target):
        rows = architecture_from_config(config, zero_output_bias=True).vocab
    tokenizer, old = named_tokenizer(job.source, "SRC"), files_of(job.target)
    path = tokenizer.path
    if path is not None and tokenizer.kind in ("huggingface", "slow") and path.resolve() == job.target.resolve():
        raise UsageError("SRC and DST are the same directory", file=str(path))
    if old and not job.overwrite:
        remedy = "replace it with --overwrite"
        raise TargetExists("the model has a tokenizer", file=str(job.target), found=", ".join(old), remedy=remedy)
    style = style_of(tokenizer, config, job)
    kept, contents = job.true_vocab_size or rows, dict[str, bytes | Iterable[bytes]]()
    if kept < (needed := min(rows, tokenizer.size or rows)):
        what, remedy = "--true-vocab-size cuts rows of tokens", "keep a row for each token of the tokenizer"
        if not tokenizer.size:
            what, remedy = "the tokenizer does not tell how many tokens it has", "leave --true-vocab-size out"
        raise UsageError(what, file=str(job.target), expected=f"{needed} or more", found=kept, remedy=remedy)
    if kept != rows:
        from dist_convert.formats.huggingface.cut_rows import cut_vocabulary  # needs torch, which takes seconds

        contents |= cut_vocabulary(job.target, kept)
        config["vocab_size"] = kept
    cut = tuple(contents)
    args = read_json(job.target / ARGS_FILE) if (job.target / ARGS_FILE).is_file() else {}
    notes = notes_on_tokenizer(tokenizer, style, job.source_model_type)
    said = args.get("vocab_size")
    claims = {"tokenizer": tokenizer.size, "args": said if isinstance(said, int) else None}
    notes += vocabulary_warnings(claims, rows, kept)
    if tokenizer.size and tokenizer.size < kept:
        padding = f"vocabulary: {kept} rows for {tokenizer.size} tokens of the tokenizer"
        notes.append(f"{padding}; --true-vocab-size {tokenizer.size} cuts what is padding")
    print(*map(shown_line, notes), sep="\n", file=sys.stderr)

    generation = read_json(job.target / GENERATION_FILE) if (job.target / GENERATION_FILE).is_file() else {}
    changed = with_special_ids(config, generation, tokenizer, style, tokenizer.path)
    with tempfile.TemporaryDirectory() as scratch:
        names = write_tokenizer(tokenizer, style, Path(scratch))
        contents |= {name: (Path(scratch) / name).read_bytes() for name in names}
    contents |= {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in changed.items()}
    replace_files(job.target, contents)
    renew_manifest(job.target, gone=old, fresh=(*names, *changed, *cut))
    _remove(job.target, [name for name in old if name not in names])
    return (*names, *changed, *cut)


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
