# SPDX-License-Identifier: Apache-2.0
"""Decide which problems every training step rolls out. It rolls nothing out and ranks nothing: the selection does.

    curriculum = Curriculum(config, problem_ids, batch_size)
    draw = curriculum.draw(step)              # once per step, in ascending order
    trained = curriculum.keep(step, kept)     # where draw.is_scored; best first

A problem's id is its row in the train files. All orders are seeded and are recomputed, not stored: a place in them is
an epoch and an offset, so a checkpoint holds two numbers per order, and the problems kept.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse, require

# What an order is for: the second word of its seed. Above any step, because ties are broken by the seed [seed, step]
# and numpy takes missing words for zeros.
STREAM, WARMUP_PART, WARMUP, KEPT = range(2**31, 2**31 + 4)
NO_PROBLEMS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Draw:
    """What a step rolls out."""

    problem_ids: tuple[int, ...]
    """In the order in which they are rolled out."""
    num_kept: int
    """Problems that the selection keeps of them. 0: nothing is scored, all are trained on."""

    @property
    def is_scored(self) -> bool:
        return self.num_kept > 0


def check_schedule(config: GradAlignConfig, num_problems: int, batch_size: int, chooses: bool = True) -> None:
    """Raise ValueError, with the key, its value and the remedy, if the train files do not last for the schedule.

    `num_problems` are in the train files after filtering; `chooses`: see `Curriculum`.
    """
    if num_problems < batch_size:
        why = f"hold {num_problems} problems, fewer than a batch of {batch_size}"
        remedy = f"add problems or set data.train_batch_size={max(num_problems, 1)}"
        raise ValueError(f"data.train_files: {why}. Remedy: {remedy}.")
    if config.is_forecast:  # its shortlist may be the whole pool
        return
    if config.schedule in ("once", "staged"):
        _check_stages(config, num_problems, batch_size)
    elif config.schedule == "round" or chooses:
        num, plan = num_candidates(config, num_problems, batch_size), config.curriculum
        is_step = config.schedule == "step"
        # Rounded down: so many candidates are there.
        by_factor = ("oversample", config.oversample, math.floor(100 * num_problems / batch_size) / 100)
        key, value, most = by_factor if is_step else ("curriculum.num_candidates", plan.num_candidates, num_problems)
        rule = f"schedule {config.schedule} draws {num} candidates at a time, the train files hold {num_problems}"
        remedy = f"set gradalign.{key}={most:g} or less, or add problems to data.train_files"
        require(num <= num_problems, key, value, rule, remedy)
        _check_kept(config, "curriculum.keep", plan.keep, num, batch_size)


class Curriculum:
    """The state of a schedule: its place in the seeded orders, and the problems kept. Raises as `check_schedule` does.

    Args:
        problem_ids: int64, distinct; rows of the train files that were not filtered out.
        batch_size: problems trained on per step.
        chooses: False for a score that needs no candidates: schedule `step` then draws batches and scores nothing.
    """

    def __init__(self, config: GradAlignConfig, problem_ids: np.ndarray, batch_size: int, chooses: bool = True) -> None:
        check_schedule(config, len(problem_ids), batch_size, chooses)
        self._config = config
        self._pool = np.ascontiguousarray(problem_ids, dtype=np.int64)
        self._batch_size, self._chooses = batch_size, chooses
        self._stages = _stages(config)
        self._identity: dict[str, Any] = {"gradalign.schedule": config.schedule, "gradalign.seed": config.seed}
        self._identity["problem_ids_crc32"] = zlib.crc32(self._pool.data)
        warmup_part, num = self._pool, config.curriculum.warmup_problems
        if self._stages and num is not None:
            warmup_part = np.random.default_rng([config.seed, WARMUP_PART]).permutation(self._pool)[:num].copy()
        self._warmup = _Epochs(warmup_part, (config.seed, WARMUP))
        self._stream = _Epochs(self._pool, (config.seed, STREAM))
        """Where candidates are drawn from; in a stage, all that is left of the pool."""
        self._kept, self._kept_step = _Epochs(NO_PROBLEMS, ()), 0
        self._released = NO_PROBLEMS
        """Kept by the stages before the newest one."""
        self._step, self._drawn, self._source = 0, NO_PROBLEMS, self._stream
        self._is_waiting = False
        """Whether the next draw depends on what the present one's selection keeps, which is still to come."""

    def is_selecting(self, step: int) -> bool:
        """Return whether the draw of `step` is scored."""
        if self._config.schedule == "step":
            return self._chooses
        if self._config.schedule == "round":
            return (step - 1) % self._config.curriculum.steps_per_round == 0
        return step in self._stages

    def draw(self, step: int) -> Draw:
        """Return what `step` rolls out. Called once per step, in ascending order.

        Candidates are distinct. A batch of problems kept or of the warm-up may hold one twice, where epochs meet.
        Raises: RuntimeError if the selection that the step depends on is missing.
        """
        self._check_not_waiting()
        assert step > self._step, f"step {step} is drawn after step {self._step}"
        self._source = self._source_of(step)
        self._step, self._drawn = step, NO_PROBLEMS
        if not self.is_selecting(step):
            return Draw(self.refill(self._batch_size), 0)
        self._is_waiting = self._config.schedule != "step"
        num = num_candidates(self._config, len(self._source.problem_ids), self._batch_size)
        return Draw(self.refill(num), _num_kept(self._config, num, self._batch_size))

    def refill(self, num: int) -> tuple[int, ...]:
        """Return `num` further problems of the present draw; fewer if it then holds every candidate there is."""
        is_distinct = self._source is self._stream
        further = self._source.take_new(num, self._drawn) if is_distinct else self._source.take(num)
        self._drawn = np.concatenate([self._drawn, further])
        return tuple(further.tolist())

    def keep(self, step: int, kept: Sequence[int]) -> tuple[int, ...]:
        """Return the problems trained on in `step`, given those that its selection kept, best first.

        Schedule `step` trains on all of them, the others on a batch, the first of many (fewer if fewer were kept).
        Raises: ValueError if none were kept, one was kept twice, or was not drawn in this step.
        """
        assert step == self._step, f"the selection of step {step} came in step {self._step}"
        kept_ids = np.asarray(kept, dtype=np.int64)
        not_drawn = kept_ids[~np.isin(kept_ids, self._drawn)]
        if len(not_drawn):
            raise ValueError(f"step {step} kept {len(not_drawn)} problems that it did not draw: {not_drawn[:5]}")
        if self.is_selecting(step) and not 0 < len(np.unique(kept_ids)) == len(kept_ids):
            raise ValueError(f"step {step} kept {len(kept_ids)} problems; at least one is needed, and none twice")
        if not self._is_waiting:
            return tuple(kept_ids.tolist())
        if self._stages:
            self._released = np.concatenate([self._released, self._kept.problem_ids])
        self._kept, self._kept_step = _Epochs(kept_ids, (self._config.seed, KEPT, step)), step
        self._is_waiting = False
        return tuple(self._kept.take(min(self._batch_size, len(kept_ids))).tolist())

    def state(self) -> dict[str, Any]:
        """Return all that the next draws depend on, as numbers, strings and numpy arrays. Taken between two steps."""
        self._check_not_waiting()
        return {
            **self._identity,
            "step": self._step,
            "warmup_place": self._warmup.place,
            "stream_place": self._stream.place,
            "kept_place": self._kept.place,
            "kept_step": self._kept_step,
            "kept": self._kept.problem_ids,
            "released": self._released,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: ValueError if it is that of another seed, schedule or set of problems."""
        remedy = "resume with the same gradalign.schedule, gradalign.seed and data.train_files, or start a new run"
        for key, own in self._identity.items():
            if state[key] != own:
                refuse(key, repr(own), f"the checkpoint's curriculum has {state[key]!r}, and cannot go on", remedy)
        self._step, self._kept_step = state["step"], state["kept_step"]
        self._kept = _Epochs(np.asarray(state["kept"], dtype=np.int64), (self._config.seed, KEPT, self._kept_step))
        places = (state["warmup_place"], state["stream_place"], state["kept_place"])
        self._warmup.place, self._stream.place, self._kept.place = places
        self._released = np.asarray(state["released"], dtype=np.int64)
        self._drawn, self._is_waiting = NO_PROBLEMS, False

    def _source_of(self, step: int) -> _Epochs:
        if self._stages and self.is_selecting(step):
            rest = ~np.isin(self._pool, np.concatenate([self._released, self._kept.problem_ids]))
            self._stream = _Epochs(self._pool[rest], (self._config.seed, STREAM))
        if self._config.schedule == "step" or self.is_selecting(step):
            return self._stream
        if self._stages and step < self._stages[0]:
            return self._warmup
        if not len(self._kept.problem_ids):
            raise RuntimeError(f"no problems are kept yet in step {step}. Remedy: start at step 1 or restore a state.")
        return self._kept

    def _check_not_waiting(self) -> None:
        if self._is_waiting:
            raise RuntimeError(f"keep() was not told what the selection of step {self._step} kept")


class _Epochs:
    """An endless walk over problems: all of them in a seeded order, then all in another, and so on."""

    def __init__(self, problem_ids: np.ndarray, seed: Sequence[int]) -> None:
        self.problem_ids = problem_ids
        self.place: Sequence[int] = (0, 0)
        """Epoch, and offset within it."""
        self._seed = seed
        self._order_of: dict[int, np.ndarray] = {}
        """The present epoch's, to compute it once."""

    def take(self, num: int) -> np.ndarray:
        """Return the next `num` problems, with repeats where epochs meet: at any time counts differ by 1 at most."""
        parts = [NO_PROBLEMS]
        while num > 0:
            parts.append(self._upcoming(num))
            self.place = (self.place[0], self.place[1] + len(parts[-1]))
            num -= len(parts[-1])
        return np.concatenate(parts)

    def take_new(self, num: int, drawn: np.ndarray) -> np.ndarray:
        """Return the next `num` problems that are not in a draw yet, or fewer if it then holds them all.

        What the draw took at the end of an epoch is passed over in the next one: it has had its turn there.
        """
        taken = NO_PROBLEMS
        num = min(num, len(self.problem_ids) - len(drawn))
        num_seen = max(num, 1024)
        while len(taken) < num:
            seen = self._upcoming(num_seen)
            new = np.flatnonzero(~np.isin(seen, np.concatenate([drawn, taken])))[: num - len(taken)]
            taken = np.concatenate([taken, seen[new]])
            num_passed = len(seen) if len(taken) < num else int(new[-1]) + 1
            self.place = (self.place[0], self.place[1] + num_passed)
            num_seen *= 2
        return taken

    def _upcoming(self, num: int) -> np.ndarray:
        """Return the next problems, at most `num`, of the present epoch; begin another if it is over."""
        if self.place[1] >= len(self.problem_ids):
            self.place = (self.place[0] + 1, 0)
        epoch, offset = self.place
        if epoch not in self._order_of:
            self._order_of = {epoch: np.random.default_rng([*self._seed, epoch]).permutation(self.problem_ids)}
        return self._order_of[epoch][offset : offset + num]


def _stages(config: GradAlignConfig) -> tuple[int, ...]:
    """Return the steps in which all that is left of the pool is scored: `once` has one such step."""
    if config.schedule == "once":
        return (config.curriculum.warmup_steps + 1,)
    return config.curriculum.stages if config.schedule == "staged" else ()


def num_candidates(config: GradAlignConfig, num_problems: int, batch_size: int) -> int:
    """Return the candidates of a scored draw, from the problems that may be drawn."""
    if config.schedule in ("once", "staged"):
        return num_problems
    num_steps = 1 if config.schedule == "step" else config.curriculum.steps_per_round
    asked = None if config.schedule == "step" else config.curriculum.num_candidates
    return asked or -_floor(-config.oversample * batch_size * num_steps)  # rounded up


def _num_kept(config: GradAlignConfig, num_candidates: int, batch_size: int) -> int:
    """Return the problems kept of a scored draw."""
    keep = config.curriculum.keep
    if config.schedule == "step":
        return batch_size
    if keep is None:
        return _floor(num_candidates / config.oversample)
    return int(keep) if keep > 1 else _floor(keep * num_candidates)


def _floor(x: float) -> int:
    """Return the whole part of a product of decimals: 29 for 0.29 * 100, which is 28.999999999999996."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else math.floor(x)


def _check_stages(config: GradAlignConfig, num_problems: int, batch_size: int) -> None:
    """Check schedules `once` and `staged`, as if every selection kept as many as it may."""
    plan, num = config.curriculum, config.curriculum.warmup_problems
    rule = f"must be from a batch ({batch_size}) to all problems of the train files ({num_problems})"
    require(num is None or batch_size <= num <= num_problems, "curriculum.warmup_problems", num, rule, "set it to null")
    rule, remedy = f"schedule {config.schedule} has no default", "set a share, such as 0.25, or a number of problems"
    require(plan.keep is not None, "curriculum.keep", None, rule, remedy)
    rule, remedy = "schedule staged needs the steps of its stages", "set for instance [20,120,220]"
    require(bool(_stages(config)), "curriculum.stages", list(plan.stages), rule, remedy)
    num_left = num_problems
    for i in range(len(_stages(config))):
        key, value = ("curriculum.stages", list(plan.stages)) if i else ("curriculum.keep", plan.keep)
        num_left -= _check_kept(config, key, value, num_left, batch_size)


def _check_kept(config: GradAlignConfig, key: str, value: object, num_candidates: int, batch_size: int) -> int:
    """Return how many candidates of a draw are kept, or raise ValueError about `key` if that cannot be."""
    num_kept = _num_kept(config, num_candidates, batch_size)
    rule = f"would keep {num_kept} of {num_candidates} candidates; must keep from a batch ({batch_size}) to all of them"
    remedy = f"set gradalign.curriculum.keep={max(batch_size, 2)} or a share, or draw from more problems"
    if key == "curriculum.stages":
        rule = f"the train files do not last for all stages: {rule}"
        remedy = "remove the last stages, lower gradalign.curriculum.keep, or add problems to data.train_files"
    require(batch_size <= num_kept <= num_candidates, key, value, rule, remedy)
    return num_kept
