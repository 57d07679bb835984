# SPDX-License-Identifier: Apache-2.0
"""A pool of problems of several kinds whose scores are made up, for forecasts to be tried on."""

import dataclasses

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.selection.features import Features
from verl_gradalign.selection.forecast import Forecaster
from verl_gradalign.types import Observations


def config_of(oversample=4, seed=0, **forecast):
    values = {"validation": {"files": ["x"]}, "schedule": "forecast", "score": "dot"}
    return GradAlignConfig.from_mapping({**values, "oversample": oversample, "seed": seed, "forecast": forecast})


@dataclasses.dataclass
class Pool:
    """Problem ids as filtering leaves them: ascending, with gaps. Kind 0 are the targets."""

    num: int
    shares: tuple = (0.12, 0.88)
    means: tuple = (0.04, 0.0)
    noise: float | tuple = 0.3
    """Of all kinds, or of each."""
    own: float = 0.0
    """Standard deviation of the problems' own parts."""
    common: float = 0.0
    """Standard deviation of each kind's error that all of a step's measurements share."""
    dead: float | tuple = 0.0
    """Share of groups without any spread of rewards, of all kinds or of each."""
    num_noise_features: int = 0
    seed: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.kind = self.rng.choice(len(self.shares), self.num, p=self.shares)
        self.u = self.own * self.rng.standard_normal(self.num)
        self.extra = self.rng.standard_normal((self.num, self.num_noise_features))
        self.ids = np.arange(self.num, dtype=np.int64) * 3 + 7

    def rows(self, ids):
        return (np.asarray(ids) - 7) // 3

    def features(self, ids):
        rows = self.rows(ids)
        columns = [np.ones((len(rows), 1)), np.eye(len(self.shares))[self.kind[rows]], self.extra[rows]]
        narrow = 0.3 / max(self.num_noise_features, 1) ** 0.5
        prior = [1.0] * (1 + len(self.shares)) + [narrow] * self.num_noise_features
        return Features(np.concatenate(columns, axis=1), np.array(prior))

    def truth(self, ids):
        rows = self.rows(ids)
        return np.array(self.means)[self.kind[rows]] + self.u[rows]

    def measure(self, ids, unit=1.0):
        """What a step says of the problems; errors are estimated from eight responses."""
        num = len(ids)
        common, kind = self.common * self.rng.standard_normal(len(self.shares)), self.kind[self.rows(ids)]
        noise, dead = (np.broadcast_to(each, len(self.shares))[kind] for each in (self.noise, self.dead))
        error = noise * np.sqrt(self.rng.chisquare(7, num) / 7)
        value = self.truth(ids) + common[kind] + noise * self.rng.standard_normal(num)
        is_dead = self.rng.random(num) < dead
        value[is_dead], error[is_dead] = 0.0, np.nan
        return Observations(np.asarray(ids), unit * value, unit * error, self.rng.integers(20, 200, num).astype(float))

    def forecaster(self, batch_size=32, **values):
        return Forecaster(config_of(**values), self.ids, batch_size)

    def run_step(self, forecaster, step, batch_size=32, unit=1.0):
        shortlist = forecaster.shortlist(step)
        picks = forecaster.pick(step, shortlist, self.features(shortlist), batch_size)
        forecaster.observe(step, self.measure(picks.problem_id_P, unit))
        return picks

    def run(self, forecaster, num_steps, batch_size=32, first=1, unit=1.0):
        return [self.run_step(forecaster, step, batch_size, unit) for step in range(first, first + num_steps)]

    def share_of_targets(self, ids):
        return float(np.mean(self.kind[self.rows(ids)] == 0))
