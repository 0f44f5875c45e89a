"""`dist-convert tokenizer`: gives a converted model its tokenizer, or another one, and cuts rows that no token has."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dist_convert.errors import CorruptFile, TargetError, TargetExists, UnsupportedModel, UsageError, below, shown_line
from dist_convert.formats.huggingface.config import architecture_from_config, with_special_ids
from dist_convert.formats.huggingface.files import INDEX_FILE, index_json, target_file, target_tensors
from dist_convert.formats.huggingface.open import open_huggingface
from dist_convert.formats.huggingface.read import ARGS_FILE, GENERATION_FILE, SAFETENSORS, check_inside, read_config
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.formats.tokenizer.find import named_tokenizer
from dist_convert.formats.tokenizer.huggingface import TEMPLATES, files_of, tokenizer_files
from dist_convert.formats.tokenizer.record import notes_on_tokenizer, style_of, vocabulary_warnings
from dist_convert.options import TokenizerJob
from dist_convert.ranks.collectives import alone
from dist_convert.read.source import opened_source, read_json
from dist_convert.records import StoredTensor, TargetFile, TensorSpec
from dist_convert.write.files import WAITING, Directory, go_on_replacing, held, replace_files
from dist_convert.write.manifest import renew_manifest
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.trees import remove

_BLOCK_BYTES = 4 << 20


def add_tokenizer(job: TokenizerJob) -> tuple[str, ...]:
    """Write the tokenizer into the model's directory and its special ids into the model's configs.

    Returns:
        The names of all files that are new or changed.

    Raises:
        UsageError: the source is no tokenizer, or the target a model with fewer rows than it shall keep.
        SourceError: the tokenizer cannot be converted, or the target's config is no model's.
        TargetExists: the target has a tokenizer, and `--overwrite` was not given.
        TargetBusy: another process gives it one.
        MissingPackage, TargetError
    """
    with held(job.target.resolve()) as root:
        waiting = go_on_replacing(root, TEMPLATES)
        refuse_unfinished(job.target)
        return _add(job, root, waiting)


def _add(job: TokenizerJob, root: Directory, waiting: Sequence[str]) -> tuple[str, ...]:
    """`add_tokenizer` to a model, of which a run before has listed files that were waiting for their names."""
    config = read_config(job.target)
    with below(job.target):
        rows = architecture_from_config(config, zero_output_bias=True).vocab
    tokenizer, old = named_tokenizer(job.source, "SRC"), files_of(job.target)
    path = tokenizer.path
    if path is not None and tokenizer.kind in ("huggingface", "slow") and path.samefile(job.target):
        raise UsageError("SRC and DST are the same directory", path)
    if old and not job.overwrite and not waiting:
        remedy = "replace it with --overwrite"
        raise TargetExists("the model has a tokenizer", job.target, found=", ".join(old), remedy=remedy)
    style = style_of(tokenizer, config, job)
    kept, contents = job.true_vocab_size or rows, dict[str, bytes | Iterable[bytes]]()
    if kept < (needed := min(rows, tokenizer.size or rows)):
        what, remedy = "--true-vocab-size would cut rows of tokens", "keep a row for each token of the tokenizer"
        if not tokenizer.size:
            what, remedy = "the tokenizer does not say how many tokens it has", "leave --true-vocab-size out"
        raise UsageError(what, job.target, expected=f"{needed} or more", found=kept, remedy=remedy)
    if kept != rows:
        contents |= _cut_vocabulary(job.target, kept)
        config["vocab_size"] = kept
    cut = tuple(contents)
    args = read_json(job.target / ARGS_FILE) if (job.target / ARGS_FILE).is_file() else {}
    notes = notes_on_tokenizer(tokenizer, style, job.source_model_type)
    said = args.get("vocab_size")
    claims = {"tokenizer": tokenizer.size, "args": said if isinstance(said, int) else None}
    notes += vocabulary_warnings(claims, rows, kept)
    if tokenizer.size and tokenizer.size < kept:
        padding = f"vocabulary: {kept} rows for {tokenizer.size} tokens of the tokenizer"
        notes.append(f"{padding}; --true-vocab-size {tokenizer.size} cuts the padding")
    print(*map(shown_line, notes), sep="\n", file=sys.stderr)

    if os.path.lexists(job.target / GENERATION_FILE):
        check_inside(job.target, GENERATION_FILE)  # its content is written again
    generation = read_json(job.target / GENERATION_FILE) if (job.target / GENERATION_FILE).is_file() else {}
    changed = with_special_ids(config, generation, tokenizer, style, tokenizer.path)
    files = dict(tokenizer_files(tokenizer, style))
    names = tuple(files)
    contents |= files | {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in changed.items()}
    replace_files(root, contents, waiting=waiting)
    fresh = dict.fromkeys((*names, *changed, *cut, *waiting))
    renew_manifest(job.target, gone=set(old) - fresh.keys(), fresh=fresh)
    _remove(root, [name for name in old if name not in names])
    remove(root, WAITING)
    return (*names, *changed, *cut)


def _cut_vocabulary(directory: Path, rows: int) -> dict[str, Iterable[bytes]]:
    """The files of a model that change where its vocabulary keeps so many rows: by name, their content in pieces.

    Raises:
        UsageError: it has fewer rows.
        SourceError: all that the headers show to be wrong; or no plain safetensors files.
    """
    model = open_huggingface(directory, alone())
    catalog, _ = model.catalog(with_tied_copies=True)
    architecture = catalog.architecture
    if rows > architecture.vocab:
        check_own_vocab(rows, architecture.vocab)
    if model.quantisation or not all(one.file.endswith(SAFETENSORS) for one in model.stored.values()):
        remedy = "convert it with --to huggingface first"
        raise UnsupportedModel("rows are cut from plain safetensors only", directory, remedy=remedy)
    smaller = replace(catalog, architecture=replace(architecture, vocab=rows))
    shapes = {name: shape for name, _, shape in target_tensors(smaller, None)}
    cut = {name for name, meta in catalog.tensors.items() if shapes.get(name, meta.shape) != meta.shape}
    stored = {view.tensor for name in cut for region in catalog.regions(name) for view in region.replicas}
    specs: dict[str, list[TensorSpec]] = {}
    for one in sorted(model.stored.values(), key=lambda one: (one.file, one.offset_bytes)):
        shape = (rows, *one.shape[1:]) if one.name in stored else one.shape
        specs.setdefault(one.file, []).append((one.name, one.dtype, shape))
    files = [target_file(name, of_file) for name, of_file in specs.items()]
    changed = {model.stored[name].file for name in stored}
    contents: dict[str, Iterable[bytes]] = {
        file.name: _pieces(directory, file, model.stored) for file in files if file.name in changed
    }
    index = index_json(files)
    return contents | ({INDEX_FILE: [index.encode()]} if index else {})


def _pieces(directory: Path, file: TargetFile, stored: Mapping[str, StoredTensor]) -> Iterator[bytes]:
    """A weights file of the first rows of stored tensors."""
    path = directory / file.name
    yield file.header
    with opened_source(path) as opened:
        for tensor in file.tensors:
            opened.seek(stored[tensor.name].offset_bytes)
            left_bytes = tensor.size_bytes
            while left_bytes:
                block = opened.read(min(left_bytes, _BLOCK_BYTES))
                if not block:
                    raise CorruptFile("the file ends early", path, tensor=tensor.name)
                left_bytes -= len(block)
                yield block


def _remove(root: Directory, obsolete: Sequence[str]) -> None:
    """Remove what only the old tokenizer had, now that the new one is complete."""
    try:
        for name in obsolete:
            remove(root, name)
    except OSError as error:
        what = "the new tokenizer is written, but a file of the old one cannot be removed"
        remedy = "remove it, or repeat the command with --overwrite"
        raise TargetError(what, error.filename, found=error.strerror or error, remedy=remedy) from error
    with contextlib.suppress(OSError):  # it is not there, or has others
        os.rmdir(TEMPLATES, dir_fd=root.descriptor)
