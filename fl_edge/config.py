"""Configuration: one dataclass a room, a YAML a scenario, overrides on top, and one clear line when something is off.

A room declares its settings with :func:`setting`, which keeps default, meaning and allowed range in one place. A
scenario is a dataclass of such dataclasses. :func:`resolve` merges ``defaults < YAML < overrides`` with OmegaConf and
checks the result, so that no run starts on a value that cannot work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_edge.errors import ConfigError

_LARGEST = 2.0**63  # what the libraries below us take as a number; also keeps out infinity
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}

T = TypeVar("T")
V = TypeVar("V", int, float, bool, str)


def setting(
    default: V, doc: str, *, low: float | None = None, high: float | None = None, choices: Sequence[V] | None = None
) -> V:
    """Declare one field of a configuration dataclass.

    Parameters
    ----------
    default
        The value when nobody says otherwise.
    doc
        Meaning and unit, one line.
    low, high
        Inclusive bounds.
    choices
        The only values allowed.
    """
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field  # type: ignore[no-any-return] # a field stands where its value will stand


def allowed(field: dataclasses.Field[Any]) -> str:
    """Say in words what values a field takes, for example ``an integer, at least 1``."""
    meta = field.metadata
    if meta.get("choices"):
        return "one of " + ", ".join(map(str, meta["choices"]))
    kind = _KINDS[_type(field)]
    bounds = [f"at least {meta['low']}"] if meta.get("low") is not None else []
    bounds += [f"at most {meta['high']}"] if meta.get("high") is not None else []
    return ", ".join([kind, " and ".join(bounds)] if bounds else [kind])


def check(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value outside its declared range, in the configuration and all nested ones.

    A dataclass may add a method ``contradictions() -> str | None`` for what depends on more than one field.
    """
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{key}.")
            continue
        limits: Mapping[str, Any] = field.metadata
        low, high, choices = limits.get("low"), limits.get("high"), limits.get("choices")
        try:
            # "not (value >= low)" is true for NaN as well, which "value < low" is not
            outside = (low is not None and not value >= low) or (high is not None and not value <= high)
            outside = outside or (_type(field) in ("int", "float") and not abs(value) < _LARGEST)
        except TypeError:  # text where a number should be, in a dataclass that somebody filled by hand
            outside = True
        if outside or (choices and value not in choices):
            raise ConfigError(f"{key}={_shown(value)} is not allowed; it must be {allowed(field)}")
    if reason := config.contradictions() if hasattr(config, "contradictions") else None:
        raise ConfigError(f"{prefix.rstrip('.') or 'configuration'}: {reason}")


def flatten(config: Any, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Map every dotted key of a configuration dataclass (instance or class) to its field."""
    keys: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(config):
        nested: Any = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            keys |= flatten(nested, f"{prefix}{field.name}.")
        else:
            keys[f"{prefix}{field.name}"] = field
    return keys


def resolve(schema: type[T], source: Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> T:
    """Merge ``schema's defaults < source < overrides``, check every value, and return the dataclass.

    Parameters
    ----------
    schema
        A dataclass whose fields are settings or nested dataclasses.
    source
        A YAML file, or its content, or nothing.
    overrides
        Dotted keys to values; values given as text are read as YAML would read them.

    Raises
    ------
    ConfigError
        An unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    keys = flatten(schema)
    base = OmegaConf.structured(schema)
    layer, where = _read(source)
    layers = ((where, _dotted(layer, keys)), ("the overrides", dict(overrides)))
    for origin, values in layers:
        _reject_unknown(keys, values, origin)
    for origin, values in layers:
        for key, value in values.items():
            try:
                OmegaConf.update(base, key, _parsed(value, keys[key]))
            except (OmegaConfBaseException, ValueError, OverflowError):
                raise ConfigError(
                    f"{key}={_shown(value)} in {origin} is not allowed; it must be {allowed(keys[key])}"
                ) from None
    try:
        config = cast("T", OmegaConf.to_object(base))
    except OmegaConfBaseException as error:  # ${another.key} that is not there, and OmegaConf's ???
        raise ConfigError(f"{error.full_key} has no value: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def to_yaml(config: Any) -> str:
    """Return a configuration dataclass as YAML text, in the order its fields are declared."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(source: Path | Mapping[str, Any] | None) -> tuple[Mapping[str, Any], str]:
    if not isinstance(source, Path):
        return source or {}, "the configuration"
    try:
        loaded = OmegaConf.load(source)
    except OSError as error:  # OmegaConf raises it, without a reason, for a file that holds a single number
        raise ConfigError(
            f"cannot read the configuration {_shown(source)}: {error.strerror or 'it must hold keys and values'}"
        ) from None
    except Exception as error:  # yaml raises several unrelated classes
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        at = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{_shown(source)} is not YAML{at}: {_shown(problem or error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{_shown(source)} must hold keys and values, not a list")
    return cast("Mapping[str, Any]", OmegaConf.to_container(loaded)), source.name


def _dotted(layer: Mapping[Any, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in layer.items():
        key = f"{prefix}{name}"
        section = any(known.startswith(f"{key}.") for known in keys)
        if section and value is None:  # all its keys are commented out
            continue
        nested = isinstance(value, Mapping) and key not in keys and (section or value)
        flat |= _dotted(value, keys, f"{key}.") if nested else {key: value}
    return flat


def _reject_unknown(keys: Mapping[str, Any], values: Mapping[Any, Any], where: str) -> None:
    import difflib  # noqa: PLC0415 - only needed to word an error

    for key in values:
        if key not in keys:
            name = str(key)
            near = [known for known in keys if known.rpartition(".")[2] == name.rpartition(".")[2]]
            near = near or difflib.get_close_matches(name, keys, n=3)
            first = sorted({known.partition(".")[0] + ".*" * ("." in known) for known in keys})
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(first)}"
            raise ConfigError(f"unknown key {_shown(key)} in {where}; {hint}")


def _parsed(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Refuse, with ValueError, what OmegaConf would bend: true to 1, 2.5 to 2, 2 to true."""
    kind = _type(field)
    if isinstance(value, bool) != (kind == "bool") and not (kind == "bool" and isinstance(value, str)):
        raise ValueError
    if kind == "bool" and isinstance(value, str) and value.strip().isdigit():
        raise ValueError
    if isinstance(value, float) and kind == "int":
        if not value.is_integer():
            raise ValueError
        return int(value)
    return value


def _type(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def _shown(value: Any) -> str:
    """Put a value that may be anything into one line of a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
