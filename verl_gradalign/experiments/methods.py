# SPDX-License-Identifier: Apache-2.0
"""Ways to choose what is trained on that are compared on one budget, as overrides of verl.

    METHODS["forecast"].overrides
    miniature_overrides(run, data, policy)

A step trains on 256 responses, 32 problems x 8 or, as the regime says, 64 x 4, in all of them but `random_large_batch`.
Where gradients are measured, 64 trusted problems x 4 responses are rolled out in ten steps.
"""

from dataclasses import dataclass
from pathlib import Path

from verl_gradalign.data.tasks import AUDIT
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.toy.regimes import MINIATURES, Miniature

RESPONSES_OF_UPDATE = 256
SHARE_OF_CANDIDATES = 4
"""Batches that are rolled out in a step of selection after rollout, and trained on in one of the large batch."""
NEVER = 1_000_000
# Of all runs. However many steps a run makes, its budget ends it.
SETTING = (
    f"trainer.total_training_steps={NEVER}",
    f"trainer.total_epochs={NEVER}",
    "gradalign.validation.n=4",
    "gradalign.direction.refresh_interval=10",
)
SHUFFLED = "gradalign.score=verl_gradalign.experiments.shuffled_scores"


@dataclass(frozen=True)
class Method:
    """One way to choose problems."""

    group: str | None
    """The file of configs/gradalign that it is; None: verl's own trainer, as if nothing were installed."""
    overrides: tuple[str, ...] = ()
    train_file: str = "pool"
    """pool | oracle | mixed (`toy.train_files`)."""
    num_batches: int = 1
    """Rolled out in a step, trusted problems excluded: at least so many."""
    is_one_update: bool = False
    """Whether all of these batches are trained on."""

    @property
    def num_responses(self) -> int:
        """Return what a step generates at least."""
        return self.num_batches * RESPONSES_OF_UPDATE


def _forecast(*overrides: str) -> Method:
    return Method("forecast", overrides)


def _after_rollout(*overrides: str) -> Method:
    share = f"gradalign.oversample={SHARE_OF_CANDIDATES}"
    return Method("confident_cosine", (share, *overrides), num_batches=SHARE_OF_CANDIDATES)


WITH_TRUSTED = (
    # Groups of a batch have one size, so trusted problems are answered more often, and less often rolled out.
    "gradalign.validation.n=${actor_rollout_ref.rollout.n}",
    "gradalign.direction.refresh_interval=20",
)
METHODS: dict[str, Method] = {
    "random": Method("random"),
    # As many problems in an update as selection after rollout looks at: a quarter of the updates. The mini-batch is the
    # batch in all miniatures, so that it is one update.
    "random_large_batch": Method(None, (), num_batches=SHARE_OF_CANDIDATES, is_one_update=True),
    # As the word stands for it: problems chosen by a forecast of their dot product with the direction, measured in the
    # update, and the trusted responses trained on too.
    "forecast": _forecast(*WITH_TRUSTED),
    # Nothing but the pool trained on, and the trusted problems rolled out for the direction alone.
    "forecast_pool": _forecast("gradalign.direction.train_on_trusted=false"),
    # As if nobody had told the kinds of problems apart.
    "forecast_prompt": _forecast(*WITH_TRUSTED, "gradalign.forecast.features=[prompt]"),
    # No trusted set: near one half right.
    "difficulty_forecast": _forecast(
        "gradalign.score=accuracy_greedy", "gradalign.measure=before", "gradalign.direction.train_on_trusted=false"
    ),
    "forecast_shuffled": _forecast(*WITH_TRUSTED, f"{SHUFFLED}:dot"),
    # Half of every batch is of the trusted set. The file is in the order in which batches are made of it.
    "trusted_mixed": Method(None, ("data.shuffle=false",), "mixed"),
    # DAPO: groups that are all right or all wrong are thrown away, and others generated in their place.
    "filter_groups": Method(None, ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward")),
    # Four times as many problems are rolled out as are trained on.
    "confident_cosine": _after_rollout(),
    "confident_cosine_shuffled": _after_rollout(f"{SHUFFLED}:confident_cosine"),
    # The pool's useful problems alone, at random.
    "oracle": Method("random", (), "oracle"),
}
NOT_BY_DEFAULT = ("forecast_pool", "forecast_prompt", "confident_cosine_shuffled")
DEFAULT_METHODS = tuple(name for name in METHODS if name not in NOT_BY_DEFAULT)


def batch_size(miniature: Miniature) -> int:
    """Return the problems of an update."""
    return RESPONSES_OF_UPDATE // miniature.group_size


def overrides_of(run: RunPlan, data: Path, policy: Path) -> list[str]:
    """Return the overrides of a miniature's run on verl's entry point, on the CPU."""
    method, miniature = METHODS[run.method], MINIATURES[run.regime]
    num_problems = batch_size(miniature) * (method.num_batches if method.is_one_update else 1)
    settings = [
        f"data.train_batch_size={num_problems}",
        f"actor_rollout_ref.rollout.n={miniature.group_size}",
        *SETTING,
        *method.overrides,
    ]
    if method.group is None:
        settings = [setting for setting in settings if not setting.startswith("gradalign.")]
    else:
        settings += [f"gradalign.seed={run.seed}", f"gradalign.validation.files={data / 'trusted.parquet'}"]
    return [
        "+platform=cpu",
        *([f"+gradalign={method.group}"] if method.group else []),  # in front of the regime, which may add to it
        f"+regime={run.regime}",
        f"data.train_files={data / method.train_file}.parquet",
        f"data.val_files=[{data / 'test.parquet'},{data / AUDIT}.parquet]",
        f"data.seed={run.seed}",
        f"actor_rollout_ref.model.path={policy}",
        f"actor_rollout_ref.actor.optim.lr={run.learning_rate}",
        f"trainer.default_local_dir={run.folder}",
        f"trainer.experiment_name={run.regime}-{run.method}-seed{run.seed}",
        *settings,
    ]
