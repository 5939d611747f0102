"""The README: its code runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder and return what it printed; it must succeed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("EVENTRUN_")}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env=environ
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_all_code_runs_in_order(tmp_path: Path) -> None:
    """Every Python block, then every eventrun command, runs in one empty folder, top to bottom."""
    python = blocks("python")
    assert len(python) == 7
    for code in python:
        assert run([sys.executable, "-W", "error", "-c", code], tmp_path).strip()
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("eventrun ")]
    assert len(lines) >= 11
    for line in lines:
        command = shlex.split(line, comments=True)
        run([sys.executable, "-m", *command], tmp_path)


def test_each_verb_stands_in_the_readme() -> None:
    """Each verb of the command line is named in the README."""
    from eventrun.cli.verbs import VERBS

    missing = [verb for verb in VERBS if not re.search(rf"eventrun (--store \S+ |at \S+ )?{verb}\b", README)]
    assert not missing
