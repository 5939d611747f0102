"""Write tests/data/golden-journal-v1. It was run once, by hand, and is kept to show how; no test runs it.

python -m tests.make_golden_journal FOLDER
"""

import json
import sys
from itertools import count
from pathlib import Path
from unittest import mock

from eventrun.codec import encode_item
from eventrun.journal.segments import LOCK_NAME
from eventrun.portal import Portal
from eventrun.recorder import Recorder
from eventrun.stores.memory import MemoryStore
from tests.crash.test_formats import GOLDEN_WRITERS, golden_events


def main(folder: Path) -> None:
    sizes = mock.patch.multiple(
        "eventrun.journal.segments",
        SEGMENT_BYTES=(2048, 4096), WRITTEN_SEGMENT_BYTES=(2048, 4096), ARENA_BYTES=4096, WRITTEN_ARENA_BYTES=4096,
    )  # fmt: skip
    with sizes, mock.patch("eventrun.journal.writing.MARK_BYTES", 256):
        for number, mapped in GOLDEN_WRITERS.items():
            portal = Portal()
            with mock.patch("os.urandom", lambda size, number=number: number.to_bytes(size, "big")):
                recorder = Recorder(portal, MemoryStore, folder=folder, linger_ms=1e9)
            recorder._folder.mapped = recorder._mapped = mapped
            for subject, items in golden_events(number).items():
                recording = recorder.stream(subject)
                for time_ns, event in items:
                    recording.append(encode_item(time_ns, event))
            recorder._folder.abandon()
            portal.stop()
            lock = folder / "journals" / f"{number:016x}" / LOCK_NAME
            lock.write_text(
                json.dumps({**json.loads(lock.read_text()), "host": "golden", "boot": "", "pid": next(PIDS)})
            )


PIDS = count(1)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
