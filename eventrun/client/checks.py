"""What a client's questions may be made of; all else is refused at the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventrun.codec import checked_text
from eventrun.errors import InvalidType, InvalidValue
from eventrun.trial import ID_ALPHABET, ID_LENGTH

if TYPE_CHECKING:
    from eventrun.filters import Condition, Where

TrialLike = Any  # a Trial, a TrialState, an id, a unique prefix, a name or "@latest"


def key_of(trial: TrialLike) -> str:
    """Return the text that names a trial. Raises InvalidValue."""
    key = trial if isinstance(trial, str) else getattr(trial, "id", None)
    if not isinstance(key, str):
        raise InvalidValue(f"{trial!r} is neither a trial nor a trial's id, name, prefix or '@latest'")
    return checked_text(key, "the trial's name")


_COUNTS = frozenset({"limit", "offset", "after", "points", "position", "attempt"})


def check_choice(chosen: dict[str, Any]) -> None:
    """Refuse at the call what SQL would stumble over: counts are ints from 0, all else is text; None is no choice."""
    for name, value in chosen.items():
        if value is None:
            continue
        if name in _COUNTS:
            if type(value) is not int:
                raise InvalidType(f"{name}={value!r} is no whole number")
            if not 0 <= value < 1 << 62:
                raise InvalidValue(f"{name}={value!r} is out of range: it is a number from 0 on")
        elif not isinstance(value, str):
            raise InvalidType(f"{name}={value!r} is {type(value).__qualname__}, not text")
        else:
            checked_text(value, name)


def check_between(between: Any) -> None:
    """Refuse what is no pair of bounds; each is a number, or None: open. Raises InvalidValue."""
    if between is None:
        return
    pair = isinstance(between, (tuple, list)) and len(between) == 2
    if not pair or not all(bound is None or _is_number(bound) for bound in between):
        raise InvalidValue(
            f"between={between!r}: give two steps, the first and the last, or None for no bound"
        )


def _is_number(bound: Any) -> bool:
    return isinstance(bound, (int, float)) and not isinstance(bound, bool) and bound == bound


def parsed(where: Where) -> Condition | None:
    """Read a filter at the call that gives it. Raises InvalidValue, InvalidType."""
    if where is None:
        return None
    from eventrun.filters import parse

    return parse(where)


def checked_id(trial_id: Any, what: str = "resume=") -> str:
    """Return a trial's whole id. Raises InvalidValue, which begins with `what`."""
    if not isinstance(trial_id, str) or len(trial_id) != ID_LENGTH or not set(trial_id) <= set(ID_ALPHABET):
        raise InvalidValue(
            f"{what}{trial_id!r} is not a trial's id ({ID_LENGTH} letters and digits); "
            "`(await client.get(name)).id` finds it by name or prefix"
        )
    return trial_id
