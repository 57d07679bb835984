# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign bench`: what the first hour on a GPU should show, in one command."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Exit, Option

from verl_gradalign.cli.app import FAILED_RUN_EXIT_CODE, command, say

INTERRUPTED_EXIT_CODE = 130


@command(
    "verl-gradalign bench --minutes 40 --output outputs/bench",
    "verl-gradalign bench --only exactness,neutrality --minutes 15",
    "verl-gradalign bench --model path/to/Qwen2.5-0.5B --minutes 60",
    "verl-gradalign bench --dry-run",
    ends="Exit code 0: all that ran is as claimed; 1: a part failed or a claim does not hold; 2: bad input; "
    "130: interrupted.",
)
def bench(
    minutes: Annotated[float, Option(help="For all parts together; those that it does not reach are skipped.")] = 40.0,
    output: Annotated[Path, Option(help="Folder for the lines, the page and the logs; made if need be.")] = Path(
        "outputs/bench"
    ),
    only: Annotated[
        list[str] | None, Option(help="Parts to run, with commas or repeated; all by default.", metavar="PART,...")
    ] = None,
    model: Annotated[
        Path | None, Option(help="A model folder of yours, which the last part trains for ten steps.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="All of it on a CPU, at tiny shapes.")] = False,
) -> None:
    """Measure exactness, neutrality, time and memory on the GPUs of this machine, then train with verl.

    Writes OUTPUT/bench-DATE.jsonl and OUTPUT/bench-DATE.md as it goes. Each part has a process and a limit of its own;
    what cannot run here is skipped with the reason. Needs torch and transformers; verl and vLLM for the last two parts.
    """
    from verl_gradalign.bench.kit import run
    from verl_gradalign.bench.plan import Plan, num_devices

    names = tuple(name.strip() for given in only or () for name in given.split(",") if name.strip())
    if only and not names:
        raise ValueError("--only names no part. Remedy: leave it out for all parts, or write --only exactness.")
    plan = Plan(output, minutes, names, dry_run, model)
    found, console = num_devices(dry_run), Console()
    where = "a CPU, at tiny shapes" if dry_run else f"{found} device{'s' if found > 1 else ''}"
    missing = [f"{part.name} ({reason})" for part in plan.parts if (reason := plan.missing(part))]
    guess = "measured elsewhere" if dry_run else "a guess: it was not run on a GPU yet"
    say(console, f"{len(plan.parts)} parts on {where}, about {max(1, round(plan.expected_s / 60))} min ({guess}), "
                 f"{minutes:g} at most")  # fmt: skip
    if missing:
        say(console, f"will be skipped: {', '.join(missing)}")
    result = run(plan, found, lambda line: say(console, line))
    say(console, f"wrote {result.page} and {result.lines}")
    if result.is_interrupted:
        raise Exit(INTERRUPTED_EXIT_CODE)
    if result.has_failures:
        raise Exit(FAILED_RUN_EXIT_CODE)
