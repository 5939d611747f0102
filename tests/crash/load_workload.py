"""A process that is asked for more than the store can take, and counts; see `test_load.py`.

In the mapped file: calls that have returned, for each trial; the parent looks at it and at this process's memory.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

BLOCK = 200  # calls between two looks at the clock


def main() -> None:
    """Log from some threads to some trials, as fast as can be or at a pace, and close."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("counts", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1, help="of each thread")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument(
        "--calls", type=int, default=0, help="of each thread, at least, however slow the machine is"
    )
    parser.add_argument("--per-second", type=int, default=0, help="0: as fast as can be")
    parser.add_argument("--files", type=int, default=0, help="soft and hard limit of open files")
    parser.add_argument(
        "--busy", action="store_true", help="the main thread computes, in Python, all the time"
    )
    parser.add_argument("--prelude", default="")
    options = parser.parse_args()
    if options.files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.files, options.files))
    number = options.threads * options.trials
    with options.counts.open("w+b") as file:
        file.truncate(8 * number)
        counts = memoryview(mmap.mmap(file.fileno(), 8 * number)).cast("Q")
    exec(options.prelude, {"__name__": "prelude"})

    import eventrun

    client = eventrun.open(options.store, quiet=True, close_timeout_s=300)
    trials = [client.trial("load", name=f"load-{i}") for i in range(number)]
    print("begun", flush=True)
    input()  # until the store stalls, if it shall
    begun = time.monotonic()

    def work(thread: int) -> None:
        mine = range(thread * options.trials, (thread + 1) * options.trials)
        done = 0
        while (now := time.monotonic()) < begun + options.seconds or done < options.calls:
            if options.per_second and done > (now - begun) * options.per_second:
                time.sleep(0.005)
                continue
            for call in range(BLOCK):
                place = mine[(done + call) % len(mine)]
                count = counts[place]
                trials[place].log({"i": count, "loss": 0.5, "acc": 0.25}, step=count)
                counts[place] = count + 1
            done += BLOCK

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(options.threads)]
    for thread in threads:
        thread.start()
    if options.busy:
        spin(threads)
    for thread in threads:
        thread.join()
    found = client.statistics()
    with open("/dev/null"):  # the training can still open its own files
        print(f"held {found.held_bytes} {found.held_age_s} {found.journal_bytes} {found.dropped}", flush=True)
    input()  # until the store stalls no more
    client.close()
    os._exit(0 if client.statistics().dropped == 0 else 3)


def spin(threads: list[Any]) -> None:
    """Be busy in Python."""
    total = 0
    while any(thread.is_alive() for thread in threads):
        for i in range(10_000):
            total += i * i


if __name__ == "__main__":
    main()
