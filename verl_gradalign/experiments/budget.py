# SPDX-License-Identifier: Apache-2.0
"""How much a run may generate or take, in the one unit that a comparison counts by.

    budget = Budget(10_240, "responses")
    f"{budget}", budget.option  # "10,240 responses", "--budget-responses"

`verl_gradalign.cpu.series` ends a run by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from verl_gradalign.errors import refuse
from verl_gradalign.types import RESPONSES, SECONDS, TOKENS

TUNING_OPTION = "--tuning-budget"


@dataclass(frozen=True)
class Budget:
    """An amount of a unit."""

    amount: float
    unit: str = RESPONSES

    @property
    def option(self) -> str:
        """Return the option of `verl-gradalign compare` that gives it."""
        return f"--budget-{self.unit}"

    def __str__(self) -> str:
        return f"{shown(self.amount)} {self.unit}"


def shown(amount: float) -> str:
    """Return a number with thousands set apart, whole if it is."""
    return f"{amount:,.0f}" if amount == round(amount) else f"{amount:,}"


def as_given(amount: float) -> str:
    """Return a number as one writes it for a program."""
    return str(int(amount) if isfinite(amount) and amount == round(amount) else amount)


def given_budget(amounts: Mapping[str, float | None]) -> Budget | None:
    """Return the budget of the one option that was given, by unit; None: none was.

    Raises: ValueError if two were.
    """
    given = [Budget(amount, unit) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        first, second = given[:2]
        refuse(second.option, as_given(second.amount), f"{first.option} ends the runs already", "give one of them")
    return given[0] if given else None


def check_budget(budget: Budget, option: str, num_responses: int, of_what: str, instead: str = "") -> None:
    """Raise ValueError if a budget is smaller than a step, of which only the number of responses is known before.

    `instead`: what else can be done than to give more.
    """
    least, why, remedy = 0, "must be a number of seconds above 0", "give for instance 60"
    if budget.unit != SECONDS:
        least = num_responses
        why = f"is less than a step of {of_what}, which generates {num_responses:,} responses"
        # A response has a token at least.
        why += " of a token at least" if budget.unit == TOKENS else ""
        remedy = f"give {option} {num_responses} or more{instead}"
    if not (isfinite(budget.amount) and budget.amount > 0 and budget.amount >= least):
        refuse(option, as_given(budget.amount), why, remedy)
