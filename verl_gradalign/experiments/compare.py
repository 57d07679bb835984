# SPDX-License-Identifier: Apache-2.0
"""Runs a regime's whole comparison, skipping what is done, and writes its table and figures.

    verl-gradalign compare unreliable_mini --seeds 0,1,2 --output outputs/unreliable_mini

A miniature makes its own problems and policy, and runs in a few series of processes side by side
(`verl_gradalign.cpu.series`). A published regime runs its launch script once per method and seed.
Leaves in the output folder: results.csv, summary.md, four figures, and runs/<method>/seed-<n> with verl's metrics,
the selection log and the console output.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.experiments.plan import DONE, METHODS, RunPlan, miniature_overrides, plan_runs
from verl_gradalign.experiments.results import collect, draw_figures, summarise, write_csv, write_markdown
from verl_gradalign.files import atomic_folder
from verl_gradalign.toy.regimes import MINIATURES, WARM_UP_STEPS, prepare_policy, write_miniature

POLL_S = 1.0
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
Launch = tuple[subprocess.Popen[bytes], Path]
"""A process and the file that its output goes to."""


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
    _check_same(comparison, output)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    miniature = MINIATURES.get(comparison.regime)
    with Progress(*columns, console=console) as progress:
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


def _check_same(comparison: Comparison, output: Path) -> None:
    """Refuse to continue with other settings than the runs that are there were made with."""
    c = comparison
    settings: dict[str, object] = {"regime": c.regime, "overrides": list(c.overrides), "data": str(c.data)}
    settings |= {"policy": str(c.policy), "warm_up_steps": c.warm_up_steps}
    path = output / "comparison.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        why = f"the runs here were made with {before}, this comparison asks for {settings}"
        raise ValueError(f"{path}: {why}. Remedy: choose another --output, or delete this one")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def _run_miniature(comparison: Comparison, runs: Sequence[RunPlan], output: Path, progress: Progress) -> None:
    num_steps = comparison.warm_up_steps
    warm_up = progress.add_task("policy", total=num_steps)

    def show(state: Mapping[str, float]) -> None:
        progress.update(warm_up, completed=int(state["step"]))

    policy = prepare_policy(comparison.policy or output / "policy", num_steps, show)
    progress.update(warm_up, completed=num_steps)
    for seed in comparison.seeds:
        data = output / "data" / f"seed-{seed}"
        if not data.exists():
            with atomic_folder(data) as unfinished:
                write_miniature(comparison.regime, unfinished, seed)
    todo = [run for run in runs if not run.is_done]
    num_series = min(comparison.num_jobs, len(todo))
    launches = []
    for number in range(num_series):
        specifications = []
        for run in todo[number::num_series]:
            own = miniature_overrides(run, output / "data" / f"seed-{run.seed}", policy)
            files = {"folder": str(run.folder), "done": str(run.folder / DONE)}
            specifications.append({**files, "seed": run.seed, "overrides": [*own, *comparison.overrides]})
        path, log = output / f"series-{number}.json", output / f"series-{number}.log"
        path.write_text(json.dumps(specifications), encoding="utf-8")
        command = [comparison.python, "-m", "verl_gradalign.cpu.series", str(path)]
        launches.append(_start(command, log, output, cpu_environment()))
    _watch(launches, runs, progress)


def cpu_environment() -> dict[str, str]:
    """Return what the environment of verl on the CPU must hold.

    One thread per process: more gain little with tiny models, lose much on a busy machine, and round differently.
    """
    return {
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # TransferQueue asks for 8 threads per message, and says in the log for every message that there are fewer.
        "TQ_NUM_THREADS": "1",
    }


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
        _watch([_start(command, run.folder / "run.log", RECIPES.parent, environment)], runs, progress)
        (run.folder / DONE).touch()


def _start(command: Sequence[str], log: Path, folder: Path, environment: dict[str, str]) -> Launch:
    whole = {**os.environ, **environment}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=whole), log


def _watch(launches: Sequence[Launch], runs: Sequence[RunPlan], progress: Progress) -> None:
    """Wait for the processes, showing every run that has begun; end the others when one fails."""
    processes = [process for process, _ in launches]
    total = progress.add_task("runs", total=len(runs))
    bars = [progress.add_task(f"  {run.method}, seed {run.seed}", total=None, visible=False) for run in runs]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            progress.update(total, completed=sum(run.is_done for run in runs))
            for run, bar in zip(runs, bars, strict=True):
                path = run.folder / "metrics.jsonl"
                is_running = path.exists() and not run.is_done
                num_steps = sum("timing_s/step" in m for _, m in read_metrics(path)) if is_running else 0
                progress.update(bar, completed=num_steps, visible=is_running)
            if any(process.poll() for process in processes):
                break
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    # Those that were ended here have a negative code, and come last.
    for process, log in sorted(launches, key=lambda launch: -launch[0].returncode):
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"verl failed (exit {process.returncode}); its whole output is in {log}\n{tail}")
