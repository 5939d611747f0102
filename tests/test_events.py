"""Events: what every kind has in common."""

from __future__ import annotations

import gc
from typing import get_args

import msgspec
import pytest

from eventrun.events import (
    EVENT_TYPES,
    Event,
    MetricsLogged,
    group_subject,
    project_subject,
    split_subject,
    trial_subject,
)


@pytest.mark.parametrize("kind", EVENT_TYPES, ids=lambda kind: kind.__name__)
def test_each_kind_is_frozen_tagged_and_untracked(kind: type[msgspec.Struct]) -> None:
    """An event can't be changed, is stored as an array with a short tag, and costs the garbage collector nothing."""
    config = kind.__struct_config__
    assert config.frozen
    assert config.array_like
    assert not config.gc
    assert isinstance(config.tag, str)
    assert 1 <= len(config.tag) <= 3


def test_tags_differ_and_the_union_is_complete() -> None:
    """No two kinds share a tag, and the union names them all."""
    assert (
        len({kind.__struct_config__.tag for kind in EVENT_TYPES})
        == len(EVENT_TYPES)
        == len(get_args(Event))
        == 25
    )


def test_gc_does_not_track_events() -> None:
    """A queued event with a mapping of floats isn't tracked by the collector."""
    assert not gc.is_tracked(MetricsLogged({"loss": 1.0}))


@pytest.mark.parametrize("names", [("a", "b"), ("a/b", "c/d"), ("ü %2F", "/"), ("p", "")])
def test_subjects_can_be_taken_apart(names: tuple[str, str]) -> None:
    """A subject gives back the names it was made of, whatever letters they hold."""
    assert split_subject(group_subject(*names)) == ("g", *names)
    assert split_subject(project_subject(names[0])) == ("p", names[0])
    assert split_subject(trial_subject("id")) == ("t", "id")
