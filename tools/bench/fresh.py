"""Call a benchmark's function in a process of its own, so that no figure changes another.

    fresh(function, *arguments)     wait for what it returns
    running(function, *arguments)   keep it running meanwhile

Arguments and answers pass as JSON. This file is also the child's main program.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ChildFailed(Exception):
    """A measurement ended with an error, which it has printed to stderr."""


def child_environment(*first: str) -> dict[str, str]:
    """Return the environment in which children find eventrun, after the folders `first`."""
    path = [*first, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def fresh(function: Callable[..., Any], *arguments: Any, path: tuple[str, ...] = ()) -> Any:
    """Return what a module's function returns in a new process; `path` is searched first by its imports."""
    command = _command(function, arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment(*path))
    if done.returncode:
        raise ChildFailed(f"{function.__module__}.{function.__name__} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def running(function: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Keep a function running in a new process, from when it has printed a line to the end of the block."""
    command = _command(function, arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise ChildFailed(f"{function.__module__}.{function.__name__} didn't start")
            yield
        finally:
            process.kill()


def _command(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    return [sys.executable, __file__, function.__module__, function.__name__, json.dumps(arguments)]


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(given))), flush=True)
