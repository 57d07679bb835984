# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign compare`: every way of choosing problems, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, Option

from verl_gradalign.cli.app import command, say, whole_numbers
from verl_gradalign.errors import refuse

if TYPE_CHECKING:
    from verl_gradalign.experiments.tuned import Tuning

WAYS = {
    "random": "the pool, uniformly",
    "random_large_batch": "the same, four times the batch and a quarter of the updates",
    "forecast": "selection before rollout, by a forecast of the alignment; the trusted responses are trained on too",
    "forecast_pool": "forecast without training on the trusted responses (not by default)",
    "forecast_prompt": "forecast without the problems' sources (not by default)",
    "difficulty_forecast": "selection before rollout, by a forecast of the difficulty",
    "forecast_shuffled": "forecast with scores of other problems",
    "trusted_mixed": "half of every batch is of the trusted set",
    "filter_groups": "verl's, which generates groups without a gradient anew",
    "confident_cosine": "selection after rollout, of four times the batch",
    "confident_cosine_shuffled": "the same with scores of other problems (not by default)",
    "oracle": "the pool's useful problems, uniformly",
}
"""Of `experiments.methods`, which takes seconds to import."""


@command(
    "verl-gradalign compare unreliable_mini --output outputs/unreliable_mini",
    "verl-gradalign compare imbalance_mini --methods cosine,random --seeds 0 --output outputs/short",
    "verl-gradalign compare rare_mini --tune --policy outputs/policy --output outputs/rare_mini",
    "verl-gradalign compare clean_mini --tune --budget-tokens 50000 --threshold 0.8 --output outputs/clean_mini",
    ends="Methods with --tune:\n\n"
    + "\n\n".join(f"  {name}: {what}" for name, what in WAYS.items())
    + "\n\nExit code: 0 done, 1 a run failed, 2 bad input.",
)
def compare(
    regime: Annotated[
        str, Argument(help="A miniature (unreliable_mini, imbalance_mini, low_utility_mini, ...) or a published one.")
    ],
    output: Annotated[Path, Option(help="Folder for everything; give it again to go on.")],
    methods: Annotated[
        str | None,
        Option(help="Comma-separated: scores and filter_groups, all ten; with --tune those below."),
    ] = None,
    seeds: Annotated[str | None, Option(help="Comma-separated. By default 0,1,2; with --tune 1,2,3,4,5.")] = None,
    jobs: Annotated[int, Option(help="Series of a miniature's runs side by side.", min=1)] = 2,
    data: Annotated[Path | None, Option(help="A published regime's files, from `prepare`.")] = None,
    policy: Annotated[Path | None, Option(help="A miniature's policy, to share among comparisons.")] = None,
    warm_up_steps: Annotated[int | None, Option(help="Of a miniature's policy.", min=1)] = None,
    tune: Annotated[bool, Option("--tune", help="On one budget, each method's learning rate tuned.")] = False,
    rates: Annotated[str | None, Option(help="With --tune: learning rates to try, comma-separated.")] = None,
    tuning_seed: Annotated[int | None, Option(help="With --tune: what they are tried on. 0.")] = None,
    tuning_budget: Annotated[float | None, Option(help="With --tune: of each of these, in the budget's unit.")] = None,
    budget_responses: Annotated[
        int | None, Option(help="With --tune: what a run generates, candidates and trusted included. The miniature's.")
    ] = None,
    budget_tokens: Annotated[int | None, Option(help="Instead: the same in tokens.")] = None,
    budget_seconds: Annotated[
        float | None, Option(help="Instead: of training, tests left out. With --jobs 1 on an idle machine.")
    ] = None,
    threshold: Annotated[
        float | None, Option(help="With --tune: accuracy to reach. The miniature's, or what random has after 3/4.")
    ] = None,
    overrides: Annotated[list[str] | None, Argument(help="Further verl overrides of every run.")] = None,
) -> None:
    """Train with every way of choosing problems, over seeds, and write one table and figures. Resumable."""
    from verl_gradalign.experiments.compare import Comparison
    from verl_gradalign.experiments.compare import compare as run_comparison
    from verl_gradalign.experiments.methods import DEFAULT_METHODS
    from verl_gradalign.experiments.plan import METHODS
    from verl_gradalign.experiments.tuned import FRESH_SEEDS, compare_tuned
    from verl_gradalign.toy.regimes import WARM_UP_STEPS

    of_tuning: dict[str, Any] = {"--rates": rates, "--tuning-seed": tuning_seed, "--tuning-budget": tuning_budget}
    of_tuning |= {"--budget-responses": budget_responses, "--budget-tokens": budget_tokens}
    of_tuning |= {"--budget-seconds": budget_seconds, "--threshold": threshold}
    given = {option: value for option, value in of_tuning.items() if value is not None}
    if given and not tune:
        refuse(*next(iter(given.items())), "is for --tune", "add --tune")
    usual, usual_seeds = (DEFAULT_METHODS, FRESH_SEEDS) if tune else (METHODS, (0, 1, 2))
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
    summary = compare_tuned(comparison, _tuning(given), console) if tune else run_comparison(comparison, console)
    say(console, summary.read_text(encoding="utf-8"))
    say(console, f"wrote {output}")


def _tuning(given: Mapping[str, Any]) -> Tuning:
    """Return what the options that were given say of a tuned comparison. Raises: ValueError for two budgets."""
    from verl_gradalign.experiments.budget import given_budget
    from verl_gradalign.experiments.tuned import Tuning
    from verl_gradalign.types import UNITS

    return Tuning(
        seed=given.get("--tuning-seed", 0),
        learning_rates=_rates(given["--rates"]) if "--rates" in given else None,
        budget=given_budget({unit: given.get(f"--budget-{unit}") for unit in UNITS}),
        tuning_amount=given.get("--tuning-budget"),
        threshold=given.get("--threshold"),
    )


def _rates(text: str) -> tuple[float, ...]:
    """Return the learning rates that an option lists. Raises: ValueError if they are none."""
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        refuse("--rates", text, "must be numbers above 0, none twice", "give for instance --rates 2e-4,4e-4,8e-4")
    return rates
