# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign doctor`: what is wrong with a machine and a configuration, and what to change."""

import json
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from verl_gradalign.cli.app import FAILED_RUN_EXIT_CODE, command
from verl_gradalign.cli.cost import as_mapping, print_costs
from verl_gradalign.cost import Cost
from verl_gradalign.findings import Findings

STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "bold red"}


@command(
    "verl-gradalign doctor",
    "verl-gradalign doctor +gradalign=cosine gradalign.validation.files=trusted.parquet data.train_files=train.parquet"
    "\nactor_rollout_ref.model.path=Qwen/Qwen2.5-7B",
    "VERL_PLATFORM=cpu verl-gradalign doctor --json -- +platform=cpu +regime=quickstart ...",
    ends="Exit code 0: no errors; 1: errors were found; 2: the command line was wrong.",
)
def doctor(
    overrides: Annotated[
        list[str] | None, Argument(help="What verl's entry point would be given; none: the machine alone.")
    ] = None,
    response_tokens: Annotated[
        float | None, Option(help="Mean tokens of a response, for the cost. Half of data.max_response_length.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="One JSON object: findings, cost, ok.")] = False,
) -> None:
    """Check an environment and a composed configuration, and say what to change. Starts nothing.

    Versions, plugin, GPUs and limits; with overrides also what verl and the plugin refuse, the model against the
    estimator, the trusted set, rewards, folders, and the cost of a step.
    """
    findings = Findings()
    # verl prints while it checks; standard output is for the result.
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cost = _examine(overrides or [], response_tokens, findings)
    if as_json:
        found = [asdict(finding) for finding in findings.all]
        numbers = None if cost is None else as_mapping(cost)
        print(json.dumps({"findings": found, "cost": numbers, "ok": not findings.has_errors}, indent=2))
    else:
        _print(findings, cost)
    if findings.has_errors:
        raise Exit(FAILED_RUN_EXIT_CODE)


def _examine(overrides: list[str], response_tokens: float | None, findings: Findings) -> Cost | None:
    from verl_gradalign.doctor.machine import examine_environment

    machine = examine_environment(findings)
    with findings.refusals("environment", "install what is missing, see above"):
        from verl_gradalign.doctor.configuration import examine_configuration, examine_trainer_mode

        examine_trainer_mode(findings)
        # Whatever a configuration brings about, what was found before is shown.
        with findings.refusals("configuration"):
            return examine_configuration(overrides, machine, findings, response_tokens) if overrides else None
    return None


def _print(findings: Findings, cost: Cost | None) -> None:
    console = Console()
    table = Table("", "area", "finding", "what to change")
    for found in findings.all:
        level = Text(found.level, STYLES[found.level])
        table.add_row(level, found.area, escape(found.message), escape(found.remedy))
    console.print(table)
    if cost is not None:
        print_costs([cost])
    counts = {level: sum(f.level == level for f in findings.all) for level in ("error", "warning")}
    console.print(f"{counts['error']} errors, {counts['warning']} warnings", style="bold", highlight=False)
