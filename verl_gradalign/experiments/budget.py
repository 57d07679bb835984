# SPDX-License-Identifier: Apache-2.0
"""How much a run may generate or take, in the one unit that a comparison counts by.

    budget = Budget(10_240, "responses")
    f"{budget}", budget.option  # "10,240 responses", "--budget-responses"

`verl_gradalign.cpu.series` ends a run by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from verl_gradalign.errors import refuse

RESPONSES, TOKENS, SECONDS = UNITS = ("responses", "tokens", "seconds")
"""What is counted of a run, tests excluded: all responses that it generates, trusted ones and candidates included; the
tokens of these; the time of its training."""
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
    return str(int(amount) if amount == round(amount) else amount)


def given_budget(amounts: Mapping[str, float | None]) -> Budget | None:
    """Return the budget of the one option that was given, by unit; None: none was.

    Raises: ValueError if two were.
    """
    given = [Budget(amount, unit) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        first, second = given[:2]
        refuse(
            second.option, as_given(second.amount), f"{first.option} is given too, and a run ends by one", "give one"
        )
    return given[0] if given else None


def check_budget(budget: Budget, option: str, num_responses: int, of_what: str) -> None:
    """Raise ValueError if a budget is smaller than a step, of which only the number of responses is known before."""
    if budget.unit == SECONDS:
        least, why = 0.0, "is no time"
    else:
        # A response has a token at least.
        least = num_responses
        why = f"is less than a step of {of_what}, which generates {num_responses:,} responses"
        why += " of a token at least" if budget.unit == TOKENS else ""
    if not (budget.amount > 0 and budget.amount >= least):
        enough = f"give {option} {num_responses} or more, or leave {of_what} out" if least else "give a number above 0"
        refuse(option, as_given(budget.amount), why, enough)
