# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that needs nothing else: no network, no script, no other file.

path = write_report(find_runs(["outputs"]), "report.html")
"""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from verl_gradalign.files import replacing
from verl_gradalign.report.page import comparison_table, page_of
from verl_gradalign.report.pictures import compared
from verl_gradalign.report.run import RunData

__all__ = ["render", "write_report"]

MAX_RUNS_IN_FULL = 5
TEXT_BYTES = 1_200_000
"""Of all prompts, answers and responses; together with pictures this stays below 5 MB."""
TEXTS_PER_PROBLEM = 6
MOST_CHARS, LEAST_CHARS = 3000, 300


def render(runs: Sequence[RunData], top: int = 30) -> str:
    """Return the report on the runs. Of more than five, the first five are shown in full, and all are compared."""
    in_full = runs[:MAX_RUNS_IN_FULL]
    num_shown = sum(min(top, len(run.suspects)) for run in in_full)
    # Four bytes hold a character of any language.
    fair_share = TEXT_BYTES // (4 * TEXTS_PER_PROBLEM * max(1, num_shown))
    text_chars = min(MOST_CHARS, max(LEAST_CHARS, fair_share))
    pages = [page_of(run, number, top, text_chars) for number, run in enumerate(in_full, start=1)]
    environment = Environment(
        loader=PackageLoader("verl_gradalign.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        pages=pages,
        comparison=comparison_table(runs) if len(runs) > 1 else None,
        compared=compared(runs) if len(runs) > 1 else [],
        num_runs=len(runs),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=importlib.metadata.version("verl-gradalign"),
    )


def write_report(
    runs: Sequence[RunData], path: str | Path, top: int = 30, tell: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the report and return its path. The file is whole or, as before, not there."""
    path = Path(path)
    tell("drawing")
    text = render(runs, top)
    # A name of its own: two reports may be written to one place at a time.
    with replacing(path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
    return path
