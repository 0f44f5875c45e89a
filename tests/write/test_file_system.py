"""What holds a path: the types of mounted file systems as the kernel lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_convert.write.trees import file_system_type, types_by_device
from tests.file_systems import mounted

LISTED: dict[str, tuple[str, dict[str, str]]] = {
    "nothing": ("", {}),
    "a disk and NFS below it": (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "98 22 0:45 / /mnt/models rw,relatime shared:52 - nfs4 server:/export/models rw,vers=4.2,hard\n",
        {"8:1": "ext4", "0:45": "nfs4"},
    ),
    "a directory of NFS that is mounted once more": (
        "98 22 0:45 / /mnt/models rw - nfs server:/models rw\n99 22 0:45 /llama /llama rw - nfs server:/models rw\n",
        {"0:45": "nfs"},
    ),
    "characters that Python takes for ends of lines": (
        "98 22 0:45 / /mnt/a\fb\x85c\u2028d rw - fuse.sshfs server:/models rw\n", {"0:45": "fuse.sshfs"}
    ),
    "blanks, and a hyphen between them": (
        "98 22 0:45 / /mnt/our\\040-\\040models rw - cifs //server/our\\040-\\040models rw\n",
        {"0:45": "cifs"},
    ),
    "a disk inside of NFS inside of a disk": (
        "22 1 8:1 / / rw - xfs /dev/sda1 rw\n98 22 0:45 / /mnt rw - nfs4 server:/ rw\n"
        "99 98 8:17 / /mnt/scratch rw - ext4 /dev/sdb1 rw\n",
        {"8:1": "xfs", "0:45": "nfs4", "8:17": "ext4"},
    ),
    "no optional field, and several": (
        "40 1 0:30 / /a rw - tmpfs tmpfs rw\n41 1 0:31 / /b rw shared:3 master:2 unbindable - fuse.sshfs host: rw\n",
        {"0:30": "tmpfs", "0:31": "fuse.sshfs"},
    ),
    "no name of a source": ("40 1 0:30 / /a rw -  9p  rw,trans=virtio\n", {"0:30": "9p"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_mounts_are_listed_by_device_with_their_types(name: str) -> None:
    text, expected = LISTED[name]
    assert types_by_device(text) == expected


def test_a_path_that_is_not_there_yet_is_held_by_the_nearest_directory_above(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "none", str(tmp_path / "disk")):
        (tmp_path / "disk" / "inside").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "inside")
        for name in ("disk", "disk/inside", "disk/a/b/c.partial", "link/new.partial"):
            assert file_system_type(tmp_path / name) == "tmpfs"


def test_what_cannot_be_looked_at_has_no_type(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    assert file_system_type(tmp_path / "link" / "new") == ""
