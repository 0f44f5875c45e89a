"""`.metadata` of a distributed checkpoint, pickled by hand: the same bytes with every version of Python and torch.

The classes are those of torch.distributed.checkpoint, which are named and not imported. Opcodes: CPython's pickletools.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_convert.read.dcp import Blob, SavedTensor
from dist_convert.read.restricted_pickle import DTYPES

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class _Named:
    """A class, a function or a dtype."""

    module: str
    name: str


@dataclass(frozen=True)
class _Called:
    """What a function or class makes of its arguments."""

    named: _Named
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class _Object:
    """An instance of a class with its attributes; None for a class without any."""

    named: _Named
    state: Mapping[str, object] | tuple[object, ...] | None


@dataclass(frozen=True)
class _Items:
    """A dict, whose keys may be objects."""

    items: Iterable[tuple[object, object]]


_TORCH_NAMES = {dtype: name for name, dtype in DTYPES.items() if not name.endswith("Storage")}


def metadata_bytes(
    tensors: Mapping[str, SavedTensor], objects: Mapping[str, Blob], *, has_paths: bool = False
) -> bytes:
    """What `read.dcp.read_metadata` and torch read as these tensors and objects.

    `has_paths` says where in a state dict each tensor belongs, as `dcp_to_torch_save` wants it: under its own key.
    """
    state = [(key, _tensor(tensor)) for key, tensor in tensors.items()]
    state += [(key, _Object(_Named(_MODULE, "BytesStorageMetadata"), None)) for key in objects]
    places = [(_index(key, None), _place(blob)) for key, blob in objects.items()]
    places += [
        (_index(key, chunk.offsets), _place(chunk.blob)) for key, tensor in tensors.items() for chunk in tensor.chunks
    ]
    metadata = {
        "state_dict_metadata": _Items(state),
        "planner_data": _Items([(key, (key,)) for key in tensors]) if has_paths else None,
        "storage_data": _Items(places),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return _Pickle().dumps(_Object(_Named(_MODULE, "Metadata"), metadata))


def _size(numbers: tuple[int, ...]) -> _Called:
    return _Called(_Named("torch", "Size"), (numbers,))


def _tensor(tensor: SavedTensor) -> _Object:
    strided = _Called(_Named("torch.serialization", "_get_layout"), ("torch.strided",))
    preserve = _Called(_Named(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))  # of torch.contiguous_format
    dtype = _Named("torch", _TORCH_NAMES[tensor.dtype])
    properties = _Object(_Named(_MODULE, "TensorProperties"), (dtype, strided, False, preserve, False))
    chunks = [
        _Object(_Named(_MODULE, "ChunkStorageMetadata"), {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
        for chunk in tensor.chunks
    ]
    state = {"properties": properties, "size": _size(tensor.shape), "chunks": chunks}
    return _Object(_Named(_MODULE, "TensorStorageMetadata"), state)


def _index(key: str, offsets: tuple[int, ...] | None) -> _Object:
    offset = None if offsets is None else _size(offsets)
    return _Object(_Named(_MODULE, "MetadataIndex"), {"fqn": key, "offset": offset, "index": None})


def _place(blob: Blob) -> _Object:
    state = {"relative_path": blob.file, "offset": blob.offset_bytes, "length": blob.size_bytes}
    return _Object(_Named("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


class _Pickle:
    """Writes protocol 2. Equal strings and names are written once."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[str | _Named, int] = {}

    def dumps(self, value: object) -> bytes:
        """A whole pickle."""
        self._write(value)
        return bytes(self._out + b".")

    def _write(self, value: object) -> None:
        if value is None or isinstance(value, bool):
            self._out += {None: b"N", False: b"\x89", True: b"\x88"}[value]
        elif isinstance(value, int):
            data = value.to_bytes(9, "little", signed=True)
            self._out += b"J" + data[:4] if value < 1 << 31 else b"\x8a\x09" + data
        elif isinstance(value, str | _Named):
            self._write_once(value)
        elif isinstance(value, tuple):
            self._write_all(b"(", value, b"t")
        elif isinstance(value, list):
            self._write_all(b"](", value, b"e")
        elif isinstance(value, _Items | Mapping):
            items = value.items if isinstance(value, _Items) else value.items()
            self._write_all(b"}(", (one for item in items for one in item), b"u")
        elif isinstance(value, _Called):
            self._write_all(b"", (value.named, value.arguments), b"R")
        elif isinstance(value, _Object):
            self._write_all(b"", (value.named,), b")\x81")
            if value.state is not None:
                self._write_all(b"", (value.state,), b"b")
        else:
            raise TypeError(value)

    def _write_all(self, before: bytes, values: Iterable[object], after: bytes) -> None:
        self._out += before
        for value in values:
            self._write(value)
        self._out += after

    def _write_once(self, value: str | _Named) -> None:
        if value in self._memo:
            self._out += b"j" + self._memo[value].to_bytes(4, "little")
            return
        place = len(self._memo).to_bytes(4, "little")
        self._memo[value] = len(self._memo)
        if isinstance(value, str):
            data = value.encode()
            self._out += b"X" + len(data).to_bytes(4, "little") + data + b"r" + place
        else:
            self._out += f"c{value.module}\n{value.name}\n".encode() + b"r" + place
