"""Ways to damage a valid file, as strategies of hypothesis: by bytes, and by the parts that its format is made of.

Bytes alone are not enough: nearly every change of one is found by the first check there is, such as a checksum. Parts
make files that are sound up to a single lie.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Damaged = st.SearchStrategy[bytes]
#: All damage of one kind to a valid file.
Way = Callable[[bytes], Damaged]

#: Bytes that formats are made of: numbers at their limits, and the opcodes, brackets and signatures of the formats.
TOKENS = (
    b"\x00" * 4, b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06",
    b"c__builtin__\neval\n", b"R", b"b", b"s", b"u", b"e", b"(", b"t", b"0", b"2", b"h\x00", b"q\x00", b"\x81", b"\x93",
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"-1", b"1e999", b"NaN", b"9" * 30, b"../", b"/etc/passwd",
)  # fmt: skip
#: Whole instructions of a pickle: odd values, names, calls, and references to what is not there.
OPCODES = (
    b"N", b"\x88", b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"\x8b" + struct.pack("<I", 2**31 - 1), b"G" + struct.pack(">d", float("nan")), b"G" + struct.pack(">d", 1e300),
    b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage", b"X\xff\xff\xff\xff", b"C\x01a", b"\x8e" + b"\xff" * 8,
    b"]", b"}", b")", b"(", b"\x8f", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"R", b"b", b"o", b"Q",
    b"\x81", b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"q\x00", b"h\x00", b"h\x05",
    b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"\x96" + b"\xff" * 8, b"\x97", b"\x98", b"\x82\x01", b"Pname\n",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"cbuiltins\nset\n", b"cbuiltins\nrange\n",
    b"ccollections\nOrderedDict\n", b"ccollections\ndefaultdict\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nbfloat16\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"csignal\nSIGTERM\n",
    b"cargparse\nNamespace\n", b"cmegatron.core\nEnum\n", b"cpathlib\nPosixPath\n", b"c_io\nBytesIO\n",
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
#: What may stand in JSON: also where something else is expected, and much larger than makes sense.
ODD_VALUES = (
    None, True, False, "", "a", "../a", "/etc/passwd", "F32", "BF16", "I64", [], {}, [[]], [None],
    -1, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), 10**18, 10**400, *NUMBERS,
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers(-4, 260),
    st.text(max_size=3),
    st.lists(st.integers(-1, 70), max_size=4),
    st.dictionaries(st.sampled_from(("dtype", "shape", "data_offsets", "rope_type", "factor")), st.integers(0, 9)),
)
PLACES = st.floats(0, 1, exclude_max=True)  # a share of a length

BYTE_KINDS = ("over", "between", "out")
#: What is done at a place: bytes put over others or between them, or bytes taken out.
CHANGES = st.lists(
    st.tuples(
        PLACES,
        st.sampled_from(BYTE_KINDS),
        st.one_of(st.sampled_from(TOKENS), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=3,
)


def change_bytes(data: bytes, changes: Sequence[tuple[float, str, bytes]]) -> bytes:
    for place, kind, value in changes:
        at = int(place * len(data))
        data = data[:at] + (b"" if kind == "out" else value) + data[at + (kind != "between") * len(value) :]
    return data


def with_other_bytes(data: bytes) -> Damaged:
    """Up to three changes of bytes, anywhere."""
    return CHANGES.map(lambda changes: change_bytes(data, changes))


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _nodes(value[key])


VALUE_KINDS = ("value", "copy", "name", "gone")


def change_values(data: bytes, changes: Sequence[tuple[float, str, Any, float]]) -> bytes:
    whole = json.loads(data)
    for place, kind, value, other in changes:
        nodes = list(_nodes(whole))
        if not nodes:
            break
        (container, key), (from_container, from_key) = (nodes[int(at * len(nodes))] for at in (place, other))
        value = copy.deepcopy(from_container[from_key] if kind == "copy" else value)
        if kind == "name" and isinstance(container, dict):
            container[str(value)] = container.pop(key)
        elif kind == "gone":
            del container[key]
        else:
            container[key] = value
    return json.dumps(whole).encode()


def with_other_values(data: bytes) -> Damaged:
    """JSON of which up to three values, anywhere, are others, come from elsewhere, have another name, or are gone."""
    kinds = st.sampled_from(["value", "value", *VALUE_KINDS])
    changes = st.lists(st.tuples(PLACES, kinds, VALUES, PLACES), min_size=1, max_size=3)
    return changes.map(lambda changes: change_values(data, changes))


def change_header(data: bytes, changes: Sequence[tuple[float, str, Any, float]]) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    text = change_values(data[8:end], changes)
    return struct.pack("<Q", len(text)) + text + data[end:]


def with_other_header(data: bytes) -> Damaged:
    """A safetensors file in whose header values are others; the length before it is right."""
    changes = st.lists(st.tuples(PLACES, st.sampled_from(VALUE_KINDS), VALUES, PLACES), min_size=1, max_size=3)
    return changes.map(lambda changes: change_header(data, changes))


INSTRUCTION_KINDS = ("over", "between", "copy", "exchange", "gone")


def change_instructions(parts: Sequence[bytes], changes: Sequence[tuple[float, str, bytes, float]]) -> bytes:
    found = list(parts)
    for place, kind, value, other in changes:
        at, elsewhere = int(place * len(found)), int(other * len(found))
        if kind == "over":
            found[at] = value
        elif kind == "between":
            found.insert(at, value)
        elif kind == "copy":
            found.insert(at, found[elsewhere])
        elif kind == "exchange":
            found[at], found[elsewhere] = found[elsewhere], found[at]
        else:
            del found[at]
    return b"".join(found) + b"."


def _instructions(data: bytes) -> list[bytes]:
    """All but the last, STOP."""
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    return [data[start:end] for start, end in itertools.pairwise(starts)]


def with_other_instructions(data: bytes) -> Damaged:
    """A pickle of which up to three whole instructions are others, more, doubled, exchanged, or gone."""
    parts, kinds = _instructions(data), st.sampled_from(["over", "between", *INSTRUCTION_KINDS])
    changes = st.lists(st.tuples(PLACES, kinds, st.sampled_from(OPCODES), PLACES), min_size=1, max_size=3)
    return changes.map(lambda changes: change_instructions(parts, changes))


#: Fields of a local header, of an entry of the directory and of its end: offset, bytes (PKWARE's APPNOTE.TXT, 4.3).
_LOCAL = ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))
_ENTRY = ((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4))
_END = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))


def _zip_fields(data: bytes) -> list[tuple[int, int]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at, entries = archive.start_dir, archive.infolist()
    fields = [(entry.header_offset + offset, size) for entry in entries for offset, size in _LOCAL]
    for _ in entries:
        fields += [(at + offset, size) for offset, size in _ENTRY]
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    end = data.rindex(b"PK\x05\x06")
    return fields + [(end + offset, size) for offset, size in _END]


def change_fields(data: bytes, changes: Sequence[tuple[tuple[int, int], tuple[bool, int]]]) -> bytes:
    found = bytearray(data)
    for (at, size), (is_added, number) in changes:
        before = int.from_bytes(found[at : at + size], "little") if is_added else 0
        found[at : at + size] = ((before + number) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(found)


def with_other_fields(data: bytes) -> Damaged:
    """A zip file in which up to three numbers of its headers are others, or a little more or less."""
    fields: Sequence[tuple[int, int]] = _zip_fields(data)
    numbers = st.one_of(
        st.tuples(st.just(False), st.sampled_from(NUMBERS)), st.tuples(st.just(True), st.integers(-70, 70))
    )
    changes = st.lists(st.tuples(st.sampled_from(fields), numbers), min_size=1, max_size=3)
    return changes.map(lambda changes: change_fields(data, changes))


def each_kind(way: Way, data: bytes) -> Iterator[bytes]:
    """One case of each kind of a way's damage: with every token, value, instruction or field, and in every manner."""
    if way is with_other_bytes:
        for kind, value in itertools.product(BYTE_KINDS, TOKENS):
            yield change_bytes(data, [(0.5, kind, value)])
    elif way is with_other_instructions:
        parts = _instructions(data)
        for kind, value in itertools.product(INSTRUCTION_KINDS, OPCODES):
            yield change_instructions(parts, [(0.5, kind, value, 0.25)])
    elif way is with_other_fields:
        for field, number in itertools.product(_zip_fields(data), ((False, 2**31 - 1), (True, 1))):
            yield change_fields(data, [(field, number)])
    else:
        change = change_header if way is with_other_header else change_values
        for kind, value in itertools.product(VALUE_KINDS, ODD_VALUES):
            yield change(data, [(0.5, kind, value, 0.25)])
