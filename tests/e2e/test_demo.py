# SPDX-License-Identifier: Apache-2.0
"""The README's first command, with fewer steps."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_gradalign.log.selection_log import read_selection_log

pytestmark = pytest.mark.e2e


def test_the_demonstration_makes_its_table_from_an_empty_folder(demonstration: tuple[str, Path]) -> None:
    printed, made = demonstration
    assert str(made / "report.html") in printed and (made / "report.html").stat().st_size > 10_000
    log = read_selection_log(made / "cosine" / "gradalign").to_pylist()
    corrupted = [info["corrupted"] for info in pq.read_table(made / "data" / "pool.parquet")["extra_info"].to_pylist()]
    shares = [
        sum(corrupted[row["problem_id"]] for row in rows) / len(rows)
        for rows in (log, [row for row in log if row["kept"]])
    ]
    (row,) = re.findall(r"cosine.*", printed.split("What was trained on")[1])
    percentages = [float(found) for found in re.findall(r"([\d.]+)%", row)]
    assert {entry["step"] for entry in log} == {1, 2}
    assert percentages[2:4] == pytest.approx([100 * share for share in shares], abs=0.06)
    assert all(0 <= accuracy <= 100 for accuracy in percentages[:2])
