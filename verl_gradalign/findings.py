# SPDX-License-Identifier: Apache-2.0
"""Findings: what was inspected, how it stands, and what to change. The doctor and the report collect them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LEVELS = ("ok", "note", "warning", "error")
"""Of the doctor. ok: as it should be; note: good to know; warning: may go wrong; error: will go wrong."""
PROBLEM, WATCH, GOOD, NOTE = VERDICTS = ("problem", "watch", "good", "note")
"""Of the report, the most important first."""
REMEDY = "Remedy: "


@dataclass(frozen=True)
class Finding:
    """One thing that was inspected."""

    area: str
    """What it is about, such as "train files" or "reliability of scores"."""
    level: str
    """One of LEVELS (doctor) or VERDICTS (report)."""
    message: str
    remedy: str = ""
    """What to change, in the keys of the configuration; empty if nothing."""


class Findings:
    """A list that refusals are turned into entries of."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    @property
    def num_errors(self) -> int:
        return sum(finding.level == "error" for finding in self.all)

    @property
    def has_errors(self) -> bool:
        return self.num_errors > 0

    def add(self, area: str, level: str, message: str, remedy: str = "") -> None:
        assert level in LEVELS
        finding = Finding(area, level, message, remedy)
        if finding not in self.all:
            self.all.append(finding)

    def refusal(self, area: str, error: BaseException, remedy: str = "") -> None:
        """Add an exception as an error; the package's own say the remedy behind "Remedy: "."""
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError | AssertionError | OSError):
            text = f"{type(error).__name__}: {text}"
        message, _, own_remedy = text.partition(REMEDY)
        self.add(area, "error", message.strip(), own_remedy or remedy)

    @contextmanager
    def refusals(self, area: str, remedy: str = "") -> Iterator[None]:
        """Turn an exception of the block into an error: it may come from verl, a reward function or a model's code."""
        try:
            yield
        except Exception as error:
            self.refusal(area, error, remedy)
