# SPDX-License-Identifier: Apache-2.0
"""The demonstration: teach a tiny policy, train it twice with verl (random, cosine), compare.

    python recipes/quickstart/demo.py --output outputs/quickstart
    python recipes/quickstart/demo.py --gsm8k path/to/gsm8k --output outputs/gsm8k   # train.jsonl and test.jsonl

Everything stays under the output folder: data/, model/, verl's console output (run.log), report.html, and one folder
per run with verl's metrics (metrics.jsonl) and the selection log (gradalign/*.parquet). Both runs are trainings of
their own in one set of processes, which take a minute to start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# GNU OpenMP reads this when torch is imported: else its waiting threads spin, and slow a busy machine tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from transformers.utils.logging import disable_progress_bar

from verl_gradalign.experiments.launches import cpu_environment
from verl_gradalign.experiments.metrics_file import RunSummary, held_out_accuracy, read_metrics, summarise_run
from verl_gradalign.report.html import write_report
from verl_gradalign.report.run import find_runs, read_run

SCORES = ("random", "cosine")
# Without a terminal rich assumes 80 columns, too few for the table.
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass
class Footprint:
    """Peak resident memory of this process and its descendants, in bytes. Shared pages count once per process."""

    peak_bytes: int = 0

    def watch(self, stop: Event) -> None:
        """Sample once a second until told to stop."""
        me = psutil.Process()
        while not stop.wait(1.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it ended between listing and reading
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


@contextmanager
def measured_memory() -> Iterator[Footprint]:
    """Yield a `Footprint` that is kept up to date in the body."""
    footprint, stop = Footprint(), Event()
    thread = Thread(target=footprint.watch, args=(stop,), daemon=True)
    thread.start()
    try:
        yield footprint
    finally:
        stop.set()
        thread.join()


def progress_bar() -> Progress:
    """Return the progress display that all stages share."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def prepare_tasks(output: Path, warm_up_steps: int, seed: int) -> dict[str, Path]:
    """Write the task files and the warmed-up model; return the data files by split."""
    from verl_gradalign.data.tasks import write_task_files
    from verl_gradalign.toy.model import build_untrained_policy
    from verl_gradalign.toy.warmup import warm_up

    disable_progress_bar()
    files = write_task_files(output / "data", num_pool=2400, num_trusted=12, num_test=256, seed=seed)
    untrained = build_untrained_policy(output / "untrained", seed=seed)
    with progress_bar() as bar:
        task = bar.add_task("supervised warm-up", total=warm_up_steps, note="")
        report = warm_up(
            untrained,
            output / "model",
            num_steps=warm_up_steps,
            seed=seed,
            progress=lambda now: bar.update(task, completed=now["step"], note=f"loss {now['loss']:.3f}"),
        )
    console.print(f"  the policy solves {report['success']:.0%} of held-out problems after {report['seconds']:.0f} s")
    return files


def prepare_gsm8k(output: Path, folder: Path, num_rows: int, seed: int) -> dict[str, Path]:
    """Turn GSM8K's own jsonl files into pool, trusted and test files, with an untrained model that fits them."""
    from verl_gradalign.data.prepare import write_gsm8k
    from verl_gradalign.toy.model import build_tiny_model

    data = output / "data"
    build_tiny_model(output / "model", seed=seed)
    pool = write_gsm8k(folder / "train.jsonl", data / "pool.parquet", "pool", max_rows=num_rows)
    held_out = pq.read_table(write_gsm8k(folder / "test.jsonl", data / "held_out.parquet", "test", max_rows=40))
    files = {"pool": pool, "trusted": data / "trusted.parquet", "test": data / "test.parquet"}
    pq.write_table(held_out.slice(0, 8), files["trusted"])
    pq.write_table(held_out.slice(8), files["test"])
    return files


def overrides_of(run_dir: Path, data: Path, model: Path, score: str, num_steps: int, further: list[str]) -> list[str]:
    """Return the overrides of verl's entry point for one run, those of train.sh."""
    return [
        "+platform=cpu",
        "+regime=quickstart",
        f"+gradalign={score}",
        f"gradalign.validation.files={data / 'trusted.parquet'}",
        "gradalign.poll_interval_s=0.02",
        "gradalign.oversample=3",
        f"data.train_files={data / 'pool.parquet'}",
        f"data.val_files={data / 'test.parquet'}",
        f"actor_rollout_ref.model.path={model}",
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_gradalign.cpu.batched_rollout.BatchedRollout",
        "reward.num_workers=0",
        f"trainer.default_local_dir={run_dir}",
        f"trainer.total_training_steps={num_steps}",
        f"trainer.experiment_name={score}",
        *further,
    ]


def train(output: Path, runs: dict[str, list[str]], num_steps: int, seed: int, verbose: bool) -> float:
    """Run verl once per entry of `runs`, in one set of processes; return the seconds from launch to the first step.

    Raises: RuntimeError with the end of verl's output if it fails.
    """
    for name in runs:
        shutil.rmtree(output / name, ignore_errors=True)
    plan, log_path = output / "series.json", output / "run.log"
    members = [
        {"folder": str(output / name), "done": str(output / name / "done"), "seed": seed, "overrides": overrides}
        for name, overrides in runs.items()
    ]
    plan.write_text(json.dumps(members), encoding="utf-8")
    started, first_step_s = time.monotonic(), 0.0
    with log_path.open("wb") as log, progress_bar() as bar:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl_gradalign.cpu.series", str(plan)],
            stdout=None if verbose else log,
            stderr=None if verbose else subprocess.STDOUT,
            cwd=output,
            env={**os.environ, **cpu_environment()},
        )
        tasks = {name: bar.add_task(f"verl, {name}", total=num_steps, note="waiting") for name in runs}
        bar.update(tasks[next(iter(runs))], note="starting Ray and the workers")
        while process.poll() is None:
            time.sleep(0.5)
            for name, task in tasks.items():
                path = output / name / "metrics.jsonl"
                lines = [m for _, m in read_metrics(path)] if path.exists() else []
                steps = [m for m in lines if "timing_s/step" in m]
                if steps:
                    first_step_s = first_step_s or time.monotonic() - started
                    bar.update(task, completed=len(steps), note=_note(steps[-1], lines))
    if process.returncode:
        tail = "" if verbose else "\n".join(log_path.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"verl failed (exit {process.returncode}); its whole output is in {log_path}\n{tail}")
    return first_step_s


def _note(step: dict[str, float], lines: list[dict[str, float]]) -> str:
    """Return what the progress bar says of the newest step."""
    accuracies = [a for a in map(held_out_accuracy, lines) if a is not None]
    held_out = f", held-out accuracy {accuracies[-1]:.2f}" if accuracies else ""
    reward = step["critic/score/mean"]
    return f"{step['timing_s/step']:.1f} s/step, reward {reward:.2f}, kept {step['gradalign/kept']:.0f}{held_out}"


def show(summaries: dict[str, RunSummary]) -> None:
    """Print the final table."""
    table = Table(title="What was trained on, and what came of it")
    columns = ("run", "steps", "held-out accuracy", "corrupted candidates", "corrupted trained on")
    for column in (*columns, "s/step", "selection"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, s in summaries.items():
        before, after = (("-" if a is None else f"{a:.1%}") for a in (s.accuracy_before, s.accuracy_after))
        table.add_row(
            name,
            str(s.num_steps),
            f"{before} -> {after}",
            f"{s.corrupted_pool:.1%}",
            f"{s.corrupted_trained:.1%}",
            f"{s.step_s:.1f}",
            f"{s.selection_share:.0%}",
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="folder for everything")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--warm-up-steps", type=int, default=None, help="steps of the supervised warm-up")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), help="runs to make, by gradalign config")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl: use it instead")
    parser.add_argument("--gsm8k-rows", type=int, default=256, help="GSM8K training problems to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show verl's own console output")
    parser.add_argument("overrides", nargs="*", help="further verl overrides, after --")
    return parser.parse_args()


def main() -> None:
    """Prepare, train once per score, compare."""
    arguments = parse_arguments()
    output = arguments.output.resolve()
    started = time.monotonic()
    overrides = list(arguments.overrides)
    with measured_memory() as footprint:
        if arguments.gsm8k:
            files = prepare_gsm8k(output, arguments.gsm8k, arguments.gsm8k_rows, arguments.seed)
            overrides = ["data.max_prompt_length=896", "data.filter_overlong_prompts=true", *overrides]
        else:
            from verl_gradalign.toy.warmup import DEFAULT_NUM_STEPS

            files = prepare_tasks(output, arguments.warm_up_steps or DEFAULT_NUM_STEPS, arguments.seed)
        runs = {
            score: overrides_of(output / score, output / "data", output / "model", score, arguments.steps, overrides)
            for score in arguments.scores
        }
        first_step_s = train(output, runs, arguments.steps, arguments.seed, arguments.verbose)
        summaries = {score: summarise_run(output / score, files["pool"]) for score in runs}
    show(summaries)
    report = write_report(
        [read_run(run) for run in find_runs([output / score for score in runs])], output / "report.html"
    )
    minutes, peak = (time.monotonic() - started) / 60, footprint.peak_bytes / 2**30
    console.print(
        f"[bold green]Done[/] in {minutes:.1f} min, peak resident memory {peak:.1f} GiB (all processes). "
        f"The first step was done {first_step_s:.0f} s after the launch. "
        f"Metrics, selection logs and verl's output: {output}",
        highlight=False,
    )
    console.print(f"What was selected, and the problems to look at: [bold]{report}[/]", soft_wrap=True, highlight=False)
    if sys.stdout.isatty() and os.environ.get("DISPLAY"):
        webbrowser.open(report.as_uri())


if __name__ == "__main__":
    main()
