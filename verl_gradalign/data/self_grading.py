# SPDX-License-Identifier: Apache-2.0
"""Whether a reward function grades the rows it is meant for: each row's own truth is right, a neighbour of it wrong.

One check for most of what can be wrong with answers: a truth that is empty, broken, several, or of another form than
the reward function reads pays nobody, and one that is worth nothing pays everybody. No model is asked.

    for fault in self_graded(rows, compute_score):
        print(fault.position, fault.message)
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from verl_gradalign.data.countdown import solve_countdown

RewardFunction = Callable[..., Any]
"""As verl calls it: with data_source, solution_str, ground_truth and extra_info, all by keyword."""

FORMS = ("\\boxed{{{}}}", "#### {}", "Answer: {}", "The answer is {}.", "{}", "={}")
"""How an answer may be given: the reward function has to take its row's truth in one of them (the last: the tasks)."""
MARKS = {"\\boxed": FORMS[0], "####": FORMS[1]}
"""What a prompt that asks for a form says of it; then no other form is tried."""
MAX_NUMBERS_CHANGED = 3
OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


@dataclass(frozen=True)
class Fault:
    """A row that is not graded as it should be. `position` counts the rows from 0."""

    position: int
    truth: Any
    response: str
    score: float | None
    """Of the response; None if there is no number."""
    message: str
    """What was tried and what came of it, without place and remedy."""


def self_graded(rows: Iterable[Mapping[str, Any]], compute_score: RewardFunction) -> Iterator[Fault]:
    """Yield the faults of rows in verl's schema, at most one for each row; rows without fault yield nothing.

    A row is graded if, in one of FORMS, its truth scores 1, a neighbour of it 0 or less, and an empty answer 0 or less;
    a prompt that asks for a box, or for the answer after ####, has to be graded in that form. Where the function gives
    `acc` (whether the answer is right) that is read instead of the score, which may have other units. A row's mark of a
    corrupted reward (`extra_info["corrupted"]`) is left out: its coin says nothing.
    Values may be numbers too; of several acceptable truths the first is given. A coroutine function is awaited.
    """
    for position, row in enumerate(rows):
        fault = grading_fault(row, compute_score, forms_asked_for(row.get("prompt")), position)
        if fault is not None:
            yield fault


def grading_fault(
    row: Mapping[str, Any], compute_score: RewardFunction, forms: Sequence[str] = FORMS, position: int = 0
) -> Fault | None:
    """Return what is wrong with the grading of one row (see `self_graded`), None if nothing is.

    `forms`: what to try instead of FORMS, where the prompt says how the answer is to be given.
    """
    truth = (row.get("reward_model") or {}).get("ground_truth")

    def fault(response: str, score: float | None, message: str) -> Fault:
        return Fault(position, truth, response, score, message)

    answer = right_answer(truth)
    if answer is None:
        return fault("", None, f"has a truth that no right answer was found for ({_shortened(truth)})")
    try:
        scores = {}
        for form in forms:
            scores[form] = score = grade(row, compute_score, form.format(answer))
            if score >= 1:
                break
        else:
            form = max(scores, key=lambda tried: scores[tried])
            message = f"has the truth {_shortened(truth)}, which scores {scores[form]:g} as {form.format(answer)!r}"
            others = f" and no more in {len(forms) - 1} other forms" if len(forms) > 1 else ""
            return fault(form.format(answer), scores[form], message + others)
        for response in ("", form.format("")):
            score = grade(row, compute_score, response)
            if score > 0:
                message = f"pays an empty answer: {response!r} scores {score:g} for the truth {_shortened(truth)}"
                return fault(response, score, message)
        tried = []
        for response in (form.format(near) for near in neighbours(answer)):
            score = grade(row, compute_score, response)
            if score <= 0:
                return None
            tried.append((response, score))
    except UngradableError as error:
        return fault(error.response, None, str(error))
    response, score = tried[0]
    message = f"pays a wrong answer: {response!r} scores {score:g} for the truth {_shortened(truth)}"
    return fault(response, score, message)


class UngradableError(Exception):
    """A reward function that raised, or gave what is no number."""

    def __init__(self, response: str, message: str) -> None:
        super().__init__(message)
        self.response = response


def forms_asked_for(prompt: Any) -> tuple[str, ...]:
    """Return the forms of an answer that a prompt (text or messages) asks for; all of them if it names none."""
    asked = [] if isinstance(prompt, str) or prompt is None else list(prompt)
    text = prompt if isinstance(prompt, str) else " ".join(str(message.get("content")) for message in asked)
    return tuple(form for mark, form in MARKS.items() if mark in text) or FORMS


def grade(row: Mapping[str, Any], compute_score: RewardFunction, response: str) -> float:
    """Return how right a response is: `acc` if the reward function gives it, else its score.

    Raises: UngradableError if the function raises, or gives no finite number.
    """
    info = {**(row.get("extra_info") or {}), "corrupted": False}
    truth = (row.get("reward_model") or {}).get("ground_truth")
    shown = f"for the response {_shortened(response)} and the truth {_shortened(truth)}"
    try:
        value = compute_score(
            data_source=row.get("data_source"), solution_str=response, ground_truth=truth, extra_info=info
        )
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
    except Exception as error:
        message = f"has a reward that raises {type(error).__name__}: {error} ({shown})"
        raise UngradableError(response, message) from error
    score = value
    if isinstance(value, Mapping):
        score = value.get("acc") if value.get("acc") is not None else value.get("score")
    score = score.item() if getattr(score, "ndim", None) == 0 else score  # numpy's and torch's scalars
    if not isinstance(score, Real) or not math.isfinite(score):
        raise UngradableError(response, f"has a reward that is no finite number: {_shortened(value)} ({shown})")
    return float(score)


def right_answer(truth: Any) -> str | None:
    """Return an answer that is right if the truth is: the truth itself as text, or the first of several.

    A solution, if it is a Countdown problem. None if there is none.
    """
    truth = truth.tolist() if hasattr(truth, "tolist") else truth
    if isinstance(truth, list | tuple):
        return right_answer(truth[0]) if truth else None
    if isinstance(truth, str) and truth.startswith('{"numbers"'):
        return solve_countdown(truth)
    if truth is None or isinstance(truth, Mapping | bytes):
        return None
    return str(truth)


def neighbours(answer: str) -> tuple[str, ...]:
    """Return answers near to one, nearest first, of which at least one differs from it in value.

    A number has one neighbour, its last digit changed; a choice the next one; yes has no. In other answers a digit of
    each of the first numbers is changed, or the first letter. That may leave the value as it is (0/5 and 0/6), so 1
    more follows, which is still right for infinity, and 7.
    """
    if re.fullmatch("[A-Z]", answer):
        return (chr(ord("A") + (ord(answer) - ord("A") + 1) % 26),)
    if answer.lower() in OPPOSITES:
        return (OPPOSITES[answer.lower()],)
    last_digits = [number.end() - 1 for number in re.finditer(r"[0-9]+", answer)]
    changed = [f"{answer[:at]}{(int(answer[at]) + 1) % 10}{answer[at + 1 :]}" for at in last_digits]
    if re.fullmatch(r"[-+]?[0-9,]*\.?[0-9]+", answer):
        return (changed[-1],)
    if not changed and re.fullmatch(r"[^\W\d_][^\\]*", answer):
        changed = [("y" if answer[0] == "x" else "x") + answer[1:]]
    return (*changed[:MAX_NUMBERS_CHANGED], f"{answer}+1", "7")


def _shortened(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and re.search("[\ud800-\udfff]", value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_reward_function(named: str) -> RewardFunction:
    """Return a reward function named as FILE.py:FUNCTION or pkg://MODULE:FUNCTION; without function, compute_score.

    Raises: ValueError if there is none, with the reason.
    """
    place, colon, function = named.rpartition(":")
    if not colon or "/" in function or function.endswith(".py"):
        place, function = named, "compute_score"
    try:
        if place.startswith("pkg://"):
            module = importlib.import_module(place.removeprefix("pkg://"))
        else:
            spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).expanduser())
            if spec is None or spec.loader is None:
                raise ImportError("its name does not end in .py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        found = getattr(module, function)
    except Exception as error:  # whatever a user's own module raises
        why = f"--reward {named} cannot be loaded ({type(error).__name__}: {error})"
        raise ValueError(f"{why}; write FILE.py:FUNCTION or pkg://MODULE:FUNCTION") from error
    if not callable(found):
        raise ValueError(f"--reward {named} is no function but of type {type(found).__name__}; name the function")
    return found
