# SPDX-License-Identifier: Apache-2.0
"""Choose problems before anything is generated, by a forecast of their score, and learn from what is measured of them.

    forecaster = Forecaster(config, problem_ids, batch_size)
    shortlist = forecaster.shortlist(step)
    picks = forecaster.pick(step, shortlist, features.of(shortlist), num=batch_size)
    ...                                          # roll out, train, measure
    forecaster.observe(step, observations)       # in this step or some steps later

The shortlist is drawn uniformly, and the best of it by x . w~ + m_u are picked: w~ is one draw of w from its posterior
in each step, m_u the posterior mean of the problem's own part. So at most `oversample` times as many of a kind are
picked as the pool holds, and near-duplicates do not fill a batch, as they would as the best of the whole pool. u is not
drawn: the largest of thousands of independent draws is noise. The rest of the batch, `forecast.floor` of it, is a
uniform part of the shortlist. All is seeded by the step, so that a resumed run picks the same.

Shape legend: S problems of a shortlist, P of a step, K those with a score, F features.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.selection.features import Features
from verl_gradalign.selection.pending import Pending
from verl_gradalign.selection.predictor import Predictor
from verl_gradalign.selection.shortlist import NONE, RestingPool
from verl_gradalign.types import Observations, Picks

# What is drawn: the second word of the seed. Above any step, and other than the curriculum's.
SHORTLIST, PICKS, FURTHER = range(2**31 + 8, 2**31 + 11)
LENGTH_ERROR = 0.25
"""Standard error of the logarithm of a mean response length, at least; what it is beyond that is measured."""


class Forecaster:
    """What is known of every problem, and the picks of a step.

    Args:
        problem_ids: int64, distinct; rows of the train files that were not filtered out.
        batch_size: problems trained on per step.
    """

    def __init__(self, config: GradAlignConfig, problem_ids: np.ndarray, batch_size: int) -> None:
        if len(problem_ids) < batch_size:
            why = f"hold {len(problem_ids)} problems, fewer than a batch of {batch_size}"
            remedy = f"add problems or set data.train_batch_size={max(len(problem_ids), 1)}"
            raise ValueError(f"data.train_files: {why}. Remedy: {remedy}.")
        self._config, self._batch_size = config, batch_size
        ids = np.ascontiguousarray(problem_ids, dtype=np.int64)
        self._identity: dict[str, Any] = {"gradalign.seed": config.seed, "problem_ids_crc32": zlib.crc32(ids.data)}
        self._ids = ids if (np.diff(ids) > 0).all() else np.sort(ids)
        """Ascending. A problem's position in it is what the parts know it by."""
        self._pool = RestingPool(len(ids), config.forecast.rest)
        self._pending = Pending()
        self._score: Predictor | None = None
        self._length: Predictor | None = None
        """Of the logarithm of response lengths; with forecast.per=token."""
        self._length_centre = math.nan
        self._step = 0
        self._in_step, self._next, self._next_features = NONE, NONE, np.zeros((0, 0))
        """Positions of the present step's problems, and of what is left of its shortlist, best first, with features."""

    def shortlist(self, step: int, num_picks: int | None = None) -> np.ndarray:
        """Return the ids of `oversample` problems for each to be picked (a batch), uniformly from those not resting.

        Where too few are awake, those that rest longest come back; fewer problems if the pool holds no more.
        """
        asked = self._config.oversample * (num_picks or self._batch_size)
        num = round(asked) if math.isclose(asked, round(asked), rel_tol=1e-12) else math.ceil(asked)
        return self._ids[self._pool.draw(self._rng(SHORTLIST, step), step, num)]

    def forecast(self, step: int, problem_ids: np.ndarray, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Return each problem's forecast score and its standard deviation: 0 and nan before anything was observed."""
        self._check(problem_ids, features)
        if self._score is None or not self._score.is_known:
            return np.zeros(len(problem_ids)), np.full(len(problem_ids), np.nan)
        mean_S, variance_S = self._score.predict(step, self._positions(problem_ids), features.values_SF)
        return mean_S, np.sqrt(variance_S)

    def pick(
        self, step: int, problem_ids: np.ndarray, features: Features, num: int, floor: float | None = None
    ) -> Picks:
        """Return the `num` problems of a shortlist to roll out in `step`: a uniform part of it, the others its best.

        In an order that tells nothing. While nothing was observed all are drawn uniformly, and are marked so.

        Args:
            features: of the shortlist, in its order.
            floor: the share drawn uniformly, in place of forecast.floor; what it makes of `num` is rounded so that it
                is right on average.
        Raises:
            ValueError: if a problem's features are not finite, or not as many or as wide as before, or if the shortlist
                is shorter than `num`.
        """
        mean_S, deviation_S = self.forecast(step, problem_ids, features)
        if len(problem_ids) < num:
            why = f"the shortlist of step {step} holds {len(problem_ids)} problems, {num} are to be picked"
            refuse("gradalign.oversample", self._config.oversample, why, "draw it with num_picks=the number to pick")
        rng, position_S = self._rng(PICKS, step), self._positions(problem_ids)
        share = self._config.forecast.floor if floor is None else floor
        is_known = self._score is not None and self._score.is_known
        num_uniform = min(num, math.floor(share * num + rng.random())) if is_known else num
        order = rng.permutation(len(problem_ids))
        value_S = self._values(step, position_S, features.values_SF, rng)
        by_value = order[num_uniform:][np.argsort(-value_S[order[num_uniform:]], kind="stable")]
        picked = rng.permutation(np.concatenate([order[:num_uniform], by_value])[:num])
        is_uniform_S = np.zeros(len(problem_ids), dtype=bool)
        is_uniform_S[order[:num_uniform]] = True
        left = by_value[num - num_uniform :]
        self._step, self._in_step = step, NONE
        self._next, self._next_features = position_S[left], features.values_SF[left]
        self._take_in(position_S[picked], features.values_SF[picked])
        ids_P = np.asarray(problem_ids, dtype=np.int64)[picked]
        return Picks(ids_P, mean_S[picked], deviation_S[picked], is_uniform_S[picked])

    def further(self, num: int) -> np.ndarray:
        """Return the ids of `num` more problems for the present step: the next best of its shortlist, then any.

        Fewer if it then holds the whole pool. What is drawn beyond the shortlist has no features, and is not learnt
        from.
        """
        best, features = self._next[:num], self._next_features[:num]
        self._next, self._next_features = self._next[num:], self._next_features[num:]
        self._take_in(best, features)
        rng = self._rng(FURTHER, self._step, len(self._in_step))
        others = self._pool.draw(rng, self._step, num - len(best), without=self._in_step)
        self._take_in(others)
        return self._ids[np.concatenate([best, others])]

    def observe(self, step: int, observations: Observations, is_fresh: bool = True) -> None:
        """Learn what was measured of problems picked in this step or before; each is learnt from once.

        Args:
            is_fresh: whether these were measured along another direction than those of the call before.
        """
        position_P = self._positions(observations.problem_id_P)
        is_known_P = self._pending.holds(position_P)
        position_P = position_P[is_known_P]
        values_PF = self._pending.take(position_P)
        value_P, error_P, tokens_P = (
            np.asarray(column, dtype=np.float64)[is_known_P]
            for column in (observations.value_P, observations.error_P, observations.response_tokens_P)
        )
        if self._score is None:
            return
        known_K = np.flatnonzero(np.isfinite(value_P))
        if len(known_K):
            known = position_P[known_K], values_PF[known_K], value_P[known_K], error_P[known_K]
            self._score.learn(step, *known, is_fresh)
        if self._length is not None:
            self._learn_length(step, position_P, values_PF, tokens_P)

    def summary(self) -> dict[str, float]:
        """Return what is known of the pool: see `Predictor.summary`; and how many problems rest."""
        known = self._score.summary() if self._score else {"known": 0.0}
        return {**known, "resting": float(len(self._pool.resting(self._step + 1)))}

    def state(self) -> dict[str, Any]:
        """Return all that later picks depend on, as numbers and numpy arrays. Taken between two steps."""
        predictors = {"score": self._score, "length": self._length}
        return {
            **self._identity,
            "step": self._step,
            "length_centre": self._length_centre,
            "pool": self._pool.state(),
            "pending": self._pending.state(),
            **{name: predictor.state() if predictor else None for name, predictor in predictors.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: ValueError if it is that of another seed or set of problems."""
        remedy = "resume with the same gradalign.seed and data.train_files, or start a new run"
        for key, own in self._identity.items():
            if state[key] != own:
                refuse(key, repr(own), f"the checkpoint's forecast has {state[key]!r}, and cannot go on", remedy)
        self._step, self._length_centre = state["step"], state["length_centre"]
        self._in_step, self._next, self._next_features = NONE, NONE, np.zeros((0, 0))
        self._pool.restore(state["pool"])
        self._pending.restore(state["pending"])
        self._score, self._length = (self._restored(state[name]) for name in ("score", "length"))

    def _take_in(self, position_P: np.ndarray, values_PF: np.ndarray | None = None) -> None:
        """Note what the present step rolls out, with features if it is to be learnt from."""
        self._in_step = np.concatenate([self._in_step, position_P])
        self._pool.note(position_P, self._step)
        if values_PF is not None:
            self._pending.add(self._step, position_P, values_PF)

    def _restored(self, state: Mapping[str, Any] | None) -> Predictor | None:
        if state is None:
            return None
        predictor = self._predictor(np.asarray(state["prior"]), is_scaled=state["scales"] is not None)
        predictor.restore(state)
        return predictor

    def _predictor(self, prior_F: np.ndarray, is_scaled: bool) -> Predictor:
        return Predictor(prior_F, len(self._ids), self._config.forecast.memory, is_scaled)

    def _values(self, step: int, position_S: np.ndarray, values_SF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return what a shortlist is ranked by: x . w~ + m_u, over the forecast length where that is asked for."""
        if self._score is None or not self._score.is_known:
            return np.zeros(len(position_S))
        value_S = self._score.draw(step, position_S, values_SF, rng)
        if self._length is None or not self._length.is_known:
            return value_S
        log_length_S, _ = self._length.predict(step, position_S, values_SF)
        return value_S / np.exp(log_length_S)

    def _learn_length(self, step: int, position_P: np.ndarray, values_PF: np.ndarray, tokens_P: np.ndarray) -> None:
        """Learn the logarithm of response lengths, around that of the first mean: its size is then how they differ."""
        assert self._length is not None
        is_finite_P = np.isfinite(tokens_P) & (tokens_P > 0)
        if not is_finite_P.any():
            return
        log_P = np.log(tokens_P[is_finite_P])
        if math.isnan(self._length_centre):
            self._length_centre = float(log_P.mean())
        known = position_P[is_finite_P], values_PF[is_finite_P], log_P - self._length_centre
        self._length.learn(step, *known, np.full(len(log_P), LENGTH_ERROR))

    def _check(self, problem_ids: np.ndarray, features: Features) -> None:
        """Raise ValueError unless these are a shortlist's features, and as wide as before; begin with the first."""
        names, values_SF = list(self._config.forecast.features), features.values_SF
        remedy = "let every feature give the same finite numbers of each problem throughout a run, or start a new run"
        shape = (len(problem_ids), len(features.prior_F))
        if values_SF.shape != shape:
            refuse("gradalign.forecast.features", names, f"gave {values_SF.shape} numbers in place of {shape}", remedy)
        if not (np.isfinite(features.prior_F).all() and (features.prior_F > 0).all()):
            refuse("gradalign.forecast.features", names, f"has a prior of {features.prior_F.min()}", remedy)
        is_bad_S = ~np.isfinite(values_SF).all(axis=1)
        if is_bad_S.any():
            bad = np.asarray(problem_ids)[is_bad_S]
            refuse("gradalign.forecast.features", names, f"is not finite for problems {bad[:5].tolist()}", remedy)
        if self._score is None:
            prior_F, is_per_token = features.prior_F.copy(), self._config.forecast.per == "token"
            self._score = self._predictor(prior_F, is_scaled=True)
            self._length = self._predictor(prior_F, is_scaled=False) if is_per_token else None
        if not np.array_equal(self._score.prior_F, features.prior_F):
            before, now = len(self._score.prior_F), len(features.prior_F)
            differ = f"gave {before} numbers a problem before, {now} now" if before != now else "changed their priors"
            refuse("gradalign.forecast.features", names, differ, remedy)

    def _positions(self, problem_ids: np.ndarray) -> np.ndarray:
        """Return the problems' positions in the pool. Raises ValueError if one is not of it."""
        ids = np.asarray(problem_ids, dtype=np.int64)
        position_P = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        strangers = ids[self._ids[position_P] != ids]
        if len(strangers):
            raise ValueError(f"problems {strangers[:5].tolist()} are not of the pool that the forecast was made for")
        return position_P

    def _rng(self, *words: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, *words])
