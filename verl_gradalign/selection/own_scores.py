# SPDX-License-Identifier: Apache-2.0
"""A user's own score: loaded from a file or module, tried on made-up measurements, and held to one number per problem.

    found = load("my_scores.py:promising")
    rank = held_to_form("my_scores.py:promising", function)
    try_out("my_scores.py:promising", rank, direction="trusted", needs_norm=True, needs_response_derivatives=False)

Whatever is wrong is said with the key and with what to return. It does not know what a `Score` is.

Shape legend: P problems, R responses.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from verl_gradalign.config import ScoreOptions
from verl_gradalign.types import Measurements

logger = logging.getLogger(__name__)

Rank = Callable[[Measurements, ScoreOptions], Any]
FORM = "Remedy: return one number for each problem, a tensor, array or list of shape (problems,), like m.cosine_P"
SHAPE = (5, 4)
"""Problems and responses of the made-up measurements: unlike, so that a result of the other size is noticed."""


def load(name: str, key: str = "score", kind: str = "function or Score") -> Any:
    """Return what `module:attribute` or `file.py:attribute` names.

    Raises: ValueError, for the key, that says what the module raised, or that the attribute is missing.
    """
    where, _, attribute = name.rpartition(":")
    try:
        return getattr(_module(where), attribute)
    except Exception as error:
        raise ValueError(
            f"gradalign.{key}={name!r}: cannot be loaded ({type(error).__name__}: {error}). Remedy: give an importable "
            f"module or an existing file, and the name of a {kind} in it."
        ) from error


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).expanduser()
    spec = importlib.util.spec_from_file_location(f"gradalign_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_arguments(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Raise ValueError unless the function can be called with as many arguments as these, by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none that can be read
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        remedy = (
            "a plain function takes the measurements alone; one that takes the options too is named by a Score: "
            "mine = Score(lambda m, options: ..., direction='trusted', needs_norm=True)"
        )
        wanted = f"is called with {len(arguments)} argument{'s' if len(arguments) > 1 else ''} ({', '.join(arguments)})"
        _refuse(name, f"{wanted}, but its signature is {signature} ({error})", f"Remedy: {remedy}")


def held_to_form(name: str, rank: Rank) -> Callable[[Measurements, ScoreOptions], Tensor]:
    """Return `rank` with what it returns made a tensor of one float64 number per problem, or refused.

    It is given copies, so what it changes in place changes nothing else, and it is not called without problems. Numbers
    that are not finite are let through: the selection counts them and keeps none.

    Raises: ValueError, with the key and what to return, if the result has another shape or type, or if it raises.
    """

    def held(m: Measurements, options: ScoreOptions) -> Tensor:
        num_problems = len(m.problem_id_P)
        if not num_problems:
            return torch.zeros(0, dtype=torch.float64)
        try:
            result = rank(_with_tensors(m, Tensor.clone), options)
        except Exception as error:
            raised = f"raised {type(error).__name__}: {error}, on the measurements of {num_problems} problems"
            raise ValueError(f"gradalign.score={name!r}: {raised}. {FORM}.") from error
        return one_number_each(name, result, num_problems)

    return held


def one_number_each(name: str, result: Any, num_problems: int) -> Tensor:
    """Return what a score returned as a float64 tensor (problems,) on the CPU.

    Truth values count as 0 and 1.

    Raises: ValueError, with the key and what to return, if that is not what it is.
    """
    if not isinstance(result, Tensor | np.ndarray | Sequence) and not hasattr(result, "__array__"):
        hint = "; make a list of it" if hasattr(result, "__next__") else ""
        _refuse(name, f"returned {shown(result)}{hint}", f"{FORM}.")
    try:
        # Of a list, which may hold numbers and tensors of one number.
        values = result.to_dense() if isinstance(result, Tensor) else torch.as_tensor(number_array(result))
    except (TypeError, ValueError, RuntimeError) as error:
        _refuse(name, f"returned {shown(result)}, which is no array of numbers ({error})", f"{FORM}.")
    if values.dtype.is_complex:
        _refuse(name, f"returned complex numbers ({values.dtype})", f"{FORM}.")
    if tuple(values.shape) != (num_problems,):
        shapes = f"returned shape {tuple(values.shape)} for {num_problems} problems, not ({num_problems},)"
        squeezed = "; .flatten() gives it its shape" if values.numel() == num_problems and values.dim() > 1 else ""
        _refuse(name, f"{shapes}{squeezed}", f"{FORM}.")
    # A copy: what the function keeps for itself it may go on to change.
    return values.detach().to("cpu", torch.float64, copy=True)


def number_array(result: Any) -> np.ndarray:
    """Return the numbers as an array. Raises ValueError for anything else, text and None among it."""
    if isinstance(result, str | bytes):
        raise ValueError("text")
    if isinstance(result, Sequence):
        result = [item.detach().cpu().numpy() if isinstance(item, Tensor) else item for item in result]
    array = np.asarray(result)
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    if array.dtype.kind == "c":
        return array.astype(np.complex128)
    items = enumerate(np.asarray(result, dtype=object).flat)
    raise ValueError(next((f"item {i} is {x!r:.60}" for i, x in items if not isinstance(x, Real)), f"{array.dtype}"))


def try_out(name: str, rank: Rank, direction: str | None, needs_norm: bool, needs_response_derivatives: bool) -> None:
    """Try the score on made-up measurements: of several problems, and of one, as a step may leave.

    Raises: ValueError as `held_to_form`, or if every score is nan because it uses what the score did not ask for. A
        table by problem that lacks the made-up ones is only warned of.
    """
    options = ScoreOptions()
    measured = made_up(direction is not None, needs_norm, needs_response_derivatives)
    try:
        score_P = rank(measured, options)
    except ValueError as error:
        if isinstance(error.__cause__, LookupError):
            logger.warning("%s On made-up problems; should it happen on real ones, the run stops.", error)
            return
        raise
    everything = made_up(True, True, True)
    if not score_P.isfinite().any() and rank(everything, options).isfinite().any():
        why = "is not finite for any problem, because it uses what it does not ask for"
        asks = "direction='trusted' for dot_P, needs_norm=True for norm_P, needs_response_derivatives=True for d_ij"
        _refuse(name, why, f"Remedy: name a Score that asks for it: {asks}.")
    try:
        rank(first_of(measured), options)
    except ValueError as error:
        # What it raises may be for want of company: no step need have one live problem only.
        if error.__cause__ is None:
            raise
        logger.warning("%s So it does where one candidate is live, and the run would stop there.", error)


def made_up(has_direction: bool, has_norm: bool, has_derivatives: bool) -> Measurements:
    """Return measurements of some problems with all responses, as a step may have them; the rest is nan."""
    generator = torch.Generator().manual_seed(0)

    def drawn(is_measured: bool, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        return values if is_measured else torch.full_like(values, torch.nan)

    num_problems, num_responses = SHAPE
    success_PR = (torch.arange(num_responses) <= torch.arange(num_problems).unsqueeze(1) % 3).double()
    half_dot_P2 = drawn(has_direction, num_problems, 2)
    return Measurements(
        problem_id_P=torch.arange(num_problems),
        success_PR=success_PR,
        advantage_PR=success_PR - success_PR.mean(dim=1, keepdim=True),
        half_PR=(torch.arange(num_responses) % 2).expand(num_problems, num_responses).clone(),
        num_candidates=2 * num_problems,
        dot_P=half_dot_P2.sum(dim=1),
        norm_P=2.0 + drawn(has_norm, num_problems),
        derivative_PR=drawn(has_derivatives, num_problems, num_responses),
        contribution_PR=drawn(has_derivatives, num_problems, num_responses),
        half_dot_P2=half_dot_P2,
        direction_norm=1.5 if has_direction else float("nan"),
    )


def first_of(m: Measurements) -> Measurements:
    """Return the measurements of the first problem alone."""
    return _with_tensors(m, lambda values_P: values_P[:1])


def _with_tensors(m: Measurements, function: Callable[[Tensor], Tensor]) -> Measurements:
    """Return the measurements with a function of each of their tensors."""
    made: Any = {f.name: function(v) for f in fields(m) if isinstance(v := getattr(m, f.name), Tensor)}
    return replace(m, **made)


def shown(result: Any) -> str:
    """Return the type, and the value where it is short."""
    text = repr(result)
    return f"a {type(result).__name__}" + (f" ({text})" if len(text) <= 60 and "\n" not in text else "")


def _refuse(name: str, trouble: str, remedy: str) -> NoReturn:
    raise ValueError(f"gradalign.score={name!r}: {trouble}. {remedy}")
