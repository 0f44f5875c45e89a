"""Checkpoints as arrays in memory: the copies of a plan are done with numpy, in place of files, reader and writer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from dist_convert.formats.megatron.args import architecture_from_args
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import Shard
from dist_convert.formats.torch.survey import open_catalog
from dist_convert.plan.content import Content
from dist_convert.plan.copies import bands
from dist_convert.records import Copy, StoredTensor, View
from tests import checkpoints
from tests.plan.headers import plan_to_huggingface, row_major

#: File -> its bytes as float32 numbers; what is not a tensor is NaN.
Image = dict[str, np.ndarray]

_GAP = np.full(3, np.nan, np.float32)


@dataclass(frozen=True)
class Made:
    """A checkpoint in memory: its plan, itself as a target, its files, and the Hugging Face tensors of its model."""

    content: Content
    target: TorchCatalog
    source: Image
    expected: dict[str, np.ndarray]


def make(
    model: checkpoints.Model,
    grid: checkpoints.Grid,
    *,
    norms: str = "local",
    experts: str = "sequential",
    max_shard_size_bytes: int = 100_000,
) -> Made:
    """A checkpoint in which every element of the model is another whole number."""
    hf, number = {}, 0
    for name, tensor in checkpoints.hf_tensors(model).items():
        hf[name] = torch.arange(number, number + tensor.numel()).reshape(tensor.shape).float()
        number += tensor.numel()
    assert number < 1 << 24, "float32 holds no more different whole numbers"
    saved = checkpoints.megatron_shards(model, hf, grid, norms=norms, experts=experts)
    args = vars(checkpoints.training_args(model, grid, moe_permuted_weights="transposed" not in experts))
    source, shards = _stored_back_to_front(saved, args)
    architecture = architecture_from_args(args, vocab=None, file="")
    content = plan_to_huggingface(shards, architecture, max_shard_size_bytes=max_shard_size_bytes)
    target, _ = open_catalog(shards, architecture, with_tied_copies=True)
    return Made(content, target, source, {name: tensor.numpy() for name, tensor in hf.items()})


def _stored_back_to_front(
    saved: Mapping[str, list[checkpoints.State]], args: dict[str, Any]
) -> tuple[Image, dict[str, Shard]]:
    """Each file as one buffer that holds its tensors from the last to the first, with gaps, and the headers."""
    image, shards = {}, {}
    for directory, chunks in saved.items():
        file = f"{directory}/model_optim_rng.pt"
        buffer, stored = [_GAP], [dict[str, StoredTensor]() for _ in chunks]
        for virtual in reversed(range(len(chunks))):
            prefix = f"model{virtual}." if len(chunks) > 1 else ""
            for name, value in reversed(chunks[virtual].items()):
                if value is not None:
                    array, start_bytes = value.numpy(), 4 * sum(map(len, buffer))
                    stored[virtual][name] = StoredTensor(
                        prefix + name, file, "F32", array.shape, row_major(array.shape), start_bytes
                    )
                    buffer += [array.reshape(-1), _GAP]
        image[file] = np.concatenate(buffer)
        opaque: tuple[dict[str, str], ...] = tuple({} for _ in chunks)
        shards[file] = Shard(file, image[file].nbytes, 4, args, tuple(stored), opaque)
    return image, shards


def shards_of(made: Made) -> TorchCatalog:
    """The catalog of its files."""
    catalog = made.content.ends.source
    assert isinstance(catalog, TorchCatalog)
    return catalog


def copies(content: Content) -> Iterator[Copy]:
    """All copies of a conversion."""
    for transfer in content.transfers:
        for band in bands(content.ends, transfer.names):
            yield from band


def seen(image: Image, view: View, item_bytes: int = 4) -> np.ndarray:
    """What a view names in a file, as a matrix that can be written."""
    first, strides = view.offset_bytes // 4, (view.row_stride * item_bytes, view.column_stride * item_bytes)
    return as_strided(image[view.file][first:], (view.rows, view.columns), strides)


def copied(made: Made, copies: Iterable[Copy]) -> dict[str, np.ndarray]:
    """The target's tensors, found by the headers of its files, after all copies are done.

    Raises:
        AssertionError: an element is written twice, or equal copies of a shard differ.
    """
    target = {file.name: np.full(file.size_bytes // 4, np.nan, np.float32) for file in made.content.files}
    for copy in copies:
        values = [seen(made.source, view) for view in copy.sources]
        assert all((value == values[0]).all() for value in values), copy
        for view in copy.targets:
            assert np.isnan(seen(target, view)).all(), f"written twice: {view}"
            seen(target, view)[:] = values[0] + copy.add
    tensors = {}
    for file in made.content.files:
        header = json.loads(file.header[8:])
        for name in header.keys() - {"__metadata__"}:
            start = (len(file.header) + header[name]["data_offsets"][0]) // 4
            tensors[name] = target[file.name][start:][: prod(header[name]["shape"])].reshape(header[name]["shape"])
    return tensors


def assert_rebuilt(made: Made, copies: Iterable[Copy]) -> None:
    """The copies must make exactly the tensors that the checkpoint was made from; NaN is what none has written."""
    found = copied(made, copies)
    assert sorted(found) == sorted(made.expected)
    for name, values in made.expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
