"""The hash of a configuration."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrun.errors import InvalidType
from eventrun.identity import canonical, configuration_hash

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    """Turn the order of all mappings round."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(each) for each in value] if isinstance(value, list) else value


def tagged(value: Any) -> Any:
    """Write a value so that == keeps types apart and NaN equals itself."""
    if isinstance(value, dict):
        return ("dict", {key: tagged(inner) for key, inner in value.items()})
    if isinstance(value, list):
        return ("list", [tagged(inner) for inner in value])
    return (type(value).__name__, "nan" if value != value else repr(value))


@given(value=plain)
def test_the_order_of_keys_doesnt_matter(value: Any) -> None:
    assert canonical(shuffled(value)) == canonical(value)


@given(one=plain, other=plain)
def test_other_data_gives_other_bytes(one: Any, other: Any) -> None:
    """The canonical form is injective: types, order of lists, nesting and lengths are all in it."""
    assert (canonical(one) == canonical(other)) == (tagged(one) == tagged(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), (None, ""), (["ab", "c"], ["a", "bc"]),
     ({"a": {"b": 1}}, {"a": {"c": 1}}), (-1, 1), (2**64, 2**64 + 1), (-(2**70), 2**70), (b"x", "x"), ([], {}),
     ([[1], 2], [[1, 2]])],
)  # fmt: skip
def test_what_differs(one: Any, other: Any) -> None:
    """Each of these was the same to one tracker or another."""
    assert configuration_hash(one) != configuration_hash(other)


def test_it_is_the_same_in_every_process() -> None:
    """The hash seed of the interpreter has no part in it."""
    code = """if True:
        from eventrun.identity import configuration_hash
        print(configuration_hash('p', {'b': 1, 'a': {'y': -2.5, 'x': [None]}}))
    """
    found = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {configuration_hash("p", {"a": {"x": [None], "y": -2.5}, "b": 1})}
    assert len(found.pop()) == 32


def test_other_types_are_refused() -> None:
    with pytest.raises(InvalidType):
        configuration_hash(object())
