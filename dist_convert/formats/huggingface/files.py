"""The Hugging Face weights files before any data: names, headers, sizes and every tensor's place, and their catalog.

File format: https://huggingface.co/docs/safetensors ("Format"); names and index: docs/formats.md, "Shards and index".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from dist_convert.errors import UnsupportedModel
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog, open_catalog
from dist_convert.formats.huggingface.names import published
from dist_convert.formats.huggingface.read import WEIGHTS_KINDS
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Catalog
from dist_convert.models.schema import Architecture, alias_shape, copies_of, entries
from dist_convert.records import DTYPE_BYTES, StoredTensor, TargetFile, TensorSpec, row_major

#: Data begins at a multiple of this, the size of a page. What is written then lies in memory and in the file's pages at
#: like offsets: processors copy at half their speed where the file's is a few bytes further. The format wants eight.
_DATA_ALIGNMENT_BYTES = 4096
_LENGTH_BYTES = 8
#: Says in which of several files each tensor is.
INDEX_FILE = WEIGHTS_KINDS[0][0]


def target_tensors(source: Catalog, target_dtype: str | None) -> list[TensorSpec]:
    """What is to be written of a model: tensors of its main dtype in another one, the others as they are stored.

    Raises:
        UnsupportedModel: what is published as one tensor is stored in several dtypes.
    """
    main_dtype, sizes = source.params_dtype, source.architecture.sizes()
    family = FAMILIES[source.architecture.family]
    copies = copies_of(family, source.architecture)
    specs: dict[str, TensorSpec] = {}
    for row, layer, expert in entries(family, source.architecture):
        for part in row.parts:
            dtype = source.tensors[part.name.format(layer=layer, expert=expert)].dtype_in(target_dtype, main_dtype)
            alias = published(part)
            name = alias.name.format(layer=layer, expert=expert)
            spec = specs.setdefault(name, (name, dtype, alias_shape(part, alias, sizes)))
            if spec[1] != dtype:
                what, remedy = "a tensor has parts of different dtypes", "give a --target-params-dtype other than keep"
                raise UnsupportedModel(
                    what, tensor=name, expected=f"one dtype, as {spec[1]}", found=dtype, remedy=remedy
                )
            specs |= {copy: (copy, *spec[1:]) for copy in copies.get(name, ())}
    return list(specs.values())


def lay_out_files(specs: Iterable[TensorSpec], max_shard_size_bytes: int) -> tuple[TargetFile, ...]:
    """Fill files in the given order of tensors, a new one where the next tensor would exceed the size.

    As `save_pretrained` does, sizes count tensor bytes and a tensor larger than the limit has a file of its own, while
    the file before it stays open.
    """
    groups = []
    current: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        size_bytes = DTYPE_BYTES[spec[1]] * prod(spec[2])
        if size_bytes > max_shard_size_bytes:
            groups.append([spec])
            continue
        if filled + size_bytes > max_shard_size_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(spec)
        filled += size_bytes
    groups += [current] if current else []
    total = len(groups)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    return tuple(map(target_file, names if total > 1 else ["model.safetensors"], groups))


def target_file(name: str, specs: Sequence[TensorSpec]) -> TargetFile:
    """A weights file of some tensors."""
    # Readers view the data in place, so wider elements come first and every tensor is aligned to its own.
    ordered = sorted(specs, key=lambda spec: -DTYPE_BYTES[spec[1]])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors, end = [], 0
    for tensor, dtype, shape in ordered:
        tensors.append(StoredTensor(tensor, name, dtype, shape, row_major(shape), end))
        end += tensors[-1].size_bytes
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [tensors[-1].offset_bytes, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _DATA_ALIGNMENT_BYTES)
    prefix = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    placed = tuple(replace(one, offset_bytes=len(prefix) + one.offset_bytes) for one in tensors)
    return TargetFile(name, prefix, len(prefix) + end, placed)


def catalog_of_files(
    architecture: Architecture, files: Iterable[TargetFile], chunks: Mapping[str, Stored] | None = None
) -> HuggingFaceCatalog:
    """The catalog of weights files that are to be written; their tensors are whole, or those that lie in chunks."""
    whole = [tensor.whole for tensor in chunks.values()] if chunks else [one for file in files for one in file.tensors]
    catalog, _ = open_catalog({tensor.name: tensor for tensor in whole}, architecture, chunks=chunks)
    return replace(catalog, is_owned=False)


def index_json(files: Sequence[TargetFile]) -> str | None:
    """The text of the index file, or None where there is a single file."""
    if len(files) == 1:
        return None
    tensors = [tensor for file in files for tensor in file.tensors]
    index = {
        "metadata": {
            "total_size": sum(tensor.size_bytes for tensor in tensors),
            "total_parameters": sum(tensor.elements for tensor in tensors),
        },
        "weight_map": {tensor.name: tensor.file for tensor in tensors},
    }
    return json.dumps(index, indent=2) + "\n"
