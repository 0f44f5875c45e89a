"""Reads a checkpoint's pickle without importing or calling anything that it names, in memory that its size bounds.

Every global becomes an inert record that remembers its name and arguments. What Python, torch and numpy bring and is
not on the lists below (docs/formats.md, "Pickled classes") is refused: a checkpoint that tries to run code is reported,
not half read. Classes of other packages, as forks of Megatron leave in args, are inert too, and listed. `pickletools`
of the standard library decodes the opcodes; what they do is written down here, as none of Python's unpicklers says how
much memory it is going to take.
"""

import _compat_pickle
import pickle
import pickletools
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from sys import getsizeof
from typing import Any

from dist_convert.errors import CorruptFile, UnsafePickle
from dist_convert.records import JsonObject

_DTYPE_NAMES = {
    "F64": "float64 double DoubleStorage",
    "F32": "float32 float FloatStorage",
    "F16": "float16 half HalfStorage",
    "BF16": "bfloat16 BFloat16Storage",
    "F8_E4M3": "float8_e4m3fn Float8_e4m3fnStorage",
    "F8_E5M2": "float8_e5m2 Float8_e5m2Storage",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64 LongStorage",
    "I32": "int32 IntStorage",
    "I16": "int16 ShortStorage",
    "I8": "int8 CharStorage",
    "U64": "uint64 UInt64Storage",
    "U32": "uint32 UInt32Storage",
    "U16": "uint16 UInt16Storage",
    "U8": "uint8 ByteStorage UntypedStorage",
    "BOOL": "bool BoolStorage",
    "C64": "complex64 ComplexFloatStorage",
    "C128": "complex128 ComplexDoubleStorage",
}
#: torch's scalar types and storage classes -> safetensors name.
DTYPES = {name: dtype for dtype, names in _DTYPE_NAMES.items() for name in names.split()}

#: Everything below these packages may be named; it is neither imported nor called.
INERT_PACKAGES = ("megatron", "transformer_engine", "habana_frameworks", "intel_transformer_engine", "apex")
_BUILTINS = (
    "Ellipsis bool bytearray bytes complex dict float frozenset getattr int list long object range set slice str tuple "
    "unicode xrange"
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
    "decimal": "Decimal",
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
    "re": "_compile",
    "signal": "Signals",
    "torch": "Generator Tensor device",
    "torch._C": "Generator",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
    "torch._C._nn": "gelu",
    "torch._utils": "_rebuild_device_tensor_from_numpy _rebuild_sparse_tensor _rebuild_wrapper_subclass",
    "torch.nn.functional": "gelu relu sigmoid silu softplus",
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
#: More elements than any file has, and longer numbers than any training keeps: Python does not print them all.
_NO_SIZE, _MAX_INTEGER_BITS = 1 << 63, 1024
#: Python finds numbers in a dict by their value, so that a file can choose ones that take long. Small ones cannot, and
#: texts are found by a secret; of all others a pickle has few.
_MAX_SMALL_KEY, _MAX_OTHER_KEYS = 1 << 24, 5_000

#: Besides the pickle itself, what is made from it may take so much memory. A tensor takes some eight times its bytes.
_FREE_BYTES, _BYTES_PER_BYTE = 52 << 20, 7
#: Beyond so many bytes every tensor or object stands for some more; there are no checkpoints of so much else.
_UNEXPLAINED_BYTES, _BYTES_PER_OBJECT = 64 << 20, 1024
#: Of an object, what `getsizeof` does not count; of each item on the stack, in the memo, and of a mark.
_HEAP_BYTES, _STACK_BYTES, _MEMO_BYTES, _MARK_BYTES = 8, 24, 10, 48


@dataclass(frozen=True, slots=True)
class Dtype:
    """A `torch.dtype` or a class of storages in the pickle, by safetensors name and by torch's."""

    name: str
    torch_name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that the pickle refers to: record `data/{key}` of the container."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
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
        self.class_name = class_name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> "Inert":
        return Inert(self.class_name, arguments)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Tensor:
    bits = more[2] if len(more) > 2 else None  # backends of torch add keys of their own, which change no value
    if isinstance(bits, dict) and (bits.get("neg") or bits.get("conj")):
        raise pickle.UnpicklingError("a tensor that is stored negated or conjugated; save it with resolve_neg()")
    is_whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MAX_ITEMS
    is_whole = is_whole and all(isinstance(n, int) and 0 <= n < _NO_SIZE for n in (offset, *shape, *strides))
    if not isinstance(storage, Storage) or not is_whole:
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    return Tensor(storage, offset, shape, strides)


def _rebuild_typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *bits: Any
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("a tensor without a storage or dtype")
    return _rebuild_tensor(
        Storage(storage.key, dtype.name, storage.elements), offset, shape, strides, grad, hooks, *bits
    )


def _size(numbers: tuple[int, ...] = ()) -> tuple[int, ...]:
    if not isinstance(numbers, tuple):
        raise pickle.UnpicklingError("a torch.Size of something that is not a tuple")
    return numbers


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_with_attributes(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with Python attributes, or of a subclass, which may bring a function of its own; of no foreign class."""
    if not isinstance(arguments, tuple) or len(arguments) > _MAX_ITEMS:
        raise pickle.UnpicklingError("a call with too many arguments, or none")
    return kind(*arguments) if isinstance(kind, Inert) and is_foreign(kind.class_name) else function(*arguments)


def _ordered_dict() -> dict[Any, Any]:
    return {}  # its items come one by one


#: What stands for the few functions and classes that matter.
_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}


#: Keys of a dict that are cheap to hash and to find.
_CHEAP_KEYS = frozenset((str, bytes, Inert, Dtype))


def _named(module: str, name: str, label: str) -> Any:
    """Answer every global with something of ours, or refuse it."""
    full_name = f"{module}.{name}"
    if not module or not name or len(full_name) > _LONGEST_GLOBAL:
        raise pickle.UnpicklingError(f"a global with a name of {len(module)} and {len(name)} characters")
    if full_name in _REBUILD:
        return _REBUILD[full_name]
    if module in ("torch", "torch.storage") and name in DTYPES:
        return Dtype(DTYPES[name], full_name)
    if module == "signal" and name in signal.Signals.__members__:  # as some Python versions pickle its members
        return Inert("signal.Signals", (signal.Signals[name].value,))
    is_listed = module.partition(".")[0] in INERT_PACKAGES or name in INERT_GLOBALS.get(module, "").split()
    if is_listed or is_foreign(full_name):
        return Inert(full_name)
    what = f"the pickle names {full_name}, which no checkpoint needs; nothing was run"
    expected = "tensors, args and the state classes of Megatron, Transformer Engine, torch and numpy"
    remedy = "do not load this file with torch.load; find out where it comes from"
    raise UnsafePickle(what, label, expected, found=full_name, remedy=remedy)


#: Characters of a class with its module: a pickle names one once and has a million of its objects.
_LONGEST_GLOBAL = 1000

#: Opcodes that push the value that follows them, decoded.
_VALUES = frozenset((
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
#: How often what they have made is compared with the bound; one makes no more than it says, or takes from the stack.
_COUNTED_OPCODES = 256


class _Unpickler:
    """The machine that a pickle is a program for: a stack, marks in it, and a memo."""

    def __init__(self, data: bytes, label: str) -> None:
        self._data, self._label = data, label
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._made_bytes = 0
        self._objects = 0
        self._other_keys = 0

    def run(self) -> Any:
        """The object that is on the stack at the end."""
        data, actions = BytesIO(self._data), self._actions()
        read = data.read
        known = [(opcode, actions[opcode.name]) for opcode in pickletools.opcodes if opcode.name in actions]
        steps = {opcode.code.encode("latin-1"): (opcode.arg and opcode.arg.reader, act) for opcode, act in known}
        code: bytes | None = None
        while code is None or code in steps:
            for _ in range(_COUNTED_OPCODES):
                if (code := read(1)) not in steps:
                    break
                read_argument, act = steps[code]
                act(read_argument(data) if read_argument else None)
            self._check_size(data.tell())
        if code != pickle.STOP:
            raise pickle.UnpicklingError(f"the opcode {code!r}" if code else "it ends early")
        return self._stack.pop()

    def _check_size(self, at_byte: int) -> None:
        most_bytes = _FREE_BYTES + _BYTES_PER_BYTE * len(self._data)
        kept_bytes = _STACK_BYTES * len(self._stack) + _MEMO_BYTES * len(self._memo) + _MARK_BYTES * len(self._marks)
        if self._made_bytes + kept_bytes > most_bytes:
            raise pickle.UnpicklingError(f"its objects take more than {most_bytes:,} bytes of memory")
        if at_byte > _UNEXPLAINED_BYTES + _BYTES_PER_OBJECT * self._objects:
            raise pickle.UnpicklingError(f"{at_byte:,} bytes that hold only {self._objects:,} tensors or objects")

    def _actions(self) -> dict[str, Callable[[Any], object]]:
        """What each opcode does with its argument; those that torch.save never writes, as copyreg's, are not there."""
        stack, marks, memo = self._stack, self._marks, self._memo
        push, push_new, pop, pop_to_mark = stack.append, self._push_new, self._pop_last, self._pop_to_mark
        return {
            **dict.fromkeys(_VALUES, self._push_value),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda place: push(memo[place])),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda _: self._call(*pop(2))),
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            "MEMOIZE": lambda _: memo.append(stack[-1]),
            "MARK": lambda _: marks.append(len(stack)),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            "TUPLE": lambda _: push_new(tuple(pop_to_mark())),
            "TUPLE1": lambda _: push_new(tuple(pop(1))),
            "TUPLE2": lambda _: push_new(tuple(pop(2))),
            "TUPLE3": lambda _: push_new(tuple(pop(3))),
            "NEWOBJ_EX": lambda _: self._call(*pop(3)[:2]),  # nothing is made from its keyword arguments
            "OBJ": lambda _: self._call_listed(*pop_to_mark()),
            "INST": self._make_instance,
            "BUILD": lambda _: self._build(stack.pop()),
            "BINPERSID": lambda _: self._push_storage(pop(1)[0]),
            "GLOBAL": lambda names: self._push_named(*names.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._push_named(*pop(2)),
            "EMPTY_DICT": lambda _: push_new({}),
            "EMPTY_LIST": lambda _: push_new([]),
            "EMPTY_SET": lambda _: push_new(set()),
            "SETITEM": lambda _: self._fill(dict, pop(2)),
            "SETITEMS": lambda _: self._fill(dict, pop_to_mark()),
            "APPEND": lambda _: self._fill(list, pop(1)),
            "APPENDS": lambda _: self._fill(list, pop_to_mark()),
            "ADDITEMS": lambda _: self._fill(set, pop_to_mark()),
            "DICT": lambda _: self._push_filled(dict),
            "LIST": lambda _: self._push_filled(list),
            "FROZENSET": lambda _: self._push_filled(set, frozenset),
            "POP": lambda _: marks.pop() if marks[-1:] == [len(stack)] else stack.pop(),
            "POP_MARK": lambda _: pop_to_mark(),
            "DUP": lambda _: push(stack[-1]),
        }

    def _push_new(self, value: Any) -> None:
        self._made_bytes += getsizeof(value) + _HEAP_BYTES
        self._stack.append(value)

    def _push_value(self, value: Any) -> None:
        is_number = isinstance(value, int)
        if is_number and value.bit_length() > _MAX_INTEGER_BITS:
            raise pickle.UnpicklingError(f"a number of {value.bit_length():,} bits")
        if not is_number or not -5 <= value <= 256:  # Python has each of those once
            self._made_bytes += getsizeof(value) + _HEAP_BYTES
        self._stack.append(value)

    def _push_storage(self, saved_id: Any) -> None:
        """Of a reference: ("storage", class, key, location, elements)."""
        self._objects += 1
        match saved_id:
            case ("storage", Dtype() as kind, str() as key, _, int() as elements) if 0 <= elements < _NO_SIZE:
                self._push_new(Storage(key, kind.name, elements))
            case _:
                raise pickle.UnpicklingError("a damaged storage reference")

    def _push_named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise pickle.UnpicklingError("a global with a name that is not text")
        self._push_new(_named(module, name, self._label))
        self._made_bytes += getsizeof(module) + getsizeof(name)

    def _push_filled(self, kind: type, final: type | None = None) -> None:
        items = self._pop_to_mark()
        self._push_new(kind())
        self._fill(kind, items)
        if final is not None:
            self._push_new(final(self._stack.pop()))

    def _pop_last(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count:
            raise pickle.UnpicklingError("the stack is empty")
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _put(self, place: int) -> None:
        """Remember the last item; whoever writes a pickle numbers them one by one."""
        if place == len(self._memo):
            self._memo.append(self._stack[-1])
        elif 0 <= place < len(self._memo):
            self._memo[place] = self._stack[-1]
        else:
            raise pickle.UnpicklingError(f"item {place} of a memo of {len(self._memo)}")

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ITEMS:
            raise pickle.UnpicklingError("a call with too many arguments, or none")
        if not isinstance(function, Inert) and function not in _REBUILD.values():
            raise pickle.UnpicklingError("a call of something that is not a function")
        self._objects += 1
        made = function(*arguments)
        self._stack.append(made)
        if not arguments or made is not arguments[0]:
            kept = made.arguments if isinstance(made, Inert) else ()  # a copy, unless there are none
            self._made_bytes += getsizeof(made) + _HEAP_BYTES + (getsizeof(kept) if kept else 0)

    def _call_listed(self, function: Any, *arguments: Any) -> None:
        self._call(function, arguments)

    def _make_instance(self, names: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self._push_named(*names.split(" ", 1))
        self._call(self._stack.pop(), arguments)

    def _build(self, state: Any) -> None:
        instance = self._stack[-1]
        if isinstance(instance, Inert):
            instance.state = state
        elif not isinstance(instance, dict):  # whose state is metadata of modules
            raise pickle.UnpicklingError("state for an object that takes none")

    def _fill(self, kind: type, items: list[Any]) -> None:
        """Put items into the last thing on the stack: keys and values in turn if it is a dict."""
        target = self._stack[-1]
        if isinstance(target, Inert):  # of a class that is filled with items
            return
        if type(target) is not kind or (kind is dict and len(items) % 2):
            raise pickle.UnpicklingError(f"items for an object that is not a {kind.__name__}")
        before_bytes = getsizeof(target)
        keys: Iterable[Any] = items[::2] if kind is dict else items
        if kind is not list and not _CHEAP_KEYS.issuperset(map(type, keys)):
            keys = map(self._checked_key, keys)
        if isinstance(target, dict):
            target.update(zip(keys, items[1::2], strict=True))
        elif isinstance(target, set):
            target.update(keys)
        elif isinstance(target, list):
            target.extend(items)
        self._made_bytes += getsizeof(target) - before_bytes

    def _checked_key(self, key: Any) -> Any:
        """A dict key that is cheap to hash and to find: hashing a tuple hashes all in it, however deep and often."""
        is_small = isinstance(key, int) and 0 <= key < _MAX_SMALL_KEY
        if type(key) in _CHEAP_KEYS or is_small:
            return key
        self._other_keys += 1
        if self._other_keys > _MAX_OTHER_KEYS:
            raise pickle.UnpicklingError("too many dict keys that are not text")
        waiting, seen = [key], 0
        while waiting:
            item = waiting.pop()
            seen += 1
            if seen > _MAX_ITEMS:
                raise pickle.UnpicklingError("a dict key with too many parts")
            if isinstance(item, tuple):
                waiting += item
        return key


def class_of(value: object) -> str:
    """The name of the class of a value of `load`, for an error."""
    return value.class_name if isinstance(value, Inert) else type(value).__name__


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
        return _Unpickler(data, label).run()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CorruptFile("damaged pickle", label, found=f"{type(error).__name__}: {error}") from error


#: Members of the two enums that every `args` holds, as `str()` of the real ones prints them.
_ENUM_MEMBERS: dict[str, dict[Any, str]] = {
    "ModelType": {1: "encoder_or_decoder"},
    "AttnBackend": {1: "flash", 2: "fused", 3: "unfused", 4: "local", 5: "auto"},
}

#: Training arguments are some hundred values, a few levels deep. A pickle can share one list or text a million times.
_MAX_DEPTH = 16
_MAX_VALUES = 200_000
_MAX_CHARACTERS = 16_000_000
_CUT = "..."


#: numpy's names of dtypes, and what `struct` calls them.
_NUMPY_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I", "b1": "?"}


def _numpy_number(arguments: Sequence[Any]) -> int | float | bool | None:
    """The number that numpy has pickled as its dtype and its bytes, which old protocols have as a text in latin-1."""
    match arguments:
        case (Inert(arguments=(str(name), *_)), bytes(data) | Inert(arguments=(str(data), *_))):
            data = data if isinstance(data, bytes) else data.encode("latin-1", errors="replace")
            kind = _NUMPY_NUMBERS.get(name, "")
            if kind and struct.calcsize(kind) == len(data):
                number: int | float | bool = struct.unpack(f"<{kind}", data)[0]
                return number
    return None


def plain_dict(values: Mapping[Any, Any]) -> JsonObject:
    """Every value of a mapping as JSON, cut where it is deeper or larger than any training arguments."""
    converter = _Converter()
    return {converter.text(key): converter.plain(value, 0) for key, value in values.items()}


class _Converter:
    def __init__(self) -> None:
        self._left = _MAX_VALUES
        self._characters_left = _MAX_CHARACTERS

    def plain(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            return _CUT
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int | float) or value is None:
            return value
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
        """A text for a text, a key, an enum's value or a part of a path."""
        text = str(value) if isinstance(value, str | int | float | None) else f"<{type(value).__name__}>"
        self._characters_left -= len(text)
        return text if self._characters_left >= 0 else _CUT

    def _inert(self, value: Inert, depth: int) -> Any:
        short_name = value.class_name.rpartition(".")[2]
        if short_name in ("Namespace", "SimpleNamespace") and isinstance(value.state, Mapping):
            return self.plain(value.state, depth)
        if "Path" in short_name:
            return "/".join(self.text(part) for part in value.arguments).replace("//", "/")
        if short_name in ("set", "frozenset", "list", "tuple") and value.arguments:
            return self.plain(value.arguments[0], depth)
        if value.class_name.endswith("multiarray.scalar") and (number := _numpy_number(value.arguments)) is not None:
            return number
        if value.class_name.endswith(".getattr") and len(value.arguments) == 2:
            owner, member = value.arguments
            named = owner.class_name.rpartition(".")[2] if isinstance(owner, Inert) else self.text(owner)
            return f"{named}.{self.text(member)}"
        if len(value.arguments) == 1 and isinstance(value.arguments[0], int | str):
            argument = value.arguments[0]
            return f"{short_name}.{_ENUM_MEMBERS.get(short_name, {}).get(argument) or self.text(argument)}"
        return f"<{value.class_name}>"
