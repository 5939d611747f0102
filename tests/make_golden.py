"""Write tests/data/golden-v1. It was run once, by hand, and is kept to show how; no test runs it.

python tests/make_golden.py FOLDER
"""

import asyncio
import importlib.util
import sys
from pathlib import Path

import msgspec

from eventrun.codec import (
    NO_DIGEST,
    RAW,
    ZLIB,
    Batch,
    Item,
    Stream,
    digest,
    encode_envelope,
    encode_item,
    seal,
)
from eventrun.events import MetricsLogged
from eventrun.stores.sqlite import SqliteStore


def expected() -> list[tuple[Stream, int, list[Item]]]:
    spec = importlib.util.spec_from_file_location("test_golden", Path(__file__).with_name("test_golden.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[tuple[Stream, int, list[Item]]] = module.EXPECTED_V1
    return found


def encoded(time_ns: int, event: object, old: bool) -> bytes:
    if old:
        assert isinstance(event, MetricsLogged)
        ((name, value),) = event.values.items()
        return msgspec.msgpack.encode((time_ns, ["m1", name, value, event.step]))
    return encode_item(time_ns, event)  # type: ignore[arg-type]


def batches() -> list[Batch]:
    tips: dict[Stream, tuple[int, bytes]] = {}
    made = []
    for stream, codec, items in expected():
        first, previous = tips.get(stream, (1, NO_DIGEST))
        payload = b"".join(encoded(*item, old=stream.writer == 2**64 - 1) for item in items)
        batch = seal(
            stream, first, len(items), payload, items[0][0], items[-1][0], previous, pack=codec == ZLIB
        )
        tips[stream] = (first + len(items), digest(batch))
        made.append(batch)
    return made


async def write_store(folder: Path, made: list[Batch]) -> None:
    store = SqliteStore(folder)
    await store.append(made)
    await store.aclose()


def main(folder: Path) -> None:
    made = batches()
    asyncio.run(write_store(folder / "store", made))
    frames = b"".join(len(batch.frame).to_bytes(4, "big") + batch.frame for batch in made)
    (folder / "frames.bin").write_bytes(frames)
    (folder / "envelope-raw.bin").write_bytes(encode_envelope(made, RAW))
    (folder / "envelope-zlib.bin").write_bytes(encode_envelope(made, ZLIB))
    print("\n".join(digest(batch).hex() for batch in made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
