"""When two configurations are the same: a hash of plain data that doesn't depend on the order of keys.

Types are kept apart (1, 1.0, True and "1" differ), integers may be of any size, NaN equals NaN, and nothing runs into
its neighbour: each value is written as a letter for its type, the length of what follows, and that.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

from eventrun.errors import InvalidType

HASH_BYTES = 16  # 128 bits: no two configurations will ever meet by chance


def configuration_hash(*parts: Any) -> str:
    """Hash plain data: None, bool, int, float, str, bytes, lists and mappings with text keys. Raises InvalidType."""
    return hashlib.blake2b(canonical(list(parts)), digest_size=HASH_BYTES).hexdigest()


def canonical(value: Any) -> bytes:
    """Write plain data as bytes; equal data give equal bytes, other data others."""
    kind, body = _written(value)
    return b"%s%d:%s" % (kind, len(body), body)


def _written(value: Any) -> tuple[bytes, bytes]:
    match value:
        case None:
            return b"n", b""
        case bool():
            return b"b", b"1" if value else b"0"
        case int():
            return b"i", b"%d" % value if abs(value) < 1 << 63 else hex(value).encode()
        case float():
            return b"f", b"nan" if value != value else struct.pack("<d", value)
        case str():
            return b"s", value.encode("utf-8", "surrogatepass")
        case bytes() | bytearray():
            return b"y", bytes(value)
        case list() | tuple():
            return b"l", b"".join(map(canonical, value))
        case Mapping():
            pairs = sorted((canonical(key), canonical(inner)) for key, inner in value.items())
            return b"m", b"".join(key + inner for key, inner in pairs)
    raise InvalidType(f"{type(value).__qualname__} is no plain data: numbers, text, lists and mappings are")
