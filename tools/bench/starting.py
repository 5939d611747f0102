"""How long it takes to begin: import, first log, the command's help.

These programs are texts, since fresh.py has imported a part of what eventrun needs before it calls anything.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter as now

from figures import Figure, Run, benchmark, interleaved
from fresh import ROOT, child_environment

IMPORT = """
from time import perf_counter as now
start = now()
import eventrun
print(now() - start)
"""
FIRST_LOG = """
import sys
from time import perf_counter as now
import eventrun
start = now()
client = eventrun.open(sys.argv[1], quiet=True)
opened = now()
trial = client.trial("bench")
trial.log(loss=0.5, step=0)
print(now() - start)
client.close()
"""


def _python(*arguments: str) -> float:
    """Run Python and return the number that it prints, as milliseconds."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment(), check=True)
    return float(done.stdout) * 1000


def _whole(command: list[str]) -> float:
    """Run a program and return how many milliseconds it took from start to end."""
    start = now()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=child_environment(), check=True)
    return (now() - start) * 1000


def _bare() -> float:
    return _whole([sys.executable, "-c", "pass"])


@benchmark("import")
def import_eventrun(run: Run) -> Iterator[Figure]:
    """`import eventrun` in a new process."""
    program = partial(_python, "-c", IMPORT)
    program()  # compiles what has changed
    whole = partial(_whole, [sys.executable, "-c", "import eventrun"])
    contenders: dict[str, Callable[[], float]] = {
        "import": program,
        "python -c pass": _bare,
        "whole process": whole,
    }
    results = interleaved(run.rounds(5, 21), contenders)
    yield Figure("import", "ms", results.pop("import"), results, at_most=100)


@benchmark("first-log")
def first_log(run: Run) -> Iterator[Figure]:
    """eventrun.open of a new store, client.trial and the first log call."""

    def program() -> float:
        with run.place() as folder:
            return _python("-c", FIRST_LOG, str(folder / "runs"))

    program()
    yield Figure("first-log", "ms", [program() for _ in range(run.rounds(5, 21))], at_most=30)


@benchmark("help")
def command_help(run: Run) -> Iterator[Figure]:
    """`eventrun --help`, the whole process."""
    script = Path(sys.executable).with_name("eventrun")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "eventrun"]
    program = partial(_whole, [*command, "--help"])
    program()
    results = interleaved(run.rounds(5, 21), {"help": program, "python -c pass": _bare})
    more = [whole - bare for whole, bare in zip(results["help"], results["python -c pass"], strict=True)]
    beside = {"python -c pass": results["python -c pass"], "whole minus bare": more}
    note = " ".join([*command, "--help"]).replace(f"{ROOT}/", "")
    yield Figure("help", "ms", results["help"], beside, at_most=100, note=note)
