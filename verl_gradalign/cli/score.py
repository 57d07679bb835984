# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign score`: offline selection of a subset, with verl's own rollout and actor."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from typer import Argument, Option

from verl_gradalign.cli.app import command, numbers_table, say


@command(
    "verl-gradalign score --pool train.parquet --trusted trusted.parquet --model Qwen2.5-1.5B-Instruct"
    "\n--output scores --keep 0.25 -- actor_rollout_ref.rollout.name=vllm trainer.n_gpus_per_node=8",
    "verl-gradalign score --pool train.parquet --score learnalign --model checkpoints/run/global_step_100"
    "\n--output scores --keep 1000 -- actor_rollout_ref.rollout.name=vllm trainer.n_gpus_per_node=8",
    "VERL_PLATFORM=cpu verl-gradalign score --pool pool.parquet --score accuracy_greedy --model tiny"
    "\n--output scores --json -- +platform=cpu",
    ends="The same command resumes a scoring that was interrupted. Exit code: 0 done, 1 verl failed, 2 bad input.",
)
def score(
    pool: Annotated[list[Path], Option(help="Parquet file in verl's schema to choose from; repeatable.")],
    model: Annotated[Path, Option(help="Folder of a Hugging Face model, or verl's global_step_<n>.")],
    output: Annotated[Path, Option(help="Folder for everything; give it again to go on.")],
    trusted: Annotated[list[Path] | None, Option(help="The trusted set, for scores along it; repeatable.")] = None,
    by: Annotated[str, Option("--score", help="What problems are ranked by; see configs/gradalign.")] = "cosine",
    keep: Annotated[float, Option(help="A share of the pool (0.25), or a number of problems (1000).")] = 0.25,
    responses: Annotated[int, Option(help="Responses to each problem.")] = 8,
    trusted_responses: Annotated[
        int | None, Option(help="Responses to each trusted problem; as many by default.")
    ] = None,
    chunk: Annotated[
        int | None, Option(help="Problems that are stored and scored together; 512 responses.", min=1)
    ] = None,
    seed: Annotated[int, Option(help="Of ties and of verl's data.", min=0)] = 0,
    as_json: Annotated[bool, Option("--json", help="Print summary.json instead of a table.")] = False,
    overrides: Annotated[list[str] | None, Argument(help="verl's own overrides, after --.")] = None,
) -> None:
    """Score a pool of problems with a model, without training it, and write the best as Parquet. Resumable.

    Writes OUTPUT/scores.parquet (a row per problem), OUTPUT/selected.parquet (the kept rows of the pool, ready for
    data.train_files), OUTPUT/summary.json, and a selection log that `verl-gradalign report OUTPUT` shows.
    """
    console = Console(stderr=True)
    # verl tells of every engine that is not installed.
    warnings.filterwarnings("ignore", module=r"verl\.")
    with console.status("starting verl") as status:
        from verl_gradalign.integration.offline.run import run_scoring
        from verl_gradalign.integration.offline.task import ScoringTask

        task = ScoringTask(
            pool=tuple(pool),
            model=model,
            output=output,
            trusted=tuple(trusted or ()),
            score=by,
            keep=keep,
            responses=responses,
            trusted_responses=trusted_responses,
            chunk=chunk,
            seed=seed,
            overrides=tuple(overrides or ()),
        )
        with _bars(console, status) as watch:
            summary = run_scoring(task, sys.argv, watch)
    if as_json:
        print((output / "summary.json").read_text(encoding="utf-8"))
    else:
        Console().print(_table(summary))
        say(Console(), f"wrote {output}")


@contextmanager
def _bars(console: Console, status: Status) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show how far a run is; yields what receives it (`GradAlignScoringTrainer`)."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console)
    rolled_out, scored = (progress.add_task(name, total=None) for name in ("rolled out", "scored"))

    def watch(now: Mapping[str, Any]) -> None:
        status.stop()  # rich shows one live display at a time
        progress.start()
        progress.update(rolled_out, completed=now.get("rolled_out", 0), total=now.get("to_roll_out"))
        progress.update(scored, completed=now.get("scored", 0), total=now.get("to_score"))

    try:
        yield watch
    finally:
        progress.stop()


def _table(summary: Mapping[str, Any]) -> Table:
    title = f"{summary['score']}: {summary['kept']} of {summary['problems']} problems kept, {summary['scored']} scored"
    rows = []
    for source, of in summary["by_source"].items():
        rate = "-" if of["success_rate"] is None else f"{of['success_rate']:.1%}"
        rows.append((source, str(of["problems"]), str(of["kept"]), rate))
    return numbers_table(("data source", "problems", "kept", "success rate"), rows, title=title)
