"""What every test may count on: two event loops, a watch on blocking calls, a profile, no silent skips."""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from blockbuster import BlockBuster

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

# The machines are shared: a slow example is no fault of the code.
hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if IN_CI else "dev"))

# Calls that wait for somebody else. Calls on files are left out: opening a client or a trial's journal makes
# folders and files where it is called, by design.
WAITS = ("time.sleep", "socket.", "ssl.", "sqlite3.", "threading.Lock.", "builtins.input")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run each coroutine test on both; named here, since anyio leaves out silently what isn't installed."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def nothing_blocks_an_asyncio_loop() -> Iterator[None]:
    """Raise BlockingError where eventrun's code waits on a thread that runs an asyncio loop, its own included.

    For the whole session, since functions are replaced for all threads; on trio's threads nothing is noticed.
    """
    watch = BlockBuster("eventrun")
    watched = [function for name, function in watch.functions.items() if name.startswith(WAITS)]
    for function in watched:
        # `pending.result()` waits because its caller asked for that, in a notebook for instance
        function.can_block_in("eventrun/pending.py", {"result"})
        function.activate()
    yield
    for function in watched:
        function.deactivate()


def skipped(config: pytest.Config) -> list[Any]:
    """Return the reports of the tests and modules that were skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else list(reporter.stats.get("skipped", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where CI would otherwise pass over tests without a word."""
    if IN_CI and skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say why a run in which every test passed has failed."""
    if IN_CI and (count := len(skipped(config))):
        terminalreporter.write_line(f"{count} skipped: in CI that is a failure", red=True, bold=True)
