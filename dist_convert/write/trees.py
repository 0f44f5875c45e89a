"""Directories as a whole: made, listed and removed, and what is mounted at them or inside of them."""

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dist_convert.write.files import Place, holding

_MOUNTS = Path("/proc/self/mountinfo")


def existing_parent(path: Path) -> Path:
    """The nearest thing above a path that is there: a directory, or what is in its way."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def make_parents(path: Path) -> None:
    """Make the directories above a path that are not there, however many."""
    there = existing_parent(path)
    for parent in reversed(path.absolute().parents):
        if len(parent.parts) > len(there.parts):
            parent.mkdir(exist_ok=True)


def found_below(root: Path, directory: str = "", place: Place | None = None) -> dict[str, os.stat_result]:
    """All that lies below a directory, by name below the root, in ascending order; no link is followed."""
    found, waiting = {}, [f"{directory}/".lstrip("/")]
    while waiting:
        above = waiting.pop()
        with holding(root, f"{above}.", place=place) as (holder, _), os.scandir(holder) as entries:
            for entry in entries:
                name = above + entry.name
                found[name] = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found[name].st_mode):
                    waiting.append(f"{name}/")
    return dict(sorted(found.items()))


def remove(root: Path, name: str, place: Place | None = None) -> None:
    """Remove something of ours below a directory, if it is there, whatever it is.

    What a link leads to stays, wherever the link is below the root or in its place, and what is mounted inside.

    Args:
        root, place: see `holding`.

    Raises:
        OSError: the operating system's, or something is mounted there.
    """
    with suppress(FileNotFoundError):
        with holding(root, name, place=place) as (holder, last):
            found = {name: os.stat(last, dir_fd=holder, follow_symlinks=False)}
        if stat.S_ISDIR(found[name].st_mode):
            if mount_points(root / name):
                raise OSError(errno.EBUSY, "a file system is mounted there", str(root / name))
            found |= found_below(root, name, place)
        for one in reversed(found):
            with holding(root, one, place=place) as (holder, last):
                (os.rmdir if stat.S_ISDIR(found[one].st_mode) else os.unlink)(last, dir_fd=holder)


#: Of renameat2(2): relative to the working directory, and what has the new name stays.
_HERE, _NO_REPLACE = -100, 1


def rename_to_new(old: Path, new: Path) -> None:
    """Rename something, but never in place of anything: rename(2) itself replaces an empty directory.

    Raises:
        OSError: the operating system's.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), _NO_REPLACE):
        number = ctypes.get_errno() if call else errno.ENOSYS
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number), str(new))
        if os.path.lexists(new):  # all that file systems without it let us do
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        old.rename(new)


def mount_points(directory: Path) -> list[str]:
    """What below a directory is a mount point, which renaming does not leave; "" is the directory itself."""
    place = str(directory.resolve())
    is_device = directory.stat().st_dev != directory.absolute().parent.stat().st_dev
    points = {point for _, point, _ in _mounts(_mountinfo()) if point == place or point.startswith(f"{place}/")}
    return sorted({point[len(place) + 1 :] for point in points} | ({""} if is_device else set()))


def file_system_type(path: Path) -> str:
    """The type of the file system that holds a path, or the nearest thing above it; "" where nobody says."""
    holder = path if os.path.lexists(path) else existing_parent(path)
    try:
        device = os.stat(holder).st_dev
    except OSError:
        return ""
    return types_by_device(_mountinfo()).get(f"{os.major(device)}:{os.minor(device)}", "")


def types_by_device(mountinfo: str) -> dict[str, str]:
    """The types of mounted file systems by their device, `major:minor`, which all mounts of one file system share."""
    return {device: kind for device, _, kind in _mounts(mountinfo)}


def _mountinfo() -> str:
    try:
        return _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _mounts(mountinfo: str) -> Iterator[tuple[str, str, str]]:
    """Device, mount point and type of each mount.

    Args:
        mountinfo: number, parent, device, root, mount point and options of each mount, any number of optional fields, a
            hyphen, type, source and more options; blanks inside of a field are octal
            (https://www.kernel.org/doc/html/latest/filesystems/proc.html, "/proc/<pid>/mountinfo").
    """
    for mount, _, kind in (line.partition(" - ") for line in mountinfo.splitlines()):
        if kind:
            _, _, device, _, point, *_ = mount.split(" ")
            yield device, re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point), kind.split()[0]
