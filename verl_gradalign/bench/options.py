# SPDX-License-Identifier: Apache-2.0
"""What the user asked for, as every part is told it, and how a part says that it has nothing to measure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""What was measured, by name: numbers, words, None where it is not known. `table` says which of the part's tables it
belongs to; with `claim` and `holds` it is one of the claims at the head of the page."""


def left_out(where: Record, why: str | BaseException) -> Record:
    """Return the record of a case that was not measured; of an error its first line."""
    reason = why if isinstance(why, str) else f"out of memory: {str(why).splitlines()[0]}"
    return {"table": "left out", **where, "why": reason}


class Skipped(Exception):
    """Raised by a part that cannot be measured here; the message is the reason."""


@dataclass(frozen=True)
class Options:
    """One call of the command."""

    folder: Path
    """Where models, logs and runs may be left."""
    is_dry_run: bool = False
    """Tiny shapes on the CPU, whatever else there is."""
    model: Path | None = None
    num_devices: int = 1
    """Accelerators that are seen; in a dry run processes that stand for them."""
    ends_at: float = float("inf")
    """When the part's limit is over, by `time.time`."""

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.time()

    def as_json(self) -> str:
        """Return the options as text for another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Return the options that `as_json` wrote."""
        read = cls(**json.loads(text))
        return replace(read, folder=Path(read.folder), model=None if read.model is None else Path(read.model))
