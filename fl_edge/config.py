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
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    name = field.type if isinstance(field.type, str) else field.type.__name__
    bounds = [f"at least {meta['low']}"] if meta.get("low") is not None else []
    bounds += [f"at most {meta['high']}"] if meta.get("high") is not None else []
    return ", ".join([kinds.get(name, name), " and ".join(bounds)] if bounds else [kinds.get(name, name)])


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
        # "not (value >= low)" is true for NaN as well, which "value < low" is not
        outside = (low is not None and not value >= low) or (high is not None and not value <= high)
        if outside or (choices and value not in choices):
            raise ConfigError(f"{key}={value} is not allowed; it must be {allowed(field)}")
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
    _reject_unknown(keys, _dotted(layer), where)
    _reject_unknown(keys, overrides, "the overrides")
    for origin, values in ((where, _dotted(layer)), ("the overrides", dict(overrides))):
        for key, value in values.items():
            try:
                OmegaConf.update(base, key, _parsed(value, keys[key]))
            except OmegaConfBaseException:
                raise ConfigError(
                    f"{key}={value} in {origin} is not allowed; it must be {allowed(keys[key])}"
                ) from None
    config = cast("T", OmegaConf.to_object(base))
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
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {source}: {error.strerror}") from None
    except Exception as error:  # yaml raises several unrelated classes
        raise ConfigError(f"{source} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{source} must hold keys and values, not a list")
    return cast("Mapping[str, Any]", OmegaConf.to_container(loaded)), source.name


def _dotted(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _reject_unknown(keys: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    import difflib  # noqa: PLC0415 - only needed to word an error

    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=3) or sorted(keys)
            raise ConfigError(f"unknown key {key} in {where}; did you mean {', '.join(near)}?")


def _parsed(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Keep text as text, refuse to round 2.5 to an integer or to read true as 1."""
    name = field.type if isinstance(field.type, str) else field.type.__name__
    if isinstance(value, bool) and name in ("int", "float"):
        return str(value)  # OmegaConf would take True for 1; as text it is refused
    if isinstance(value, float) and name == "int":
        return int(value) if value.is_integer() else str(value)
    return value
