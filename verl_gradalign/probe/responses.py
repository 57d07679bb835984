# SPDX-License-Identifier: Apache-2.0
"""Responses as a user gives them to `score_problems`, checked one by one and made rows of token ids and coefficients.

    table = tabulate("candidates", [[Response(prompt_ids, response_ids, advantage=0.5)]], "token-mean", 32000)

Whatever is wrong is said with its place: candidates[3][1].response_ids. It does not know the model.

Shape legend: R responses of a problem, T response tokens (padded).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.types import TokenRow


@dataclass(frozen=True)
class Response:
    """One response to a problem."""

    prompt_ids: Sequence[int]
    """Token ids (prompt tokens,), at least one: a list, an array or a tensor of whole numbers."""
    response_ids: Sequence[int]
    """Token ids (response tokens,), as sampled, end-of-sequence token included; may be empty."""
    advantage: float
    """A finite number, for instance the reward minus the mean reward of the problem's responses."""


def tabulate(
    name: str, problems: Iterable[Iterable[Response]], loss_agg_mode: str, vocabulary: int | None
) -> list[list[TokenRow]]:
    """Return the rows of each problem, coefficients filled in.

    `vocabulary` is the number of token ids that the model knows; None: ids are not compared with it.

    Raises: ValueError that names the problem, the response and the field, and says what to give; TypeError for
        something that is no list of lists of Responses.
    """
    table = []
    for i, problem in enumerate(_listed(name, problems, "a list of problems, each a list of Responses")):
        responses = _listed(f"{name}[{i}]", problem, "a problem: a list of Responses")
        table.append(_rows([(f"{name}[{i}][{k}]", r) for k, r in enumerate(responses)], loss_agg_mode, vocabulary))
    return table


def is_number(value: object) -> bool:
    """Return whether a value is a real number, truth values left out."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _rows(responses: list[tuple[str, Any]], loss_agg_mode: str, vocabulary: int | None) -> list[TokenRow]:
    ids, advantages = [], []
    for place, response in responses:
        missing = [field for field in ("prompt_ids", "response_ids", "advantage") if not hasattr(response, field)]
        if missing:
            kind = type(response).__name__
            raise TypeError(f"{place} is a {kind} without {missing[0]}; give a verl_gradalign.Response")
        prompt = _token_ids(f"{place}.prompt_ids", response.prompt_ids, vocabulary)
        if not len(prompt):
            raise ValueError(f"{place} has an empty prompt; give at least one token")
        ids.append((prompt, _token_ids(f"{place}.response_ids", response.response_ids, vocabulary)))
        advantages.append(_advantage(f"{place}.advantage", response.advantage))
    lengths = torch.tensor([len(sampled) for _, sampled in ids], dtype=torch.int64)
    mask_RT = (torch.arange(int(lengths.max()) if ids else 0) < lengths.unsqueeze(1)).double()
    advantage_R1 = torch.tensor(advantages, dtype=torch.float64).unsqueeze(1)
    coefficient_RT = token_coefficients(advantage_R1 * mask_RT, mask_RT, loss_agg_mode)
    return [TokenRow(*both, coefficient_RT[row, : len(both[1])]) for row, both in enumerate(ids)]


def _listed(place: str, given: Any, wanted: str) -> list[Any]:
    if isinstance(given, str | dict | Response) or not isinstance(given, Iterable):
        raise TypeError(f"{place} is a {type(given).__name__}; give {wanted}")
    return list(given)


def _advantage(place: str, value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not is_number(value):
        shown = f"{place}={value!r:.80}: must be a number"
        raise ValueError(
            f"{shown}. Remedy: give one number for the response, such as its reward minus the mean reward."
        )
    if not math.isfinite(value):
        remedy = "Remedy: leave the response out, or find out why its reward is not a number"
        raise ValueError(f"{place}={value!r}: must be finite, or the gradient of the whole problem is not. {remedy}.")
    return float(value)


def _token_ids(place: str, given: Any, vocabulary: int | None) -> Tensor:
    """Return token ids as int64 (tokens,) on the CPU, a copy."""
    if isinstance(given, str | bytes):
        raise ValueError(f"{place} is text. Remedy: give token ids, such as tokenizer(text).input_ids.")
    if hasattr(given, "input_ids"):
        raise ValueError(f"{place} is a {type(given).__name__}. Remedy: give its input_ids.")
    try:
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} is no list of token ids ({error}). Remedy: give whole numbers.") from error
    if array.ndim != 1:
        remedy = "give the ids of one response, without a batch axis (ids[0])"
        raise ValueError(f"{place} has shape {array.shape}, not (tokens,). Remedy: {remedy}.")
    if array.size and array.dtype.kind not in "iu":
        culprit = next((x for x in array.tolist() if not isinstance(x, Integral) or isinstance(x, bool)), array.dtype)
        raise ValueError(f"{place} holds {culprit!r}, not token ids. Remedy: give whole numbers.")
    outside = array < 0 if vocabulary is None else (array < 0) | (array >= vocabulary)
    if outside.any():
        where = int(outside.argmax())
        known = "ids begin at 0" if vocabulary is None else f"the model knows the ids 0 to {vocabulary - 1}"
        remedy = "use the model's own tokenizer, and leave out padding and labels such as -100"
        raise ValueError(f"{place}[{where}]={array[where]}: {known}. Remedy: {remedy}.")
    return torch.from_numpy(array.astype(np.int64))
