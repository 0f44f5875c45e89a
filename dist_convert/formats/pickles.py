"""Pickles made by hand, protocol 2: the same bytes with every version of Python and torch, neither of which is asked.

Classes and functions are named and not imported. Opcodes: CPython's pickletools; which of them stand for a value is
what CPython's own pickler chooses, with its memo switched off.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

#: As many items are put into a dict or a list at once.
_BATCH = 1000
#: What stands before and behind the items of a tuple, by their number; of a longer one see below.
_TUPLES = {0: (b"", b")"), 1: (b"", b"\x85"), 2: (b"", b"\x86"), 3: (b"", b"\x87")}


@dataclass(frozen=True)
class Named:
    """A class, a function or a torch.dtype, so that neither planning nor pickling needs torch."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_ORDERED_DICT = Named("collections", "OrderedDict")


@dataclass(frozen=True)
class Called:
    """What a function or class makes of its arguments."""

    named: Named
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Instance:
    """An instance of a class with its attributes; None for a class without any."""

    named: Named
    state: Mapping[str, object] | tuple[object, ...] | None


@dataclass(frozen=True)
class Items:
    """A dict, whose keys may be instances."""

    items: Iterable[tuple[object, object]]


@dataclass(frozen=True)
class Reference:
    """What lies outside of the pickle, and is known by these arguments."""

    arguments: tuple[object, ...]


def pickled(value: object, *, once: bool = False) -> bytes:
    """A whole pickle of None, bool, int, float, str, tuples, lists, dicts and the records above.

    With `once` equal strings and names are written once; otherwise no byte depends on which values are equal.

    Raises:
        TypeError: a value of another kind.
    """
    pickle = _Pickle({} if once else None)
    pickle.write(value)
    return bytes(b"\x80\x02" + pickle.out + b".")


class _Pickle:
    def __init__(self, memo: dict[str | Named, int] | None) -> None:
        self.out = bytearray()
        self._memo = memo

    def write(self, value: object) -> None:
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self._write_once(value, b"X" + len(data).to_bytes(4, "little") + data)
        elif value is None or isinstance(value, bool):
            self.out += {None: b"N", False: b"\x89", True: b"\x88"}[value]
        elif isinstance(value, int):
            self.out += _whole_number(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, tuple):
            before, after = _TUPLES.get(len(value), (b"(", b"t"))
            self.out += before
            for item in value:
                self.write(item)
            self.out += after
        elif isinstance(value, list):
            self.out += b"]"
            self._write_batches(((item,) for item in value), b"a", b"e")
        elif isinstance(value, Items | Mapping):
            if isinstance(value, OrderedDict):
                self.write(Called(_ORDERED_DICT, ()))
            else:
                self.out += b"}"
            self._write_batches(value.items if isinstance(value, Items) else value.items(), b"s", b"u")
        elif isinstance(value, Named):
            self._write_once(value, f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Reference):
            self.write(value.arguments)
            self.out += b"Q"
        elif isinstance(value, Called):
            self.write(value.named)
            self.write(value.arguments)
            self.out += b"R"
        elif isinstance(value, Instance):
            self.write(value.named)
            self.out += b")\x81"
            if value.state is not None:
                self.write(value.state)
                self.out += b"b"
        else:
            raise TypeError(f"{value!r} of type {type(value).__name__} cannot be pickled")

    def _write_batches(self, items: Iterable[tuple[object, ...]], one: bytes, many: bytes) -> None:
        """Items of a list or a dict, which the opcode puts into it, alone or with others."""
        left = iter(items)
        while batch := tuple(islice(left, _BATCH)):
            self.out += b"(" if len(batch) > 1 else b""
            for item in batch:
                for part in item:
                    self.write(part)
            self.out += many if len(batch) > 1 else one

    def _write_once(self, value: str | Named, data: bytes) -> None:
        if self._memo is None:
            self.out += data
        elif value in self._memo:
            self.out += b"j" + self._memo[value].to_bytes(4, "little")
        else:
            self.out += data + b"r" + len(self._memo).to_bytes(4, "little")
            self._memo[value] = len(self._memo)


def _whole_number(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -1 << 31 <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size_bytes = (value if value >= 0 else ~value).bit_length() // 8 + 1
    opcode, length_bytes = (b"\x8a", 1) if size_bytes < 256 else (b"\x8b", 4)
    return opcode + size_bytes.to_bytes(length_bytes, "little") + value.to_bytes(size_bytes, "little", signed=True)
