"""Files of a target: made in their final size, written at positions, replaced as a whole, forced to the disk."""

import ctypes
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from dist_convert.errors import CorruptFile, NotEnoughSpace, PlanError, TargetError, remedy_of
from dist_convert.read.source import read_json
from dist_convert.records import View, Window, local_name

#: Of every descriptor: no link is followed, and nobody waits for the other end of a pipe.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK


#: A directory's device and inode, which stay the same while something in it is open, as a lock is.
Place = tuple[int, int]


@dataclass(frozen=True)
class Beside:
    """A small file beside a target, which all targets of a directory share, so that the last one replaces it.

    Attributes:
        content: of the file.
        replaces: a regular expression for all of what it may replace.
    """

    content: bytes
    replaces: bytes


@contextmanager
def holding(root: Path, name: str, *, makes: bool = False, place: Place | None = None) -> Iterator[tuple[int, str]]:
    """A descriptor of the directory that holds a path below another one, and the path's name in it.

    Args:
        root, name: the directory, which may be a link no more than those on the way, and the path below it.
        makes: whether directories on the way are made.
        place: of the root, which no other directory may have taken since it was looked up.
    """
    *above, last = name.split("/")
    holder = os.open(root, os.O_DIRECTORY | _PLAIN)
    try:
        found = os.fstat(holder)
        if place not in (None, (found.st_dev, found.st_ino)):
            raise OSError(errno.ESTALE, "another directory than at the start has its name")
        for part in above:
            if makes:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=holder)
            outer, holder = holder, os.open(part, os.O_DIRECTORY | _PLAIN, dir_fd=holder)
            os.close(outer)
        yield holder, last
    except OSError as error:
        error.filename = str(root / name)
        raise
    finally:
        os.close(holder)


def open_below(root: Path, name: str, flags: int = os.O_RDONLY, place: Place | None = None) -> int:
    """A descriptor of a plain file below a directory of the target, reached without following any link.

    Args:
        root, name, place: see `holding`.
        flags: of open(2).

    Raises:
        OSError: the operating system's; or something is in the file's place that no conversion has put there: a link,
            a pipe, or a file that has another name elsewhere.
    """
    with holding(root, name, makes=bool(flags & os.O_CREAT), place=place) as (holder, last):
        descriptor = os.open(last, flags | _PLAIN, 0o666, dir_fd=holder)
        if not is_plain(os.fstat(descriptor)):
            os.close(descriptor)
            raise OSError(errno.EEXIST, "a link, a pipe or a file with a second name is in its place")
        return descriptor


def is_plain(found: os.stat_result) -> bool:
    """Whether something is a file with one name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


@contextmanager
def opened(root: Path, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """What `open_below` opens, for as long as the block lasts."""
    descriptor = open_below(root, name, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Force a file or a directory to the disk.

    Raises:
        OSError: it may not be there; trying again would say that it is.
    """
    descriptor = os.open(path, os.O_RDONLY | _PLAIN)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_parent(path: Path) -> None:
    """Force to the disk which names the directory has that holds a path; that directory may be reached by a link."""
    sync(path.absolute().parent.resolve())


def target_error(error: OSError, file: str) -> TargetError:
    """The error of ours for an operating system's refusal to write."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "move away what is there" if error.errno in _IN_THE_WAY else remedy_of(error)
    return (NotEnoughSpace if is_full else TargetError)(
        "cannot write the target",
        file=file,
        found=error.strerror or str(error),
        remedy=f"{what}, then start the same command again; or choose another target",
    )


#: The system's refusals where something else has the name of a file or directory of the target.
_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.ENXIO)


@contextmanager
def writing(file: str | Path) -> Iterator[None]:
    """Within it a file or directory of the target is made, written or renamed."""
    try:
        yield
    except OSError as error:
        raise target_error(error, str(file)) from error


_MAX_OPEN_FILES = 64

#: Of one system call. For larger ones Linux looks for larger stretches of free memory, which can take seconds.
_WRITE_BYTES = 1 << 20

#: What was written, and the CRC-32 of its bytes; None where there are gaps between them.
Written = tuple[Window, int | None]


class FileWriter:
    """Writes views of the files below one directory; keeps a limited number of them open.

    Not for use by two threads at once.
    """

    def __init__(self, root: Path, place: Place | None = None) -> None:
        self.written_bytes = 0
        self._root, self._place = root, place
        self._open: dict[str, int] = {}  # the one that was used last is the last

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(self, view: View, packed: memoryview) -> Written:
        """Write values that lie row after row in memory to where the view says; returns what to remember of it.

        Raises:
            PlanError: the columns of a row are apart in the file, or there are not as many values as the view has.
        """
        if view.is_transposed:
            raise PlanError("a transposed window is written by its columns", tensor=view.tensor, file=view.file)
        if len(packed) != view.size_bytes:
            raise PlanError(
                "not as many bytes as the window has",
                tensor=view.tensor,
                file=view.file,
                expected=f"{view.size_bytes} bytes",
                found=f"{len(packed)} bytes",
            )
        window = Window.of(view)
        checksum = 0 if window.runs == 1 else None
        with writing(self._root / local_name(view.file)):
            for run in range(window.runs):
                line = packed[run * window.run_bytes : (run + 1) * window.run_bytes]
                checksum = self._write_at(view.file, line, window.offset_bytes + run * window.stride_bytes, checksum)
        self.written_bytes += len(packed)
        return window, checksum

    def write_piece(self, file: str, piece: memoryview, offset_bytes: int, checksum: int | None) -> int:
        """Write bytes of a file whose CRC-32 may be known; returns that."""
        checksum = isal_zlib.crc32(piece) if checksum is None else checksum
        with writing(self._root / local_name(file)):
            self._write_at(file, piece, offset_bytes, None)
        self.written_bytes += len(piece)
        return checksum

    def _write_at(self, file: str, data: memoryview, offset_bytes: int, checksum: int | None) -> int | None:
        """Write bytes, each piece right after it went into the checksum, which leaves it in the processor's cache."""
        descriptor, done = self._descriptor(file), 0
        while done < len(data):
            piece = data[done : done + _WRITE_BYTES]
            longer = None if checksum is None else isal_zlib.crc32(piece, checksum)
            count = os.pwrite(descriptor, piece, offset_bytes + done)
            if not count:
                raise OSError(errno.EIO, "nothing of it was written")
            if count < len(piece) and checksum is not None:
                longer = isal_zlib.crc32(piece[:count], checksum)
            checksum, done = longer, done + count
        return checksum

    def _descriptor(self, file: str) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = open_below(self._root, local_name(file), os.O_WRONLY, self._place)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[file] = descriptor
        return descriptor


def make_file(root: Path, name: str, pieces: Iterable[tuple[int, bytes]], size_bytes: int) -> None:
    """Write all of a file that is no tensor's values, and give it its size; values that are there already stay.

    Args:
        root, name: see `open_below`.
        pieces: offset in bytes and content.
        size_bytes: of the whole file.
    """
    with writing(root / name):
        is_new = not os.path.lexists(root / name)
        flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0)  # NFS reads no page for it
        with opened(root, name, flags) as descriptor:
            if os.fstat(descriptor).st_size < size_bytes:
                os.ftruncate(descriptor, size_bytes)
            for offset_bytes, piece in pieces:
                if os.pwrite(descriptor, piece, offset_bytes) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_file(root: Path, name: str, content: bytes) -> None:
    """Write all of a small file of a target that is not complete yet; what an earlier run has made of it goes.

    Args:
        root, name: see `open_below`.
        content: of the file.
    """
    with writing(root / name):
        with holding(root, name, makes=True) as (holder, last), suppress(FileNotFoundError):
            os.unlink(last, dir_fd=holder)
        _write_new(root, name, content)


def _write_new(root: Path, name: str, content: bytes | Iterable[bytes], *, is_forced: bool = False) -> None:
    with opened(root, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        for piece in (content,) if isinstance(content, bytes) else content:
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
        if is_forced:
            os.fsync(descriptor)


def reserve_file(root: Path, name: str) -> bool:
    """Have blocks of the disk behind all of a file, so that no write can find it full; values that are there stay.

    By fallocate(2) itself: posix_fallocate falls back to writing, which may fall on what another rank has written.

    Returns:
        Whether the file system can promise that. Where it cannot, its free space has been compared before.
    """
    with writing(root / name), opened(root, name, os.O_WRONLY) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
        if not size_bytes:
            return True
        if call is None:
            return False
        off_t = ctypes.c_int64 if ctypes.sizeof(ctypes.c_long) == 8 else ctypes.c_long
        call.argtypes = (ctypes.c_int, ctypes.c_int, off_t, off_t)
        while call(descriptor, 0, 0, size_bytes):
            number = ctypes.get_errno()
            if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
    return True


#: Ends the names of what is not complete yet.
PARTIAL_SUFFIX = ".partial"
#: The names of files that are about to replace others.
TEMPORARY = re.compile(r"\.dist_convert-[0-9a-f]{16}\.partial")


#: Lists by their names files that are complete and wait to take them, as in `replace_files`.
WAITING = ".dist_convert-waiting.json"


def replace_files(
    root: Path,
    contents: Mapping[str, bytes | Iterable[bytes]],
    scratch: tuple[Path, str] | None = None,
    waiting: Iterable[str] | None = None,
) -> None:
    """Replace files, or add them; none before all are written and forced to the disk, and none in part.

    Args:
        root: see `holding`.
        contents: by name, of large files in pieces. A link that has the name is replaced as well, and what it leads to
            is left alone.
        scratch: a root and the name of a directory in it, on the same file system, in which they are written first;
            each beside its place without it. There a `TEMPORARY` one stays if the process is killed.
        waiting: where they belong together: `WAITING` lists them from when they are written until the caller removes
            it, and these names, which it has listed before; `go_on_replacing` does what is left.
    """
    fresh_root, fresh, is_listed = root, dict[str, str](), False
    for name in contents:
        directory = scratch[1] if scratch else name.rpartition("/")[0]
        fresh[name] = f"{directory}/.dist_convert-{secrets.token_hex(8)}{PARTIAL_SUFFIX}".lstrip("/")
    if scratch:
        fresh_root = scratch[0]
    try:
        for name, content in contents.items():
            with writing(root / name):
                _write_new(fresh_root, fresh[name], content, is_forced=True)
        if waiting is not None:
            replace_files(root, {WAITING: json.dumps(dict.fromkeys(waiting, "") | fresh).encode()})
            is_listed = True
        for name in contents:
            _take_name(fresh_root, fresh[name], root, name)
    except BaseException:
        for name in () if is_listed else fresh.values():
            with suppress(OSError), holding(fresh_root, name) as (made_in, made):
                os.unlink(made, dir_fd=made_in)
        raise


def _take_name(fresh_root: Path, fresh: str, root: Path, name: str) -> None:
    with (
        writing(root / name),
        holding(fresh_root, fresh) as (made_in, made),
        holding(root, name) as (holder, last),
    ):
        os.rename(made, last, src_dir_fd=made_in, dst_dir_fd=holder)
        os.fsync(holder)


def waiting_files(root: Path) -> dict[str, str]:
    """What `WAITING` lists, by name, which has its name already if it is not there any more.

    Raises:
        CorruptFile: it lists something else than `replace_files` does.
    """
    if not os.path.lexists(root / WAITING):
        return {}
    listed = read_json(root / WAITING)
    for name, made in listed.items():
        above, _, last = f"{made}".rpartition("/")
        is_beside = above == name.rpartition("/")[0] and TEMPORARY.fullmatch(last)
        if ".." in name.split("/") or (made != "" and not is_beside):
            raise CorruptFile("no list of files that wait for their names", file=str(root / WAITING), found=f"{name!r}")
    return listed


def go_on_replacing(root: Path) -> list[str]:
    """Give files their names that did not get them when a run was killed; the names of all of which it listed."""
    listed = waiting_files(root)
    for name, made in listed.items():
        if made and os.path.lexists(root / made):
            _take_name(root, made, root, name)
    return [*listed]
