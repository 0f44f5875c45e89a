"""Reads a checkpoint's pickle without importing or calling anything that it names.

Every global becomes an inert record that remembers its name and arguments. What Python, torch and numpy bring and is
not on the lists below (docs/formats.md, "Pickled classes") is refused: a checkpoint that tries to run code is reported,
not half read. Classes of other packages, as forks of Megatron leave in args, are inert too, and listed. The
pure Python unpickler is used on purpose: the C one allocates by indexes found in the pickle, gigabytes for ten bytes.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from dist_convert.errors import CorruptFile, UnsafePickle

_DTYPE_NAMES = {
    "F64": "float64 double DoubleStorage",
    "F32": "float32 float FloatStorage",
    "F16": "float16 half HalfStorage",
    "BF16": "bfloat16 BFloat16Storage",
    "F8_E4M3": "float8_e4m3fn Float8_e4m3fnStorage",
    "F8_E5M2": "float8_e5m2 Float8_e5m2Storage",
    "I64": "int64 LongStorage",
    "I32": "int32 IntStorage",
    "I16": "int16 ShortStorage",
    "I8": "int8 CharStorage",
    "U64": "uint64 UInt64Storage",
    "U32": "uint32 UInt32Storage",
    "U16": "uint16 UInt16Storage",
    "U8": "uint8 ByteStorage UntypedStorage",
    "BOOL": "bool BoolStorage",
}
#: torch's scalar types and storage classes -> safetensors name.
DTYPES = {name: dtype for dtype, names in _DTYPE_NAMES.items() for name in names.split()}

#: Everything below these packages may be named; it is neither imported nor called.
INERT_PACKAGES = ("megatron", "transformer_engine", "habana_frameworks", "intel_transformer_engine", "apex")
_BUILTINS = (
    "bool bytearray bytes complex dict float frozenset getattr int list long object range set slice str tuple unicode "
    "xrange"
)
#: Of other modules these names alone.
INERT_GLOBALS = {
    "_codecs": "encode",
    "_io": "BytesIO",
    "argparse": "Namespace",
    "__builtin__": _BUILTINS,
    "builtins": _BUILTINS,
    "collections": "Counter defaultdict deque",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "datetime timedelta timezone",
    "fp16.loss_scaler": "DynamicLossScaler LossScaler",
    "io": "BytesIO",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy._core.numeric": "_frombuffer",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy.dtypes": "Float32DType Float64DType Int64DType UInt32DType UInt64DType",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePosixPath",
    "signal": "Signals",
    "torch": "Generator Size Tensor device",
    "torch._C": "Generator",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
    "torch._utils": "_rebuild_device_tensor_from_numpy _rebuild_wrapper_subclass",
    "torch.nn.parameter": "Parameter",
    "torch.optim.adam": "Adam",
    "torch.optim.adamw": "AdamW",
    "torch.serialization": "_get_layout",
    "types": "SimpleNamespace",
}

#: Whose other names are refused: those of Python 3 and 2, and of the libraries above.
_REFUSED_PACKAGES = {
    module.partition(".")[0] for module in (*sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING, *INERT_GLOBALS)
}

#: Items in a dict key, arguments of a call, dimensions of a tensor. A pickle can name one large tuple a million times,
#: and each time it would be hashed or copied.
_MAX_ITEMS = 64


@dataclass(frozen=True)
class Dtype:
    """A `torch.dtype` or a class of storages in the pickle, by safetensors name and by torch's."""

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
    """Stands for a class or function that is not imported, or for what it would have made; keeps what it was given."""

    __slots__ = ("arguments", "class_name", "state")

    def __init__(self, class_name: str, arguments: tuple[Any, ...] = ()) -> None:
        if len(arguments) > _MAX_ITEMS:
            raise pickle.UnpicklingError("a call with too many arguments")
        self.class_name = class_name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> Inert:
        return Inert(self.class_name, arguments)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items that some classes are filled with."""

    def append(self, value: Any) -> None:
        """As above."""

    def extend(self, values: Any) -> None:
        """As above."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    is_whole = len(shape) == len(strides) <= _MAX_ITEMS and all(
        isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)
    )
    if not isinstance(storage, Storage) or not is_whole:
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


def _rebuild_with_attributes(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with Python attributes, or of a subclass, which may bring a function of its own; of no foreign class."""
    return kind(*arguments) if isinstance(kind, Inert) and is_foreign(kind.class_name) else function(*arguments)


def _ordered_dict(items: Sequence[tuple[Any, Any]] = ()) -> OrderedDict[Any, Any]:
    if len(items) > _MAX_ITEMS:  # as torch writes it, they come one by one
        raise pickle.UnpicklingError("a call with too many arguments")
    return OrderedDict((_checked_key(key), value) for key, value in items)


#: What stands for the few functions and classes that matter.
_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}


def _checked_key(key: Any) -> Any:
    """A dict key that is cheap to hash: hashing a tuple hashes all that it holds, however deep and however often."""
    waiting, seen = [key], 0
    while waiting:
        item = waiting.pop()
        seen += 1
        if seen > _MAX_ITEMS:
            raise pickle.UnpicklingError("a dict key that holds too much")
        if isinstance(item, tuple):
            waiting += item
    return key


def _with_checked_keys(opcode: bytes, keys: slice) -> Callable[[_Unpickler], None]:
    """The original of an opcode, after a look at those of the stack's items that become keys or members of a set."""
    original: Callable[[Any], None] = pickle._Unpickler.dispatch[opcode[0]]

    def load(unpickler: _Unpickler) -> None:
        for key in unpickler.stack[keys]:
            _checked_key(key)
        original(unpickler)

    return load


# The pure Python unpickler is private by name only; typeshed does not know it.
class _Unpickler(pickle._Unpickler):
    """Opcodes that would hash, allocate or overwrite what the pickle says are replaced by careful ones."""

    # What typeshed leaves out of the base class.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}

    def __init__(self, data: bytes, label: str) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._label = label

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
        self.append(bytearray(self.read(length)))  # no more than there is; the original makes room for all

    dispatch |= {
        pickle.BUILD[0]: _load_build,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
        pickle.SETITEM[0]: _with_checked_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_checked_keys(pickle.SETITEMS, slice(None, None, 2)),
        pickle.DICT[0]: _with_checked_keys(pickle.DICT, slice(None, None, 2)),
        pickle.ADDITEMS[0]: _with_checked_keys(pickle.ADDITEMS, slice(None)),
        pickle.FROZENSET[0]: _with_checked_keys(pickle.FROZENSET, slice(None)),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Answer every global with something of ours, or refuse it."""
        full_name = f"{module}.{name}"
        if not module or not name:
            raise pickle.UnpicklingError("a global without a name")
        if full_name in _REBUILD:
            return _REBUILD[full_name]
        if module in ("torch", "torch.storage") and name in DTYPES:
            return Dtype(DTYPES[name], full_name)
        if module == "signal" and name in signal.Signals.__members__:  # as some Python versions pickle its members
            return Inert("signal.Signals", (signal.Signals[name].value,))
        is_listed = module.partition(".")[0] in INERT_PACKAGES or name in INERT_GLOBALS.get(module, "").split()
        if is_listed or is_foreign(full_name):
            return Inert(full_name)
        raise UnsafePickle(
            f"the pickle names {full_name}, which no checkpoint needs; nothing was run",
            file=self._label,
            expected="tensors, args and the state classes of Megatron, Transformer Engine, torch and numpy",
            found=full_name,
            remedy="do not load this file with torch.load; find out where it comes from",
        )

    def persistent_load(self, saved_id: Any) -> Storage:
        """A storage reference: ("storage", class, key, location, elements)."""
        match saved_id:
            case ("storage", Dtype() as kind, str() as key, _, int() as elements):
                return Storage(key, kind.name, elements)
        raise pickle.UnpicklingError("a damaged storage reference")


def is_foreign(class_name: str) -> bool:
    """Whether a class is of a package that no checkpoint needs: not of Megatron, Python, torch or numpy."""
    package = class_name.partition(".")[0]
    return package not in INERT_PACKAGES and package not in _REFUSED_PACKAGES


def inside(saved: Any) -> Iterator[Any]:
    """Everything that a value of `load` holds, at any depth, and itself; shared objects once."""
    waiting, seen = [saved], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping | list | tuple | Inert):
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Mapping):
                waiting += value.values()
            else:
                waiting += [value.arguments, value.state] if isinstance(value, Inert) else value
        yield value


def foreign_classes(saved: Any) -> list[str]:
    """The names of all foreign classes inside a value of `load`."""
    inert = (value.class_name for value in inside(saved) if isinstance(value, Inert))
    return sorted(set(filter(is_foreign, inert)))


def load(data: bytes, label: str) -> Any:
    """The object of a pickle, with inert records in place of every class; `label` is how messages name the file.

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
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
        RecursionError, AssertionError, struct.error,
    ) as error:  # fmt: skip
        raise CorruptFile(
            "damaged pickle",
            file=label,
            found=f"{type(error).__name__}: {error}",
            remedy="copy the file again from the machine that saved it",
        ) from error


#: Members of the two enums that every `args` holds, as `str()` of the real ones prints them.
_ENUM_MEMBERS: dict[str, dict[Any, str]] = {
    "ModelType": {1: "encoder_or_decoder"},
    "AttnBackend": {1: "flash", 2: "fused", 3: "unfused", 4: "local", 5: "auto"},
}

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
            return [self.plain(item, depth + 1) for item in islice(value, self._left)]
        if isinstance(value, Mapping):
            items = islice(value.items(), self._left)
            return {self.text(key): self.plain(item, depth + 1) for key, item in items}
        if isinstance(value, Inert):
            return self._inert(value, depth)
        return f"<{type(value).__name__}>"

    def text(self, value: Any) -> str:
        """A short text for a key, an enum's value or a part of a path."""
        if isinstance(value, str):
            return value
        is_small = isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS
        return str(value) if is_small or isinstance(value, float | None) else f"<{type(value).__name__}>"

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
            named = owner.class_name.rpartition(".")[2] if isinstance(owner, Inert) else self.text(owner)
            return f"{named}.{self.text(member)}"
        if len(value.arguments) == 1 and isinstance(value.arguments[0], int | str):
            argument = value.arguments[0]
            return f"{short_name}.{_ENUM_MEMBERS.get(short_name, {}).get(argument) or self.text(argument)}"
        return f"<{value.class_name}>"
