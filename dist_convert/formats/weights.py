"""A checkpoint of any format, read lazily from Python under the names that Hugging Face publishes.

Only headers are read on opening. A tensor is put together from its shards when it is asked for.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_convert.errors import BudgetTooSmall, UsageError
from dist_convert.formats.huggingface.config import TORCH_NAMES
from dist_convert.formats.huggingface.open import configs_of
from dist_convert.formats.huggingface.read import CONFIG_FILE
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.formats.open import open_checkpoint, read_like
from dist_convert.models.catalog import Catalog, Where
from dist_convert.options import Options, check_applies
from dist_convert.ranks.collectives import alone
from dist_convert.read.discover import Discovery
from dist_convert.read.file_reader import Buffer, FileReader, make_buffer, read_box
from dist_convert.read.record_checks import RecordChecks
from dist_convert.records import DTYPE_BYTES, Box, JsonObject, human_bytes, parse_bytes
from dist_convert.write.partial import refuse_unfinished

#: What is read at once where values are cast or put beside others: the processor's own cache holds it.
_BLOCK_BYTES = 1 << 20
#: From here on a tensor has pages of its own.
_LARGE_BYTES = 2 << 20
_READERS = 2
#: Buffers of `tensors(reuse=True)`: one in the caller's hands, the others being filled.
_BUFFERS = _READERS + 1

#: Reads files, with a block for values that are put beside others.
_Reader = tuple[FileReader, Buffer]


def open_weights(job: Options, dtype: torch.dtype | str | None, device: torch.device | str) -> "Weights":
    """See `dist_convert.open`; `job` is a conversion to Hugging Face, whose target nobody makes."""
    where = Where(Path(job.source), job, read_like(job.like, alone()))
    refuse_unfinished(where.path, job.ckpt_dir_name)
    model = open_checkpoint(where, alone())
    check_applies(job, model.format)
    catalog, _ = model.catalog()
    if model.args is None:
        check_own_vocab(job.true_vocab_size, catalog.architecture.vocab)
    stored = _safetensors_name(dtype) or catalog.params_dtype
    config = configs_of(model, catalog.architecture, stored, job)[CONFIG_FILE]
    return Weights(model.directory, config, catalog, model.found, _safetensors_name(dtype), torch.device(device))


def _safetensors_name(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None:
        return None
    by_name = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
    name = by_name.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise UsageError("not a dtype of weights", expected=", ".join(by_name), found=dtype)
    return name


@dataclass
class _Own:
    """What each process has for itself: a fork may have come while another thread held a lock."""

    lock: threading.Lock
    checks: RecordChecks
    reader: _Reader | None = None


class Weights:
    """An open checkpoint; made by `dist_convert.open`. It can be pickled, and used by several threads.

    Attributes:
        config: the Hugging Face config of the model.
    """

    def __init__(
        self,
        directory: Path,
        config: JsonObject,
        catalog: Catalog,
        found: Discovery,
        dtype: str | None,
        device: torch.device,
    ) -> None:
        self.config = dict(config)
        self._directory = directory
        self._catalog = catalog
        self._found = found
        self._dtype = dtype
        self._device = device
        self._processes: dict[int, _Own] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with the process that has opened them."""
        return vars(self) | {"_processes": {}}

    @property
    def _own(self) -> _Own:
        process = os.getpid()
        if process not in self._processes:  # several threads may come here at once
            self._processes.setdefault(process, _Own(threading.Lock(), RecordChecks(self._found.checksums)))
        return self._processes[process]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        own = self._own
        with own.lock:
            if own.reader is not None:
                own.reader[0].close()
            own.reader = None

    def keys(self) -> list[str]:
        """The names of all tensors, in the order of the layers."""
        return list(self._catalog.tensors)

    def get_slice(self, name: str) -> "Slice":
        """A tensor of which parts can be read, as `safetensors.safe_open` has it; a KeyError where it is none."""
        return Slice(self, name, self._catalog.tensors[name].shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor; a KeyError where it is none, a SourceError where it cannot be read whole or has changed."""
        return self.read(name, self._catalog.tensors[name].box).view(self._catalog.tensors[name].shape)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A box of a tensor, as rows x columns."""
        own = self._own
        with own.lock:
            own.reader = own.reader or self._new_reader()
            return self._filled(own.reader, name, box, None).to(self._device)

    def tensors(self, max_memory: str | int = "1GB", *, reuse: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name, in the order of the files, read ahead of the one that is looked at.

        Args:
            max_memory: of the tensors that are being read, in bytes or with a unit.
            reuse: give views of buffers that are used again: a tensor is valid until the next one is asked for.

        Raises:
            BudgetTooSmall: it does not hold the largest tensor.
            SourceError: see `get_tensor`.
        """
        budget_bytes = parse_bytes(str(max_memory))
        tensors = self._catalog.tensors.items()
        sizes = {name: meta.box.elements * DTYPE_BYTES[self._dtype_of(name)] for name, meta in tensors}
        largest = max(sizes, key=lambda name: sizes[name])
        if sizes[largest] > budget_bytes:
            what = "the memory does not hold the largest tensor"
            expected = f"max_memory of {human_bytes(sizes[largest])}"
            raise BudgetTooSmall(what, tensor=largest, expected=f"{expected} or more", found=human_bytes(budget_bytes))
        return self._stream(sorted(sizes, key=self._place), sizes, budget_bytes, reuse=reuse)

    def _stream(
        self, names: list[str], sizes: Mapping[str, int], budget_bytes: int, *, reuse: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        largest_bytes = max(sizes.values())
        # The buffer that was free last is filled first: its pages are there, and the processor's cache may have them.
        buffers = min(_BUFFERS, budget_bytes // largest_bytes) if reuse else 0
        free = [make_buffer(largest_bytes) for _ in range(buffers)]
        readers = [self._new_reader() for _ in range(_READERS)]
        waiting, reading = deque(names), deque[tuple[str, Buffer | None, Future[torch.Tensor]]]()
        read_bytes = 0

        def read(name: str, buffer: Buffer | None) -> torch.Tensor:
            reader = readers.pop()  # there is one for each thread
            try:
                meta = self._catalog.tensors[name]
                return self._filled(reader, name, meta.box, buffer).view(meta.shape)
            finally:
                readers.append(reader)

        with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as threads:
            try:
                while waiting or reading:
                    while waiting and (free if reuse else read_bytes + sizes[waiting[0]] <= budget_bytes):
                        name = waiting.popleft()
                        buffer = free.pop() if reuse else None
                        reading.append((name, buffer, threads.submit(read, name, buffer)))
                        read_bytes += sizes[name]
                    name, buffer, future = reading.popleft()
                    tensor = future.result()
                    read_bytes -= sizes[name]
                    yield name, tensor.to(self._device)
                    del tensor, future
                    if buffer is not None:
                        free.append(buffer)
            finally:
                threads.shutdown(cancel_futures=True)
                for files, _ in readers:
                    files.close()

    def _filled(self, reader: _Reader, name: str, box: Box, buffer: Buffer | None) -> torch.Tensor:
        """A box of a tensor as rows x columns, in a buffer or in memory of its own."""
        files, block = reader
        dtype = self._dtype_of(name)
        if buffer is None and (size_bytes := box.elements * DTYPE_BYTES[dtype]) >= _LARGE_BYTES:
            buffer = make_buffer(size_bytes)
        elif buffer is None:  # of torch's, as there may be many
            tensor = torch.empty(size_bytes, dtype=torch.uint8)
            buffer = Buffer(tensor.numpy().data, tensor)
        return read_box(files, self._catalog.regions(name), box, dtype, buffer, block)

    def _place(self, name: str) -> tuple[str, int]:
        view = next((view for region in self._catalog.regions(name) for view in region.replicas), None)
        return (view.file, view.offset_bytes) if view else ("", 0)

    def _dtype_of(self, name: str) -> str:
        return self._dtype or self._catalog.tensors[name].dtype

    def _new_reader(self) -> _Reader:
        scratch, block = make_buffer(2 * _BLOCK_BYTES), make_buffer(_BLOCK_BYTES)
        return FileReader(self._directory, scratch, self._found.listing, self._own.checks), block


class Slice:
    """A tensor that is read in parts: `slice[:64]`, `slice[3, 8:16]`."""

    def __init__(self, weights: Weights, name: str, shape: tuple[int, ...]) -> None:
        self._weights, self._name, self._shape = weights, name, shape

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self._shape)

    def __getitem__(self, wanted: Any) -> torch.Tensor:
        """The rows and columns that are asked for, by numbers and by slices, as of a torch.Tensor."""
        indices = wanted if isinstance(wanted, tuple) else (wanted,)
        if len(indices) > len(self._shape) or any(not isinstance(index, int | slice) for index in indices):
            raise IndexError(f"{self._name} has {len(self._shape)} dimensions; asked for {wanted!r}")
        spans: list[range] = []
        inside: list[int | slice] = []  # of the box that is read
        for size, index in zip(self._shape, (*indices, *[slice(None)] * (2 - len(indices))), strict=False):
            if isinstance(index, slice) and index.step is not None and index.step < 1:
                raise ValueError(f"steps of a slice are 1 or more, not {index.step}")  # as torch says
            chosen = range(size)[index]
            if isinstance(chosen, int):
                spans.append(range(chosen, chosen + 1))
                inside.append(0)
            else:  # with steps, all from the first to the last is read
                spans.append(range(chosen[0], chosen[-1] + 1) if chosen else range(0))
                inside.append(slice(None, None, chosen.step))
        rows, columns = spans[0], spans[1] if len(spans) > 1 else range(1)
        found = self._weights.read(self._name, Box(rows.start, columns.start, len(rows), len(columns)))
        found = found if len(spans) > 1 else found[:, 0]
        return found[tuple(inside)].contiguous()
