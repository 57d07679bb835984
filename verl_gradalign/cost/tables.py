# SPDX-License-Identifier: Apache-2.0
"""Costs as tables of text: one model over numbers of GPUs, or several models side by side.

for table in tables_of([("7b", 8, setting, cost), ...]):
    print(markdown_of(table))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_gradalign.cost.estimate import Cost
from verl_gradalign.cost.setting import Setting
from verl_gradalign.markdown import markdown_table

__all__ = ["Column", "Table", "markdown_of", "assumptions", "tables_of"]

GPU_SHARE = 0.9
"""Of a GPU's memory that is planned with; the rest is for what memory.py leaves out."""


@dataclass(frozen=True)
class Column:
    """A setting and its cost."""

    setting: Setting
    cost: Cost


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of each says what it is."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(columns: Sequence[Column], gpu_gb: float | None = None) -> list[Table]:
    """Return the tables of one model, or of several. `gpu_gb` marks what does not fit a GPU with an asterisk."""
    models = list(dict.fromkeys(column.setting.shape.name for column in columns))
    if len(models) == 1:
        return [_of_step(columns[0].cost), _of_machine(columns, gpu_gb)]
    return [_of_models(columns, models), _of_models_memory(columns, models, gpu_gb)]


def markdown_of(table: Table) -> str:
    """Return the table in Markdown, its title above."""
    return f"**{table.title}**\n\n{markdown_table(table.header, table.rows, is_right=True)}"


def assumptions(setting: Setting) -> str:
    """Return one sentence that says what the numbers were computed for."""
    n, interval = setting.rollout_n, setting.refresh_steps
    schedule = f"{setting.oversample:g} candidates each"
    if setting.schedule == "round":
        num, steps = setting.candidates_per_selection, setting.steps_per_round
        schedule = f"{num} candidates x {setting.responses_per_candidate} responses every {steps} steps"
    refresh = "every step" if interval == 1 else f"every {interval} steps"
    return (
        f"An estimate for batches of {setting.train_batch_size} problems x {n} responses, {schedule}, "
        f"{setting.trusted_problems} trusted problems x {setting.validation_n or n} responses {refresh}, "
        f"{setting.prompt_tokens:.4g} prompt and {setting.response_tokens:.4g} response tokens on average, "
        f"{setting.live_share:.0%} of the problems live, estimator {setting.estimator or 'none'}, "
        f"checkpointing {'on' if setting.has_checkpointing else 'off'}, micro-batches of "
        f"{setting.micro_batch_tokens:,} positions per GPU, all parameters trained with AdamW, fully sharded."
    )


def _of_step(cost: Cost) -> Table:
    """What does not depend on the number of GPUs."""
    flops, plain = cost.flops, cost.plain

    def row(name: str, value: float, without: float | None) -> tuple[str, str, str, str]:
        ratio = f"{value / without:.2f}" if without else ""
        return (name, shown(value), "" if without is None else shown(without), ratio)

    def shown(value: float) -> str:
        return _short(value) if value < 1000 and value % 1 else f"{value:,.0f}"

    rows = [
        row("responses generated", cost.generated, cost.trained),
        row("  of candidates", cost.candidates, None),
        row("  of trusted problems", cost.trusted, None),
        row("  never trained on", cost.unused, None),
        row("response tokens generated", cost.generated_tokens, cost.generated_tokens / cost.rollout_ratio),
        row("PFLOP: rollout", flops.rollout / 1e15, plain.rollout / 1e15),
        row("PFLOP: direction", flops.direction / 1e15, None),
        row("PFLOP: scores", flops.scores / 1e15, None),
        row("PFLOP: log-probs", flops.log_probs / 1e15, plain.log_probs / 1e15),
        row("PFLOP: update", flops.update / 1e15, plain.update / 1e15),
        row("PFLOP: all", flops.total / 1e15, plain.total / 1e15),
        row("rollouts in host memory, GB (step that selects)", cost.host_bytes / 1e9, None),
    ]
    return Table("a mean step", ("", "with selection", "without", "ratio"), tuple(rows))


def _of_machine(columns: Sequence[Column], gpu_gb: float | None) -> Table:
    """Memory of a GPU, and time where the speeds are known, by the number of GPUs."""
    memories = [column.cost.memory for column in columns]
    parts = ("parameters", "gradients", "optimizer", "direction", "gathered", "activations", "logits")
    rows = [(f"GB: {part}", *(_gb(getattr(memory, part)) for memory in memories)) for part in parts]
    for name, attribute in (("update without selection", "plain"), ("update", "update"), ("scores", "score")):
        rows.append((f"GB, peak: {name}", *(_fits(getattr(memory, attribute), gpu_gb) for memory in memories)))
    rows.append(("GB, peak: making the direction", *(_fits(memory.make_direction, gpu_gb) for memory in memories)))
    for name in ("rollout", "direction", "scores", "training", "total", "plain"):
        seconds = [column.cost.seconds for column in columns]
        if all(second is not None for second in seconds):
            label = {"total": "a step", "plain": "a step without selection"}.get(name, name)
            rows.append((f"seconds: {label}", *(_short(getattr(second, name)) for second in seconds)))
    return Table("one GPU", ("GPUs", *(str(column.setting.num_gpus) for column in columns)), tuple(rows))


def _of_models(columns: Sequence[Column], models: Sequence[str]) -> Table:
    """Operations of a step, by model."""
    header = ("model", "parameters", "rollout", "direction", "scores", "log-probs", "update", "all", "without", "ratio")
    rows = []
    for model in models:
        column = next(c for c in columns if c.setting.shape.name == model)
        flops, cost = column.cost.flops, column.cost
        parts = (flops.rollout, flops.direction, flops.scores, flops.log_probs, flops.update, flops.total)
        numbers = (_short(part / 1e15) for part in (*parts, cost.plain.total))
        billions = f"{column.setting.shape.num_parameters / 1e9:.2f} B"
        rows.append((model, billions, *numbers, f"{cost.flops_ratio:.2f}"))
    return Table("PFLOP of a mean step", header, tuple(rows))


def _of_models_memory(columns: Sequence[Column], models: Sequence[str], gpu_gb: float | None) -> Table:
    """Peak memory of a GPU with selection and without, by model and number of GPUs."""
    counts = list(dict.fromkeys(column.setting.num_gpus for column in columns))
    of = {(c.setting.shape.name, c.setting.num_gpus): c.cost.memory for c in columns}
    rows = [
        (model, *(f"{_fits(of[model, n].peak, gpu_gb)} / {_fits(of[model, n].plain, gpu_gb)}" for n in counts))
        for model in models
    ]
    limit = f"; * is more than {GPU_SHARE:.0%} of {gpu_gb:g} GB" if gpu_gb else ""
    title = f"GB of one GPU at its highest, with selection / without, by GPUs{limit}"
    return Table(title, ("GPUs", *map(str, counts)), tuple(rows))


def _gb(num_bytes: float) -> str:
    return _short(num_bytes / 1e9)


def _fits(num_bytes: float, gpu_gb: float | None) -> str:
    return _gb(num_bytes) + ("*" if gpu_gb is not None and num_bytes > GPU_SHARE * gpu_gb * 1e9 else "")


def _short(value: float) -> str:
    """Return a number in three digits: 0.123, 1.23, 12.3, 123, 1,230."""
    if value >= 100:
        digits = max(0, len(str(int(value))) - 3)
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
