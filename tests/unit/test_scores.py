# SPDX-License-Identifier: Apache-2.0
"""The thirteen scores: each against its formula written out another way, and what all of them have in common."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tables import candidates_of
from verl_gradalign.config import ScoreOptions
from verl_gradalign.selection.scores import SCORES, Score, score_of
from verl_gradalign.selection.select import select_top
from verl_gradalign.types import Measurements

RTOL_FLOAT64 = 1e-10  # measured 1e-14
OPTIONS = ScoreOptions()
RANKED = [name for name, score in SCORES.items() if score.rank is not None]
untimed = settings(deadline=None)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Problems with dense gradients: every response has one of its own."""

    gradients: list  # (responses, G) of log pi(y_ij), one array per problem
    rewards: list
    direction: np.ndarray

    @property
    def advantages(self):
        return [r - r.mean() for r in self.rewards]

    @property
    def problem_gradients(self):
        """Of the loss: -mean_j A_ij grad log pi(y_ij)."""
        pairs = zip(self.gradients, self.advantages, strict=True)
        return [-(a[:, None] * q).mean(axis=0) for q, a in pairs]

    def measurements(self, along=None, num_candidates=None):
        """What the probe would measure along a unit vector of the given direction."""
        along = self.direction if along is None else along
        length = np.linalg.norm(along)
        unit = along / length if length else along
        width = max(map(len, self.rewards))

        def padded(rows):
            return torch.tensor(np.array([[*row, *[math.nan] * (width - len(row))] for row in rows]))

        derivative = [q @ unit for q in self.gradients]
        contribution = [-a * d / len(a) for a, d in zip(self.advantages, derivative, strict=True)]
        halves = [[place % 2 for place in range(len(r))] + [-1] * (width - len(r)) for r in self.rewards]
        half_dots = [[c[h::2].sum() for h in (0, 1)] for c in contribution]
        grads = self.problem_gradients
        return Measurements(
            problem_id_P=torch.arange(len(grads)),
            success_PR=padded(self.rewards),
            advantage_PR=padded(self.advantages),
            half_PR=torch.tensor(halves),
            num_candidates=num_candidates or len(grads),
            dot_P=torch.tensor([g @ unit for g in grads]),
            norm_P=torch.tensor([np.linalg.norm(g) for g in grads]),
            derivative_PR=padded(derivative),
            contribution_PR=padded(contribution),
            half_dot_P2=torch.tensor(half_dots),
            direction_norm=float(length),
        )


def make_pool(seed, num_problems=7, size=5, min_responses=2):
    rng = np.random.default_rng(seed)
    gradients, rewards = [], []
    for _ in range(num_problems):
        n = int(rng.integers(min_responses, 9))
        reward = rng.permutation([1.0, 0.0, *rng.integers(0, 2, n - 2)]).astype(float)
        gradients.append(rng.standard_normal((n, size)))
        rewards.append(reward)
    return Pool(gradients, rewards, rng.standard_normal(size))


POOLS = st.builds(make_pool, st.integers(0, 10_000), st.integers(1, 9))


def rank(name, m, options=OPTIONS):
    return SCORES[name].rank(m, options).numpy()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def oracle(name, pool):
    """Each problem's score, written out problem by problem with dense vectors."""
    grads, v = pool.problem_gradients, pool.direction
    p = [r.mean() for r in pool.rewards]
    unit = v / np.linalg.norm(v)
    rho = [np.corrcoef(a, -(q @ unit))[0, 1] for a, q in zip(pool.advantages, pool.gradients, strict=True)]
    terms = [-a * (q @ unit) for a, q in zip(pool.advantages, pool.gradients, strict=True)]  # their mean is the dot
    formulas = {
        "cosine": lambda i: cosine(grads[i], v),
        "dot": lambda i: grads[i] @ unit,
        "norm": lambda i: np.linalg.norm(grads[i]),
        "negative_cosine": lambda i: -cosine(grads[i], v),
        "cosine_learnability": lambda i: 4 * p[i] * (1 - p[i]) * cosine(grads[i], v),
        "correlation": lambda i: rho[i],
        "confident_cosine": lambda i: cosine(grads[i], v) * max(rho[i], 0),
        "lower_bound": lambda i: (
            (terms[i].mean() - terms[i].std(ddof=1) / math.sqrt(len(terms[i]))) / np.linalg.norm(grads[i])
        ),
        "accuracy_greedy": lambda i: 0.5 - abs(p[i] - 0.5),
        "accuracy_band": lambda i: float(0.2 <= p[i] <= 0.8),
    }
    return np.array([formulas[name](i) for i in range(len(grads))])


@untimed
@given(pool=POOLS)
@pytest.mark.parametrize("name", [n for n in RANKED if not SCORES[n].is_of_candidates])
def test_a_score_equals_its_formula(name, pool):
    np.testing.assert_allclose(rank(name, pool.measurements()), oracle(name, pool), rtol=RTOL_FLOAT64, atol=1e-12)


@untimed
@given(pool=POOLS, num_dead=st.integers(0, 3))
def test_learnalign_is_the_row_mean_of_the_dense_matrix(pool, num_dead):
    """V_i V_j cos(g_i, g_j) over all candidates, self included; dead ones have V = 0."""
    grads = np.array(pool.problem_gradients)
    v = np.array([r.mean() * (1 - r.mean()) for r in pool.rewards])
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    num = len(grads) + num_dead
    dense = (np.outer(v, v) * (units @ units.T)).sum(axis=1) / num
    m = pool.measurements(along=(v[:, None] * units).sum(axis=0), num_candidates=num)
    np.testing.assert_allclose(rank("learnalign", m), dense, rtol=RTOL_FLOAT64, atol=1e-12)


@untimed
@given(pool=POOLS)
def test_pool_cosine_is_the_cosine_with_the_summed_gradient(pool):
    grads = np.array(pool.problem_gradients)
    total = grads.sum(axis=0)
    m = pool.measurements(along=total)
    expected = [cosine(g, total) for g in grads]
    np.testing.assert_allclose(rank("pool_cosine", m), expected, rtol=RTOL_FLOAT64, atol=1e-12)


@untimed
@given(pool=POOLS)
def test_a_lower_bound_of_no_errors_is_cosine(pool):
    m = pool.measurements()
    np.testing.assert_allclose(rank("lower_bound", m, ScoreOptions(z=0.0)), rank("cosine", m), rtol=RTOL_FLOAT64)
    assert (rank("lower_bound", m) <= rank("cosine", m)).all()


@untimed
@given(pool=POOLS, scale=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("name", ["cosine", "correlation", "confident_cosine", "lower_bound", "cosine_learnability"])
def test_scores_of_direction_do_not_depend_on_the_size_of_gradients_or_advantages(name, pool, scale):
    """The group's standard deviation, the loss scale and the number of ranks drop out."""
    larger = dataclasses.replace(pool, gradients=[scale * q for q in pool.gradients])
    np.testing.assert_allclose(
        rank(name, larger.measurements()), rank(name, pool.measurements()), rtol=1e-8, atol=1e-10
    )


@untimed
@given(pool=POOLS, data=st.data(), num_kept=st.integers(1, 9), dead_groups=st.sampled_from(["drop", "rank"]))
@pytest.mark.parametrize("name", RANKED)
def test_every_score_selects_the_same_problems_in_any_order_and_exactly_so_many(
    name, pool, data, num_kept, dead_groups
):
    num = len(pool.rewards)
    order = data.draw(st.permutations(range(num)))
    broken = data.draw(st.sets(st.integers(0, num - 1), max_size=2))
    m = pool.measurements()
    m = dataclasses.replace(m, dot_P=m.dot_P.clone(), norm_P=m.norm_P.clone(), derivative_PR=m.derivative_PR.clone())
    m = dataclasses.replace(m, contribution_PR=m.contribution_PR.clone(), success_PR=m.success_PR.clone())
    for i in broken:
        for tensor in (m.dot_P, m.norm_P, m.derivative_PR, m.contribution_PR, m.success_PR):
            tensor[i] = math.nan
    score_P = rank(name, m)
    kept = {}
    for positions in (list(range(num)), order):
        ids = np.array(positions)
        # One dead group more, which has no score.
        candidates = candidates_of(
            np.append(ids, 99),
            np.zeros(num + 1, bool),
            np.append(np.ones(num, bool), False),
            np.append(score_P[ids], np.nan),
        )
        selection = select_top(candidates, num_kept, dead_groups, (0, 1))
        kept[tuple(positions)] = candidates.problem_id_P[selection.kept].tolist()
    first, second = kept.values() if len(kept) == 2 else (*kept.values(), *kept.values())
    assert first == second
    known = num - (len(broken) if name != "accuracy_band" else 0)
    assert len(first) == min(num_kept, known + 1)
    assert name == "accuracy_band" or not set(first) & broken
    if dead_groups == "drop":
        assert 99 not in first or len(first) == known + 1


def test_dead_ends_of_the_formulas():
    """No spread, one response, an exactly zero gradient."""
    equal = Pool([np.ones((4, 3))], [np.array([1.0, 0.0, 1.0, 0.0])], np.ones(3))
    assert rank("correlation", equal.measurements()) == 0.0
    assert rank("cosine", equal.measurements()) == 0.0
    single = Pool([np.ones((1, 3))], [np.array([1.0])], np.ones(3))
    assert math.isnan(rank("lower_bound", single.measurements())[0])
    m = make_pool(0).measurements()
    unknown = dataclasses.replace(m, derivative_PR=torch.full_like(m.derivative_PR, math.nan))
    assert np.isnan(rank("correlation", unknown)).all() and np.isnan(rank("confident_cosine", unknown)).all()


def test_random_is_the_only_score_that_ranks_nothing():
    assert [name for name, score in SCORES.items() if score.rank is None] == ["random"]
    assert len(SCORES) == 13


def test_a_function_of_the_users_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from verl_gradalign import Measurements, Score\n"
        "def promising(m: Measurements):\n    return m.cosine_P * (m.success_rate_P < 0.5)\n"
        "sure = Score(lambda m, options: m.dot_P, direction='trusted', needs_response_derivatives=True)\n"
        "number = 3\n"
    )
    score = score_of(f"{path}:promising")
    assert score.needs_direction and score.needs_norm and not score.needs_response_derivatives
    pool = make_pool(3)
    m = pool.measurements()
    expected = np.where(m.success_rate_P < 0.5, oracle("cosine", pool), 0)
    np.testing.assert_allclose(score.rank(m, OPTIONS), expected, rtol=RTOL_FLOAT64)
    assert isinstance(score_of(f"{path}:sure"), Score) and score_of(f"{path}:sure").needs_response_derivatives
    for bad in (f"{path}:number", f"{path}:absent", "nowhere.at.all:score", f"{tmp_path}/none.py:f", "fancy"):
        with pytest.raises(ValueError, match=r"gradalign\.score=.*Remedy"):
            score_of(bad)


def test_a_function_of_the_users_is_loaded_from_a_module():
    assert score_of("verl_gradalign.selection.scores:learnability").rank is not None


def test_the_pages_own_score_works(tmp_path):
    text = (Path(__file__).parents[2] / "recipes" / "how_to" / "own_score.md").read_text(encoding="utf-8")
    block = next(b for b in text.split("```python\n")[1:] if "def promising" in b).split("```")[0]
    path = tmp_path / "my_scores.py"
    path.write_text(block)
    m = make_pool(3).measurements()
    assert score_of(f"{path}:promising").rank(m, OPTIONS).shape == (7,)
    assert score_of(f"{path}:agreeing").needs_response_derivatives
