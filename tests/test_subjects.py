"""Groups and projects as handles, and what their states tell of their trials."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import eventrun
from eventrun.errors import Closed, InvalidType, InvalidValue


def test_what_is_told_about_a_group_and_a_project(tmp_path: Path) -> None:
    """Description, tags, metadata, notes and charts are events of the subject, kept beside those of its trials."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        project = client.project("p", description="first", tags=["a"], metadata={"x": {"y": 1}})
        project.set_description("second")
        project.add_tags("b", owner="ann")
        project.remove_tags("a")
        project.set_metadata({"x": {"z": 2}})
        project.add_note("looks good")
        group = client.group("p", "g / 1", tags={"lr": 0.1})
        group.add_chart({"mark": "line"}, name="curve")
        again = client.group("p", "g / 1")
        again.add_tags("more")
        assert (project.name, group.project, group.name) == ("p", "p", "g / 1")
        found = client.projects().first().result()
        assert found is not None
        assert (found.description, found.tags) == ("second", {"b": None, "owner": "ann"})
        assert found.metadata == {"x": {"y": 1, "z": 2}}
        assert [note.text for note in found.notes] == ["looks good"]
        [state] = client.groups("p")
        assert (state.name, state.tags, state.trials) == ("g / 1", {"lr": 0.1, "more": None}, 0)
        assert [chart.name for chart in state.charts] == ["curve"]
        assert client.verify(views=True).result().ok


def test_nothing_is_recorded_when_something_cant_be(tmp_path: Path) -> None:
    """All is checked before any is recorded."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        with pytest.raises(InvalidType):
            client.project("p", description="d", metadata={"x": object()})
        with pytest.raises(InvalidValue):
            client.group("p", " ")
        with pytest.raises(InvalidType):
            client.group("p", "g", tags=[1])  # type: ignore[list-item]
        assert list(client.projects()) == []
    with pytest.raises(Closed):
        client.project("p")


def test_the_spread_over_attempts(tmp_path: Path) -> None:
    """Trials of one configuration are put together, with count, mean, sd, min and max of each metric's last value."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        for seed, loss in enumerate((1.0, 2.0, 3.0, math.nan, 7.0)):
            with client.trial("p", group="g", params={"lr": 0.1 if seed < 4 else 0.2}) as trial:
                trial.log(loss=99.0)
                trial.log(loss=loss, huge=1e300 * (seed + 1), word="x")
        [state] = client.groups()
        [attempts] = state.attempts
        assert (attempts.params, attempts.version, len(attempts.trials)) == ({"lr": 0.1}, None, 4)
        loss_spread = attempts.metrics["loss"]
        assert (loss_spread.count, loss_spread.mean, loss_spread.min, loss_spread.max) == (3, 2.0, 1.0, 3.0)
        assert loss_spread.sd == pytest.approx(math.sqrt(2 / 3))
        assert attempts.metrics["huge"].sd == pytest.approx(math.sqrt(1.25) * 1e300)
        assert set(attempts.metrics) == {"loss", "huge"}
        assert state.to_dict()["attempts"][0]["metrics"]["loss"]["count"] == 3
        assert set(state.params_varying) == {"lr"}
