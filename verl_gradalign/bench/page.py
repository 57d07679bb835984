# SPDX-License-Identifier: Apache-2.0
"""The page of a call, made of its lines alone: claims first, then how each part ended, then every part's tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from verl_gradalign.bench.options import Record
from verl_gradalign.markdown import markdown_table

META = ("at", "part", "table", "event", "claim", "holds")
HOLDS = {True: "yes", False: "**no**", None: "open"}
DRY = (
    "**A dry run: tiny shapes on a CPU.** It shows that every part runs; its times and its memory say nothing of a GPU."
)


def page_of(records: Sequence[Record]) -> str:
    """Return the page in Markdown."""
    kit = next(record for record in records if record.get("event") == "kit")
    blocks = [f"# verl-gradalign bench, {kit['at']}", _state(records)]
    if kit["is_dry_run"]:
        blocks.append(DRY)
    blocks += [_machine(records), "## Claims", _claims(records), "## Parts", _parts(kit["parts"], records)]
    for part in kit["parts"]:
        mine = [record for record in records if record.get("part") == part and "table" in record]
        if mine:
            blocks += [f"## {part}", f"What it shows: {kit['parts'][part]}.", *_tables(mine)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _state(records: Sequence[Record]) -> str:
    last = records[-1]
    if last.get("event") == "kit ends":
        return (
            "All parts are through." if last["status"] == "done" else "**Interrupted**; what was measured stands below."
        )
    return f"Not through yet: written while {last.get('part', 'the first part')} ran, or it was killed then."


def _machine(records: Sequence[Record]) -> str:
    """Return one line that says on what the numbers were measured."""
    of_environment = [record for record in records if record.get("part") == "environment"]
    names = [record["name"] for record in of_environment if record.get("table") == "devices"]
    versions = {r["package"]: r["version"] for r in of_environment if r.get("table") == "versions"}
    if not versions:
        return ""
    where = f"{len(names)} x {names[0]}" if names else "a CPU"
    wanted = ("verl-gradalign", "torch", "transformers", "verl", "vllm")
    return f"On {where}, with {', '.join(f'{name} {versions[name]}' for name in wanted if name in versions)}."


def _claims(records: Sequence[Record]) -> str:
    claims = [record for record in records if "claim" in record]
    if not claims:
        return "None was looked at yet."
    counts = {answer: sum(record["holds"] is answer for record in claims) for answer in HOLDS}
    line = f"{counts[True]} hold, {counts[False]} do not, {counts[None]} are open: what is measured differs by itself."
    rows = [(record["part"], _shown(record["claim"]), HOLDS[record["holds"]]) for record in claims]
    return f"{line}\n\n{markdown_table(('part', 'claim', 'holds'), rows)}"


def _parts(parts: Iterable[str], records: Sequence[Record]) -> str:
    rows = []
    for part in parts:
        events = [record for record in records if record.get("part") == part and "event" in record]
        last = events[-1] if events else {}
        status = {"begins": "running", "ends": last.get("status")}.get(last.get("event", ""), "not begun")
        rows.append((part, str(status), _shown(last.get("seconds")), _shown(last.get("reason"))))
    return markdown_table(("part", "status", "seconds", "reason"), rows)


def _tables(records: Sequence[Record]) -> Iterable[str]:
    """Yield a heading and a table of every kind of record, with the columns that any of its kind has."""
    for table in dict.fromkeys(record["table"] for record in records):
        mine = [record for record in records if record["table"] == table]
        columns = list(dict.fromkeys(key for record in mine for key in record if key not in META))
        header = [column.replace("_", " ") for column in columns]
        rows = [[_shown(record.get(column)) for column in columns] for record in mine]
        if any("holds" in record for record in mine):
            header.append("holds")
            rows = [[*row, HOLDS[r["holds"]] if "holds" in r else ""] for row, r in zip(rows, mine, strict=True)]
        yield f"### {table}"
        yield markdown_table(header, rows)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
