"""Reads a checkpoint's pickle without importing or calling anything that it names.

Every global becomes an inert record that remembers its name and arguments. What is not on the lists below
(docs/formats.md, "Pickled classes") is refused: a checkpoint that tries to run code is reported, not half read. The
pure Python unpickler is used on purpose: the C one allocates by indexes found in the pickle, gigabytes for ten bytes.
"""

from __future__ import annotations

import io
import pickle
import signal
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dist_convert.errors import CorruptFile, UnsafePickle

#: torch's storage classes and scalar types, by safetensors name.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
    "UInt16Storage": "U16", "UInt32Storage": "U32", "UInt64Storage": "U64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip

#: Everything below these packages may be named; it is neither imported nor called.
INERT_PACKAGES = ("megatron", "transformer_engine", "habana_frameworks", "intel_transformer_engine", "apex")
_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "long", "object",
    "range", "set", "slice", "str", "tuple", "unicode", "xrange",
}  # fmt: skip
INERT_GLOBALS = {
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "__builtin__": _BUILTINS,
    "builtins": _BUILTINS,
    "collections": {"Counter", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "datetime": {"datetime", "timedelta", "timezone"},
    "fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "io": {"BytesIO"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy.dtypes": {"Float32DType", "Float64DType", "Int64DType", "UInt32DType", "UInt64DType"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "signal": {"Signals"},
    "torch": {"Generator", "Size", "Tensor", "device"},
    "torch._C": {"Generator"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch._utils": {"_rebuild_device_tensor_from_numpy", "_rebuild_wrapper_subclass"},
    "torch.nn.parameter": {"Parameter"},
    "torch.optim.adam": {"Adam"},
    "torch.optim.adamw": {"AdamW"},
    "torch.serialization": {"_get_layout"},
    "types": {"SimpleNamespace"},
}  # fmt: skip


@dataclass(frozen=True)
class Dtype:
    """A `torch.dtype` in the pickle, by safetensors name and by torch's."""

    name: str
    torch_name: str


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle refers to: record `data/{key}` of the container."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class Tensor:
    """A tensor over a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands for an object of a class that is not imported; keeps what it was made from."""

    __slots__ = ("arguments", "class_name", "state")

    def __init__(self, class_name: str, arguments: tuple[Any, ...]) -> None:
        self.class_name = class_name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> Inert:
        """Stay inert where a pickle calls what it got from a call."""
        return Inert(self.class_name, arguments)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items that some classes are filled with."""

    def append(self, value: Any) -> None:
        """Accept the list items that some classes are filled with."""

    def extend(self, values: Any) -> None:
        """Accept the list items that some classes are filled with."""

    def __repr__(self) -> str:
        return f"<{self.class_name}>"


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names; calling it makes a record of the call."""

    name: str

    def __call__(self, *arguments: Any) -> Inert:
        return Inert(self.name, arguments)


#: Items in a dict key. Keys of checkpoints are names and numbers, and the nodes of nested tuples at most.
_MAX_KEY_ITEMS = 64


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    whole = isinstance(offset, int) and all(isinstance(n, int) and n >= 0 for n in (*shape, *strides))
    if not isinstance(storage, Storage) or not whole or len(shape) != len(strides) or offset < 0:
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("a tensor without a storage or dtype")
    return _rebuild_tensor(Storage(storage.key, dtype.name, storage.elements), offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_with_attributes(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with Python attributes, or of a subclass, which may bring a function of its own."""
    return function(*arguments)


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_typed_tensor,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}


# The pure Python unpickler is private by name only; typeshed does not know it.
class _Unpickler(pickle._Unpickler):
    """Opcodes that would hash, allocate or overwrite what the pickle says are replaced by careful ones."""

    # What typeshed leaves out of the base class.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}

    def __init__(self, data: bytes, label: str) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._label = label
        self._size_bytes = len(data)

    def _load_build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Inert):
            instance.state = state
        elif not isinstance(instance, OrderedDict):  # whose state is metadata of modules
            raise pickle.UnpicklingError("state for an object that has none")

    def _load_newobj(self) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        self.append(named(*arguments))

    def _load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments; nothing is made from them
        self._load_newobj()

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size_bytes:
            raise pickle.UnpicklingError("a byte array longer than the pickle")
        self.append(bytearray(self.read(length)))

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_checked_key(key)] = value

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_checked_key(key)] = value

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_checked_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _load_additems(self) -> None:
        items = [_checked_key(item) for item in self.pop_mark()]
        self.stack[-1].update(items)

    def _load_frozenset(self) -> None:
        items = [_checked_key(item) for item in self.pop_mark()]
        self.append(frozenset(items))

    dispatch |= {
        pickle.BUILD[0]: _load_build,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.DICT[0]: _load_dict,
        pickle.ADDITEMS[0]: _load_additems,
        pickle.FROZENSET[0]: _load_frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Answer every global with something of ours, or refuse it."""
        if not module or not name:
            raise pickle.UnpicklingError("a global without a name")
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            return _rebuild_with_attributes
        if module == "torch._utils" and name in _REBUILD:
            return _REBUILD[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Dtype(STORAGES[name], name)
        if module == "torch" and name in DTYPES:
            return Dtype(DTYPES[name], f"torch.{name}")
        if module == "signal" and name in signal.Signals.__members__:  # as some Python versions pickle its members
            return Inert("signal.Signals", (signal.Signals[name].value,))
        if module.partition(".")[0] in INERT_PACKAGES or name in INERT_GLOBALS.get(module, ()):
            return Global(f"{module}.{name}")
        raise UnsafePickle(
            f"the pickle names {module}.{name}, which no checkpoint needs; nothing was run",
            file=self._label,
            expected="tensors, args and the state classes of Megatron, Transformer Engine, torch and numpy",
            found=f"{module}.{name}",
            remedy="do not load this file with torch.load; find out where it comes from",
        )

    def persistent_load(self, saved_id: Any) -> Storage:
        """A storage reference: ("storage", class, key, location, elements)."""
        if not (isinstance(saved_id, tuple) and len(saved_id) == 5 and saved_id[0] == "storage"):
            raise pickle.UnpicklingError("an unknown persistent id")
        _, kind, key, _location, elements = saved_id
        if not (isinstance(kind, Dtype) and isinstance(key, str) and isinstance(elements, int)):
            raise pickle.UnpicklingError("a damaged storage reference")
        return Storage(key, kind.name, elements)


def _checked_key(key: Any) -> Any:
    """A dict key that is cheap to hash: hashing a tuple hashes all that it holds, however deep and however often."""
    waiting, seen = [key], 0
    while waiting:
        item = waiting.pop()
        seen += 1
        if seen > _MAX_KEY_ITEMS:
            raise pickle.UnpicklingError("a dict key that holds too much")
        if isinstance(item, tuple):
            waiting += item
    return key


def load(data: bytes, label: str) -> Any:
    """The pickled object, with inert records in place of every class.

    Args:
        data: the pickle.
        label: how messages name the file.

    Raises:
        UnsafePickle: it names a global that is not on the lists above.
        CorruptFile: it is not a pickle that torch.save writes.
    """
    try:
        if data[-1:] != pickle.STOP:
            raise EOFError("the pickle has no end")
        return _Unpickler(data, label).load()
    except UnsafePickle:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
        OverflowError, RecursionError, AssertionError, struct.error,
    ) as error:  # fmt: skip
        raise CorruptFile(
            "damaged pickle",
            file=label,
            found=f"{type(error).__name__}: {error}",
            remedy="copy the file again from the machine that saved it",
        ) from error


#: Members of the two enums that every `args` holds, as `str()` of the real ones prints them.
_ENUM_MEMBERS: dict[tuple[str, object], str] = {
    ("ModelType", 1): "encoder_or_decoder",
    ("AttnBackend", 1): "flash", ("AttnBackend", 2): "fused", ("AttnBackend", 3): "unfused",
    ("AttnBackend", 4): "local", ("AttnBackend", 5): "auto",
}  # fmt: skip

#: Training arguments are some hundred values, a few levels deep. A pickle can share one list a million times.
_MAX_DEPTH = 16
_MAX_VALUES = 200_000
_MAX_INTEGER_BITS = 1024
_CUT = "..."


def plain_dict(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Every value of a mapping as JSON, cut where it is deeper or larger than any training arguments."""
    converter = _Converter()
    return {converter.text(key): converter.plain(value, 0) for key, value in values.items()}


class _Converter:
    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def plain(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            return _CUT
        if isinstance(value, bool | float | str) or value is None:
            return value
        if isinstance(value, int):
            return value if value.bit_length() <= _MAX_INTEGER_BITS else _CUT
        if isinstance(value, Dtype):
            return value.torch_name
        if isinstance(value, list | tuple | set | frozenset):
            return [self.plain(item, depth + 1) for item in self._affordable(value)]
        if isinstance(value, Mapping):
            items = self._affordable(value.items())
            return {self.text(key): self.plain(item, depth + 1) for key, item in items}
        if isinstance(value, Inert):
            return self._inert(value, depth)
        return f"<{type(value).__name__}>"

    def _affordable(self, values: Any) -> list[Any]:
        return [item for item, _ in zip(values, range(max(0, self._left)), strict=False)]

    def text(self, value: Any) -> str:
        """A short text for a key, an enum's value or a part of a path."""
        if isinstance(value, str):
            return value
        small = isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS)
        return str(value) if small or value is None else f"<{type(value).__name__}>"

    def _inert(self, value: Inert, depth: int) -> Any:
        short_name = value.class_name.rpartition(".")[2]
        if short_name in ("Namespace", "SimpleNamespace") and isinstance(value.state, Mapping):
            return self.plain(value.state, depth)
        if "Path" in short_name:
            return "/".join(self.text(part) for part in value.arguments).replace("//", "/")
        if short_name in ("set", "frozenset", "list", "tuple") and value.arguments:
            return self.plain(value.arguments[0], depth)
        if value.class_name.endswith(".getattr") and len(value.arguments) == 2:
            owner, member = value.arguments
            named = owner.name.rpartition(".")[2] if isinstance(owner, Global) else self.text(owner)
            return f"{named}.{self.text(member)}"
        if len(value.arguments) == 1 and isinstance(value.arguments[0], int | str):
            argument = value.arguments[0]
            return f"{short_name}.{_ENUM_MEMBERS.get((short_name, argument), self.text(argument))}"
        return f"<{value.class_name}>"
