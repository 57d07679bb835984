# SPDX-License-Identifier: Apache-2.0
"""One part in a process of its own: what it says goes to its log, its records through a pipe as they are made."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from verl_gradalign.bench.options import Options, Record, Skipped
from verl_gradalign.files import without_nan

DONE, SKIPPED, FAILED, STOPPED, INTERRUPTED = "done", "skipped", "failed", "stopped", "interrupted"
MAX_REASON = 300


def run_part(function: str, options: str, log: str, records: Connection) -> None:
    """Run `module:function` and send its records, and at the end how it ended."""
    with contextlib.suppress(OSError):
        # Ctrl-C is for the parent, which ends this group as a whole.
        os.setsid()
    _write_to(log)
    ends: Record = {"event": "ends", "status": DONE}
    try:
        module, _, name = function.partition(":")
        for record in getattr(import_module(module), name)(Options.from_json(options)):
            _send(records, record)
    except Skipped as reason:
        ends |= {"status": SKIPPED, "reason": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        ends |= {"status": FAILED, "reason": f"{type(error).__name__}: {error}"[:MAX_REASON]}
    _send(records, ends)
    records.close()


def _send(records: Connection, record: Record) -> None:
    plain: Any = without_nan(record)
    records.send_bytes(json.dumps(plain, default=str).encode())


def _write_to(log: str) -> None:
    """Have all that this process and those it starts print go to a file."""
    sys.stdout.flush(), sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.close(descriptor)
