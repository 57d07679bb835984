# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign compare`: every way of choosing problems, side by side."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from verl_gradalign.cli.app import command, say, whole_numbers
from verl_gradalign.errors import refuse


@command(
    "verl-gradalign compare unreliable_mini --output outputs/unreliable_mini",
    "verl-gradalign compare imbalance_mini --methods cosine,random --seeds 0 --output outputs/short",
    "verl-gradalign compare skill_mini --tuned --policy outputs/policy --output outputs/skill_mini",
    ends="Exit code: 0 done, 1 a run failed, 2 bad input.",
)
def compare(
    regime: Annotated[
        str, Argument(help="A miniature (unreliable_mini, imbalance_mini, low_utility_mini, ...) or a published one.")
    ],
    output: Annotated[Path, Option(help="Folder for everything; give it again to go on.")],
    methods: Annotated[str | None, Option(help="Scores, and filter_groups; comma-separated. All ten.")] = None,
    seeds: Annotated[str | None, Option(help="Comma-separated. By default 0,1,2; with --tuned 1,2,3,4,5.")] = None,
    jobs: Annotated[int, Option(help="Series of a miniature's runs side by side.", min=1)] = 2,
    data: Annotated[Path | None, Option(help="A published regime's files, from `prepare`.")] = None,
    policy: Annotated[Path | None, Option(help="A miniature's policy, to share among comparisons.")] = None,
    warm_up_steps: Annotated[int | None, Option(help="Of a miniature's policy.", min=1)] = None,
    tuned: Annotated[
        bool, Option("--tuned", help="At equal generated responses, with a learning rate tuned for every method.")
    ] = False,
    rates: Annotated[str | None, Option(help="With --tuned: learning rates to try, comma-separated.")] = None,
    tuning_seed: Annotated[int, Option(help="With --tuned: what they are tried on.", min=0)] = 0,
    tuning_responses: Annotated[int | None, Option(help="With --tuned: what each of these generates.", min=1)] = None,
    responses: Annotated[int | None, Option(help="With --tuned: what a run generates.", min=1)] = None,
    overrides: Annotated[list[str] | None, Argument(help="Further verl overrides of every run.")] = None,
) -> None:
    """Train with every way of choosing problems, over seeds, and write one table and figures. Resumable."""
    from verl_gradalign.experiments.compare import Comparison
    from verl_gradalign.experiments.compare import compare as run_comparison
    from verl_gradalign.experiments.methods import DEFAULT_METHODS
    from verl_gradalign.experiments.plan import METHODS
    from verl_gradalign.experiments.tuned import FRESH_SEEDS, Tuning, compare_tuned
    from verl_gradalign.toy.regimes import WARM_UP_STEPS

    of_tuning = {"--rates": rates, "--responses": responses, "--tuning-responses": tuning_responses}
    if not tuned and (given := {option: value for option, value in of_tuning.items() if value}):
        refuse(*next(iter(given.items())), "is for --tuned", "add --tuned")
    usual, usual_seeds = (DEFAULT_METHODS, FRESH_SEEDS) if tuned else (METHODS, (0, 1, 2))
    comparison = Comparison(
        regime=regime,
        output=output,
        methods=tuple(methods.split(",")) if methods else usual,
        seeds=whole_numbers("--seeds", seeds, "0,1,2") if seeds else usual_seeds,
        num_jobs=jobs,
        data=data,
        policy=policy,
        warm_up_steps=warm_up_steps or WARM_UP_STEPS,
        overrides=tuple(overrides or ()),
    )
    console = Console()
    if tuned:
        tuning = Tuning(tuning_seed, _rates(rates) if rates else None, responses, tuning_responses)
        summary = compare_tuned(comparison, tuning, console)
    else:
        summary = run_comparison(comparison, console)
    say(console, summary.read_text(encoding="utf-8"))
    say(console, f"wrote {output}")


def _rates(text: str) -> tuple[float, ...]:
    """Return the learning rates that an option lists. Raises: ValueError if they are none."""
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        refuse("--rates", text, "must be numbers above 0, none twice", "give for instance --rates 2e-4,4e-4,8e-4")
    return rates
