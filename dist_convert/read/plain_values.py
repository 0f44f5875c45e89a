"""JSON values for what a pickled Namespace holds; what has no JSON form becomes text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_convert.read.pickle_records import Dtype, Global, Inert

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
