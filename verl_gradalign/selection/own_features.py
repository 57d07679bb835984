# SPDX-License-Identifier: Apache-2.0
"""A user's own features: a function of a problem's row, loaded from a file or module, and held to one form.

    own = OwnFeatures("my_features.py:levels")
    own.try_out(rows)
    value_D = own.of(problem_id, row)

Whatever is wrong is said with the key, the problem and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from verl_gradalign.selection.own_scores import load, number_array, shown

FORM = "return a number, or a list of finite numbers, as many for every problem"


class OwnFeatures:
    """The function, and how many numbers it gave first.

    Args:
        name: `module:function` or `path/to/file.py:function`.

    Raises: ValueError if that cannot be loaded or is no function.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._function = load(name, "forecast.features", "function")
        self._num: int | None = None
        if not callable(self._function):
            self._refuse(f"names {shown(self._function)}, no function", "name a function of a problem's row")

    def of(self, problem_id: int, row: Mapping[str, Any]) -> np.ndarray:
        """Return the problem's numbers, float64.

        Raises: ValueError if the function raises, or gives no numbers, another number of them, or one not finite.
        """
        where = f"of problem {problem_id} (its row in the train files, from 0 on)"
        try:
            result = self._function(row)
        except Exception as error:
            # Chained: its traceback says where in the user's function.
            raised = f"raised {type(error).__name__}: {error}, {where}"
            raise ValueError(self._message(raised, f"mend it; it is called with the row alone, to {FORM}")) from error
        values = self._numbers(result, where)
        self._num = len(values) if self._num is None else self._num
        if len(values) != self._num:
            self._refuse(f"gave {len(values)} numbers {where}, and {self._num} of the first", FORM)
        if not np.isfinite(values).all():
            self._refuse(f"gave {values[~np.isfinite(values)][0]} {where}", FORM)
        return values

    def try_out(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Call the function on some rows, by problem id. Raises ValueError as `of`."""
        for problem_id, row in rows.items():
            self.of(problem_id, row)

    def _numbers(self, result: Any, where: str) -> np.ndarray:
        try:
            values = np.atleast_1d(number_array(_plain(result)))
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse(f"gave {shown(result)} {where}, which is no list of numbers ({error})", FORM)
        if values.ndim != 1 or not len(values) or values.dtype.kind == "c":
            self._refuse(f"gave shape {values.shape}, {values.dtype}, {where}", FORM)
        return values

    def _message(self, trouble: str, remedy: str) -> str:
        return f"gradalign.forecast.features={self._name!r}: {trouble}. Remedy: {remedy}."

    def _refuse(self, trouble: str, remedy: str) -> NoReturn:
        raise ValueError(self._message(trouble, remedy))


def _plain(result: Any) -> Any:
    """Return a tensor as an array, on the CPU and without its graph; whatever else as it is."""
    return result.detach().cpu().numpy() if hasattr(result, "detach") else result
