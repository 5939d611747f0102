"""Say in a few short lines what was recorded: text and tables for people, and the closing block.

Only text is made here; who prints it is somebody else's business.
"""

from eventrun.summary.block import closing_block, direction, telling_metrics
from eventrun.summary.tables import FAIR_COLUMN, Column, Laid, lay_out, pad, plain_table
from eventrun.summary.text import (
    ASCII_BARS,
    ASCII_NOT_FINITE,
    BARS,
    NOT_FINITE,
    SPARK_CELLS,
    amount,
    can_write,
    clean,
    command,
    duration,
    local_time,
    near,
    number,
    short_time,
    shorten,
    size,
    sparkline,
    width,
    wrap,
)

__all__ = [
    "ASCII_BARS",
    "ASCII_NOT_FINITE",
    "BARS",
    "FAIR_COLUMN",
    "NOT_FINITE",
    "SPARK_CELLS",
    "Column",
    "Laid",
    "amount",
    "can_write",
    "clean",
    "closing_block",
    "command",
    "direction",
    "duration",
    "lay_out",
    "local_time",
    "near",
    "number",
    "pad",
    "plain_table",
    "short_time",
    "shorten",
    "size",
    "sparkline",
    "telling_metrics",
    "width",
    "wrap",
]
