"""`eventrun doctor`: how the store and this machine are. Looks only: it recovers, folds and changes nothing."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from eventrun.cli import terminal
from eventrun.cli.opening import store_folder, store_url
from eventrun.cli.verbs import Command
from eventrun.clock import monotonic_ns, time_ns
from eventrun.errors import EventrunError, FormatTooNew
from eventrun.filesystems import file_system
from eventrun.journal import Held, held, segments_in
from eventrun.journal.writers import ELSEWHERE, KILLED, SILENT, Left, writers
from eventrun.locks import Turn, now_ns
from eventrun.stores import open_store
from eventrun.stores.base import Store
from eventrun.summary import amount, duration, local_time, near, size

LEAST_SPACE_BYTES = 100_000_000
CLOCK_SLACK_S = 60.0  # how far ahead of this clock the newest event may be
FIRST_SANE_NS = 1_700_000_000 * 10**9  # November 2023: eventrun is younger

PROMISES = {
    "crash_safe": "crash_safe: an event survives a kill of the process as soon as its log call returns",
    "accepted": "accepted: an event is in memory until its batch is in the log, so a kill may cost the last of them",
}

NETWORK = (
    "yes: a flush makes events durable in the journals, and whoever reads or collects brings them to the log"
)

Finding = tuple[str, Any, str]  # a name for programs, a value for programs, a text for people


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; 1 when something is wrong."""
    url = store_url(arguments)
    folder = store_folder(url)
    problems: list[str] = []
    findings = [("store", url if folder is None else str(folder.absolute()), "")]
    findings += [
        *_store(url, folder, problems),
        *_journals(url, folder, problems),
        *_disk(folder, problems),
        *_clock(problems),
    ]
    findings += _versions()
    if arguments.json:
        terminal.show_json({name: value for name, value, _ in findings} | {"problems": problems})
    else:
        rows = [[name.replace("_", " "), text or str(value)] for name, value, text in findings]
        terminal.facts(rows)
        print()
        for problem in problems or ["no problem found"]:
            print(problem)
    return 1 if problems else 0


# the store -----------------------------------------------------------------------------------------------------


def _store(url: str, folder: Path | None, problems: list[str]) -> Iterator[Finding]:
    if url == "memory:":
        yield "kind", "memory", "memory: it ends with its process"
        return
    if folder is None:
        try:
            open_store(url, create=False)
        except EventrunError as error:
            problems.append(str(error))
        return
    yield "kind", "sqlite", "a folder with an SQLite database"
    if not (folder / "log.db").exists() and not (folder / "log.mark").exists():
        problems.append(
            f"there is no log in {near(folder)}: nothing was recorded there; to make one: eventrun demo"
        )
        return
    try:
        yield from _log(url, problems)
    except EventrunError as error:
        problems.append(str(error))
    files = {name: _bytes_of(folder.glob(name)) for name in ("log.db", "log.db-wal", "views*", "files/**/*")}
    shown = [f"{size(count)} in {name.rstrip('/*')}" for name, count in files.items() if count]
    yield "sizes", files, ", ".join(shown)


def _log(url: str, problems: list[str]) -> Iterator[Finding]:
    import asyncio

    end, newest_ns, lost, version = asyncio.run(_ask(url))
    yield "format", version, ""
    newest = "" if newest_ns is None else f", the newest of {local_time(newest_ns)}"
    yield "events", end, f"{end:,}{newest}"
    if lost is not None:
        problems.append(
            f"the log once went up to position {lost[0]:,} and ends at {lost[1]:,} now: its tail is lost; "
            "restore log.db from a backup, save what can be read by `eventrun salvage OUT`, or go on with what is left"
        )
    if newest_ns is not None and newest_ns > time_ns() + CLOCK_SLACK_S * 1e9:
        ahead = duration((newest_ns - time_ns()) / 1e9)
        problems.append(
            f"the newest event is {ahead} ahead of this machine's clock: one of the clocks is wrong"
        )


async def _ask(url: str) -> tuple[int, int | None, tuple[int, int] | None, int | None]:
    store = open_store(url, create=False)
    try:
        end = await store.end()
        last = await store.read(end - 1) if end else []
        lost_tail = getattr(store, "lost_tail", None)
        lost = None if lost_tail is None else await lost_tail()
    finally:
        await store.aclose()
    if not last:
        return end, None, lost, None
    return end, last[-1].batch.header.last_ns, lost, last[-1].batch.header.version


def _bytes_of(files: Iterator[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # gone meanwhile
            pass
    return total


# journals ------------------------------------------------------------------------------------------------------


def _journals(url: str, folder: Path | None, problems: list[str]) -> Iterator[Finding]:
    journals = None if folder is None else folder / "journals"
    if journals is None or not journals.is_dir():
        return
    network = file_system(journals).network
    found = [_journal(left, network) for left in writers(journals, _time_there(journals, network))]
    waiting = _waiting(url, [journals / each["folder"] for each in found if each["state"] != "damaged"])
    for each in found:
        each |= _told(waiting.get(each["folder"]))
    states = Counter(each["state"] for each in found)
    shown = ", ".join(f"{count} {state}" for state, count in states.items()) or "none: no process writes now"
    yield "journals", found, shown
    for each in found:
        age = f"{'last sign of life' if network else 'begun'} {duration(each['age_s'])} ago"
        if each["held_events"]:
            oldest = duration(each["held_age_s"])
            age += f", holds {each['held_events']:,} events that the log lacks, the oldest {oldest} old"
        yield f"journal_{each['writer']}", each, f"{each['state']}, {size(each['bytes'])}, {age}{each['who']}"
        if each["state"] == "damaged":
            problems.append(
                f"{near(journals / each['folder'])} holds what could not be recovered: "
                "`eventrun salvage OUT` saves all that can be read; keep a copy of it, then remove it"
            )
    yield from _advice(url, folder, states, problems)


def _advice(url: str, folder: Path | None, states: Counter[str], problems: list[str]) -> Iterator[Finding]:
    if states[KILLED]:
        problems.append(
            f"{amount(states[KILLED], 'killed writer')} left a journal: `eventrun ls`, or whatever opens the store "
            "next, takes it in"
        )
    others = states[ELSEWHERE] + states[SILENT]
    network = folder is not None and file_system(folder).network
    if others and not network:
        problems.append(
            f"{amount(others, 'writer')} of another host left a journal: `eventrun collect` takes it in"
        )
    if folder is not None and network:
        holder = Turn(folder, "collecting").holder()
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "nobody just now"
        yield (
            "collector",
            holder or None,
            f"{who}; reads collect by themselves, so does `eventrun collect --follow`",
        )


def _time_there(folder: Path, network: bool) -> int:
    try:
        return now_ns(folder) if network else time_ns()
    except OSError:  # nothing can be written there
        return time_ns()


def _waiting(url: str, folders: list[Path]) -> dict[str, Held]:
    """Tell by folder what the journals hold that the log lacks; nothing where the log can't be asked."""
    import asyncio

    async def ask() -> dict[str, Held]:
        store = open_store(url, create=False)
        try:
            return {folder.name: await _held(store, folder) for folder in folders}
        finally:
            await store.aclose()

    try:
        return asyncio.run(ask())
    except EventrunError:  # said above
        return {}


async def _held(store: Store, folder: Path) -> Held:
    total = Held()
    try:
        streams, _ = segments_in(folder)
    except FormatTooNew:  # a newer eventrun's; `verify` says so
        return total
    for stream, segments in streams.items():
        logged = (await store.tip(stream)).sequence
        for segment in segments:
            total = total.plus(held(segment, logged))
    return total


def _told(waiting: Held | None) -> dict[str, Any]:
    if waiting is None:
        return {"held_events": None, "held_bytes": None, "held_age_s": None}
    age_s = None if waiting.oldest_ns is None else max(time_ns() - waiting.oldest_ns, 0) / 1e9
    return {"held_events": waiting.events, "held_bytes": waiting.size, "held_age_s": age_s}


def _journal(left: Left, network: bool) -> dict[str, Any]:
    path = left.folder
    seen_ns = path.stat().st_mtime_ns if left.beat_ns is None else left.beat_ns
    return {
        "writer": path.name.partition(".")[0],
        "folder": path.name,
        "state": left.state,
        "bytes": _bytes_of(path.iterdir()),
        "age_s": max(_time_there(path.parent, network) - seen_ns, 0) / 1e9,
        "owner": left.owner,
        "who": f", process {left.owner.get('pid')} on {left.host}" if left.owner else "",
    }


# the machine ---------------------------------------------------------------------------------------------------


def _disk(folder: Path | None, problems: list[str]) -> Iterator[Finding]:
    if folder is None:
        return
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    kind, mapped, network = file_system(there)
    trusted = "journals can be mapped files" if mapped else "not one whose mapped files can be trusted"
    where = "on a network" if network else "local"
    yield "file_system", kind or None, f"{kind or 'unknown'}, {where}: {trusted}"
    yield "network", network, NETWORK if network else "no"
    promise = "crash_safe" if hasattr(os, "fork") and os.access(there, os.W_OK | os.X_OK) else "accepted"
    yield "log_calls", promise, PROMISES[promise]
    usage = os.statvfs(there) if hasattr(os, "statvfs") else None
    if usage is not None:
        free = usage.f_bavail * usage.f_frsize
        yield "free_space", free, size(free)
        if free < LEAST_SPACE_BYTES:
            problems.append(f"only {size(free)} are free on the disk of {near(there)}: free some space")


def _clock(problems: list[str]) -> Iterator[Finding]:
    now, before = time_ns(), monotonic_ns()
    while (after := monotonic_ns()) == before:  # at most a tick, 16 ms on old Windows
        pass
    yield "clock", now, f"{local_time(now)}, durations to {after - before:,} ns"
    if now < FIRST_SANE_NS:
        problems.append(f"this machine's clock says {local_time(now)}: set it, or events are dated wrongly")


def _versions() -> Iterator[Finding]:
    import sqlite3

    packages = {name: _version(name) for name in ("eventrun", "anyio", "msgspec", "aiosqlite", "PyYAML")}
    versions = {"python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version, **packages}
    yield (
        "versions",
        versions,
        ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
    )
    known = _extras()
    if known is None:
        yield "missing_extras", None, "unknown: this eventrun is a checkout that is not installed"
        return
    extras = {extra: missing for extra, missing in known.items() if missing}
    shown = ", ".join(f"{extra} ({' '.join(packages)})" for extra, packages in extras.items())
    advice = f"; to add one: pip install 'eventrun[{next(iter(extras))}]'" if extras else ""
    yield "missing_extras", extras, (shown or "none") + advice


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]] | None:
    """Return the packages that each extra would add, by the metadata of the installed eventrun."""
    missing: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("eventrun") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        needed, _, condition = requirement.partition(";")
        if "extra ==" in condition:
            package = needed.strip().partition("[")[0]
            name = "".join(c if c.isalnum() or c in "-_." else " " for c in package).split()[0]
            extra = condition.partition("extra ==")[2].strip(" \"')")
            missing.setdefault(extra, []).extend([] if _version(name) else [name])
    return missing


COMMANDS = {"doctor": Command(_arguments, doctor)}
