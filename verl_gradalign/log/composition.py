# SPDX-License-Identifier: Apache-2.0
"""Of what the candidates and the kept problems are made: shares by data source, and by columns of extra_info.

    composition = Composition({"data_source": ["math", "code", ...]})
    composition.metrics("data_source", ["math", "code", "math"], is_kept_P)
    # {"composition/data_source/math/pool": 0.67, "composition/data_source/math/kept": 1.0, ...}

Shape legend: P candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

__all__ = ["MAX_VALUES", "OTHER", "Composition"]

MAX_VALUES = 20
"""Values of a column that have metrics of their own, the most frequent. A logger with thousands is of no use."""

OTHER = "other"
"""Stands for all further values."""

MAX_NAME_CHARS = 60


class Composition:
    """Knows which values of a column are named: decided by the train files, so the same in every step and after resume.

    Args:
        values: of every problem of the train files, by column.
    """

    def __init__(self, values: Mapping[str, Iterable[str]]) -> None:
        self._names = {column: self._most_frequent(of_all) for column, of_all in values.items()}

    @staticmethod
    def _most_frequent(values: Iterable[str]) -> list[str]:
        counts = Counter(value[:MAX_NAME_CHARS] for value in values)
        names = sorted(counts, key=lambda name: (-counts[name], name))
        return names if len(names) <= MAX_VALUES else [*names[:MAX_VALUES], OTHER]

    def metrics(self, column: str, value_P: Sequence[str], is_kept_P: np.ndarray) -> dict[str, float]:
        """Return the shares of a column's values among the candidates and among the kept ones."""
        names = self._names[column]
        known = set(names)
        cut = [value[:MAX_NAME_CHARS] for value in value_P]
        name_P = np.array([name if name in known else OTHER for name in cut], dtype=object)
        shares = {}
        for name in names:
            is_name_P = name_P == name
            for group, members_P in (("pool", is_name_P), ("kept", is_name_P[is_kept_P])):
                shares[f"composition/{column}/{name}/{group}"] = float(members_P.mean()) if len(members_P) else 0.0
        return shares
