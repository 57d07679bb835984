# SPDX-License-Identifier: Apache-2.0
"""How a bad value is refused: with the key, the value, the rule and the remedy."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn


def require(holds: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """Raise ValueError "gradalign.<key>=<value>: <rule>. Remedy: <remedy>" unless `holds`."""
    if not holds:
        raise ValueError(f"gradalign.{key}={value!r}: {rule}. Remedy: {remedy}.")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    require(
        value in choices, key, value, f"unknown; known are {', '.join(choices)}", f"set gradalign.{key}={choices[0]}"
    )


def refuse(key: str, value: Any, why: str, remedy: str) -> NoReturn:
    """Raise ValueError for a key of the whole configuration, or a command's option ("--name"; None: it is missing)."""
    shown = f"{key}={value}" if not key.startswith("--") else key if value is None else f"{key} {value}"
    raise ValueError(f"{shown}: {why}. Remedy: {remedy}.")


def require_all(checks: Iterable[Callable[[], object]], errors: Iterable[ValueError] = ()) -> None:
    """Run every check, and raise ValueError with the messages of all that raised one, their number first.

    One launch shows all that is wrong with a configuration: each costs its user a wait. `errors` were found before.
    """
    messages = [str(error) for error in errors]
    for check in checks:
        try:
            check()
        except ValueError as error:
            messages.append(str(error))
    if len(messages) == 1:
        raise ValueError(messages[0])
    if messages:
        lines = "".join(f"\n  {number}. {message}" for number, message in enumerate(messages, start=1))
        raise ValueError(f"{len(messages)} things must be changed before this can run:{lines}")
