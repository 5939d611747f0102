#!/usr/bin/env python3
"""Measure what eventrun promises: one JSON line per figure on stdout, a table on stderr. It judges nothing.

Figures are medians of rounds. What is compared is measured in turn in the same run, each time in a new process.
"""

import argparse
import fnmatch
import importlib
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(ROOT))  # eventrun may not be installed here

from figures import BENCHMARKS, Figure, LeftOut, Run, short  # noqa: E402
from fresh import ChildFailed  # noqa: E402

GROUPS = (
    "starting",
    "log_call",
    "loop_lag",
    "throughput",
    "folding",
    "reading",
)  # in the order of the design
IN_MEMORY = ("tmpfs", "ramfs")  # file systems on which nothing waits for a disk


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    for group in GROUPS:
        importlib.import_module(group)  # registers its benchmarks
    if options.list:
        for name, function in BENCHMARKS.items():
            print(f"{name:<18} {function.__doc__}")
        return 0
    names = chosen(options.only)
    with scratch_folder(options.store) as folder, output(options.json) as out:
        url = options.store if is_url(options.store) else None
        run = Run(folder, url=url, quick=options.quick, rounds=options.rounds)
        kind = filesystem(folder)
        if kind in IN_MEMORY:
            say(f"{folder} lies in memory ({kind}): writing and fsync cost nothing there.")
        about = {"quick": options.quick, "machine": machine(), "versions": versions()}
        about["store"] = {"url": url or str(folder.parent), "filesystem": kind}
        return measure(run, names, about, out)


def measure(run: Run, names: list[str], about: dict[str, Any], out: Any) -> int:
    """Run the benchmarks and print their figures; return 1 when one of them could not be measured."""
    measured: list[Figure] = []
    failed = False
    for name in names:
        start = perf_counter()
        try:
            for figure in BENCHMARKS[name](run):
                print(json.dumps({**figure.to_dict(), **about}), file=out, flush=True)
                measured.append(figure)
        except LeftOut as reason:
            say(f"{name}: left out, {reason}")
            continue
        except (ChildFailed, subprocess.CalledProcessError) as error:
            say(f"{name}: not measured, {error}")
            failed = True
        say(f"{name}: {perf_counter() - start:.1f} s")
    say(table(measured))
    return int(failed)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dev.py bench",
        description=__doc__,
        epilog="examples:\n  dev.py bench --quick\n  dev.py bench --only 'log-*,loop-lag' --rounds 9 --json out.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--quick", action="store_true", help="fewer events and rounds, under a minute in all")
    found.add_argument(
        "--only", metavar="NAME[,NAME]", help="only these benchmarks; * and ? stand for any letters"
    )
    found.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    found.add_argument("--rounds", type=int, metavar="N", help="how often to measure each figure")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the JSON lines to a file")
    where = "a folder to make stores in (default: beside the checkout), or the URL of a store to use as it is"
    found.add_argument("--store", metavar="URL", help=where)
    return found


def chosen(only: str | None) -> list[str]:
    """Return the names of the benchmarks to run. Exits with 2 when one is unknown."""
    if only is None:
        return list(BENCHMARKS)
    wanted = only.split(",")
    for pattern in wanted:
        if not fnmatch.filter(BENCHMARKS, pattern):
            say(f"There is no benchmark {pattern!r}. There are: {', '.join(BENCHMARKS)}.")
            raise SystemExit(2)
    return [name for name in BENCHMARKS if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]


def is_url(text: str | None) -> bool:
    """Tell whether --store names a store rather than a folder for stores."""
    return text is not None and (text == "memory:" or "://" in text)


@contextmanager
def scratch_folder(where: str | None) -> Iterator[Path]:
    """Make a folder, beside the checkout unless said otherwise, and remove it afterwards.

    Not in /tmp, which is often another disk or none.
    """
    beside = ROOT.parent if os.access(ROOT.parent, os.W_OK) else ROOT / "build"
    parent = Path(where).expanduser() if where is not None and not is_url(where) else beside
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="eventrun-bench-", dir=parent.resolve()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def output(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as file:
            yield file


# about the run -------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Say what this was measured on, and how busy it was before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu(), "cores": cores, "system": platform.platform(), "load_1min": load}


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def versions() -> dict[str, str | None]:
    packages = {name: package(name) for name in ("eventrun", "msgspec", "aiosqlite", "anyio", "numpy")}
    python, sqlite = platform.python_version(), sqlite3.sqlite_version
    return {"python": python, "sqlite": sqlite, "commit": commit(), **packages}


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the checkout's commit, with a + when there are changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def filesystem(path: Path) -> str:
    """Return the type of the file system that a path lies on."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return kind
    for line in mounts:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


# talk ----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(measured: list[Figure]) -> str:
    rows = [("figure", "median", "unit", "min .. max", "ratio", "target", "")]
    for figure in measured:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f} x"
        spread = f"{number(min(figure.values))} .. {number(max(figure.values))}"
        mark = {True: "reached", False: "MISSED", None: ""}[figure.met]
        rows.append((figure.name, number(figure.median), figure.unit, spread, ratio, figure.target, mark))
        for name, values in figure.beside.items():
            middle = median(values)
            rows.append((f"  {name}", number(middle), figure.unit, "", "", "", ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    right = (1, 4)  # numbers
    lines = [
        "  ".join(cell.rjust(width) if place in right else cell.ljust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join(["", *lines])


def number(value: float) -> str:
    return f"{short(value):,}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
