"""The records that the parts of a conversion hand to each other. Integers and strings only, no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from dist_convert.boxes import Box

#: Bytes of one element, by the dtype's safetensors name (https://huggingface.co/docs/safetensors, "Format").
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its first element is, and how the others follow.

    Attributes:
        name: its name in the file.
        file: the file, relative to the checkpoint directory, with `/` between the parts.
        dtype: safetensors name, a key of `DTYPE_BYTES`.
        shape: elements per dimension.
        strides: elements between neighbours, per dimension.
        offset_bytes: of the first element, from the start of the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset_bytes: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class View:
    """A two-dimensional window on stored bytes: `rows` x `columns` elements at element strides."""

    file: str
    tensor: str
    dtype: str
    offset_bytes: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    @staticmethod
    def of(tensor: StoredTensor) -> View:
        """A whole matrix or vector, as it is stored."""
        columns, column_stride = (tensor.shape[1], tensor.strides[1]) if len(tensor.shape) == 2 else (1, 1)
        rows, row_stride = tensor.shape[0], tensor.strides[0]
        return View(
            tensor.file, tensor.name, tensor.dtype, tensor.offset_bytes, rows, columns, row_stride, column_stride
        )

    def window(self, box: Box) -> View:
        """The part of this view inside `box`."""
        shift = box.row * self.row_stride + box.column * self.column_stride
        offset_bytes = self.offset_bytes + shift * DTYPE_BYTES[self.dtype]
        return View(
            self.file, self.tensor, self.dtype, offset_bytes, box.rows, box.columns, self.row_stride, self.column_stride
        )

    def widened(self, columns: int) -> View:
        """The same rows with so many columns."""
        return View(
            self.file, self.tensor, self.dtype, self.offset_bytes, self.rows, columns, self.row_stride,
            self.column_stride,
        )  # fmt: skip

    def transposed(self) -> View:
        """The same elements with rows and columns exchanged."""
        return replace(
            self,
            rows=self.columns,
            columns=self.rows,
            row_stride=self.column_stride,
            column_stride=self.row_stride,
        )

    @property
    def size_bytes(self) -> int:
        return self.rows * self.columns * DTYPE_BYTES[self.dtype]

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie row after row without gaps."""
        return (self.columns == 1 or self.column_stride == 1) and (self.rows == 1 or self.row_stride == self.columns)

    @property
    def is_transposed(self) -> bool:
        """Whether neighbours in a row are apart in the file, as in a transposed matrix."""
        return self.columns > 1 and self.column_stride != 1


def side_by_side(left: View, right: View) -> View | None:
    """Both views as one, where the right one continues the rows of the left one."""
    columns = left.columns + right.columns
    joins = (
        right.offset_bytes == left.offset_bytes + left.columns * DTYPE_BYTES[left.dtype]
        and (left.file, left.tensor, left.rows, left.row_stride)
        == (right.file, right.tensor, right.rows, right.row_stride)
        and left.column_stride == right.column_stride == 1
        and left.row_stride >= columns
    )
    return left.widened(columns) if joins else None


@dataclass(frozen=True)
class Window:
    """The bytes of a file that one write fills: `runs` stretches of `run_bytes`, each `stride_bytes` after the other.

    A write without gaps is one run, with stride 0.
    """

    file: str
    offset_bytes: int
    run_bytes: int
    stride_bytes: int = 0
    runs: int = 1

    @staticmethod
    def of(view: View) -> Window:
        """The bytes of a view, which is written along its contiguous dimension."""
        lines = view.transposed() if view.is_transposed else view
        if lines.is_dense:
            return Window(lines.file, lines.offset_bytes, lines.size_bytes)
        item_bytes = DTYPE_BYTES[lines.dtype]
        return Window(
            lines.file, lines.offset_bytes, lines.columns * item_bytes, lines.row_stride * item_bytes, lines.rows
        )

    @property
    def size_bytes(self) -> int:
        return self.run_bytes * self.runs


@dataclass(frozen=True)
class Copy:
    """One box copy: any one of `sources` (which hold equal values) goes to every one of `targets`.

    All views have the same rows and columns. `add` is added to each value on the way (1 for norms that are stored as
    gamma - 1, docs/formats.md "Norms and their spellings").
    """

    sources: tuple[View, ...]
    targets: tuple[View, ...]
    add: int = 0

    @property
    def rows(self) -> int:
        return self.sources[0].rows

    @property
    def columns(self) -> int:
        return self.sources[0].columns

    def window(self, box: Box) -> Copy:
        """The part of this copy inside `box`."""
        return Copy(
            tuple(view.window(box) for view in self.sources), tuple(view.window(box) for view in self.targets), self.add
        )

    def into(self, files: Collection[str]) -> Copy:
        """The same to those targets that lie in some files, which may be none."""
        return replace(self, targets=tuple(view for view in self.targets if view.file in files))


#: A tensor to be written: name, dtype, shape.
TensorSpec = tuple[str, str, tuple[int, ...]]

#: Copies that are moved together because they share a row range of a Hugging Face tensor.
Block = tuple[Copy, ...]


@dataclass(frozen=True)
class TargetFile:
    """A file of the target, before any data: its header, its size and the tensors that it will hold."""

    name: str
    header: bytes
    size_bytes: int
    tensors: tuple[StoredTensor, ...]
