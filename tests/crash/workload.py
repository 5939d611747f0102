"""A process that logs 0, 1, 2, ... and counts, in a mapped file, the calls that have returned. See `harness.Run`."""

from __future__ import annotations

import argparse
import mmap
import os
import time
from pathlib import Path


def main() -> None:
    """Log, count, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("name")
    parser.add_argument("counts", type=Path)
    for name in ("events", "flush-every", "item-bytes"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--linger-ms", type=float, default=20.0)
    parser.add_argument("--pause-s", type=float, default=0.0)
    parser.add_argument("--end", choices=("close", "exit"), default="close")
    parser.add_argument("--patient", action="store_true")
    parser.add_argument("--prelude", default="")
    options = parser.parse_args()
    exec(options.prelude, {"__name__": "prelude"})

    import eventrun

    with options.counts.open("w+b") as file:
        file.truncate(16 * options.trials)
        mapped = memoryview(mmap.mmap(file.fileno(), 16 * options.trials)).cast("Q")
    client = eventrun.open(options.store, linger_ms=options.linger_ms, quiet=True)
    trials = [client.trial("crash", name=f"{options.name}-{i}") for i in range(options.trials)]
    more = {"pad": "x" * options.item_bytes} if options.item_bytes else {}
    done = 0
    while not options.events or done < options.events:
        for place, trial in enumerate(trials):
            trial.log({"i": done, **more}, step=done)
            mapped[2 * place] = done + 1
        done += 1
        if options.flush_every and done % options.flush_every == 0:
            try:
                client.flush().result()
                for place in range(options.trials):
                    mapped[2 * place + 1] = done
            except eventrun.StoreError:  # nothing is durable then, nothing lost
                if not options.patient:
                    raise
        if options.pause_s:
            time.sleep(options.pause_s)
    if options.end == "exit":
        os._exit(0)
    client.close()
    if not client.statistics().held_bytes:
        for place in range(options.trials):
            mapped[2 * place + 1] = done


if __name__ == "__main__":
    main()
