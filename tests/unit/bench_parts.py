# SPDX-License-Identifier: Apache-2.0
"""Small parts of the kit, which do in a moment what real ones may do: measure, say no, fail, die, hang."""

import os
import signal
import subprocess
import sys
import time

from verl_gradalign.bench.options import Skipped


def measures(options):
    yield {"table": "numbers", "value": 1.5, "claim": "it is above one", "holds": True}
    yield {"table": "numbers", "value": float("nan"), "claim": "it is known", "holds": None}


def looks_at_its_lines(options):
    """Yields how many lines there are, once what it has yielded before is among them."""
    (lines,) = options.folder.parent.glob("*.jsonl")
    yield {"table": "seen", "num_lines": 0}
    deadline = time.monotonic() + 20
    while '"num_lines": 0' not in lines.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    yield {"table": "seen", "num_lines": len(lines.read_text().splitlines())}


def says_no(options):
    raise Skipped("there is no such device")
    yield


def fails(options):
    yield {"table": "numbers", "value": 2}
    print("what it said before")
    raise RuntimeError("the third product was nan")


def dies(options):
    yield {"table": "numbers", "value": 3}
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(options):
    """Starts a process, says which, and waits with it for ever."""
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    yield {"table": "numbers", "value": 4, "mine": os.getpid(), "other": waiting.pid}
    time.sleep(600)


def does_not_hold(options):
    yield {"table": "numbers", "value": 5, "claim": "it is six | or seven", "holds": False}
