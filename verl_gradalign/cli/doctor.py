# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign doctor`: what is wrong with a machine and a configuration, and what to change."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from verl_gradalign.cli.app import FAILED_RUN_EXIT_CODE, command
from verl_gradalign.cli.cost import as_mapping, print_costs
from verl_gradalign.cost import Cost, alternatives
from verl_gradalign.doctor.script import Launch, launch_of
from verl_gradalign.findings import LEVELS, Findings

STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "bold red"}


ORDER = tuple(reversed(LEVELS))
"""Errors first: with many findings the end of a table is what is seen, and its beginning what is read."""
SHORT = ("error", "warning")


@command(
    "verl-gradalign doctor -- bash run.sh +gradalign=cosine gradalign.validation.files=trusted.parquet",
    "verl-gradalign doctor python -m verl.trainer.main_ppo data.train_files=train.parquet +gradalign=random",
    "verl-gradalign doctor +gradalign=cosine gradalign.validation.files=trusted.parquet data.train_files=train.parquet"
    "\nactor_rollout_ref.model.path=Qwen/Qwen2.5-7B",
    "VERL_PLATFORM=cpu verl-gradalign doctor --json -- +platform=cpu +regime=quickstart ...",
    ends="Exit code 0: no errors; 1: errors were found; 2: the command line was wrong.",
    takes_commands=True,
)
def doctor(
    words: Annotated[
        list[str] | None,
        Argument(
            help="A launch script, with bash before it; a whole command; or overrides alone. None: the machine alone.",
            metavar="[COMMAND | OVERRIDES]...",
        ),
    ] = None,
    response_tokens: Annotated[
        float | None, Option(help="Mean tokens of a response, for the cost. Half of data.max_response_length.")
    ] = None,
    verbose: Annotated[bool, Option("--verbose", help="Also what is in order, and notes.")] = False,
    as_json: Annotated[bool, Option("--json", help="One JSON object: findings, cost, ok.")] = False,
) -> None:
    """Check an environment and a composed configuration, and say what to change. Starts nothing.

    Versions, plugin, GPUs and limits; with a configuration also what verl and the plugin refuse, what verl loads by
    name, the model against the estimator, data files, rewards, folders, and the cost of a step. A script is run with
    stand-ins for Python and launchers, so that its argument list is seen; what its own lines write is written.
    """
    findings = Findings()
    launch = launch_of(words or [])
    # verl prints while it checks; standard output is for the result.
    with redirect_stdout(sys.stderr), warnings.catch_warnings(), in_place_of(launch):
        warnings.simplefilter("ignore")
        cost = _examine(launch, response_tokens, findings)
    if as_json:
        found = [asdict(finding) for finding in findings.all]
        numbers = None if cost is None else as_mapping(cost)
        print(json.dumps({"findings": found, "cost": numbers, "ok": not findings.has_errors}, indent=2))
    else:
        _print(findings, cost, verbose)
    if findings.has_errors:
        raise Exit(FAILED_RUN_EXIT_CODE)


@contextmanager
def in_place_of(launch: Launch) -> Iterator[None]:
    """Take the folder, the variables and the modules of a launch for the time of the body."""
    folder, variables, modules = os.getcwd(), dict(os.environ), list(sys.path)
    os.environ.update(launch.variables)
    os.chdir(launch.folder or folder)
    # `python -m` finds modules in the folder that it starts in.
    own = launch.variables.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd(), *(os.path.abspath(part) for part in own if part)]
    try:
        yield
    finally:
        sys.path[:] = modules
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)


def _examine(launch: Launch, response_tokens: float | None, findings: Findings) -> Cost | None:
    from verl_gradalign.doctor.machine import examine_environment

    machine = examine_environment(findings)
    if launch.num_others:
        text = f"the script starts verl {launch.num_others + 1} times; the first is looked at"
        findings.add("configuration", "note", text)
    with findings.refusals("environment", "install what is missing, see above"):
        from verl_gradalign.doctor.configuration import examine_configuration, examine_trainer_mode

        examine_trainer_mode(findings)
        if launch.is_empty:
            return None
        # Whatever a configuration brings about, what was found before is shown.
        with findings.refusals("configuration"):
            return examine_configuration(launch.overrides, machine, findings, response_tokens, launch.primary)
    return None


def _print(findings: Findings, cost: Cost | None, verbose: bool) -> None:
    console = Console()
    shown = [found for found in findings.all if verbose or found.level in SHORT]
    table = Table("", "area", "finding", "what to change")
    for found in sorted(shown, key=lambda found: ORDER.index(found.level)):
        level = Text(found.level, STYLES[found.level])
        table.add_row(level, found.area, escape(found.message), escape(found.remedy))
    if shown:
        console.print(table)
    if cost is not None:
        print_costs([cost], schedules=alternatives(cost.setting) if cost.setting.estimator else None)
    counts = {level: sum(f.level == level for f in findings.all) for level in ORDER}
    line = f"{counts['error']} errors, {counts['warning']} warnings"
    if not verbose:
        line += f"; {counts['note']} notes and {counts['ok']} things in order: --verbose shows them"
    console.print(line, style="bold", highlight=False, soft_wrap=True)
