# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign prepare`: train, trusted and test files in verl's schema."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

from verl_gradalign.cli.app import command, numbers_table, say


@command(
    "verl-gradalign prepare --regime learnalign_gsm8k --from gsm8k=path/to/gsm8k --output data/gsm8k",
    "verl-gradalign prepare --train dapo:10000 --train countdown:4000 --trusted amc22 --test aime24 --output data/mine",
)
def prepare(
    output: Annotated[Path, Option(help="Folder to make; it must not exist, or be empty.")],
    train: Annotated[
        list[str] | None, Option(help="NAME, NAME:COUNT or NAME:first-COUNT; NAME@SPLIT for another split; repeatable.")
    ] = None,
    trusted: Annotated[list[str] | None, Option(help="The same, for the trusted set.")] = None,
    test: Annotated[list[str] | None, Option(help="The same, for the test file.")] = None,
    regime: Annotated[
        str | None,
        Option(help="unreliable, imbalance, low_utility or learnalign_gsm8k; other options replace its parts."),
    ] = None,
    origin: Annotated[
        list[str] | None, Option("--from", help="NAME=PLACE or NAME@SPLIT=PLACE, a file, folder or hub id; repeatable.")
    ] = None,
    corrupted_share: Annotated[
        float | None, Option(help="Share of train problems whose reward is a coin flip; none by default.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of every draw.")] = 0,
    drop_overlap: Annotated[
        bool, Option("--drop-overlap", help="Leave out problems that two sources bring into two splits.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, Option("--skip-bad-rows", help="Leave out rows that cannot be asked or graded.")
    ] = False,
    reward: Annotated[
        str | None,
        Option(help="What training grades with, FILE.py:FUNCTION or pkg://MODULE:FUNCTION; else the package's own."),
    ] = None,
) -> None:
    """Make train, trusted and test files in verl's schema, with a manifest.

    Every row's own answer must be right by the reward function, and one near to it wrong. What was repaired, and what
    was left out, is counted. To hold problems out of a Parquet file in verl's schema: verl-gradalign hold-out.

    Sources: gsm8k, math, math500, dapo, webinstruct, amc22, amc23, aime24, aime25, mmlu_pro, countdown (generated).
    """
    from verl_gradalign.data.prepare import REGIMES, PreparationPlan
    from verl_gradalign.data.prepare import prepare as prepare_files

    if regime is not None and regime not in REGIMES:
        raise ValueError(f"--regime {regime} is unknown; use one of {', '.join(REGIMES)}")
    splits = {"train": train, "trusted": trusted, "test": test}
    parts: dict[str, Any] = {split: tuple(requests) for split, requests in splits.items() if requests}
    if corrupted_share is not None:
        parts["corrupted_share"] = corrupted_share
    parts |= {"seed": seed, "drop_overlap": drop_overlap, "skip_bad_rows": skip_bad_rows}
    parts |= {"reward": reward} if reward is not None else {}
    parts["origins"] = _parse_origins(origin or [])
    plan = replace(REGIMES[regime], **parts) if regime else PreparationPlan(**{"train": (), **parts})
    console = Console()
    with console.status("reading, dividing and writing the problems"):
        manifest = prepare_files(plan, output)
    console.print(_summary(manifest))
    if (happened := what_happened(manifest["sources"])).row_count:
        console.print(happened)
    say(console, f"wrote {output}")


def _parse_origins(values: list[str]) -> dict[str, str]:
    origins = {}
    for value in values:
        name, equals_sign, origin = value.partition("=")
        if not equals_sign or not origin:
            raise ValueError(f"--from {value} is not NAME=ORIGIN; write for example --from gsm8k=path/to/gsm8k")
        origins[name] = origin
    return origins


def _summary(manifest: dict[str, Any]) -> Table:
    """A table of what went where, by split and source."""
    table = numbers_table(("split", "source", "problems", "duplicates", "held out", "overlaps", "corrupted"), [])
    table.columns[1].justify = "left"
    for split, counts in manifest["splits"].items():
        left_out = [counts[why] for why in ("duplicates_removed", "held_out_for_another_split", "overlaps_removed")]
        for source, num in counts["by_source"].items():
            table.add_row(split, source, str(num), *(str(of_source.get(source, 0)) for of_source in left_out), "")
        table.add_row(split, "all", str(counts["rows"]), "", "", "", str(counts["corrupted"]), end_section=True)
    duplicates = Counter[str]()
    for pool in manifest["sources"]:
        duplicates[pool["source"]] += pool["duplicates_removed"]
    found = ", ".join(f"{source} {num}" for source, num in duplicates.items())
    table.caption = f"duplicates removed within a source: {found}"
    return table


def what_happened(sources: list[dict[str, Any]]) -> Table:
    """A table of each source's rows that were repaired or left out, by the manifest's names, without zeros."""
    from verl_gradalign.data.splits import NOT_IN_POOL

    table = numbers_table(("source", "split", "repaired or left out", "rows"), [])
    for column in table.columns[1:3]:
        column.justify, column.overflow = "left", "fold"
    for pool in sources:
        counts = {name: count for name, count in pool.items() if name in NOT_IN_POOL} | pool["repaired"]
        for name, count in counts.items():
            if count:
                table.add_row(pool["source"], pool["split"], name, str(count))
    return table
