# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign hold-out`: a trusted and an audit set out of parquet files of one's own."""

from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from verl_gradalign.cli.app import command, numbers_table, say


@command(
    "verl-gradalign hold-out train.parquet --trusted 64 --audit 128 --output data/mine",
    "verl-gradalign hold-out train.parquet --trusted 64 --reward rewards.py:compute_score --output data/mine",
)
def hold_out(
    files: Annotated[list[Path], Argument(help="Parquet files in verl's schema, with equal columns.")],
    output: Annotated[Path, Option(help="Folder to make; it must not exist, or be empty.")],
    trusted: Annotated[int, Option(help="Problems of the trusted set.")],
    audit: Annotated[int, Option(help="Problems of a set for audits; none by default.")] = 0,
    seed: Annotated[int, Option(help="Seed of the draw.", min=0)] = 0,
    reward: Annotated[
        str | None,
        Option(
            help="What training grades with, FILE.py:FUNCTION or pkg://MODULE:FUNCTION; held-out rows must pass it."
        ),
    ] = None,
    prompt_key: Annotated[str, Option(help="Column of prompts, verl's data.prompt_key.")] = "prompt",
    media_key: Annotated[
        list[str] | None, Option(help="Column of images, videos or sounds; repeatable. verl's own by default.")
    ] = None,
    skip_bad_rows: Annotated[
        bool, Option("--skip-bad-rows", help="Leave out rows without prompt or truth, or that are not graded.")
    ] = False,
) -> None:
    """Hold a trusted (and an audit) set out of parquet files, by data_source in proportion.

    Writes OUTPUT/trusted.parquet, OUTPUT/audit.parquet, OUTPUT/train.parquet with what is left, and a manifest; all
    columns and the schema are kept. No problem (the same text and images) is in two of the files.
    """
    from verl_gradalign.data.hold_out import HoldOutPlan
    from verl_gradalign.data.hold_out import hold_out as hold_out_of_files

    keys = {} if media_key is None else {"media_keys": tuple(media_key)}
    names = tuple(map(str, files))
    plan = HoldOutPlan(names, trusted, audit, seed, prompt_key, reward=reward, skip_bad_rows=skip_bad_rows, **keys)
    console = Console()
    with console.status("reading, dividing and writing the problems"):
        manifest = hold_out_of_files(plan, output)
    console.print(_summary(manifest))
    say(console, f"wrote {output}")


def _summary(manifest: dict[str, Any]) -> Table:
    """A table of what went where, by split and source, and of the rows that went nowhere."""
    from verl_gradalign.data.hold_out import LEFT_OUT, SEVERAL_TRUTHS

    table = numbers_table(("split", "source", "problems", "rows"), [])
    table.columns[1].justify = "left"
    for split, counts in manifest["splits"].items():
        for source, num in counts["by_source"].items():
            table.add_row(split, source, "", str(num))
        table.add_row(split, "all", str(counts["problems"]), str(counts["rows"]), end_section=True)
    counted = [f"{name} {manifest[name]}" for name in (*LEFT_OUT.values(), SEVERAL_TRUTHS) if manifest[name]]
    table.caption = ", ".join(counted)
    return table
