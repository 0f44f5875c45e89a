"""Directories as a whole: made, listed and removed, and what is mounted at them or inside of them."""

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dist_convert.write.files import Directory, Root, holding

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


def lies_in(path: Path, directory: Path) -> bool:
    """Whether a path is a directory or lies below it, which may have two names: by a bind mount, or in either case."""
    place, root = path.resolve(), directory.resolve()
    there = [one for one in (place, *place.parents) if os.path.exists(one)] if os.path.exists(root) else []
    return place.is_relative_to(root) or any(map(root.samefile, there))


def found_below(root: Root, directory: str = "") -> dict[str, os.stat_result]:
    """All that lies below a directory, by name below the root, in ascending order; no link is followed."""
    found, waiting = {}, [f"{directory}/".lstrip("/")]
    while waiting:
        above = waiting.pop()
        with holding(root, f"{above}.") as (holder, _), os.scandir(holder) as entries:
            for entry in entries:
                name = above + entry.name
                found[name] = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found[name].st_mode):
                    waiting.append(f"{name}/")
    return dict(sorted(found.items()))


def remove(root: Directory, name: str) -> None:
    """Remove something of ours below a directory, if it is there, whatever it is.

    What a link leads to stays, wherever the link is below the root or in its place, and what is mounted inside.

    Raises:
        OSError: the operating system's, or something is mounted there.
    """
    with suppress(FileNotFoundError):
        with holding(root, name) as (holder, last):
            found, place = {name: os.stat(last, dir_fd=holder, follow_symlinks=False)}, Path(f"/proc/self/fd/{holder}")
            # Without /proc nobody tells what is mounted where.
            if stat.S_ISDIR(found[name].st_mode) and place.exists() and mount_points(place / last):
                raise OSError(errno.EBUSY, "a file system is mounted there")
        if stat.S_ISDIR(found[name].st_mode):
            found |= found_below(root, name)
        for one in reversed(found):
            with holding(root, one) as (holder, last):
                (os.rmdir if stat.S_ISDIR(found[one].st_mode) else os.unlink)(last, dir_fd=holder)


#: Of renameat2(2): what has the new name stays.
_NO_REPLACE = 1


def rename_to_new(holder: int, old: str, new_holder: int, new: str) -> None:
    """Rename something, but never in place of anything: rename(2) itself replaces an empty directory.

    Args:
        holder, new_holder: descriptors of the directories that have it, and that get it.
        old, new: its names in them.

    Raises:
        OSError: the operating system's.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or call(holder, os.fsencode(old), new_holder, os.fsencode(new), _NO_REPLACE):
        number = ctypes.get_errno() if call else errno.ENOSYS
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number), new)
        if new in os.listdir(new_holder):  # all that file systems without it let us do
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new, src_dir_fd=holder, dst_dir_fd=new_holder)


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
            hyphen, type, source and more options; blanks inside of a field are octal, other odd characters are not
            (https://www.kernel.org/doc/html/latest/filesystems/proc.html, "/proc/<pid>/mountinfo").
    """
    for mount, _, kind in (line.partition(" - ") for line in mountinfo.split("\n")):
        if kind:
            _, _, device, _, point, *_ = mount.split(" ")
            yield device, re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point), kind.split()[0]
