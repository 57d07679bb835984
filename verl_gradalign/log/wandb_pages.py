# SPDX-License-Identifier: Apache-2.0
"""What wandb shows at an interval, besides the metrics: a table of problems, and figures.

    pages = Pages(num_problems=10)
    pages.add(step, selection, samples, composition)     # every step
    pages.publish(wandb, step)                           # at an interval; what was added begins anew

Shape legend: P candidates, S steps.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_gradalign.metrics import PREFIX

COLUMNS = (
    *("kind", "step", "problem_id", "data_source", "score", "error", "success_rate", "reward"),
    *("prompt", "answer", "response"),
)

MAX_STEPS = 1000
"""Of the curves of composition and lift: the latest."""


class Pages:
    """Collects what happened since the last pages.

    Args:
        num_problems: of each kind in the table: top and bottom by score, most uncertain by standard error of the
            cosine. They are found among the problems whose texts are logged.
    """

    def __init__(self, num_problems: int) -> None:
        self._num_problems = num_problems
        self._rows: list[dict[str, Any]] = []
        self._points: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._shares: dict[int, dict[str, float]] = {}
        self._lifts: dict[int, list[float]] = {}

    def add(
        self, step: int, selection: Mapping[str, Any], samples: Mapping[str, list[Any]], composed: Mapping[str, float]
    ) -> None:
        """Note a step: columns of the selection log, of its samples, and the composition's metrics."""
        self._points.append((selection["success_rate"], selection["score"], selection["kept"]))
        self._shares[step] = dict(composed)
        self._shares.pop(step - MAX_STEPS, None)
        place_of = {int(problem_id): place for place, problem_id in enumerate(selection["problem_id"])}
        for index, problem_id in enumerate(samples["problem_id"]):
            place = place_of[problem_id]
            row = {name: values[index] for name, values in samples.items()}
            row |= {name: selection[name][place] for name in ("data_source", "score", "success_rate")}
            norm = selection["norm"][place]
            row["error"] = selection["dot_error"][place] / norm if norm > 0 else float("nan")
            self._rows.append(row)

    def add_lift(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note a step's lift and its interval, where the metrics (under their full names) have one."""
        values = [metrics.get(f"{PREFIX}forecast/{name}", float("nan")) for name in ("lift", "lift_low", "lift_high")]
        if np.isfinite(values).all():
            self._lifts[step] = values
            self._lifts.pop(step - MAX_STEPS, None)

    def publish(self, wandb: Any, step: int) -> None:
        """Log the table and the figures to the run that is open in `wandb`, and begin anew."""
        from PIL import Image

        pages: dict[str, Any] = {}
        if self._rows:
            rows = [[_plain(row[name]) for name in COLUMNS] for row in self.table()]
            pages[PREFIX + "problems"] = wandb.Table(columns=list(COLUMNS), data=rows)
        for name, figure in self.figures().items():
            buffer = io.BytesIO()  # as a picture: wandb takes figures of pyplot only
            figure.savefig(buffer, format="png", dpi=110)
            pages[f"{PREFIX}figures/{name}"] = wandb.Image(Image.open(buffer))
        if pages:
            wandb.log(pages, step=step)
        self._rows.clear()
        self._points.clear()

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of the table, kind by kind."""
        first = {(row["step"], row["problem_id"]): row for row in reversed(self._rows)}
        scored = sorted((row for row in first.values() if np.isfinite(row["score"])), key=lambda row: -row["score"])
        doubtful = sorted((row for row in scored if np.isfinite(row["error"])), key=lambda row: -row["error"])
        n = self._num_problems
        kinds = {"top": scored[:n], "bottom": scored[::-1][:n], "uncertain": doubtful[:n]}
        return [{**row, "kind": kind} for kind, rows in kinds.items() for row in rows]

    def figures(self) -> dict[str, Any]:
        """Return figures of what was added: scores against success rates; composition and lift over time."""
        from verl_gradalign.log.figures import composition_over_time, interval_over_time, score_against_success

        figures = {}
        if self._points:
            success_P, score_P, kept_P = (np.concatenate(parts) for parts in zip(*self._points, strict=True))
            if np.isfinite(score_P).any():
                figures["score_against_success"] = score_against_success(success_P, score_P, kept_P)
        steps, start = sorted(self._shares), "composition/data_source/"
        names = {n.rsplit("/", 1)[0] for shares in self._shares.values() for n in shares if n.startswith(start)}

        def over_steps(name: str) -> np.ndarray:
            return np.array([self._shares[step].get(name, 0.0) for step in steps])

        if names:
            shares = {n.removeprefix(start): (over_steps(f"{n}/pool"), over_steps(f"{n}/kept")) for n in sorted(names)}
            figures["composition"] = composition_over_time(np.array(steps), shares)
        if self._lifts:
            lift_S, low_S, high_S = np.array([self._lifts[step] for step in sorted(self._lifts)]).T
            steps_S = np.array(sorted(self._lifts))
            figures["lift"] = interval_over_time("Lift of the forecast", "times", steps_S, lift_S, low_S, high_S, 1.0)
        return figures


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
