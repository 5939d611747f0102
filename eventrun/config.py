"""Settings of a client: from arguments, the environment, and a YAML file that the environment names.

An argument wins over EVENTRUN_<NAME>, which wins over the file named by EVENTRUN_CONFIG, which wins over the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from eventrun.errors import InvalidValue

DEFAULT_URL = "runs"


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client can be told."""

    url: str = DEFAULT_URL
    linger_ms: float = 100.0  # how long an event waits for others before its batch is written
    close_timeout_s: float = 10.0  # how long closing waits for the store
    quiet: bool = False  # print nothing, not even on a terminal


def load_settings(environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
    """Layer the settings; arguments that are None count as not given. Raises InvalidValue naming setting and source."""
    environ = os.environ if environ is None else environ
    layers: dict[str, tuple[Any, str]] = {}
    if path := environ.get("EVENTRUN_CONFIG"):
        layers.update({name: (value, path) for name, value in read_yaml(Path(path)).items()})
    for name in Settings.__struct_fields__:
        variable = f"EVENTRUN_{name.upper()}"
        if environ.get(variable):
            layers[name] = (environ[variable], variable)
    layers.update({name: (value, "the argument") for name, value in arguments.items() if value is not None})
    for name, (value, source) in layers.items():
        try:
            msgspec.convert({name: value}, Settings, strict=False)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter: bytes that are no text
            raise InvalidValue(f"the setting {name!r} from {source} can't be used: {error}") from error
    settings = msgspec.convert({name: value for name, (value, _) in layers.items()}, Settings, strict=False)
    for name in ("linger_ms", "close_timeout_s"):
        if not 0 < getattr(settings, name) < 1e9:
            raise InvalidValue(
                f"the setting {name!r} must be above 0 and below 1e9, not {getattr(settings, name)!r}"
            )
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file, safely. Raises InvalidValue with line and column."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidValue(f"the file {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no day, bytes that are no text
        raise InvalidValue(f"the file {path} is not YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidValue(f"the file {path} must hold a mapping with text keys, like `url: runs`")
    return found
