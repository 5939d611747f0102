"""A process that logs 0, 1, 2, ... onto a disk that gets full, and counts outside of it; see `test_full_disk.py`.

In the mapped file: calls that have returned, those of them of which the client said then that they are crash_safe,
those that a flush has made durable, those that were dropped, and 1 when the disk has been full for all of its calls.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import time
from pathlib import Path

LOOK_EVERY = 20  # calls between two looks at what the client promises


def main() -> None:
    """Log until the disk is long full, wait for space if there will be some, log more, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("counts", type=Path)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--item-bytes", type=int, default=400)
    parser.add_argument("--end", choices=("kill", "back", "close"), required=True)
    parser.add_argument("--prelude", default="")
    options = parser.parse_args()
    with options.counts.open("w+b") as file:
        file.truncate(40)
        counts = memoryview(mmap.mmap(file.fileno(), 40)).cast("Q")
    given: dict[str, object] = {"__name__": "prelude"}
    exec(options.prelude, given)

    import eventrun
    from eventrun.errors import StoreError

    client = eventrun.open(options.store, linger_ms=20, quiet=True, close_timeout_s=1)
    trial = client.trial("crash", name="full-0")
    chance = random.Random(1)

    def log(events: int) -> None:
        for _ in range(events):
            pad = chance.randbytes(options.item_bytes // 2).hex()
            trial.log({"i": counts[0], "pad": pad}, step=counts[0])
            counts[0] += 1
            if counts[0] % LOOK_EVERY == 0:
                if (now := client.statistics()).acknowledgement == "crash_safe" and not now.dropped:
                    counts[1] = counts[0]
                time.sleep(0.0005)  # or it would be over before the flusher has looked at it

    def flush() -> None:
        done = counts[0]
        try:
            client.flush().result(60)
            counts[2] = done
        except (StoreError, TimeoutError):
            pass

    for _ in range(4):
        log(options.events // 4)
        flush()
    counts[4] = 1
    if options.end == "back":
        while counts[4] == 1:
            time.sleep(0.01)
        if callable(back := given.get("back")):
            back()
        while client.statistics().acknowledgement != "crash_safe":
            log(LOOK_EVERY)
            time.sleep(0.1)
        log(options.events)
    counts[3] = client.statistics().dropped
    if options.end == "close":
        client.close()
        counts[3] = client.statistics().dropped
    else:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
