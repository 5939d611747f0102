"""Power loss: a recording of all that was written and synced, and the disks that a power cut may leave of it.

`record` runs a workload under strace and gives its steps. `Disk` replays them; wherever it is stopped, `crash` writes
out what a disk may hold if the power is cut there. The model is the one of ALICE ("All File Systems Are Not Created
Equal", OSDI 2014) and CrashMonkey, without the promises that only some file systems make:

- What fsync or fdatasync of a file covers (contents and size of what was written before the call began) is there.
- Of each other 512-byte sector any state since the last sync may be there, whatever became of its neighbours; the
  step at which the power goes is one of them, so a write may be there in part. Sectors are not torn, and a write
  doesn't harm the bytes beside it (SQLite's powersafe overwrite, true of today's disks).
- A file has any of the sizes that it had since its last sync; what lies beyond that is gone, what was never written
  is zeros.
- A name (created, renamed, removed) is there for sure only after an fsync of its folder, never by that of the file
  itself. Of the changes since, in half of the images those that came first are there (as on ext4 and xfs, which have
  a journal), in the other half any of them. A rename happens or doesn't.
- Stores to mapped files don't show in strace. The workload hands over what its journals hold now and then, and each
  of their sectors may be as in any of these moments, or still zeros. `log.db-shm` is not durable state at all: it is
  left out, or full of rubbish.
"""

from __future__ import annotations

import random
import re
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
BOOT = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
OTHER_BOOT = b"0" * len(BOOT)  # after a power loss the machine has been started anew
WORKLOAD = Path(__file__).with_name("power_workload.py")
CALLS = (
    "openat,open,creat,pwrite64,write,pwritev,pwritev2,writev,ftruncate,truncate,fallocate,fsync,fdatasync,sync,syncfs,"
    "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,symlink,mmap,copy_file_range,sendfile"
)
STRACE = ("strace", "-f", "-y", "-xx", "-qq", "--seccomp-bpf", "-s", "10000000", "-e", f"trace={CALLS}")
_LINE = re.compile(
    r"(?P<pid>\d+) +(?:(?P<name>\w+)\((?P<args>.*)|<\.\.\. (?P<resumed>\w+) resumed>(?P<rest>.*))"
)
_END = re.compile(r"(?P<args>.*)\) += (?P<value>\S+).*")
_FILE = re.compile(r"(?P<number>\d+|AT_FDCWD)<(?P<path>[^>]*)>(?P<gone>\(deleted\))?")


class Step(NamedTuple):
    """Something that was done: `began` and `ended` are numbers of lines in the recording."""

    began: int
    ended: int
    kind: str  # create, mkdir, write, size, sync, rename, remove, mark
    path: str
    data: bytes = b""
    at: int = 0  # of a write; the new size; of "create": 1 if what was there is cut off
    to: str = ""  # of a rename


class Mark(NamedTuple):
    """What the workload said: how many events of a trial will be `sent`, or are `durable`."""

    kind: str
    trial: str
    events: int


def record(python: Sequence[str], root: Path, scenarios: Iterable[str], prelude: str = "") -> list[Step]:
    """Run scenarios of the workload under strace, one after another, each in a folder of its name under `root`."""
    trace = root.with_name(root.name + ".trace")
    command = [*STRACE, "-o", str(trace), *python, str(WORKLOAD), str(root), prelude, *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    assert not done.stderr, done.stderr
    steps = list(_steps(trace, str(root)))
    trace.unlink()
    return steps


def _steps(trace: Path, root: str) -> Iterator[Step]:
    begun: dict[str, tuple[int, str]] = {}  # by process: a call that another one's came in between
    offsets: dict[str, int] = {}
    with trace.open(encoding="ascii") as lines:
        for number, line in enumerate(lines):
            found = _LINE.match(line)
            if found is None:  # "+++ killed by SIGKILL +++"
                continue
            pid, began = found["pid"], number
            if found["resumed"]:
                began, before = begun.pop(pid)
                text, name = before + found["rest"], found["resumed"]
            else:
                text, name = found["args"], found["name"]
            if text.endswith("<unfinished ...>"):
                begun[pid] = began, text.removesuffix("<unfinished ...>")
                continue
            ended = _END.fullmatch(text.rstrip())
            if ended and not ended["value"].startswith("-"):
                for step in _understood(name, [arg.strip() for arg in ended["args"].split(", ")], offsets):
                    if step.path.startswith(root):
                        yield step._replace(began=began, ended=number)


def _understood(name: str, args: list[str], offsets: dict[str, int]) -> Iterator[Step]:
    """Tell what a call that succeeded (or whose process was killed inside) has done."""
    match name:
        case "openat" | "open" | "creat":
            path, flags = (
                (_joined(args[0], args[1]), args[2]) if name == "openat" else (_text(args[0]), args[1])
            )
            if "O_CREAT" in flags or "O_TRUNC" in flags:
                offsets[path] = 0
                yield Step(0, 0, "create", path, at="O_TRUNC" in flags)
        case "mkdir" | "mkdirat":
            yield Step(0, 0, "mkdir", _joined(args[0], args[1]) if name == "mkdirat" else _text(args[0]))
        case "pwrite64":
            yield Step(0, 0, "write", _path(args[0]), _bytes(args[1]), int(args[3]))
        case "write":
            path, data = _path(args[0]), _bytes(args[1])
            yield Step(0, 0, "write", path, data, offsets.get(path, 0))
            offsets[path] = offsets.get(path, 0) + len(data)
        case "ftruncate":
            yield Step(0, 0, "size", _path(args[0]), at=int(args[1]))
        case "fallocate":
            yield Step(0, 0, "grow", _path(args[0]), at=int(args[2]) + int(args[3]))
        case "fsync" | "fdatasync":
            yield Step(0, 0, "sync", _path(args[0]))
        case "rename":
            yield Step(0, 0, "rename", _text(args[0]), to=_text(args[1]))
        case "unlink" | "rmdir":
            yield Step(0, 0, "remove", _text(args[0]))
        case "unlinkat":
            yield Step(0, 0, "remove", _joined(args[0], args[1]))
        case "mmap":
            file = _FILE.fullmatch(args[4])
            if file and "MAP_SHARED" in args[3] and "PROT_WRITE" in args[2]:
                yield Step(0, 0, "map", _path(args[4]))
        case _:
            raise AssertionError(f"{name}: the model doesn't know what this does to the disk")


def _bytes(argument: str) -> bytes:
    return bytes.fromhex(argument[1:-1].replace("\\x", ""))


def _text(argument: str) -> str:
    return _bytes(argument).decode()


def _path(argument: str) -> str:
    found = _FILE.fullmatch(argument)
    if found is None or found["gone"]:
        return ""
    return bytes.fromhex(found["path"].replace("\\x", "")).decode(errors="replace")


def _joined(folder: str, name: str) -> str:
    return str(Path(_path(folder)) / _text(name))


# the disk ------------------------------------------------------------------------------------------------------------


class File:
    """A file or folder: what is surely on the disk, and what was done to it since."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.synced = b""
        self.pending: list[Step] = []
        self.mapped = b""  # what the workload has last told of a mapped file

    def sync(self, before: int) -> None:
        """Make durable what had ended before."""
        done = [step for step in self.pending if step.ended < before]
        self.pending = [step for step in self.pending if step.ended >= before]
        now = bytearray(self.synced)
        for step in done:
            _apply(now, step)
        self.synced = bytes(now)

    def crash(self, chance: random.Random, kept: float) -> bytes:
        """Draw what the disk may hold: of what isn't synced each part is there, as it was last, with odds of `kept`."""
        now = bytearray(self.synced)
        sizes = [len(now)]
        states: dict[int, list[bytes]] = {}
        for step in self.pending:
            before, now_touched = len(now), _touched(step, len(now))
            for sector in now_touched:
                states.setdefault(sector, [bytes(now[sector * SECTOR : (sector + 1) * SECTOR])])
            _apply(now, step)
            for sector in now_touched:
                states[sector].append(bytes(now[sector * SECTOR : (sector + 1) * SECTOR]))
            if len(now) != before:
                sizes.append(len(now))
        size = sizes[-1] if chance.random() < kept else chance.choice(sizes)
        image = bytearray(self.synced[:size].ljust(size, b"\0"))
        for sector, seen in states.items():
            state = seen[-1] if chance.random() < kept else chance.choice(seen)
            at = sector * SECTOR
            if at < size:
                image[at : at + SECTOR] = state.ljust(SECTOR, b"\0")[: size - at]
        return bytes(image)


def _apply(now: bytearray, step: Step) -> None:
    if step.kind == "write":
        if len(now) < step.at:
            now.extend(bytes(step.at - len(now)))
        now[step.at : step.at + len(step.data)] = step.data
    elif step.kind == "grow":
        now.extend(bytes(max(step.at - len(now), 0)))
    else:
        del now[step.at :]
        now.extend(bytes(step.at - len(now)))


def _touched(step: Step, size: int) -> range:
    if step.kind == "write":
        return range(min(step.at, size) // SECTOR, -(-(step.at + len(step.data)) // SECTOR))
    low, high = (size, size) if step.kind == "grow" else sorted((size, step.at))
    return range(low // SECTOR, -(-high // SECTOR))


_Names = dict[tuple[int, str], File | None]  # (id of the folder's File, name) -> what the name stands for


class Disk:
    """A folder as the processes see it, and as a power cut may leave it."""

    def __init__(self, root: str) -> None:
        self._top = File(folder=True)
        self._root = root
        self._now: _Names = {}
        self._synced: _Names = {}
        self._pending: list[tuple[Step, _Names]] = []
        self.marks: list[Mark] = []

    def replay(self, step: Step) -> None:
        """Do a step."""
        match step.kind:
            case "create" | "mkdir":
                file = self._find(step.path)
                if file is None:
                    self._name(step, {self._place(step.path): File(step.kind == "mkdir")})
                elif step.at:
                    file.pending.append(step._replace(kind="size", at=0))
            case "rename":
                moved = self._find(step.path)
                self._name(step, {self._place(step.path): None, self._place(step.to): moved})
            case "remove":
                self._name(step, {self._place(step.path): None})
            case "sync":
                self._sync(step)
            case "map":
                assert step.path.removesuffix(".new").endswith((".arena", "-shm")), (
                    f"{step.path} is mapped: the model knows nothing of it"
                )
            case "write" if step.path.endswith("/marks"):
                self._mark(step)
            case _:
                file = self._find(step.path)
                assert file is not None, step
                assert not file.folder, step
                file.pending.append(step)

    def crash(self, to: Path, chance: random.Random) -> None:
        """Write what a power cut now may leave to the folder `to`."""
        kept = chance.choice((0.0, 0.5, 0.9, 1.0, chance.random()))
        names = dict(self._synced)
        first = chance.randint(0, len(self._pending))
        in_order = chance.random() < 0.5
        for place, (_, change) in enumerate(self._pending):
            if place < first if in_order else chance.random() < kept:
                names.update(change)
        self._write(self._top, names, to, chance, kept)

    def _write(self, folder: File, names: _Names, to: Path, chance: random.Random, kept: float) -> None:
        to.mkdir()
        for (parent, name), file in names.items():
            if parent != id(folder) or file is None:
                continue
            if file.folder:
                self._write(file, names, to / name, chance, kept)
            elif not name.endswith("-shm"):
                (to / name).write_bytes(file.crash(chance, kept).replace(BOOT, OTHER_BOOT))
            elif chance.random() < 0.5:
                (to / name).write_bytes(chance.randbytes(32 << 10))

    def _sync(self, step: Step) -> None:
        file = self._find(step.path)
        if file is None:  # removed meanwhile
            return
        if not file.folder:
            file.sync(step.began)
            return
        left: list[tuple[Step, _Names]] = []
        for done, change in self._pending:
            if done.ended < step.began and any(folder == id(file) for folder, _ in change):
                self._synced.update(change)
            else:
                left.append((done, change))
        self._pending = left

    def _name(self, step: Step, change: _Names) -> None:
        self._now.update(change)
        self._pending.append((step, change))

    def _mark(self, step: Step) -> None:
        head, _, data = step.data.partition(b"\n")
        kind, name, *rest = head.decode().split(" ")
        if kind != "journal":
            self.marks.append(Mark(kind, name, int(rest[0])))
            return
        file = self._find(f"{self._root}/{name}")
        if file is None:
            return
        seen, before = zlib.decompress(data), file.mapped
        file.mapped = seen
        for at in range(0, len(seen), SECTOR):
            sector = seen[at : at + SECTOR]
            if sector != before[at : at + SECTOR].ljust(len(sector), b"\0"):
                file.pending.append(step._replace(data=sector, at=at))

    def _place(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        folder = self._find(parent)
        assert folder is not None, path
        return id(folder), name

    def _find(self, path: str) -> File | None:
        found: File | None = self._top
        for name in path.removeprefix(self._root).strip("/").split("/"):
            if name:
                found = None if found is None else self._now.get((id(found), name))
        return found


def images(
    steps: Sequence[Step], scenario: Path, to: Path, count: int, chance: random.Random
) -> Iterator[tuple[Path, list[Mark]]]:
    """Cut the power `count` times at random moments of a scenario; yield each disk and what had been said by then."""
    place = str(scenario)
    made = next(at for at, step in enumerate(steps) if step.path == place and step.kind == "mkdir")
    own = [step for step in steps[made + 1 :] if f"{step.path}/".startswith(f"{place}/")]
    disk = Disk(place)
    done = 0
    for number, cut in enumerate(sorted(chance.randint(1, len(own)) for _ in range(count))):
        for step in own[done:cut]:
            disk.replay(step)
        done = cut
        image = to / f"{scenario.parent.name}-{scenario.name}-{number}"
        disk.crash(image, chance)
        yield image, list(disk.marks)
