"""The table of the crash tests, printed at the end of a run; as JSON too where EVENTRUN_CRASH_JSON names a file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.crash.harness import Table

TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin an empty table."""
    config.stash[TABLE] = Table()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """Give the run's table, to note what came of each fault."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    found = config.stash[TABLE]
    if found.rows:
        terminalreporter.write_sep("=", "what was done to lose events, and what was lost")
        for line in found.lines():
            terminalreporter.write_line(line)
    if (path := os.environ.get("EVENTRUN_CRASH_JSON")) and found.rows:
        rows = [{**row._asdict(), "tally": row.tally and row.tally._asdict()} for row in found.rows]
        Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")
