"""File systems: what a path lies on, by the mount table, and what may be done there."""

import os
from pathlib import Path

import pytest

from eventrun import filesystems
from eventrun.filesystems import FileSystem, file_system

MOUNTS = """
22 1 254:0 / / rw,relatime shared:1 - {root} /dev/vda rw
30 22 0:26 / /home rw - nfs4 server:/home rw
31 30 0:27 / /home/me/fast\\040disk rw - xfs /dev/sdb rw
32 22 0:28 / /mnt/données rw - cifs //server/x rw
33 22 0:29 / /mnt/tmp rw shared:9 master:2 - tmpfs tmpfs rw
34 22 0:30 / /mnt/tmp rw - fuse.sshfs host: rw
"""
LOCAL_MAPPED, LOCAL, NETWORK = (True, False), (False, False), (False, True)


@pytest.mark.parametrize(
    ("path", "root", "kind", "expected"),
    [
        ("/data/runs", "ext4", "ext4", LOCAL_MAPPED),
        ("/data/runs", "overlay", "overlay", LOCAL),
        ("/data/runs", "btrfs", "btrfs", LOCAL),
        ("/data/runs", "fuseblk", "fuseblk", LOCAL),
        ("/data/runs", "fuse.fuse-overlayfs", "fuse.fuse-overlayfs", LOCAL),
        ("/data/runs", "fuse.s3fs", "fuse.s3fs", NETWORK),
        ("/data/runs", "lustre", "lustre", NETWORK),
        ("/data/runs", "9p", "9p", NETWORK),
        ("/home/me/runs", "ext4", "nfs4", NETWORK),
        ("/homes/runs", "ext4", "ext4", LOCAL_MAPPED),
        ("/home/me/fast disk/runs", "ext4", "xfs", LOCAL_MAPPED),
        ("/home/me/fast disk", "ext4", "xfs", LOCAL_MAPPED),
        ("/mnt/données/runs", "ext4", "cifs", NETWORK),
        ("/mnt/tmp/runs", "ext4", "fuse.sshfs", NETWORK),  # the later mount hides the earlier
    ],
)
def test_the_innermost_mount_decides(path: str, root: str, kind: str, expected: tuple[bool, bool]) -> None:
    """Only file systems that keep what is allocated are mapped; what other machines may write to is a network."""
    assert file_system(Path(path), MOUNTS.strip().format(root=root)) == FileSystem(kind, *expected)


def test_a_link_is_followed(tmp_path: Path) -> None:
    """It is the place that a path leads to that counts."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    mounts = f"1 1 0:1 / / rw - nfs a: rw\n2 1 0:2 / {tmp_path / 'disk'} rw - xfs /dev/sda rw"
    assert file_system(tmp_path / "runs" / "new", mounts).kind == "xfs"


def test_nothing_is_mapped_where_space_cant_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without posix_fallocate (macOS, Windows) or a mount table nothing is mapped, and nothing is a network."""
    with monkeypatch.context() as patch:
        patch.delattr(os, "posix_fallocate")
        assert not file_system(tmp_path).mapped
    monkeypatch.setattr(filesystems, "MOUNTINFO", tmp_path / "missing")
    assert file_system(tmp_path) == FileSystem("", False, False)
