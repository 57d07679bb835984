# SPDX-License-Identifier: Apache-2.0
"""Of what the candidates and the kept problems are made: shares by data source, and by columns of extra_info.

    composition = Composition()
    composition.metrics("data_source", ["math", "code", "math"], is_kept_P)
    # {"composition/data_source/math/pool": 0.67, "composition/data_source/math/kept": 1.0, ...}

Shape legend: P candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

__all__ = ["MAX_VALUES", "OTHER", "Composition"]

MAX_VALUES = 20
"""Values of a column that have metrics of their own: the first that are seen. A logger with thousands is of no use."""

OTHER = "other"
"""Stands for all further values."""

MAX_NAME_CHARS = 60


class Composition:
    """Remembers which values of a column it has named, so that a metric means the same in every step."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def metrics(self, column: str, value_P: Sequence[str], is_kept_P: np.ndarray) -> dict[str, float]:
        """Return the shares of a column's values among the candidates and among the kept ones."""
        name_P = np.array([self._name(column, value[:MAX_NAME_CHARS]) for value in value_P], dtype=object)
        shares = {}
        for name in self._names[column]:
            is_name_P = name_P == name
            for group, members_P in (("pool", is_name_P), ("kept", is_name_P[is_kept_P])):
                shares[f"composition/{column}/{name}/{group}"] = float(members_P.mean()) if len(members_P) else 0.0
        return shares

    def _name(self, column: str, value: str) -> str:
        names = self._names[column]
        name = value if value in names or len(names) < MAX_VALUES else OTHER
        if name not in names:
            names.append(name)
        return name
