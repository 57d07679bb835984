# SPDX-License-Identifier: Apache-2.0
"""Which runs a comparison is made of, and how each is given to verl.

for run in plan_runs("unreliable_mini", methods=METHODS, seeds=[0, 1, 2], output=Path("outputs/unreliable_mini")):
    run.folder, run.overrides
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_gradalign.errors import refuse
from verl_gradalign.selection.scores import SCORES
from verl_gradalign.toy.regimes import MINIATURES

DONE = "done"
"""Name of the file that marks a run's folder as complete."""

FILTER_GROUPS = "filter_groups"
METHODS = (
    *("cosine", "dot", "confident_cosine", "lower_bound", "correlation", "learnalign", "pool_cosine"),
    *("accuracy_greedy", FILTER_GROUPS, "random"),
)
PUBLISHED = ("unreliable", "imbalance", "low_utility", "learnalign_gsm8k")


@dataclass(frozen=True)
class RunPlan:
    """One run of verl: a way to choose problems, a seed, and the folder that holds all it leaves behind."""

    regime: str
    method: str
    seed: int
    folder: Path
    learning_rate: float | None = None
    """None: the regime's."""

    @property
    def title(self) -> str:
        """Return what tells the run from others of its regime."""
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"{self.method}, seed {self.seed}{rate}"

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()


def plan_runs(regime: str, methods: Sequence[str], seeds: Sequence[int], output: Path) -> list[RunPlan]:
    """Return the runs, a seed's methods together, so that an interrupted comparison has whole seeds first.

    Raises: ValueError for an unknown regime or method, repeated ones, or none.
    """
    regimes, known = (*MINIATURES, *PUBLISHED), (*SCORES, FILTER_GROUPS)
    if regime not in regimes:
        raise ValueError(f"regime={regime} is unknown; choose one of {', '.join(regimes)}")
    for method in methods:
        if method not in known:
            refuse("--methods", method, "is unknown without --tune", f"add --tune, or choose among {', '.join(known)}")
    check_unique(methods, seeds)
    return [RunPlan(regime, m, seed, output / "runs" / m / f"seed-{seed}") for seed in seeds for m in methods]


def check_unique(methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are some of both, and none twice."""
    for option, values in (("--methods", list(map(str, methods))), ("--seeds", list(map(str, seeds)))):
        if not values or len(set(values)) < len(values):
            refuse(option, ",".join(values), "names one twice, or none", "name at least one, and each once")


def miniature_overrides(run: RunPlan, data: Path, policy: Path) -> list[str]:
    """Return the overrides of a miniature's run on verl's entry point, on the CPU."""
    of_method = [f"+gradalign={run.method}"]
    of_selection = [f"gradalign.seed={run.seed}", f"gradalign.validation.files={data / 'trusted.parquet'}"]
    if run.method == FILTER_GROUPS:
        of_method = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward"]
        of_selection = []
    return [
        "+platform=cpu",
        *of_method,  # in front of the regime, which may add to it
        f"+regime={run.regime}",
        f"data.train_files={data / 'pool.parquet'}",
        f"data.val_files={data / 'test.parquet'}",
        f"data.seed={run.seed}",
        f"actor_rollout_ref.model.path={policy}",
        f"trainer.default_local_dir={run.folder}",
        f"trainer.experiment_name={run.regime}-{run.method}-seed{run.seed}",
        *of_selection,
    ]
