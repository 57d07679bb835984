# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign compare`: every way of choosing problems, side by side."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from verl_gradalign.cli.app import command, say, whole_numbers


@command(
    "verl-gradalign compare unreliable_mini --output outputs/unreliable_mini",
    "verl-gradalign compare imbalance_mini --methods cosine,random --seeds 0 --output outputs/short",
    ends="Exit code: 0 done, 1 a run failed, 2 bad input.",
)
def compare(
    regime: Annotated[
        str, Argument(help="A miniature (unreliable_mini, imbalance_mini, low_utility_mini) or a published one.")
    ],
    output: Annotated[Path, Option(help="Folder for everything; give it again to go on.")],
    methods: Annotated[str | None, Option(help="Scores, and filter_groups; comma-separated. All ten.")] = None,
    seeds: Annotated[str, Option(help="Comma-separated.")] = "0,1,2",
    jobs: Annotated[int, Option(help="Series of a miniature's runs side by side.", min=1)] = 2,
    data: Annotated[Path | None, Option(help="A published regime's files, from `prepare`.")] = None,
    policy: Annotated[Path | None, Option(help="A miniature's policy, to share among comparisons.")] = None,
    warm_up_steps: Annotated[int | None, Option(help="Of a miniature's policy.", min=1)] = None,
    overrides: Annotated[list[str] | None, Argument(help="Further verl overrides of every run.")] = None,
) -> None:
    """Train with every way of choosing problems, over seeds, and write one table and figures. Resumable."""
    from verl_gradalign.experiments.compare import Comparison
    from verl_gradalign.experiments.compare import compare as run_comparison
    from verl_gradalign.experiments.plan import METHODS
    from verl_gradalign.toy.regimes import WARM_UP_STEPS

    comparison = Comparison(
        regime=regime,
        output=output,
        methods=tuple(methods.split(",")) if methods else METHODS,
        seeds=whole_numbers("--seeds", seeds, "0,1,2"),
        num_jobs=jobs,
        data=data,
        policy=policy,
        warm_up_steps=warm_up_steps or WARM_UP_STEPS,
        overrides=tuple(overrides or ()),
    )
    console = Console()
    summary = run_comparison(comparison, console)
    say(console, summary.read_text(encoding="utf-8"))
    say(console, f"wrote {output}")
