# SPDX-License-Identifier: Apache-2.0
"""What blocks of keys are made of: fields with bounds, checked when a block is built, and read from plain containers.

Every message names the key, the value and the remedy. `config.py` holds the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from verl_gradalign.errors import require, require_choice

T = TypeVar("T")


def key(default: T, *, one_of: tuple[str, ...] = (), least: float | None = None, is_neutral: bool = False) -> T:
    """Return a field with the values that it allows; None is always allowed where it is the default.

    `is_neutral`: a resumed run may change it.
    """
    return field(default=default, metadata={"one_of": one_of, "least": least, "is_neutral": is_neutral})


def neutral(default: T, *, one_of: tuple[str, ...] = (), least: float | None = None) -> T:
    """Return a field that a resumed run may change."""
    return key(default, one_of=one_of, least=least, is_neutral=True)


def decisive(config: Any) -> dict[str, Any]:
    """Return the values of a configuration that must be the same when its run is resumed, as a nested dictionary."""
    named = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("is_neutral")}
    return {name: decisive(value) if is_dataclass(value) else value for name, value in named.items()}


class Block:
    """A block of keys, checked when it is built: its fields' own bounds, then what `_check` adds."""

    _prefix = ""

    def __init_subclass__(cls, name: str = "") -> None:
        """`name`: the block's, as in gradalign.<name>.<key>; none for the outermost."""
        cls._prefix = f"{name}." if name else ""

    def __post_init__(self) -> None:
        this: Any = self
        for f in fields(this):
            value, name = getattr(self, f.name), f"{self._prefix}{f.name}"
            one_of, least = f.metadata.get("one_of"), f.metadata.get("least")
            if value is None:
                continue
            if one_of:
                require_choice(name, value, one_of)
            if least is not None:
                remedy = f"leave it out, or set {least} or more" if f.default is None else f"set {least} or more"
                require(value >= least, name, value, f"must be at least {least}", remedy)
        self._check()

    def _check(self) -> None:
        """Raise ValueError for what a bound of one field does not say."""


def build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """Build dataclass `cls` from a nested mapping, recursing into nested dataclasses."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}={values!r}: must be a block of keys. Remedy: set {prefix}.<key>=<value> instead.")
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{prefix}.{key}={value!r}: unknown key. Remedy: use one of {', '.join(sorted(known))}.")
    return cls(**{key: _convert(hints[key], value, f"{prefix}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint` asks for, or raise ValueError naming the key."""
    if is_dataclass(hint):
        return build(hint, {} if value is None else value, key)
    allowed = [t for t in getattr(hint, "__args__", (hint,)) if t is not Ellipsis]
    if getattr(hint, "__origin__", None) is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(_convert(allowed[0], item, key) for item in items)
    if value is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tuple(allowed)) and not (isinstance(value, bool) and bool not in allowed):
        return value
    names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
    raise ValueError(f"{key}={value!r}: must be {names}. Remedy: remove the override to use the default.")
