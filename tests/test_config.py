"""Settings: which source wins, and what a bad one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from eventrun.config import load_settings, read_yaml
from eventrun.errors import InvalidValue


def test_defaults() -> None:
    """Without anything said, the store is the folder runs and a batch waits 100 ms."""
    settings = load_settings({})
    assert (settings.url, settings.linger_ms, settings.close_timeout_s, settings.quiet) == (
        "runs",
        100.0,
        10.0,
        False,
    )


def test_argument_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """An argument wins over the environment, which wins over the file, which wins over the default."""
    file = tmp_path / "eventrun.yaml"
    file.write_text("url: from-file\nlinger_ms: 7\nquiet: true\n")
    environ = {"EVENTRUN_CONFIG": str(file), "EVENTRUN_URL": "from-environment", "EVENTRUN_LINGER_MS": "20"}
    settings = load_settings(environ, url="from-argument", linger_ms=None)
    assert (settings.url, settings.linger_ms, settings.quiet) == ("from-argument", 20.0, True)


@pytest.mark.parametrize(
    ("environ", "arguments", "named"),
    [
        ({"EVENTRUN_LINGER_MS": "soon"}, {}, "EVENTRUN_LINGER_MS"),
        ({}, {"linger_ms": 0.0}, "linger_ms"),
        ({}, {"close_timeout_s": float("nan")}, "close_timeout_s"),
        ({}, {"linger": 3}, "linger"),
    ],
)
def test_a_bad_setting_names_itself_and_its_source(
    environ: dict[str, str], arguments: dict[str, float], named: str
) -> None:
    """A setting that can't be used is an error that names it and where it came from."""
    with pytest.raises(InvalidValue, match=named):
        load_settings(environ, **arguments)


@pytest.mark.parametrize(
    ("text", "says"), [("url: [", "line 1"), ("- a\n", "mapping"), ("1: x\n", "text keys")]
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, says: str) -> None:
    """A file that isn't a YAML mapping is an error that names file and place."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=says) as caught:
        read_yaml(file)
    assert "bad.yaml" in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    """A missing file is an error that says so; an empty one sets nothing."""
    with pytest.raises(InvalidValue, match="can't be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}
