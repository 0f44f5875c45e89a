"""Reads a checkpoint's pickle without importing or calling anything that it names.

Every global becomes an inert record that remembers its name and arguments. What is not on the lists of
`pickle_globals` is refused: a checkpoint that tries to run code is reported, not half read. The pure Python unpickler
is used on purpose: the C one allocates by indexes found in the pickle, gigabytes for ten bytes.
"""

from __future__ import annotations

import io
import pickle
import signal
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from dist_convert.errors import CorruptFile, UnsafePickle
from dist_convert.read.pickle_globals import DTYPES, INERT_GLOBALS, INERT_PACKAGES, STORAGES
from dist_convert.read.pickle_records import Dtype, Global, Inert, Storage, Tensor

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
