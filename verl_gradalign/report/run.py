# SPDX-License-Identifier: Apache-2.0
"""One run as a report needs it: sums of its log, and sentences on what is missing of it.

run = read_run(find_runs([folder])[0])
print(run.missing, run.steps.num_rows, len(run.suspects))
"""

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_gradalign.log.parts import NAME, parts_of
from verl_gradalign.log.selection_log import EXTRA
from verl_gradalign.report.forecast import ForecastTally
from verl_gradalign.report.reader import LogReader
from verl_gradalign.report.suspicious import Suspects, find_suspects
from verl_gradalign.report.tallies import Metrics, PointSample, ProblemSums, Rows, StepBins, StepTally, ValueTally

MAX_GAPS = 4
MAX_COLUMNS = 12
MAX_DEPTH = 6
LOG_FOLDER = "gradalign"
NOT_SEARCHED = ("earlier-", "global_step_", ".")
"""Beginnings of the names of folders that hold no log of their own: earlier runs, checkpoints, hidden ones."""
WANTED_METRICS = (
    *(f"gradalign/{name}" for name in ("reliability/", "direction/", "probe/", "seconds/", "cost/", "candidates")),
    *(f"gradalign/{name}" for name in ("forecast/", "responses/", "tokens/")),
    *("timing_s/step", "val-core/", "critic/score/mean", "critic/rewards/mean", "actor/entropy"),
)
"""Beginnings of the names of the metrics that the report draws or judges."""


@dataclass(frozen=True)
class RunFolder:
    """A run's log, and a name that distinguishes it from the others."""

    name: str
    folder: Path


@dataclass(frozen=True)
class RunData:
    """What is known of a run."""

    name: str
    folder: Path
    about: Mapping[str, Any]
    """The latest of what its parts say: versions, config, created; empty if nothing does."""
    missing: list[str]
    """Sentences."""
    steps: StepTally
    reasons: ValueTally
    columns: dict[str, ValueTally]
    """By data_source, and what gradalign.log.columns asked for."""
    points: PointSample
    forecast: ForecastTally
    suspects: Suspects
    metrics: Metrics
    reader: LogReader

    @property
    def groups(self) -> tuple[str, str]:
        """What is compared everywhere: what there was to choose from, and what was chosen."""
        return ("random draws", "forecast picks") if self.forecast.has_picks else ("candidates", "kept")

    def key(self, path: str, default: Any = None) -> Any:
        """Return a key of the run's configuration ("gradalign.score"), the default if it is not known."""
        return key_of(self.about, f"config.{path}", default)

    def held_out(self) -> tuple[str, dict[str, str]]:
        """Return "accuracy", or "reward" where there is none, and verl's metric of it by data source."""
        for quantity, word in (("acc", "accuracy"), ("reward", "reward")):
            pattern = re.compile(rf"val-core/(.+)/{quantity}/mean@\d+", re.DOTALL)
            found = {match[1]: name for name in self.metrics.names if (match := pattern.fullmatch(name))}
            if found:
                return word, found
        return "accuracy", {}

    def accuracy(self) -> list[dict[str, Any]]:
        """Return the first and the last held-out accuracy, or reward, by data source."""
        found = []
        for source, name in self.held_out()[1].items():
            steps, values = (column.tolist() for column in self.metrics.points(name))
            ends = {"before": values[0], "after": values[-1], "first_step": int(steps[0]), "last_step": int(steps[-1])}
            found.append({"data_source": source, **ends})
        return found

    def composition(self, column: str) -> list[tuple[str, float, float]]:
        """Return (value, share of the pool, share of what was chosen) of a column, the most frequent first: see
        `groups`."""
        pool, kept = (
            {value: int(count.sum()) for value, count in self.columns[column].counts(of_kept).items()}
            for of_kept in (False, True)
        )
        num_pool, num_kept = sum(pool.values()), max(1, sum(kept.values()))
        return [(value, pool[value] / num_pool, kept[value] / num_kept) for value in pool] if num_pool else []


def key_of(about: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """Return a value of a part's metadata ("config.data.train_files"), the default if it is not there."""
    value: Any = about
    for name in path.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            return default
        value = value[name]
    return value


def read_run(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> RunData:
    """Return everything of a run but texts. `tell` is given a line on the progress now and then."""
    reader = LogReader(run.folder)
    parts = parts_of(run.folder, "selection") or parts_of(run.folder, "metrics")
    first = max(1, min((part.first for part in parts), default=1))
    bins = StepBins(first, max((part.last for part in parts), default=first))
    steps, reasons, points, sums = StepTally(bins), ValueTally(bins, all_rows=True), PointSample(), ProblemSums()
    columns, forecast = {"data_source": ValueTally(bins)}, ForecastTally(bins)
    for table in reader.batches("selection"):
        rows = Rows.of(table)
        steps.add(rows)
        reasons.add(rows, "reason")
        points.add(rows)
        source_N = columns["data_source"].add(rows, "data_source")
        sums.add(rows, source_N)
        forecast.add(rows, source_N)
        for name in [name for name in rows.texts if name.startswith(EXTRA)]:
            if name in columns or len(columns) < MAX_COLUMNS:
                columns.setdefault(name, ValueTally(bins)).add(rows, name)
        tell(f"{run.name}: {steps.num_rows:,} rows")
    metrics = Metrics(bins, WANTED_METRICS)
    for table in reader.batches("metrics"):
        metrics.add(table)
        tell(f"{run.name}: metrics of {len(metrics.steps):,} steps")
    about = reader.abouts[-1] if reader.abouts else {}
    missing = [*reader.warnings(), *_missing(run.folder, reader.abouts, steps.steps, metrics.steps)]
    suspects = find_suspects(sums, list(columns["data_source"].values))
    tallies = steps, reasons, columns, points, forecast, suspects, metrics
    return RunData(run.name, run.folder, about, missing, *tallies, reader)


def gaps_of(steps: Iterable[int], first: int = 1) -> list[tuple[int, int]]:
    """Return the ranges of steps that are absent from `first` to the last step there is."""
    gaps, expected = [], first
    for step in sorted(steps):
        if step > expected:
            gaps.append((expected, step - 1))
        expected = max(expected, step + 1)
    return gaps


def _missing(folder: Path, abouts: list[dict[str, Any]], selected: set[int], measured: set[int]) -> list[str]:
    """Return what is missing of the run itself: steps, tables, its end."""
    found = []
    gaps = gaps_of(selected)
    if not selected:
        found.append("No row of the selection can be read: there is nothing to say of what was chosen.")
    elif gaps and gaps[0][0] == 1:
        limit = key_of(abouts[-1], "config.gradalign.log.max_gb") if abouts else None
        found.append(
            f"The log begins at step {gaps[0][1] + 1:,}: earlier steps were dropped (beyond gradalign.log.max_gb"
            f"{'' if limit is None else f'={limit}'}) or are lost."
        )
    found += _named_gaps("", [gap for gap in gaps if gap[0] > 1])
    if not measured:
        why = "an older release wrote none"
        found.append(f"There is no table of metrics ({why}): accuracy, reliability and cost are unknown.")
    elif selected:
        absent = selected - measured - {max(selected)}  # a step's metrics are written at its end
        found += _named_gaps("The metrics of ", [g for g in gaps_of(selected - absent, min(selected)) if g not in gaps])
    if not parts_of(folder, "samples"):
        why = "gradalign.log.sample_problems was 0, or an older release wrote the log"
        found.append(f"There are no sample texts: {why}.")
    if not abouts:
        return found
    planned, last = key_of(abouts[-1], "config.trainer.total_training_steps"), max(selected, default=0)
    if isinstance(planned, int) and last < planned:
        found.append(f"The run is not at its end: {last:,} of {planned:,} steps so far, or it was interrupted.")
    writers = [str(key_of(about, "versions.verl-gradalign", "unknown")) for about in abouts]
    mine = importlib.metadata.version("verl-gradalign")
    if len(set(writers)) > 1:
        found.append(
            f"The run was resumed with another release: {', then '.join(dict.fromkeys(writers))} of verl-gradalign."
        )
    elif mine not in writers:
        found.append(f"The log was written by verl-gradalign {writers[0]}; this report is made by {mine}.")
    return found


def _named_gaps(beginning: str, gaps: list[tuple[int, int]]) -> list[str]:
    if not gaps:
        return []
    named = [f"step {a:,}" if a == b else f"steps {a:,} to {b:,}" for a, b in gaps]
    more = f", and {len(named) - MAX_GAPS} more gaps" if len(named) > MAX_GAPS else ""
    text = f"{beginning}{', '.join(named[:MAX_GAPS])}{more}"
    verb = "is" if len(gaps) == 1 and gaps[0][0] == gaps[0][1] and not beginning else "are"
    return [f"{text[0].upper()}{text[1:]} {verb} missing."]


def find_runs(places: Sequence[str | Path]) -> list[RunFolder]:
    """Return the logs at or below the places, in the order given, each once.

    Raises: ValueError that names a place that is not there or holds no log.
    """
    folders = dict[Path, None]()
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"RUN_DIR {place} does not exist. Remedy: give the folder of a run, or one above several.")
        found = list(_logs_below(place))
        if not found:
            raise ValueError(
                f"RUN_DIR {place} holds no selection log (<step>.parquet files in a folder {LOG_FOLDER}). Remedy: give "
                "the run's trainer.default_local_dir, or gradalign.log.dir if it was set; a run that has not finished "
                "its first step has no log yet."
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [RunFolder(name, folder) for name, folder in zip(_names(list(folders)), folders, strict=True)]


def _holds_log(folder: Path) -> bool:
    """Return whether parts of a log are in the folder, be they damaged."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(NAME.fullmatch(name.replace(".damaged", ".parquet")) for name in names)


def _logs_below(place: Path) -> Iterator[Path]:
    if _holds_log(place):
        yield place
    elif _holds_log(place / LOG_FOLDER):
        yield place / LOG_FOLDER
    else:
        for parent, subfolders, _ in os.walk(place):
            is_deep = len(Path(parent).relative_to(place).parts) >= MAX_DEPTH
            names = [] if is_deep else sorted(n for n in subfolders if not n.startswith(NOT_SEARCHED))
            logs = [name for name in names if _holds_log(Path(parent, name))]
            yield from (Path(parent, name) for name in logs)
            subfolders[:] = [name for name in names if name not in logs]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths, whole folders, that differ from each other."""
    parts = [folder.parent.parts if folder.name == LOG_FOLDER else folder.parts for folder in folders]
    for length in range(1, max((len(p) for p in parts), default=0) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
