"""What the checkout promises as a whole: its layout, its dependencies, its contracts, its two commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP_LEVEL = {"pyproject.toml", "eventrun", "tests", "tools", "README.md"}
SLUG = r"[a-z0-9]+(-[a-z0-9]+)*"


def files(folder: str = ".") -> list[Path]:
    """Return the repository's files: those that git knows, and new ones that it doesn't ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def requirement_names(requirements: list[str]) -> set[str]:
    """Return the packages' names, without versions and extras."""
    return {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def contract(name: str) -> dict[str, Any]:
    """Return an import-linter contract by its id."""
    [found] = [entry for entry in PROJECT["tool"]["importlinter"]["contracts"] if entry["id"] == name]
    return dict(found)


def test_top_level_holds_only_what_a_newcomer_expects() -> None:
    top = {path.parts[0] for path in files()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_core_depends_on_four_packages() -> None:
    core = requirement_names(PROJECT["project"]["dependencies"])
    assert core == {"aiosqlite", "anyio", "msgspec", "pyyaml"}


def test_every_module_has_a_place_among_the_layers() -> None:
    modules = {path.parts[1].removesuffix(".py") for path in files("eventrun") if path.suffix == ".py"}
    layers = [layer.strip("() ") for line in contract("layers")["layers"] for layer in line.split("|")]
    assert sorted(layers) == sorted(modules - {"__init__"})
    assert contract("layers")["exhaustive"] is True


def test_what_folds_and_encodes_may_not_touch_the_world() -> None:
    pure = contract("pure")
    names = ("events", "codec", "aggregators", "projections")
    assert set(pure["source_modules"]) == {f"eventrun.{name}" for name in names}
    assert {"anyio", "asyncio", "sqlite3", "os", "time"} <= set(pure["forbidden_modules"])


def test_package_is_typed() -> None:
    assert (ROOT / "eventrun" / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("command", ["python3 tools/dev.py demo", "python3 tools/dev.py test"])
def test_readme_has_the_two_commands(command: str) -> None:
    """Each stands on a line of its own, to be copied; a comment may follow."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^ *{re.escape(command)} *(#.*)?$", readme, re.MULTILINE)


def test_ci_runs_the_readme_test_command() -> None:
    assert "python3 tools/dev.py test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def dev(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run tools/dev.py."""
    command = [sys.executable, str(ROOT / "tools" / "dev.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_dev_explains_itself_in_any_folder(tmp_path: Path) -> None:
    shown = dev("--help", cwd=tmp_path)
    verbs = re.findall(r"^  ([a-z]+)  +[A-Z].*\.$", shown.stdout, re.MULTILINE)
    assert shown.returncode == 0
    assert verbs == ["demo", "test", "check", "bench", "crash", "wheel"]
    assert "--all-pythons" in dev("test", "--help", cwd=tmp_path).stdout


def test_dev_suggests_the_verb_that_was_meant() -> None:
    shown = dev("chekc")
    assert shown.returncode == 2
    assert "Did you mean `check`?" in shown.stderr


def test_change_fragments_are_named_by_their_kind_and_hold_one_sentence() -> None:
    for path in files("tools/changes"):
        if path.name != "README.md":
            assert re.fullmatch(rf"{SLUG}\.(added|changed|fixed|removed)\.md", path.name), path
            text = (ROOT / path).read_text(encoding="utf-8").strip()
            assert text.endswith("."), path
            assert "\n\n" not in text, path


def test_decisions_are_numbered_without_gaps() -> None:
    names = [path.name for path in files("tools/decisions") if path.name != "README.md"]
    assert all(re.fullmatch(rf"\d{{4}}-{SLUG}\.md", name) for name in names), names
    assert sorted(int(name[:4]) for name in names) == list(range(1, len(names) + 1))
