"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

from dist_convert.errors import UsageError

_FACTORS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip

#: A number without a unit is in bytes; below this it is taken for an oversight.
_LEAST_BARE = 1000


def human_bytes(size_bytes: float) -> str:
    """Decimal units, three digits: 4.97 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size_bytes) < 999.5 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"


def counted(count: int, what: str) -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def parse_bytes(text: str) -> int:
    """Bytes of "5GB" (decimal), "5GiB" (binary) or "5000000000".

    Raises:
        UsageError: not a positive size, or so few bytes without a unit that one must have been forgotten.
    """
    digits = text.strip().rstrip("abgikmtABGIKMT ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size_bytes = int(float(digits) * _FACTORS[unit])
    except (ValueError, KeyError, OverflowError):
        size_bytes = 0
    if size_bytes <= 0 or (text.strip() == digits and size_bytes < _LEAST_BARE):
        what = "not a size" if size_bytes <= 0 else f"a size of {size_bytes} bytes, because it has no unit"
        raise UsageError(what, expected="a number with a unit, such as 5GB or 512MiB", found=repr(text))
    return size_bytes


def human_seconds(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
