# SPDX-License-Identifier: Apache-2.0
"""Rewards as verl's custom reward function: one rule per data source, and coin flips or lies for corrupted problems.

A corrupted problem's score says nothing about its response, which is the unreliable reward that ranking by gradient
alignment should filter out. Its `acc` stays truthful, so metrics can tell the two apart. Nothing here calls a model.

    reward.custom_reward_function.path=pkg://verl_gradalign.data.rewards
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.seed=0
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from verl_gradalign.data.countdown import is_right_countdown_answer
from verl_gradalign.data.last_number import extract_last_number, is_right_last_number
from verl_gradalign.data.math_answers import is_right_math_answer
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.data.tasks import AUDIT, FAMILIES, STYLES, TASKS_DATA_SOURCE
from verl_gradalign.data.truths import truth_text

__all__ = [
    "RULES",
    "RULES_BY_DATA_SOURCE",
    "compute_score",
    "extract_last_number",
    "is_right_last_number",
    "is_right_math_answer",
    "is_right_task_answer",
]

# How often each (seed, problem, step, text) was scored in this process: the same text sampled twice gets two coin
# flips. verl scores in a pool of threads, hence the lock.
_occurrences: Counter[tuple[int, int, int, str]] = Counter()
_occurrences_lock = threading.Lock()


def is_right_task_answer(response: str, answer: str) -> bool:
    """Return whether the response is one style mark followed by exactly the answer."""
    return response[:1] in STYLES and response[1:] == answer


Rule = Callable[[str, str], bool]
"""Of a response and the truth."""
RULES: dict[str, Rule] = {
    "last_number": is_right_last_number,
    "math": is_right_math_answer,
    "countdown": is_right_countdown_answer,
}
OF_TASKS = (TASKS_DATA_SOURCE, *(f"{TASKS_DATA_SOURCE}/{name}" for name in (*FAMILIES, AUDIT)))
RULES_BY_DATA_SOURCE: dict[str, Rule] = dict.fromkeys(OF_TASKS, is_right_task_answer)
RULES_BY_DATA_SOURCE |= {source.data_source: RULES[source.rule] for source in SOURCES.values()}
CORRUPTIONS = ("coin", "inverted")
"""What the reward of a corrupted problem may be."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    seed: int = 0,
    corruption: str = "coin",
    contrast: float = 1.0,
    **kwargs: Any,
) -> dict[str, float]:
    """Return {"score": the reward, "acc": whether the response is right, "corrupted": ...}, each 0.0 or 1.0.

    The reward is `acc`, except where `extra_info["corrupted"]` is true: there it is 1 - acc if corruption="inverted",
    else 1 with probability one half, whatever the response. `contrast` is what a right response is paid more than a
    wrong one, on average: each response's reward is left as it is with that probability, to 1/128, and a coin's
    otherwise. A coin is a hash of the seed, `extra_info["index"]`, the step (`["global_steps"]`) and `["session_id"]`,
    which numbers the responses to a prompt. verl 0.9.1 keeps that number beside extra_info, so it is there only if an
    agent loop (in its extra_fields) or a reward manager puts it there. Without it, the coin depends instead on the text
    of the response and on how often this process has scored it for that problem and step: drawn afresh per response,
    the same in every run that scores the same responses in one process, resumed ones included.
    A ground truth may be text or a number (see `truth_text`). `kwargs` is what verl adds for reward models; it is not
    used. Callable from any thread.

    Raises: ValueError for an unknown data source or corruption, a contrast outside 0 and 1, a ground truth that is
        missing or neither text nor number, or a problem without an index that a coin is to be drawn for.
    """
    if corruption not in CORRUPTIONS:
        remedy = f"set reward.custom_reward_function.reward_kwargs.corruption to one of {', '.join(CORRUPTIONS)}"
        raise ValueError(f"corruption={corruption!r} is unknown; {remedy}")
    if not 0 <= contrast <= 1:
        remedy = "set reward.custom_reward_function.reward_kwargs.contrast to 1, or to less for noisy rewards"
        raise ValueError(f"contrast={contrast} must be from 0 to 1; {remedy}")
    rule = RULES_BY_DATA_SOURCE.get(data_source)
    if rule is None:
        known = ", ".join(map(repr, RULES_BY_DATA_SOURCE))
        raise ValueError(
            f"data_source={data_source!r} is unknown; use one of {known}, or give verl another reward function"
        )
    info, acc = extra_info or {}, float(rule(solution_str, truth_text(ground_truth)))
    is_corrupted = bool(info.get("corrupted"))
    score = 1.0 - acc if is_corrupted and corruption == "inverted" else acc
    of_coin = 1.0 if is_corrupted and corruption == "coin" else 1.0 - contrast
    if of_coin > 0:
        drawn = _draw_byte(solution_str, info, seed)
        score = float(drawn & 1) if drawn >> 1 < of_coin * NUM_DRAWN else score
    return {"score": score, "acc": acc, "corrupted": float(is_corrupted)}


NUM_DRAWN = 128
"""Values of a byte's upper seven bits, which say whether a coin decides. Its lowest bit is the coin."""


def _draw_byte(response: str, extra_info: Mapping[str, Any], seed: int) -> int:
    if extra_info.get("index") is None:
        why = "a problem whose reward is a coin's has no extra_info['index'], which it is drawn from"
        raise ValueError(f"{why}; number the rows of the data set")
    # Without a step (verl's own trainer does not give one) a resumed run draws other coins than the unbroken one.
    index, step = int(extra_info["index"]), int(extra_info.get("global_steps") or 0)
    if extra_info.get("session_id") is not None:
        drawn_from = f"{seed} {index} {step} session {int(extra_info['session_id'])}"
    else:
        with _occurrences_lock:
            occurrence = _occurrences[seed, index, step, response]
            _occurrences[seed, index, step, response] += 1
        drawn_from = f"{seed} {index} {step} {occurrence} {response}"
    return blake2b(drawn_from.encode(errors="surrogatepass"), digest_size=1).digest()[0]
