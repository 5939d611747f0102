"""The only module that reads a clock.

`time_ns` dates events (nanoseconds since 1970, UTC; it may jump). `monotonic_ns` measures durations and
deadlines and never jumps back. Order never comes from either: it comes from sequence numbers.
"""

from time import monotonic_ns, sleep, time_ns

__all__ = ["monotonic_ns", "sleep", "time_ns"]
