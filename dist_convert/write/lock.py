"""Keeps two conversions from making one target at the same time, on one machine or on several.

On one machine flock(2) tells, which the kernel lets go of whatever becomes of the process. Network file systems may not
pass it on, so the file also says who holds it, and a thread touches it every few seconds: to whoever finds it held by
another machine, a file that is touched while he looks on is alive, and no clocks need agree.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from datetime import datetime

from dist_convert.errors import TargetBusy
from dist_convert.ranks.timeout import wait_for_end
from dist_convert.records import JsonObject
from dist_convert.write.files import Directory, open_below, opened, writing
from dist_convert.write.journal import this_boot

BEAT_SECONDS = 5.0
#: What another machine has not touched for so long is given up.
STALE_SECONDS = 30.0
_RELEASED = b"{}\n"


class Lock:
    """Holds a file for this process until it is released.

    Args:
        root, name: of the file, which is made where it is not there, as the directory that holds it is; see `holding`.
        label: what messages call it.
        stale_seconds: how long another machine's holder is watched.
        fresh_seconds: how long one is waited for who has made the file, and has not said yet who he is.

    Raises:
        TargetBusy: naming who holds it.
    """

    def __init__(
        self,
        root: Directory,
        name: str,
        label: object,
        stale_seconds: float = STALE_SECONDS,
        fresh_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._released = threading.Event()
        is_new = True
        with writing(root / name):
            try:
                self._descriptor = open_below(root, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                is_new = False
                self._descriptor = open_below(root, name, os.O_RDWR)
        try:
            holder = _refuse_held(self._descriptor, label)
            if not is_new and holder is None:
                time.sleep(fresh_seconds)
                holder = _refuse_held(self._descriptor, label)
            if holder and _lives(holder, root, name, stale_seconds):
                raise _busy(label, holder)
            if not is_new and not _is_there(root, name, self._descriptor):
                raise _busy(label, None)  # who held it has just completed the target
            with writing(root / name):
                self._write()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Let another process have it."""
        self._released.set()
        wait_for_end(lambda: not self._beats.is_alive())
        with contextlib.suppress(OSError):  # what is left behind is known to be stale
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _RELEASED, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open
        os.close(self._descriptor)

    def _write(self) -> None:
        host, boot = this_boot()
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps({"host": host, "boot": boot, "process": os.getpid(), "started": started})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def check_unlocked(root: Directory, name: str, label: object) -> None:
    """Refuse what another process of this machine holds, as `Lock` does, without holding it."""
    with writing(root / name), contextlib.suppress(FileNotFoundError), opened(root, name, os.O_RDWR) as descriptor:
        _refuse_held(descriptor, label)


def _refuse_held(descriptor: int, label: object) -> JsonObject | None:
    """Who wrote the file: empty where it is nobody, None where the file is empty, as for a moment when it is new.

    Refused is what another process has, as far as flock(2) tells.
    """
    text = os.pread(descriptor, 4096, 0)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    holder = found if isinstance(found, dict) else {} if text else None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _busy(label, holder) from error
    return holder


def _lives(holder: JsonObject, root: Directory, name: str, stale_seconds: float) -> bool:
    """Whether the holder of a file that flock did not refuse is at work all the same."""
    if (holder.get("host"), holder.get("boot")) == this_boot():
        return False  # it would have the flock
    touched, deadline = set(), time.monotonic() + stale_seconds
    while time.monotonic() < deadline:
        with opened(root, name) as descriptor:  # opening makes a network file system ask its server
            touched.add(os.fstat(descriptor).st_mtime_ns)
        if len(touched) > 1:
            return True
        time.sleep(min(1.0, stale_seconds / 10))
    return False


def _is_there(root: Directory, name: str, descriptor: int) -> bool:
    """Whether an open file still has its name."""
    with contextlib.suppress(FileNotFoundError), opened(root, name) as found:
        return os.path.samestat(os.fstat(found), os.fstat(descriptor))
    return False


def _busy(label: object, holder: JsonObject | None) -> TargetBusy:
    who = f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('started')}" if holder else ""
    what = "another conversion is making this target"
    remedy = "wait until it has ended, or stop it, and start the same command again"
    return TargetBusy(what, label, found=who or "a process that has just started", remedy=remedy)
