# SPDX-License-Identifier: Apache-2.0
"""Runs a regime's whole comparison, skipping what is done, and writes its table and figures.

    verl-gradalign compare unreliable_mini --seeds 0,1,2 --output outputs/unreliable_mini

A miniature makes its own problems and policy, and runs in a few series of processes side by side
(`verl_gradalign.cpu.series`). A published regime runs its launch script once per method and seed.
Leaves in the output folder: results.csv, summary.md, four figures, and runs/<method>/seed-<n> with verl's metrics,
the selection log and the console output.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verl_gradalign.experiments.budget import as_given
from verl_gradalign.experiments.launches import run_series, start, watch
from verl_gradalign.experiments.plan import DONE, METHODS, RunPlan, miniature_overrides, plan_runs
from verl_gradalign.experiments.results import collect, draw_figures, summarise, write_csv, write_markdown
from verl_gradalign.files import atomic_folder
from verl_gradalign.toy.regimes import MINIATURES, WARM_UP_STEPS, prepare_policy, write_miniature

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class Comparison:
    """What to compare, and where."""

    regime: str
    output: Path
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    num_jobs: int = 2
    """Series that run side by side; a miniature keeps one core busy."""
    data: Path | None = None
    """Folder of a published regime's files, from `verl-gradalign prepare`."""
    policy: Path | None = None
    """Folder of a miniature's warmed-up policy, made if it is not there; by default <output>/policy."""
    warm_up_steps: int = WARM_UP_STEPS
    overrides: tuple[str, ...] = ()
    """Further overrides of every run."""
    python: str = sys.executable
    """Interpreter that launches verl."""


def compare(comparison: Comparison, console: Console) -> Path:
    """Run what is not done yet, and return the path of the summary.

    Raises: ValueError for what cannot be run; RuntimeError with the end of the output if a run fails. What is done
        stays done: the same call resumes from there.
    """
    output = comparison.output.resolve()
    runs = plan_runs(comparison.regime, comparison.methods, comparison.seeds, output)
    check_same(comparison, output)
    miniature = MINIATURES.get(comparison.regime)
    with Progress(*COLUMNS, console=console) as progress:
        if miniature:
            _run_miniature(comparison, runs, output, progress)
        else:
            _run_recipe(comparison, runs, progress)
    rows = collect(runs)
    watched = miniature.label if miniature else "corrupted"
    write_csv(rows, output / "results.csv")
    draw_figures(rows, output, watched)
    write_markdown(summarise(rows), output / "summary.md", watched)
    return output / "summary.md"


def check_same(comparison: Comparison, output: Path, **further: Any) -> dict[str, Any]:
    """Return the settings that the folder was begun with; refuse to continue with others.

    Settings of MAY_CHANGE are kept as they were at first.
    """
    c = comparison
    settings: dict[str, Any] = {"regime": c.regime, "overrides": list(c.overrides), "data": str(c.data), **further}
    settings |= {"policy": str(c.policy), "warm_up_steps": c.warm_up_steps}
    path = output / "comparison.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
        return settings
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(
            f"{path}: cannot be read as JSON. Remedy: delete it, if the runs beside it are these"
        ) from None
    if why := difference(before, settings):
        raise ValueError(f"{path}: {why}, or choose another --output, or delete the folder {output}")
    return before


MAY_CHANGE = ("threshold",)
"""Settings that no run depends on."""


def difference(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return in what the runs of a folder were made otherwise, and the remedy; None: in nothing."""
    before, settings = ({k: v for k, v in given.items() if k not in MAY_CHANGE} for given in (before, settings))
    if before == settings:
        return None
    if "num_responses" in before:
        return (
            "the runs here are of an earlier version, which compared by responses alone "
            f"(num_responses={before['num_responses']}). Remedy: go on with that version"
        )
    for one, other, how in ((before, settings, "with"), (settings, before, "without")):
        if "tuning_seed" in one and "tuning_seed" not in other:
            made = f"the runs here were made {how} --tune"
            return f"{made}, this comparison is of the other kind. Remedy: run it {how} --tune"
    keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    changes = [f"{_option(k)} was {_shown(before.get(k))}, now it is {_shown(settings.get(k))}" for k in keys]
    return f"the runs here were made with other settings: {'; '.join(changes)}. Remedy: give what they were made with"


def _option(key: str) -> str:
    return key if key in ("regime", "overrides", "num_tests") else f"--{key.replace('_', '-')}"


def _shown(value: Any) -> str:
    if value in (None, "None", []):
        return "not given"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return as_given(value) if isinstance(value, float) else str(value)


def _run_miniature(comparison: Comparison, runs: Sequence[RunPlan], output: Path, progress: Progress) -> None:
    policy = policy_of(comparison, output, progress)
    for seed in comparison.seeds:
        data_of(comparison, output, seed)

    def specify(run: RunPlan) -> dict[str, Any]:
        own = miniature_overrides(run, data_of(comparison, output, run.seed), policy)
        return {"overrides": [*own, *comparison.overrides]}

    run_series(runs, specify, output, comparison.num_jobs, comparison.python, progress)


def policy_of(comparison: Comparison, output: Path, progress: Progress) -> Path:
    """Return the folder of the policy that the miniature's runs start from, warming it up if it is not there."""
    num_steps = comparison.warm_up_steps
    warm_up = progress.add_task("policy", total=num_steps)

    def show(state: Mapping[str, float]) -> None:
        progress.update(warm_up, completed=int(state["step"]))

    name = MINIATURES[comparison.regime].policy
    policy = prepare_policy(comparison.policy or output / "policy", num_steps, show, name)
    progress.update(warm_up, completed=num_steps)
    return policy


def data_of(comparison: Comparison, output: Path, seed: int) -> Path:
    """Return the folder of the miniature's problems of a seed, writing them if they are not there."""
    data = output / "data" / f"seed-{seed}"
    if not data.exists():
        with atomic_folder(data) as unfinished:
            write_miniature(comparison.regime, unfinished, seed)
    return data


def _run_recipe(comparison: Comparison, runs: Sequence[RunPlan], progress: Progress) -> None:
    script = RECIPES / comparison.regime / "run.sh"
    if not script.exists():
        raise ValueError(f"{script}: no such file; published regimes are run from a checkout of the repository")
    if comparison.data is None or not (comparison.data / "train.parquet").exists():
        remedy = f"make it with `verl-gradalign prepare --regime {comparison.regime} --output DIR` and give DIR"
        raise ValueError(f"--data {comparison.data}: no train.parquet there; {remedy}")
    for run in (run for run in runs if not run.is_done):
        run.folder.mkdir(parents=True, exist_ok=True)
        environment = {"METHOD": run.method, "SEED": str(run.seed), "DATA_DIR": str(comparison.data.resolve())}
        environment |= {"PYTHON": comparison.python, "VERL_FILE_LOGGER_PATH": str(run.folder / "metrics.jsonl")}
        own = [f"trainer.default_local_dir={run.folder}", "trainer.logger=[console,wandb,file]"]
        command = ["bash", str(script), *own, *comparison.overrides]
        watch([start(command, run.folder / "run.log", RECIPES.parent, environment)], runs, progress)
        (run.folder / DONE).touch()
