"""Options as fields of a dataclass: their help and default, and checks of what YAML gave for them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_args, get_origin, get_type_hints


def option(default: Any, text: str) -> Any:
    """A dataclass field whose help text is its only description."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def default(option: Field) -> object:
    """What an option is where nobody sets it."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def check_range(config: Any, options: Iterable[str], allowed: str, holds: Callable[[float], bool]) -> None:
    """Raises ValueError where a number is set that does not hold or is not finite; `allowed` says it in words."""
    for name in options:
        value = getattr(config, name)
        if value is not None and not (holds(value) and math.isfinite(value)):
            raise ValueError(f"`{name}` is {value}; allowed: {allowed}")


def check_choice(config: Any, name: str, allowed: Iterable[str]) -> None:
    """Raises ValueError where a value is not among those allowed."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"`{name}` is {getattr(config, name)!r}; allowed: {', '.join(allowed)}")


def check_types(config: Any, *owners: type) -> None:
    """Raises ValueError where a value from YAML is not of its option's type (a bare `2e-4` is a string to YAML).

    Args:
        owners: the classes whose own options are checked.
    """
    for owner in owners:
        hints = get_type_hints(owner)
        for name in (found.name for found in fields(config) if found.name in owner.__annotations__):
            _check_type(name, getattr(config, name), hints[name])


def _check_type(name: str, value: object, hint: Any) -> None:
    allowed = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if any(_is(value, kind) for kind in allowed):
        return
    names = " or ".join(
        "nothing" if k is type(None) else getattr(k, "__name__", str(k)) if not get_args(k) else str(k)
        for k in allowed
    )
    raise ValueError(f"`{name}` is {value!r} ({type(value).__name__}); allowed: {names}")


def _is(value: object, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_is(k, key) and _is(v, item) for k, v in value.items())
    return type(value) is kind or (kind is float and type(value) is int)
