# SPDX-License-Identifier: Apache-2.0
"""The token ids of many rows, which lie one after another in memory: not copied, and not taken apart by torch.

content = RowContent(data["input_ids"])
blake2b(content.of_row(3))
content.places(16, 32)      # [0, 1, 2, 1, ...]: rows that are equal have the same
"""

from typing import Any

import numpy as np

PROBED = np.array([0.5, 0.7, 0.85, 1.0])
"""Where rows are compared first, as parts of their lengths: answers to one problem begin with the same prompt."""
FACTORS = np.array([1_000_003, 15_485_863, 32_452_843, 49_979_687])


class RowContent:
    """Rows of a column, nested or not."""

    def __init__(self, column: Any) -> None:
        if column.is_nested:
            values, bounds = column.values().numpy(), column.offsets().numpy()
        else:
            rows, width = column.shape
            values, bounds = column.contiguous().numpy().reshape(-1), np.arange(rows + 1) * width
        self._bytes = memoryview(values).cast("B")
        self._ends: list[int] = (bounds * values.itemsize).tolist()
        self._marks = _marks(values, bounds)

    def of_row(self, row: int) -> memoryview:
        """Return the bytes of a row."""
        return self._bytes[self._ends[row] : self._ends[row + 1]]

    def places(self, start: int, end: int) -> list[int]:
        """Return for each of the rows from `start` to `end` a number that it shares with those equal to it alone."""
        if len(set(self._marks[start:end])) == end - start:
            return list(range(end - start))
        place_of: dict[bytes, int] = {}
        return [place_of.setdefault(bytes(self.of_row(row)), len(place_of)) for row in range(start, end)]


def _marks(values: np.ndarray, bounds: np.ndarray) -> list[int]:
    """Return a number of each row that equal rows have in common, and nearly all others have not."""
    length_R = np.diff(bounds)
    marks_R = length_R.copy()
    is_some_R = length_R > 0
    probed_R4 = bounds[:-1, None] + ((length_R[:, None] - 1) * PROBED).astype(np.int64)
    # Integers wrap around, which is as good.
    marks_R[is_some_R] += values[probed_R4[is_some_R]] @ FACTORS
    marks: list[int] = marks_R.tolist()
    return marks
