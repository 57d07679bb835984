# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign report`: one HTML file on what was selected, how reliably, at what price."""

import json
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from verl_gradalign.cli.app import command, say


@command(
    "verl-gradalign report checkpoints/project/run",
    "verl-gradalign report checkpoints/project/cosine checkpoints/project/random --output report.html",
    "verl-gradalign report checkpoints/project/run --json",
)
def report(
    run_dirs: Annotated[
        list[Path], Argument(metavar="RUN_DIR...", help="Folders of runs, of their logs, or above several runs.")
    ],
    output: Annotated[
        Path | None, Option(help="The file to write; report.html in the first RUN_DIR by default.")
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print the numbers, all suspicious problems among them, as JSON.")
    ] = False,
    top: Annotated[int, Option(help="Suspicious problems shown with their texts, per run.", min=0)] = 30,
) -> None:
    """Write one self-contained HTML file: summary, curves, composition, cost, comparison, suspicious problems."""
    from verl_gradalign.errors import refuse
    from verl_gradalign.report.findings import summary_of
    from verl_gradalign.report.html import write_report
    from verl_gradalign.report.run import find_runs, read_run
    from verl_gradalign.report.visible_text import short, visible

    if output is not None and output.is_dir():
        refuse("--output", output, "is a folder", f"name a file in it, such as {output / 'report.html'}")
    # What is for people goes to stderr where stdout is for machines.
    console = Console(stderr=as_json, soft_wrap=True)
    found = find_runs(run_dirs)
    with console.status("reading") as status:

        def tell(text: str) -> None:
            status.update(escape(short(text)))

        runs = [read_run(run, tell) for run in found]
        path = write_report(runs, output or run_dirs[0] / "report.html", top, tell)
    for run in runs:
        for line in run.missing:
            say(console, visible(f"{run.name}: {line}"), style="yellow")
    size = path.stat().st_size
    say(console, f"wrote {path} ({size / 1e6:.2f} MB, {len(runs)} run{'' if len(runs) == 1 else 's'})")
    if as_json:
        print(json.dumps({"report": str(path), "bytes": size, "runs": [summary_of(run) for run in runs]}, indent=1))
