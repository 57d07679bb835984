# SPDX-License-Identifier: Apache-2.0
"""A step's decisions, with the actor replaced by a function that returns scores."""

import copy
import dataclasses
import logging
import math
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from tests.unit.tables import candidates_of
from verl_gradalign.config import DirectionConfig, GradAlignConfig, ProbeConfig
from verl_gradalign.integration import rollouts, selector
from verl_gradalign.integration.in_flight import InFlight
from verl_gradalign.integration.read_ahead import ReadAhead
from verl_gradalign.integration.selection_trainer import SelectionTrainer
from verl_gradalign.integration.selector import AlignmentSelector
from verl_gradalign.log.columns import log_columns
from verl_gradalign.log.run_log import RunNotes
from verl_gradalign.log.selection_log import SelectionLog, read_selection_log
from verl_gradalign.metrics import metric_of
from verl_gradalign.probe import call
from verl_gradalign.probe.call import ScoringReply, ScoringRequest
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.trusted import SetReport
from verl_gradalign.selection.candidates import tabulate
from verl_gradalign.selection.curriculum import Curriculum, Draw
from verl_gradalign.selection.groups import Group, Problem, keys_by_uid
from verl_gradalign.selection.select import select_top
from verl_gradalign.types import ProblemScores

NUM_CANDIDATES, NUM_KEPT, NUM_RESPONSES = 6, 2, 4
MAX_TOKENS = 512
VERL = OmegaConf.create(
    {
        "algorithm": {"adv_estimator": "grpo"},
        "reward": {"reward_model": {"enable": False, "enable_resource_pool": False}},
        "trainer": {"v1": {"trainer_mode": "gradalign"}},
        "actor_rollout_ref": {
            "rollout": {"temperature": 1.0, "n": NUM_RESPONSES},
            "actor": {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": MAX_TOKENS},
            "model": {"use_remove_padding": True},
        },
    }
)


def make_group(uid: str, row: int, is_live: bool = True, is_failed: bool = False, num=NUM_RESPONSES) -> Group:
    keys = tuple(keys_by_uid(f"{uid}_{k}_0" for k in range(num))[uid])
    rewards = () if is_failed else tuple(float(is_live and k < num // 2) for k in range(num))
    advantages = tuple(r - 0.5 for r in rewards) if is_live else (0.0,) * len(rewards)
    coefficients = tuple(-a / max(len(rewards), 1) for a in advantages)
    is_live = is_live and not is_failed
    halves = tuple(int(k >= (num + 1) // 2) for k in range(num))
    problem = Problem(uid, row, "tasks")
    tokens = (20, 3 * num)
    return Group(problem, keys, tokens[0], rewards, is_failed, is_live, advantages, coefficients, halves, tokens[1])


class OneSource:
    """Problems of which only the source is asked."""

    def values(self, column):
        return ["tasks"] * NUM_CANDIDATES

    def read_labels(self, columns):
        assert not columns

    def text(self, problem_id):
        raise AssertionError("no samples are written here")


class Step(SelectionTrainer):
    """A trainer's step on given groups, without verl's trainer below it: what it asks of actor and TransferQueue."""

    verl_mode = "sync"

    def __init__(
        self, tmp_path, monkeypatch, dots, diagnostics=None, probe=None, values=None, half_dots=None, **direction
    ):
        self.requests, self.cleared, self.slept, self.completed = [], [], 0, []
        self.dots, self.half_dots, self.diagnostics = dots, half_dots, diagnostics or {}
        self.half_cosine = 0.5
        self.gradalign = config = GradAlignConfig.from_mapping(
            {"validation": {"files": ["trusted"]}, "direction": direction, "probe": probe or {}}
            | {"log": {"sample_problems": 0}}
            | (values or {})
        )
        self.log_folder = tmp_path / "log"
        self._curriculum = None
        if config.schedule != "step":
            self._curriculum = Curriculum(config, np.arange(NUM_CANDIDATES), NUM_KEPT)
        self._notes = RunNotes(config, self.log_folder, {}, problems=OneSource(), decode=str)
        self.config = copy.deepcopy(VERL)
        self._in_flight, self._sums = InFlight(), {}
        self._ahead = ReadAhead(config, self.config)
        self._selector = AlignmentSelector(config, self.config, NUM_CANDIDATES)
        self.actor_rollout_wg = SimpleNamespace(gradalign_score=self.score, _query_dispatch_info=lambda _: [0])
        self.monkeypatch = monkeypatch

    def _ask_reward(self):
        return "The reward function gives 1.0."

    def free_rollout(self):
        self.slept += 1

    def _complete(self, batch, taken):
        self.completed.append(len(batch.keys))

    def score(self, metas, requests):
        self.requests.append(requests[0])
        (request,) = requests
        uids = tuple(problem.uid for problem in request.candidates)
        dots = torch.tensor([self.dots[int(uid[1:])] for uid in uids], dtype=torch.float64)
        ones = torch.ones_like(dots)
        halves = torch.stack([dots, dots], dim=1) / 2
        if self.half_dots is not None:
            halves = torch.tensor([self.half_dots[int(uid[1:])] for uid in uids], dtype=torch.float64)
        derivative = torch.ones(len(uids), NUM_RESPONSES, dtype=torch.float64)
        derivative = derivative if request.probe.response_derivatives else None
        scores = ProblemScores(uids, dots, ones, ones.long(), derivative, 3.0, halves, self.diagnostics)
        reports = {"trusted": SetReport(3.0, self.half_cosine, 1.0), "": SetReport(3.0, self.half_cosine, 1.0)}
        is_fresh = bool(request.set_weights)
        return [ScoringReply(scores, is_fresh, reports if is_fresh else {}, 0.1, 0.2)]

    def run(self, step, candidates=None, trusted_live=True, draw=None):
        candidates = candidates or [make_group(f"c{i}", i) for i in range(NUM_CANDIDATES)]
        trusted = dataclasses.replace(make_group("t0", 0, is_live=trusted_live))
        trusted = dataclasses.replace(trusted, problem=dataclasses.replace(trusted.problem, trusted_set="trusted"))
        groups = [*candidates, trusted]
        self.groups, self.cleared = {group.problem.uid: group for group in groups}, []
        read = lambda problems, *_: [self.groups[problem.uid] for problem in problems]  # noqa: E731
        self.monkeypatch.setattr(rollouts, "read_groups", read)
        self.monkeypatch.setattr(rollouts.tq, "kv_clear", lambda keys, partition_id: self.cleared.extend(keys))
        self._draw = draw or Draw(tuple(g.problem.problem_id for g in candidates), NUM_KEPT)
        self._in_flight.add(g.problem for g in groups)
        keys = [key for group in groups for key in group.keys]
        batch = KVBatchMeta(keys=keys, tags=[{"seq_len": 10, "response_len": 3}] * len(keys), partition_id="train")
        kept, metrics = self._choose(batch, list(self.groups), set(), step)
        self.kept_keys = kept.keys
        assert sorted([*kept.keys, *self.cleared]) == sorted(keys)
        return {key.split("_")[0] for key in kept.keys}, metrics


def test_the_best_are_kept_and_every_other_row_is_cleared(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.1, 0.9, -0.5, 0.3, 0.8, 0.0])
    kept, metrics = step.run(1)
    assert kept == {"c1", "c4"}
    assert step.slept == 1
    assert {key.split("_")[0] for key in step.cleared} == {"c0", "c2", "c3", "c5", "t0"}
    assert metrics["gradalign/direction/degenerate"] == 0 and metrics["gradalign/direction/age"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_counted_and_never_kept(tmp_path, monkeypatch, bad):
    step = Step(tmp_path, monkeypatch, dots=[0.1, bad, -0.5, 0.3, bad, 0.0])
    kept, metrics = step.run(1)
    assert kept == {"c0", "c3"}
    assert metrics["gradalign/rejected_by/non_finite"] == 2
    assert metrics["gradalign/score/max"] == pytest.approx(0.3)
    reasons = {row["problem_id"]: row["reason"] for row in read_selection_log(step.log_folder).to_pylist()}
    assert reasons[1] == reasons[4] == "non_finite"


@pytest.mark.parametrize("fallback", ["random", "accuracy_greedy"])
def test_a_gradient_that_is_not_finite_is_not_kept_by_a_fallback_either(tmp_path, monkeypatch, fallback):
    values = {"reliability": {"min_reliability": 0.8, "of": "direction", "fallback": fallback}}
    step = Step(tmp_path, monkeypatch, dots=[math.nan, 0.9, math.nan, math.inf, 0.8, math.nan], values=values)
    step.half_cosine = 0.0
    kept, metrics = step.run(1)
    assert kept == {"c1", "c4"} and metrics["gradalign/reliability/fallback"] == 1
    assert metrics["gradalign/rejected_by/non_finite"] == 4


@pytest.mark.parametrize("dead_groups", ["drop", "rank"])
@pytest.mark.parametrize("score", ["cosine", "accuracy_greedy", "random"])
def test_a_group_without_a_finite_reward_is_counted_as_that_and_never_fills_up(
    tmp_path, monkeypatch, caplog, score, dead_groups
):
    step = Step(tmp_path, monkeypatch, dots=[0.1] * NUM_CANDIDATES, values={"score": score, "dead_groups": dead_groups})
    bad = {"is_failed": True, "is_live": False, "rewards": (), "failure": "reward_not_finite"}
    groups = [make_group(f"c{i}", i) for i in range(NUM_CANDIDATES)]
    groups = [dataclasses.replace(g, **bad) if i != 2 else g for i, g in enumerate(groups)]
    kept, metrics = step.run(1, groups)
    assert kept == {"c2"}
    assert metrics["gradalign/rejected_by/reward_not_finite"] == 5 and metrics["gradalign/rejected_by/dead"] == 0
    assert "5 reward_not_finite" in caplog.text and "The reward function gives 1.0" in caplog.text
    step.run(2, groups)
    assert caplog.text.count("The reward function gives 1.0") == 1


def test_previous_scores_along_the_last_good_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.1, 0.9, -0.5, 0.3, 0.8, 0.0], on_degenerate="previous")
    step.run(1)
    kept, metrics = step.run(2, trusted_live=False)
    assert kept == {"c1", "c4"}
    assert step.requests[0].set_weights and not step.requests[1].set_weights
    assert metrics["gradalign/direction/degenerate"] == 1 and metrics["gradalign/direction/age"] == 1


def test_previous_selects_at_random_while_there_is_no_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="previous")
    _, metrics = step.run(1, trusted_live=False)
    assert not step.requests
    assert metrics["gradalign/kept_by/random"] == NUM_KEPT and metrics["gradalign/direction/degenerate"] == 1


def test_random_never_uses_an_old_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="random")
    step.run(1)
    _, metrics = step.run(2, trusted_live=False)
    assert len(step.requests) == 1
    assert metrics["gradalign/kept_by/random"] == NUM_KEPT


def test_stop_raises_with_the_remedy(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="stop")
    with pytest.raises(RuntimeError, match="Remedy"):
        step.run(1, trusted_live=False)


def test_dead_groups_cost_nothing_and_fill_empty_places_only(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[-0.9] * NUM_CANDIDATES)
    groups = [make_group(f"c{i}", i, is_live=i == 3) for i in range(NUM_CANDIDATES)]
    kept, metrics = step.run(1, candidates=groups)
    assert [problem.uid for problem in step.requests[0].candidates] == ["c3"]
    assert "c3" in kept and metrics["gradalign/kept_by/filler"] == 1 and metrics["gradalign/kept_by/top"] == 1


def test_nothing_to_train_on_is_an_error_that_counts_the_reasons(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES)
    groups = [make_group(f"c{i}", i, is_failed=True) for i in range(NUM_CANDIDATES)]
    with pytest.raises(RuntimeError, match=r"\(6 failed\)\. The reward function gives"):
        step.run(1, candidates=groups)


def test_the_refresh_interval_decides_when_the_trusted_set_is_rolled_out(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, refresh_interval=3)
    assert step._selector.needs_trusted(1)
    step.run(1)
    assert [step._selector.needs_trusted(s) for s in (2, 3, 4)] == [False, False, True]


def test_the_request_carries_what_was_configured(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, probe={"canary_problems": 3}, metric="adam")
    step.run(1)
    (request,) = step.requests
    assert (request.estimator, request.temperature, request.direction.metric) == ("ghost", 1.0, "adam")
    assert request.budget == TokenBudget(MAX_TOKENS, is_padded=False)
    assert request.probe.canary_problems == 3 == len(request.audited)


@pytest.mark.parametrize("score", ["cosine", "confident_cosine"])
def test_response_derivatives_are_measured_where_the_score_uses_them(tmp_path, monkeypatch, score):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, values={"score": score})
    step.run(1)
    assert step.requests[0].probe.response_derivatives == (score == "confident_cosine")


def test_a_canary_above_the_threshold_stops_the_run_with_the_remedy(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, {"canary/relative_error": 0.06})
    with pytest.raises(RuntimeError, match=r"ghost differ.*0\.06.*canary_threshold=0\.05.*Remedy.*estimator=backward"):
        step.run(1)


def test_a_canary_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, {"canary/relative_error": math.nan})
    with pytest.raises(RuntimeError, match="canary_threshold"):
        step.run(1)


def test_a_canary_within_the_configured_threshold_is_a_metric(tmp_path, monkeypatch):
    diagnostics = {"canary/relative_error": 0.06}
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, diagnostics, probe={"canary_threshold": 0.1})
    _, metrics = step.run(1)
    assert metrics["gradalign/probe/canary/relative_error"] == 0.06


def test_oversized_problems_are_warned_of_once_and_counted_always(tmp_path, monkeypatch, caplog):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, {"oversized": 2.0})
    with caplog.at_level(logging.WARNING, logger=selector.__name__):
        counts = [step.run(number)[1]["gradalign/probe/oversized"] for number in (1, 2)]
    assert counts == [2.0, 2.0]
    warnings = [record.getMessage() for record in caplog.records if "larger than a micro-batch" in record.getMessage()]
    assert len(warnings) == 1
    assert f"of {MAX_TOKENS} tokens" in warnings[0] and "gradalign.probe.max_tokens_per_rank" in warnings[0]


def test_what_the_estimator_says_of_itself_becomes_metrics(tmp_path, monkeypatch):
    diagnostics = {"fidelity/spearman": 0.9, "energy_kept": 0.8, "step": 0.1, "oversized": 0.0}
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, diagnostics)
    _, metrics = step.run(1)
    for name, value in diagnostics.items():
        assert metrics[f"gradalign/probe/{name}"] == value
        assert metric_of(f"probe/{name}").unit


def test_the_worker_takes_a_fresh_direction_else_the_stored_one_where_allowed(monkeypatch):
    fresh, stored, none = Direction((), 2.0), Direction((), 1.0), Direction((), 0.0)
    request = ScoringRequest("ghost", ProbeConfig(), DirectionConfig(), TokenBudget(1, False), 1.0)
    with_trusted = dataclasses.replace(request, set_weights={"trusted": 1.0}, trusted={"trusted": ()})
    made = {}
    monkeypatch.setattr(call, "trusted_direction", lambda *_: (made["direction"], {}))

    def used(request, direction=None, on_degenerate="previous"):
        made["direction"] = direction
        request = dataclasses.replace(request, direction=DirectionConfig(on_degenerate=on_degenerate))
        return call._direction_for(SimpleNamespace(module=torch.nn.Linear(1, 1)), request, stored, None)[0]

    assert used(with_trusted, fresh, "random") is fresh
    assert used(with_trusted, none, "previous") == stored
    assert used(with_trusted, none, "random") is None
    assert used(request) == stored


def test_an_unreliable_selection_falls_back_and_says_so(tmp_path, monkeypatch):
    """Halves that rank the problems the other way round."""
    halves = [[i, 5.5 - i] for i in range(NUM_CANDIDATES)]
    dots = [sum(pair) for pair in halves]
    values = {"reliability": {"min_reliability": 0.2, "fallback": "random"}}
    step = Step(tmp_path, monkeypatch, dots, half_dots=halves, values=values)
    _, metrics = step.run(1)
    assert metrics["gradalign/reliability/scores_spearman"] == pytest.approx(-1.0)
    assert metrics["gradalign/reliability/fallback"] == 1 and metrics["gradalign/kept_by/random"] == NUM_KEPT
    calm = Step(tmp_path, monkeypatch, [float(i) for i in range(NUM_CANDIDATES)], values=values)
    kept, metrics = calm.run(1)
    assert kept == {"c4", "c5"} and metrics["gradalign/reliability/fallback"] == 0
    assert metrics["gradalign/reliability/scores"] == pytest.approx(1.0)


def test_an_unreliable_direction_falls_back_to_success_rates(tmp_path, monkeypatch):
    values = {"reliability": {"min_reliability": 0.8, "of": "direction", "fallback": "accuracy_greedy"}}
    step = Step(tmp_path, monkeypatch, [float(i) for i in range(NUM_CANDIDATES)], values=values, refresh_interval=2)
    groups = [make_group(f"c{i}", i) for i in range(NUM_CANDIDATES)]
    rare = (1.0, 0.0, 0.0, 0.0)
    groups[2:] = [dataclasses.replace(g, rewards=rare) for g in groups[2:]]
    kept, metrics = step.run(1, groups)
    assert kept == {"c0", "c1"} and metrics["gradalign/reliability/fallback"] == 1
    assert metrics["gradalign/reliability/direction_cosine"] == 0.5
    assert metrics["gradalign/reliability/direction"] == pytest.approx(2 / 3)
    assert step.run(2, groups, trusted_live=False)[1]["gradalign/reliability/fallback"] == 1


def test_repeated_scores_are_drawn_to_their_mean_only_if_asked(tmp_path, monkeypatch):
    for shrinkage, expected in ((0.0, [1.0, 3.0]), (1.0, [1.0, 2.0])):
        step = Step(tmp_path, monkeypatch, [1.0] * 6, values={"reliability": {"shrinkage": shrinkage}})
        means = [step.run(1)[1]["gradalign/score/mean"]]
        step.dots = [3.0] * 6
        means.append(step.run(2)[1]["gradalign/score/mean"])
        assert means == pytest.approx(expected)


def test_scores_of_rewards_alone_ask_nothing_of_the_actor(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [], values={"score": "accuracy_greedy"})
    groups = [make_group(f"c{i}", i) for i in range(NUM_CANDIDATES)]
    groups[:4] = [dataclasses.replace(g, rewards=(1.0, 0.0, 0.0, 0.0)) for g in groups[:4]]
    kept, metrics = step.run(1, groups)
    assert kept == {"c4", "c5"} and not step.requests and not step.slept
    assert not step._selector.needs_trusted(1) and "gradalign/direction/age" not in metrics


def test_a_round_trains_on_one_batch_of_what_it_keeps_and_then_on_what_is_scheduled(tmp_path, monkeypatch):
    values = {"schedule": "round", "oversample": 1.5, "curriculum": {"steps_per_round": 2}}
    step = Step(tmp_path, monkeypatch, [0.1, 0.9, -0.5, 0.3, 0.8, 0.2], values=values)
    draw = step._curriculum.draw(1)
    assert draw.is_scored and draw.num_kept == 4
    trained, metrics = step.run(1, draw=draw)
    assert metrics["gradalign/kept"] == 4 and len(trained) == NUM_KEPT and trained <= {"c1", "c3", "c4", "c5"}
    draw = step._curriculum.draw(2)
    groups = [make_group(f"c{i}", i) for i in draw.problem_ids]
    trained_later, metrics = step.run(2, groups, draw=draw)
    assert trained | trained_later == {"c1", "c3", "c4", "c5"}
    assert metrics["gradalign/kept_by/scheduled"] == NUM_KEPT and len(step.requests) == 1


def test_more_responses_than_training_takes_are_scored_but_not_trained_on(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.1, 0.9, -0.5, 0.3, 0.8, 0.0])
    groups = [make_group(f"c{i}", i, num=2 * NUM_RESPONSES) for i in range(NUM_CANDIDATES)]
    kept, _ = step.run(1, groups)
    assert kept == {"c1", "c4"}
    assert step.kept_keys == [f"{uid}_{k}_0" for uid in ("c1", "c4") for k in range(NUM_RESPONSES)]
    assert all(problem.num_rows == 2 * NUM_RESPONSES for problem in step.requests[0].candidates)


def test_a_critic_and_a_colocated_reward_model_are_asked_before_groups_are_read(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES)
    step.run(1)
    assert not step.completed
    step.config.algorithm.adv_estimator = "gae"
    step.run(2)
    step.config.algorithm.adv_estimator = "grpo"
    step.config.reward.reward_model.enable = True
    step.run(3)
    assert step.completed == [7 * NUM_RESPONSES] * 2
    # Rewards are read in every step, values only where advantages are.
    step.run(4, draw=Draw(tuple(range(NUM_CANDIDATES)), 0))
    step.config.reward.reward_model.enable, step.config.algorithm.adv_estimator = False, "gae"
    step.run(5, draw=Draw(tuple(range(NUM_CANDIDATES)), 0))
    assert step.completed == [7 * NUM_RESPONSES] * 3


def test_the_state_decides_the_next_selection(tmp_path, monkeypatch):
    values = {"reliability": {"shrinkage": 0.5}}
    make = lambda: Step(tmp_path, monkeypatch, [0.1, 0.9, -0.5, 0.3, 0.8, 0.0], values=values, refresh_interval=5)  # noqa: E731
    whole, broken = make(), make()
    whole.run(1)
    broken.run(1)
    state = broken._selector.state()
    resumed, without_direction = make(), make()
    resumed._selector.restore(state, has_direction=True)
    without_direction._selector.restore(state, has_direction=False)
    assert not resumed._selector.needs_trusted(2) and without_direction._selector.needs_trusted(2)
    for step in (whole, resumed):
        step.dots = [0.5, -0.9, 0.5, 0.3, 0.1, 0.9]
    (kept, metrics), (kept_again, metrics_again) = whole.run(2), resumed.run(2)
    assert kept == kept_again
    timeless = [name for name in metrics if "seconds" not in name]
    assert {n: metrics[n] for n in timeless} == pytest.approx({n: metrics_again[n] for n in timeless}, nan_ok=True)
    assert resumed.requests[0].audited == whole.requests[1].audited


def test_without_the_saved_direction_its_age_is_known_until_a_step_that_scores(tmp_path, monkeypatch):
    make = lambda: Step(tmp_path, monkeypatch, dots=[0.1, 0.9, -0.5, 0.3, 0.8, 0.0])  # noqa: E731
    unbroken, resumed = make(), make()
    unbroken.run(1)
    resumed._selector.restore(unbroken._selector.state(), has_direction=False)
    unscored = Draw(tuple(range(NUM_CANDIDATES)), 0)
    for step in (unbroken, resumed):
        assert step.run(2, draw=unscored)[1]["gradalign/direction/age"] == 1
    assert resumed._selector.needs_trusted(3) and not resumed._selector.has_direction
    degenerate = resumed.run(3, trusted_live=False)[1]
    assert degenerate["gradalign/direction/degenerate"] == 1 and "gradalign/direction/age" not in degenerate
    assert resumed.run(4)[1]["gradalign/direction/age"] == 0 and resumed._selector.has_direction


def test_a_hundred_thousand_candidates_are_ranked_kept_and_logged_in_a_second(tmp_path, monkeypatch):
    """Scores given: the actor's reply is there."""
    num = 100_000
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    groups = [make_group(f"c{i}", i, num=2) for i in range(num)]
    scores = torch.randn(num, generator=torch.Generator().manual_seed(0)).double().numpy()
    candidates = candidates_of(np.arange(num), np.zeros(num, bool), np.ones(num, bool), scores)

    def choose(folder):
        selection = select_top(candidates, num // 4, config.dead_groups, (0, 1))
        SelectionLog(folder).write(1, log_columns(1, tabulate(groups, 0.5).of_live(score_P=scores), selection))
        return len(selection.kept)

    started = time.process_time()  # a busy machine is no failure
    num_kept = choose(tmp_path / "timed")
    seconds = time.process_time() - started
    tracemalloc.start()  # by itself: it makes all of this three times as long
    choose(tmp_path / "traced")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_kept == num // 4 and read_selection_log(tmp_path / "timed").num_rows == num
    assert seconds < 1.0, seconds
    assert peak_bytes < 500e6, peak_bytes
