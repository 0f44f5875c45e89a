"""Files of a target: made in their final size, written at positions, replaced as a whole, forced to the disk."""

import ctypes
import errno
import fcntl
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

from dist_convert.errors import CorruptFile, NotEnoughSpace, PlanError, TargetBusy, TargetError, remedy_of
from dist_convert.read.source import read_json
from dist_convert.records import View, Window, local_name

#: Of every descriptor: no link is followed, and nobody waits for the other end of a pipe.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Directory:
    """A directory that `held` keeps open: all below it is reached from it, whatever has its name meanwhile.

    Attributes:
        path: of its name, for messages.
        descriptor: of the directory itself.
    """

    path: Path
    descriptor: int

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def is_named(self, name: str, parent: "Directory") -> bool:
        """Whether it has a name in the directory that holds it."""
        try:
            found = os.stat(name, dir_fd=parent.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self.descriptor))


#: What to read below; a path is opened for this one time, and is no link.
Root = Directory | Path


@contextmanager
def held(path: Path, parent: Directory | None = None) -> Iterator[Directory]:
    """Keep a directory open, which is no link; its name is looked up in a parent that is held, if there is one."""
    name, base = (path, None) if parent is None else (path.name, parent.descriptor)
    descriptor = os.open(name, os.O_DIRECTORY | _PLAIN, dir_fd=base)
    try:
        yield Directory(path, descriptor)
    finally:
        os.close(descriptor)


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
def holding(root: Root, name: str, *, makes: bool = False) -> Iterator[tuple[int, str]]:
    """A descriptor of the directory that holds a path below another one, and the path's name in it.

    Args:
        root, name: the directory, and the path below it; no directory on the way is a link.
        makes: whether directories on the way are made.
    """
    *above, last = name.split("/")
    start, base = (".", root.descriptor) if isinstance(root, Directory) else (root, None)
    try:
        holder = os.open(start, os.O_DIRECTORY | _PLAIN, dir_fd=base)
        try:
            for part in above:
                if makes:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=holder)
                outer, holder = holder, os.open(part, os.O_DIRECTORY | _PLAIN, dir_fd=holder)
                os.close(outer)
            yield holder, last
        finally:
            os.close(holder)
    except OSError as error:
        error.filename = str(root / name)
        raise


def open_below(root: Root, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file below a directory, reached without following any link.

    Args:
        root, name: see `holding`.
        flags: of open(2).

    Raises:
        OSError: the operating system's; or something is in the file's place that no conversion has put there: a link,
            a pipe, or a file that has another name elsewhere.
    """
    with holding(root, name, makes=bool(flags & os.O_CREAT)) as (holder, last):
        descriptor = os.open(last, flags | _PLAIN, 0o666, dir_fd=holder)
        if not is_plain(os.fstat(descriptor)):
            os.close(descriptor)
            raise OSError(errno.EEXIST, "a link, a pipe or a hard-linked file is in its place")
        return descriptor


def is_plain(found: os.stat_result) -> bool:
    """Whether something is a file with one name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def names_in(root: Root, directory: str = "") -> set[str]:
    """What a directory below another one, or that one, holds; see `holding`."""
    with holding(root, f"{directory}/.".lstrip("/")) as (holder, _):
        return set(os.listdir(holder))


def is_file(root: Root, name: str) -> bool:
    """Whether a file with one name lies below a directory, as far as that can be seen; see `holding`."""
    try:
        with holding(root, name) as (holder, last):
            return is_plain(os.stat(last, dir_fd=holder, follow_symlinks=False))
    except OSError:
        return False


@contextmanager
def opened(root: Root, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """What `open_below` opens, for as long as the block lasts."""
    descriptor = open_below(root, name, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(root: Directory, name: str = ".") -> None:
    """Force a file or a directory below another one, or that one, to the disk.

    Raises:
        OSError: it may not be there; trying again would say that it is.
    """
    with holding(root, name) as (holder, last):
        descriptor = os.open(last, os.O_RDONLY | _PLAIN, dir_fd=holder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def target_error(error: OSError, file: object) -> TargetError:
    """The error of ours for an operating system's refusal to write."""
    what = "move away what is there" if error.errno in _IN_THE_WAY else remedy_of(error)
    remedy = f"{what}, then start the same command again; or choose another target"
    kind = NotEnoughSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else TargetError
    return kind("cannot write the target", file, found=error.strerror or error, remedy=remedy)


#: The system's refusals where something else has the name of a file or directory of the target.
#: EXDEV: overlayfs renames no directory of a lower layer.
_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.ENXIO, errno.EXDEV)


@contextmanager
def writing(file: object) -> Iterator[None]:
    """Within it a file or directory of the target is made, written or renamed."""
    try:
        yield
    except OSError as error:
        raise target_error(error, file) from error


_MAX_OPEN_FILES = 64

#: Of one system call, so that the processor's cache has it from its CRC-32.
_WRITE_BYTES = 1 << 20

#: What was written, and the CRC-32 of its bytes; None where there are gaps between them.
Written = tuple[Window, int | None]


class FileWriter:
    """Writes views of the files below one directory; keeps a limited number of them open.

    Not for use by two threads at once.
    """

    def __init__(self, root: Directory) -> None:
        self.written_bytes = 0
        self._root = root
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
            raise PlanError("a transposed window is written by its columns", view.file, tensor=view.tensor)
        if len(packed) != view.size_bytes:
            what, expected = "not as many bytes as the window has", f"{view.size_bytes} bytes"
            raise PlanError(what, view.file, expected, tensor=view.tensor, found=f"{len(packed)} bytes")
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
            descriptor = open_below(self._root, local_name(file), os.O_WRONLY)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[file] = descriptor
        return descriptor


def make_file(root: Directory, name: str, pieces: Iterable[tuple[int, bytes]], size_bytes: int) -> None:
    """Write all of a file that is no tensor's values, and give it its size; values that are there already stay.

    Args:
        root, name: see `open_below`.
        pieces: offset in bytes and content.
        size_bytes: of the whole file.
    """
    with writing(root / name):
        flags = os.O_WRONLY | (0 if is_file(root, name) else os.O_CREAT | os.O_EXCL)  # NFS reads no page for it
        with opened(root, name, flags) as descriptor:
            if os.fstat(descriptor).st_size < size_bytes:
                os.ftruncate(descriptor, size_bytes)
            for offset_bytes, piece in pieces:
                if os.pwrite(descriptor, piece, offset_bytes) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_file(root: Directory, name: str, content: bytes) -> None:
    """Write all of a small file of a target that is not complete yet; what an earlier run has made of it goes."""
    with writing(root / name):
        with holding(root, name, makes=True) as (holder, last), suppress(FileNotFoundError):
            os.unlink(last, dir_fd=holder)
        _write_new(root, name, content)


def _write_new(root: Directory, name: str, content: bytes | Iterable[bytes], *, is_forced: bool = False) -> None:
    with opened(root, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        for piece in (content,) if isinstance(content, bytes) else content:
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
        if is_forced:
            os.fsync(descriptor)


def reserve_file(root: Directory, name: str) -> bool:
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
    root: Directory,
    contents: Mapping[str, bytes | Iterable[bytes]],
    scratch: tuple[Directory, str] | None = None,
    waiting: Iterable[str] | None = None,
) -> None:
    """Replace files, or add them; none before all are written and forced to the disk, and none in part.

    Args:
        root: see `holding`.
        contents: by name, of large files in pieces. A link that has the name is replaced as well, and what it leads to
            is left alone.
        scratch: another root and the name of a directory in it, on the same file system, in which they are written
            first; each beside its place without it. There a `TEMPORARY` one stays if the process is killed.
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


def _take_name(fresh_root: Directory, fresh: str, root: Directory, name: str) -> None:
    with writing(root / name), holding(fresh_root, fresh) as (made_in, made), holding(root, name) as (holder, last):
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
        if not _is_below(name) or (made != "" and not is_beside):
            raise CorruptFile("no list of files that wait for their names", root / WAITING, found=f"{name!r}")
    return listed


def _is_below(name: str) -> bool:
    """Whether a text is the name of something below a directory."""
    try:
        return not {"", ".", ".."} & {*name.split("/")} and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair, as JSON can have
        return False


def go_on_replacing(root: Directory, *more: str) -> list[str]:
    """Give files their names that did not get them when a run was killed; the names of those that it listed.

    As long as the root is held no other process does so, where flock(2) can tell. There what the killed run was still
    writing is removed, here and in more directories below.

    Raises:
        TargetBusy: another process does.
    """
    try:
        fcntl.flock(root.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        can_tell = True
    except BlockingIOError as error:
        remedy = "wait until it has ended, or stop it, and start the same command again"
        raise TargetBusy("another process is changing files of the model", root, remedy=remedy) from error
    except OSError:
        can_tell = False
    listed = waiting_files(root.path)
    for name, made in listed.items():
        if made and is_file(root, made):
            _take_name(root, made, root, name)
    with suppress(OSError):
        for directory in (".", *more) if can_tell else ():
            with holding(root, f"{directory}/.") as (holder, _):
                for name in filter(TEMPORARY.fullmatch, os.listdir(holder)):
                    os.unlink(name, dir_fd=holder)
    return [name for name in listed if is_file(root, name)]
