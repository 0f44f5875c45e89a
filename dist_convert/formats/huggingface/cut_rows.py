"""Cuts the padding of a model's vocabulary, once its true size is known: files that hold some are written anew."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.formats.huggingface.files import INDEX_FILE, index_json, target_file, target_tensors
from dist_convert.formats.huggingface.open import open_huggingface
from dist_convert.formats.huggingface.read import SAFETENSORS
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.ranks.collectives import alone
from dist_convert.read.source import reading
from dist_convert.records import StoredTensor, TargetFile, TensorSpec

_BLOCK_BYTES = 4 << 20


def cut_vocabulary(directory: Path, rows: int) -> dict[str, Iterable[bytes]]:
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
        what, remedy = "rows are cut from plain safetensors only", "convert it with --to huggingface first"
        raise UnsupportedModel(what, file=str(directory), remedy=remedy)
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
    with reading(path), path.open("rb") as opened:
        for tensor in file.tensors:
            opened.seek(stored[tensor.name].offset_bytes)
            left_bytes = tensor.size_bytes
            while left_bytes:
                block = opened.read(min(left_bytes, _BLOCK_BYTES))
                if not block:
                    raise CorruptFile("the file ends early", tensor=tensor.name, file=str(path))
                left_bytes -= len(block)
                yield block
