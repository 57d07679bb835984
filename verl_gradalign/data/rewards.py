# SPDX-License-Identifier: Apache-2.0
"""Rewards of the tasks and of GSM8K, as verl's custom reward function, and coin-flip rewards for corrupted problems.

A corrupted problem's score says nothing about its response, which is the unreliable reward that ranking by gradient
alignment should filter out. Its `acc` stays truthful, so metrics can tell the two apart. Nothing here calls a model.

    reward.custom_reward_function.path=pkg://verl_gradalign.data.rewards
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.seed=0
"""

import re
import threading
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from verl_gradalign.data.tasks import STYLES, TASKS_DATA_SOURCE

__all__ = ["GSM8K_DATA_SOURCE", "compute_score", "extract_last_number", "is_right_task_answer"]

GSM8K_DATA_SOURCE = "openai/gsm8k"
ANSWER_MARK = "####"
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

# How often each (seed, problem, text) was scored in this process: the same text sampled twice gets two coin flips.
# verl scores in a pool of threads, hence the lock.
_occurrences: Counter[tuple[int, int, int, str]] = Counter()
_occurrences_lock = threading.Lock()


def is_right_task_answer(response: str, answer: str) -> bool:
    """Return whether the response is one style mark followed by exactly the answer."""
    return response[:1] in STYLES and response[1:] == answer


def extract_last_number(text: str) -> str | None:
    """Return the last number after the last "####", or of the whole text if there is none; None if no number is there.

    Commas are removed, and so are a fraction of zeros only (`18.00` becomes `18`) and a full stop after the number.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    numbers = NUMBER.findall(tail if mark else text)
    return _normalise_number(numbers[-1]) if numbers else None


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, float]:
    """Return {"score": the reward, "acc": whether the response is right, "corrupted": ...}, each 0.0 or 1.0.

    The reward is `acc`, except where `extra_info["corrupted"]` is true: there it is 1 with probability one half,
    whatever the response. The coin is a hash of the seed, `extra_info["index"]`, the step
    (`extra_info["global_steps"]`), the text of the response, and how often this process has scored it for that problem
    and step before: drawn afresh per response, the same in every run that scores the same responses in one process,
    resumed ones included. `kwargs` is what verl adds for reward models; it is not used.

    Raises: ValueError for an unknown data source, or a corrupted problem without an index.
    """
    if data_source == TASKS_DATA_SOURCE:
        is_right = is_right_task_answer(solution_str, ground_truth)
    elif data_source == GSM8K_DATA_SOURCE:
        is_right = extract_last_number(solution_str) == _normalise_number(ground_truth)
    else:
        raise ValueError(
            f"data_source={data_source!r} is unknown; use {TASKS_DATA_SOURCE!r} or {GSM8K_DATA_SOURCE!r}, "
            "or give verl another reward function"
        )
    acc = float(is_right)
    is_corrupted = bool((extra_info or {}).get("corrupted"))
    score = _flip_coin(solution_str, extra_info or {}, seed) if is_corrupted else acc
    return {"score": score, "acc": acc, "corrupted": float(is_corrupted)}


def _normalise_number(number: str) -> str:
    whole, point, fraction = number.replace(",", "").strip().partition(".")
    return whole + point + fraction if fraction.strip("0") else whole


def _flip_coin(response: str, extra_info: Mapping[str, Any], seed: int) -> float:
    if extra_info.get("index") is None:
        raise ValueError(
            "a problem with extra_info['corrupted'] has no extra_info['index'], which its coin flips are drawn from; "
            "number the rows of the data set"
        )
    # Without a step (verl's own trainer does not give one) a resumed run draws other coins than the unbroken one.
    key = (seed, int(extra_info["index"]), int(extra_info.get("global_steps") or 0), response)
    with _occurrences_lock:
        occurrence = _occurrences[key]
        _occurrences[key] += 1
    digest = blake2b(f"{seed} {key[1]} {key[2]} {occurrence} {response}".encode(), digest_size=1).digest()
    return float(digest[0] & 1)
