# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of a plan one after another, each in a process of its own, and writes what comes as it comes.

A part that runs out of memory, hangs or crashes takes nothing along: its process is ended with all that it started,
what it had measured stays, and the next part finds the device as the first one did.

    result = run(plan, num_devices=1, tell=print)
    result.page, result.lines
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from verl_gradalign import __version__
from verl_gradalign.bench.child import DONE, FAILED, INTERRUPTED, SKIPPED, STOPPED, run_part
from verl_gradalign.bench.options import Options, Record
from verl_gradalign.bench.page import page_of
from verl_gradalign.bench.plan import Plan
from verl_gradalign.bench.registry import Part
from verl_gradalign.files import replace_file

LEAST_S = 5.0
"""Left, below which no part is begun: importing torch takes as long."""
POLL_S = 0.5
END_S = 15.0
"""For a process that has sent all to end by itself."""
PRELOADED = ["transformers.models.qwen2.modeling_qwen2", "verl_gradalign.bench.exactness"]
"""By the process that those of a dry run are forked from: importing takes longer than what they measure. Processes
that use a GPU cannot be forked, and start anew."""


@dataclass(frozen=True)
class Result:
    """What a call has left behind."""

    lines: Path
    page: Path
    records: Sequence[Record]

    @property
    def is_interrupted(self) -> bool:
        return any(record.get("event") == "kit ends" and record["status"] == INTERRUPTED for record in self.records)

    @property
    def has_failures(self) -> bool:
        """Whether a part failed, or a claim does not hold."""
        return any(record.get("status") == FAILED or record.get("holds") is False for record in self.records)


def run(plan: Plan, num_devices: int, tell: Callable[[str], None], parts: Sequence[Part] | None = None) -> Result:
    """Run the plan's parts, or others; returns in any case what was measured, also when it is interrupted."""
    parts = plan.parts if parts is None else parts
    now = datetime.datetime.now().astimezone()
    name = f"bench-{now:%Y-%m-%dT%H-%M-%S}"
    folder = plan.output.resolve() / name
    folder.mkdir(parents=True)
    log = Log(plan.output / f"{name}.jsonl", plan.output / f"{name}.md")
    options = Options(folder, plan.is_dry_run, plan.model and plan.model.resolve(), num_devices)
    log.note(
        event="kit",
        version=__version__,
        command=sys.argv[1:],
        minutes=plan.minutes,
        is_dry_run=plan.is_dry_run,
        parts={part.name: part.shows for part in parts},
        expected_s=plan.expected_s,
    )
    status = DONE
    with interruptible():
        try:
            _run_parts(parts, plan, options, log, tell)
        except KeyboardInterrupt:
            status = INTERRUPTED
            tell("interrupted; what was measured is kept")
    log.note(event="kit ends", status=status)
    return Result(log.lines, log.page, log.records)


class Log:
    """The file of JSON lines, and the page that is made of them after each."""

    def __init__(self, lines: Path, page: Path) -> None:
        self.lines, self.page = lines, page
        self.records: list[Record] = []

    def note(self, **record: Any) -> None:
        """Write a record, so that it is there whatever comes next."""
        record = {"at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **record}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        replace_file(self.page, page_of(self.records))


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM end the body as Ctrl-C does; a second one does not disturb what is put in order then."""

    def interrupt(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _run_parts(parts: Sequence[Part], plan: Plan, options: Options, log: Log, tell: Callable[[str], None]) -> None:
    context = _context(plan.is_dry_run)
    ends_at = time.monotonic() + 60 * plan.minutes
    for part in parts:
        left = ends_at - time.monotonic()
        reason = plan.missing(part) or ("out of time" if left < LEAST_S else None)
        if reason is not None:
            ends: Record = {"event": "ends", "status": SKIPPED, "reason": reason, "seconds": 0.0}
        else:
            ends = run_one(part, min(left, plan.limit_s(part)), options, log, context)
        log.note(part=part.name, **ends)
        why = f": {ends['reason']}" if ends.get("reason") else ""
        tell(f"{part.name}: {ends['status']}{why} ({ends['seconds']:.0f} s)")
        if ends["status"] == INTERRUPTED:
            raise KeyboardInterrupt


def _context(is_dry_run: bool) -> Any:
    context: Any = multiprocessing.get_context("forkserver" if is_dry_run else "spawn")
    if is_dry_run:
        context.set_forkserver_preload(PRELOADED)
    return context


def run_one(part: Part, limit_s: float, options: Options, log: Log, context: Any) -> Record:
    """Run a part, write its records, and return how it ended."""
    log.note(part=part.name, event="begins", limit_s=round(limit_s, 1))
    started, output = time.monotonic(), options.folder / f"{part.name}.log"
    records, sender = context.Pipe(duplex=False)
    told = replace(options, ends_at=time.time() + limit_s).as_json()
    process = context.Process(target=run_part, args=(part.function, told, str(output), sender))
    ends: Record = {"event": "ends", "status": INTERRUPTED}
    try:
        process.start()
        sender.close()
        for record in _received(records, process, started + limit_s):
            if record.get("event") == "ends":
                ends = record
            else:
                log.note(part=part.name, **record)
        if ends["status"] in (DONE, SKIPPED):
            process.join(END_S)
    except KeyboardInterrupt:
        pass
    finally:
        end_with_all_it_started(process)
        records.close()
    return {**ends, "seconds": round(time.monotonic() - started, 2)}


def _received(records: Connection, process: Any, ends_at: float) -> Iterator[Record]:
    """Yield what a part sends, and as the last how it ended, if it cannot say so itself."""
    while (left := ends_at - time.monotonic()) > 0:
        if not records.poll(min(left, POLL_S)):
            continue
        try:
            record: Record = json.loads(records.recv_bytes())
        except (EOFError, OSError):  # the pipe closes with the process
            process.join(END_S)
            code = process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
            yield {"event": "ends", "status": FAILED, "reason": f"its process ended {how}, see its log"}
            return
        yield record
        if record.get("event") == "ends":
            return
    yield {"event": "ends", "status": STOPPED, "reason": "its time was over; what it had measured stays"}


def end_with_all_it_started(process: Any) -> None:
    """Kill a process and its descendants, and wait for it."""
    if process.pid is None:
        return
    victims: list[psutil.Process] = []
    try:
        root = psutil.Process(process.pid)
        victims = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        pass
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=END_S)
    process.join(END_S)
