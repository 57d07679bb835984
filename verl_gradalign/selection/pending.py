# SPDX-License-Identifier: Apache-2.0
"""Features of problems that were picked and are still to be measured: an asynchronous run measures steps later.

    pending = Pending()
    pending.add(step, position_P, values_PF)
    values_PF = pending.take(position_P[pending.holds(position_P)])

Shape legend: P problems, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

STEPS = 50
"""Steps after which a problem is not waited for any more."""


class Pending:
    """Rows of features by problem; a problem's newest."""

    def __init__(self) -> None:
        self._row_of: dict[int, tuple[int, np.ndarray]] = {}
        """Step and features."""

    def add(self, step: int, position_P: np.ndarray, values_PF: np.ndarray) -> None:
        """Keep these, and drop what has waited for too long."""
        kept = {position: row for position, row in self._row_of.items() if row[0] > step - STEPS}
        rows = zip(position_P.tolist(), np.array(values_PF, dtype=np.float64), strict=True)
        self._row_of = kept | {position: (step, values_F) for position, values_F in rows}

    def holds(self, position_P: np.ndarray) -> np.ndarray:
        """Return which of the problems are waited for, bool."""
        return np.array([position in self._row_of for position in position_P.tolist()], dtype=bool)

    def take(self, position_P: np.ndarray) -> np.ndarray:
        """Return the problems' features, and wait for them no more."""
        rows = [self._row_of.pop(position)[1] for position in position_P.tolist()]
        return np.array(rows) if rows else np.zeros((0, 0))

    def state(self) -> dict[str, Any]:
        rows = list(self._row_of.values())
        return {
            "position": np.array(list(self._row_of), dtype=np.int64),
            "step": np.array([step for step, _ in rows], dtype=np.int64),
            "values": np.array([values_F for _, values_F in rows]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        rows = zip(state["step"].tolist(), state["values"], strict=True)
        self._row_of = dict(zip(state["position"].tolist(), rows, strict=True))
