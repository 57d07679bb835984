# SPDX-License-Identifier: Apache-2.0
"""Costs as tables of text: one model over numbers of GPUs, several models or several schedules side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from verl_gradalign.cost.estimate import Cost
from verl_gradalign.cost.setting import Setting

GPU_SHARE = 0.9
"""Of a GPU's memory that is planned with; the rest is for what estimate.py leaves out."""
Row = tuple[str, ...]


class Table(NamedTuple):
    """Text in rows; the first cell of each says what it is."""

    title: str
    header: Row
    rows: Sequence[Row]


def tables_of(costs: Sequence[Cost], gpu_gb: float | None = None) -> list[Table]:
    """Return the tables of one model, or of several. `gpu_gb` marks what does not fit a GPU with an asterisk."""
    if len({cost.setting.shape.name for cost in costs}) == 1:
        return [_of_step(costs[0]), _of_machine(costs, gpu_gb)]
    return [_of_models(costs), _of_models_memory(costs, gpu_gb)]


def table_of_schedules(costs: Mapping[str, Cost]) -> Table:
    """Return plain verl and schedules side by side, by the schedule's name; time where the speeds are known."""
    first, others = next(iter(costs.values())), list(costs.values())
    plain = sum(first.plain.values())
    rows: list[Row] = [
        ("responses per step", f"{first.trained:,.0f}", *(f"{cost.generated:,.0f}" for cost in others)),
        ("  of them trusted", "0", *(_short(cost.trusted) if cost.trusted else "0" for cost in others)),
        ("  ratio", "1.00", *(f"{cost.ratios['rollout']:.2f}" for cost in others)),
        ("PFLOP per step", _short(plain / 1e15), *(_short(sum(cost.flops.values()) / 1e15) for cost in others)),
        ("  ratio", "1.00", *(f"{cost.ratios['flops']:.2f}" for cost in others)),
    ]
    if first.seconds:
        rows.append(("seconds per step", _short(first.seconds["plain"]), *(_short(cost.step_s) for cost in others)))
        rows.append(("  ratio", "1.00", *(f"{cost.ratios['seconds']:.2f}" for cost in others)))
    return Table("schedules", ("", "plain verl", *(f"schedule {name}" for name in costs)), rows)


def assumptions(setting: Setting) -> str:
    """Return one sentence that says what the numbers were computed for."""
    n, interval = setting.rollout_n, setting.refresh_steps
    schedule = f"{setting.oversample:g} candidates each"
    if setting.schedule == "round":
        num, steps = setting.candidates_per_selection, setting.steps_per_round
        schedule = f"{num} candidates x {setting.responses_per_candidate} responses every {steps} steps"
    if setting.is_forecast:
        schedule = f"{setting.oversample:g} forecast for each and none rolled out beside them"
    refresh = "every step" if interval == 1 else f"every {interval} steps"
    if setting.keeps_responses:
        refresh += f", kept for {setting.replay} turns"
    where = ", measuring in the update" if setting.measures_in_update else ""
    return (
        f"An estimate for batches of {setting.train_batch_size} problems x {n} responses, {schedule}, "
        f"{setting.trusted_problems} trusted problems x {setting.validation_n or n} responses {refresh}, "
        f"{setting.prompt_tokens:.4g} prompt and {setting.response_tokens:.4g} response tokens on average, "
        f"{setting.live_share:.0%} of the problems live, estimator {setting.estimator or 'none'}{where}, "
        f"checkpointing {'on' if setting.has_checkpointing else 'off'}, micro-batches of "
        f"{setting.micro_batch_tokens:,} positions per GPU, all parameters trained with AdamW, fully sharded."
    )


def _of_step(cost: Cost) -> Table:
    """Return what does not depend on the number of GPUs."""
    flops, plain = {**cost.flops, "all": sum(cost.flops.values())}, {**cost.plain, "all": sum(cost.plain.values())}
    values: list[tuple[str, float, float]] = [
        ("responses generated", cost.generated, cost.trained),
        ("  of candidates", cost.candidates, 0),
        ("  of trusted problems", cost.trusted, 0),
        ("  never trained on", cost.unused, 0),
        ("response tokens generated", cost.generated_tokens, cost.generated_tokens / cost.ratios["rollout"]),
        *((f"PFLOP: {_name(part, cost)}", flops[part] / 1e15, plain[part] / 1e15) for part in flops if flops[part]),
        ("rollouts in host memory, GB (step that selects)", cost.host_bytes / 1e9, 0),
        ("kept in host memory, GB", cost.kept_bytes / 1e9, 0),
    ]

    def shown(value: float) -> str:
        return _short(value) if value < 1000 and value % 1 else f"{value:,.0f}"

    rows = [
        (name, shown(value), shown(without) if without else "", f"{value / without:.2f}" if without else "")
        for name, value, without in values
        if value or without
    ]
    return Table("a mean step", ("", "with selection", "without", "ratio"), rows)


def _name(part: str, cost: Cost) -> str:
    """Return what a part of the operations is called."""
    is_passing = part == "scores" and cost.setting.measures_in_update
    return "measuring in the update" if is_passing else part.replace("_", "-")


def _of_machine(costs: Sequence[Cost], gpu_gb: float | None) -> Table:
    """Return memory of a GPU, and time where the speeds are known, by the number of GPUs."""
    kept = ("parameters", "gradients", "optimizer", "direction", "replicated")
    parts = (*kept, "gathered", "activations", "logits", "unreduced")
    peaks = {"update without selection": "plain", "update": "update", "scores": "score"}
    peaks["making the direction"] = "make_direction"
    names = {"replicated": "direction in the update", "unreduced": "gradients between micro-batches"}
    rows = [(f"GB: {names.get(part, part)}", *(_gb(cost.memory[part]) for cost in costs)) for part in parts]
    rows += [(f"GB, peak: {name}", *(_gb(c.memory[peak], gpu_gb) for c in costs)) for name, peak in peaks.items()]
    rows = [row for row in rows if set(row[1:]) != {_gb(0)}]
    seconds = [dict(cost.seconds) for cost in costs if cost.seconds]
    for parts_s in seconds:
        plain = parts_s.pop("plain")
        parts_s |= {"a step": sum(parts_s.values()), "a step without selection": plain}
    if seconds:
        shown = [part for part in seconds[0] if any(parts_s[part] for parts_s in seconds)]
        rows += [(f"seconds: {_name(p, costs[0])}", *(_short(parts_s[p]) for parts_s in seconds)) for p in shown]
    return Table("one GPU", ("GPUs", *(str(cost.setting.num_gpus) for cost in costs)), rows)


def _of_models(costs: Sequence[Cost]) -> Table:
    """Return operations of a step, by model."""
    of_model = {cost.setting.shape.name: cost for cost in costs}  # the same on any number of GPUs
    parts = [part for part in costs[0].flops if any(cost.flops[part] for cost in costs)]
    names = (_name(part, costs[0]) for part in parts)
    header, rows = ("model", "parameters", *names, "all", "without", "ratio"), []
    for cost in of_model.values():
        shape, sums = cost.setting.shape, (sum(cost.flops.values()), sum(cost.plain.values()))
        numbers = (_short(operations / 1e15) for operations in (*(cost.flops[part] for part in parts), *sums))
        rows.append((shape.name, f"{shape.num_parameters / 1e9:.2f} B", *numbers, f"{cost.ratios['flops']:.2f}"))
    return Table("PFLOP of a mean step", header, rows)


def _of_models_memory(costs: Sequence[Cost], gpu_gb: float | None) -> Table:
    """Return peak memory of a GPU with selection and without, by model and number of GPUs."""
    cells: dict[str, dict[str, str]] = {}
    for cost in costs:
        cell = f"{_gb(cost.memory['peak'], gpu_gb)} / {_gb(cost.memory['plain'], gpu_gb)}"
        cells.setdefault(cost.setting.shape.name, {})[str(cost.setting.num_gpus)] = cell
    limit = f"; * is more than {GPU_SHARE:.0%} of {gpu_gb:g} GB" if gpu_gb else ""
    title = f"GB of one GPU at its highest, with selection / without, by GPUs{limit}"
    header = ("GPUs", *dict.fromkeys(str(cost.setting.num_gpus) for cost in costs))
    return Table(title, header, [(model, *of_model.values()) for model, of_model in cells.items()])


def _gb(num_bytes: float, gpu_gb: float | None = None) -> str:
    """Return gigabytes, with an asterisk where they do not fit a GPU."""
    return _short(num_bytes / 1e9) + ("*" if gpu_gb is not None and num_bytes > GPU_SHARE * gpu_gb * 1e9 else "")


def _short(value: float) -> str:
    """Return a number in three digits: 0.123, 1.23, 12.3, 123, 1,230."""
    if value >= 100:
        digits = max(0, len(str(int(value))) - 3)
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
