"""What stands in for the objects of a checkpoint's pickle: inert records, by which nothing is imported or called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
