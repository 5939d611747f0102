"""File systems: on which one a path lies, whether mapped files can be trusted there, and whether others share it.

A file system that another machine (or another kernel: the host of a virtual machine) may write to at the same time is
called a network here. There neither mapped files nor SQLite's write-ahead log work.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

MOUNTINFO = Path("/proc/self/mountinfo")  # tests put another one here

MAPPED = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs"})  # keep what posix_fallocate promised
NETWORK = frozenset({
    "9p", "acfs", "afs", "afpfs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2",
    "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb2",
    "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "webdav", "weka", "wekafs",
})  # fmt: skip
# Of the programs that serve files by FUSE most bring them from elsewhere (sshfs, s3fs, rclone, gcsfuse, juicefs, ...),
# and new ones come each year. The slower way is right everywhere, so it is the known local ones that are named.
LOCAL_FUSE = frozenset({
    "bindfs", "cryfs", "encfs", "exfat", "fuse-overlayfs", "gocryptfs", "mergerfs", "ntfs", "ntfs-3g", "overlayfs",
    "portal", "snapfuse", "squashfuse", "unionfs", "unionfs-fuse", "zfs-fuse",
})  # fmt: skip


class FileSystem(NamedTuple):
    """What a path lies on; `kind` is "" where the system doesn't tell (macOS, Windows)."""

    kind: str
    mapped: bool  # mapped files keep what was allocated
    network: bool


def file_system(path: Path, mountinfo: str | None = None) -> FileSystem:
    """Tell what a path lies on, or would lie on. `mountinfo` is the text of /proc/self/mountinfo."""
    kind = _kind(os.path.realpath(path), _mountinfo() if mountinfo is None else mountinfo)
    return FileSystem(kind, kind in MAPPED and hasattr(os, "posix_fallocate"), _is_network(kind))


def sync_parents(folder: Path) -> None:
    """Make a folder's name durable, and those of the folders that lead to it, which may be new as well.

    After a power loss a folder may be gone with all that was synced in it, as long as its own name wasn't. Raises
    OSError when the disk fails.
    """
    try:
        device = os.stat(folder).st_dev
        for each in folder.parents:
            descriptor = os.open(each, os.O_RDONLY)
            try:
                if os.fstat(descriptor).st_dev != device:
                    break
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:  # not ours to read, so not new; or a system that has no such thing
        if error.errno == errno.EIO:
            raise


def cache_folder(folder: Path) -> Path | None:
    """Make a folder on a local disk for what can be made anew of a store on a network; None: there is no such disk."""
    import tempfile
    from hashlib import sha256

    name = sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    for place in (home / "eventrun", Path(tempfile.gettempdir()) / f"eventrun-{user}"):
        try:
            if file_system(place).network:
                continue
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.stat().st_uid == user:  # in a folder that all may write to it could be another's
                (place / name).mkdir(exist_ok=True)
                return place / name
        except OSError:
            continue
    return None


def _mountinfo() -> str:
    try:
        return MOUNTINFO.read_text("utf-8", "surrogateescape")
    except OSError:
        return ""


def _kind(place: str, mountinfo: str) -> str:
    best, kind = "", ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])  # of spaces
        # Of two on the same place the later one hides the earlier.
        if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def _is_network(kind: str) -> bool:
    served, dot, program = kind.partition(".")
    if served == "fuse":
        return not dot or program not in LOCAL_FUSE
    return kind in NETWORK  # "fuseblk" is a local disk; overlay's upper folder can't be on a network disk
