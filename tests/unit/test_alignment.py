# SPDX-License-Identifier: Apache-2.0
"""A step's decisions, with the actor replaced by a function that returns scores."""

import dataclasses
import logging
import math

import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import alignment
from verl_gradalign.integration.groups import Group, Problem
from verl_gradalign.integration.worker import GradAlignWorker, ScoringReply
from verl_gradalign.metrics import METRICS
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.planning import TokenBudget
from verl_gradalign.report.selection_log import SelectionLog, read_selection_log
from verl_gradalign.selection.scores import SCORES
from verl_gradalign.types import ProblemScores

NUM_CANDIDATES, NUM_KEPT, NUM_RESPONSES = 6, 2, 2
MAX_TOKENS = 512
VERL = OmegaConf.create(
    {
        "actor_rollout_ref": {
            "rollout": {"temperature": 1.0},
            "actor": {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": MAX_TOKENS},
            "model": {"use_remove_padding": True},
        }
    }
)


def make_group(uid: str, row: int, is_live: bool = True, is_failed: bool = False) -> Group:
    keys = tuple(f"{uid}_{k}_0" for k in range(NUM_RESPONSES))
    rewards = () if is_failed else (1.0, 0.0) if is_live else (1.0, 1.0)
    return Group(Problem(uid, row, "tasks"), keys, 20, rewards, is_failed, is_live and not is_failed)


class Step:
    """A selector on given groups, and what it asked of the actor and of TransferQueue."""

    def __init__(self, tmp_path, monkeypatch, dots, diagnostics=None, probe=None, **direction):
        self.requests, self.cleared, self.slept = [], [], 0
        self.dots, self.diagnostics = dots, diagnostics or {}
        config = GradAlignConfig.from_mapping(
            {"validation": {"files": ["trusted"]}, "direction": direction, "probe": probe or {}}
        )
        self.log_folder = tmp_path / "log"
        self.selector = alignment.AlignmentSelector(config, VERL, SelectionLog(self.log_folder), self.sleep)
        self.selector.attach_workers(self.score, dp_rank_of=[0])
        monkeypatch.setattr(alignment, "read_groups", lambda problems, *_: self.groups[problems[0].uid[0]])
        monkeypatch.setattr(alignment.tq, "kv_clear", lambda keys, partition_id: self.cleared.extend(keys))

    def sleep(self):
        self.slept += 1

    def score(self, metas, requests):
        self.requests.append(requests[0])
        (request,) = requests
        uids = tuple(problem.uid for problem in request.candidates)
        dots = torch.tensor([self.dots[int(uid[1:])] for uid in uids], dtype=torch.float64)
        ones = torch.ones_like(dots)
        scores = ProblemScores(uids, dots, ones, ones.long(), None, direction_norm=3.0, diagnostics=self.diagnostics)
        return [ScoringReply(scores, 3.0 if request.trusted else None, bool(request.trusted), 0.1, 0.2)]

    def run(self, step, candidates=None, trusted_live=True):
        candidates = candidates or [make_group(f"c{i}", i) for i in range(NUM_CANDIDATES)]
        trusted = [make_group("t0", 0, is_live=trusted_live)]
        self.groups = {"c": candidates, "t": trusted}
        self.selector.expect([g.problem for g in candidates], [g.problem for g in trusted])
        keys = [key for group in (*candidates, *trusted) for key in group.keys]
        batch = KVBatchMeta(keys=keys, tags=[{"seq_len": 10}] * len(keys), partition_id="train")
        kept, metrics = self.selector.select(batch, set(), NUM_KEPT, step)
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
    assert metrics["gradalign/rejected/non_finite"] == 2
    assert metrics["gradalign/score/max"] == pytest.approx(0.3)
    reasons = {row["problem_id"]: row["reason"] for row in read_selection_log(step.log_folder).to_pylist()}
    assert reasons[1] == reasons[4] == "non_finite"


def test_previous_scores_along_the_last_good_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.1, 0.9, -0.5, 0.3, 0.8, 0.0], on_degenerate="previous")
    step.run(1)
    kept, metrics = step.run(2, trusted_live=False)
    assert kept == {"c1", "c4"}
    assert step.requests[0].trusted and not step.requests[1].trusted
    assert metrics["gradalign/direction/degenerate"] == 1 and metrics["gradalign/direction/age"] == 1


def test_previous_selects_at_random_while_there_is_no_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="previous")
    _, metrics = step.run(1, trusted_live=False)
    assert not step.requests
    assert metrics["gradalign/kept/random"] == NUM_KEPT and metrics["gradalign/direction/degenerate"] == 1


def test_random_never_uses_an_old_direction(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="random")
    step.run(1)
    _, metrics = step.run(2, trusted_live=False)
    assert len(step.requests) == 1
    assert metrics["gradalign/kept/random"] == NUM_KEPT


def test_stop_raises_with_the_remedy(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, on_degenerate="stop")
    with pytest.raises(RuntimeError, match="Remedy"):
        step.run(1, trusted_live=False)


def test_dead_groups_cost_nothing_and_fill_empty_places_only(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[-0.9] * NUM_CANDIDATES)
    groups = [make_group(f"c{i}", i, is_live=i == 3) for i in range(NUM_CANDIDATES)]
    kept, metrics = step.run(1, candidates=groups)
    assert [problem.uid for problem in step.requests[0].candidates] == ["c3"]
    assert "c3" in kept and metrics["gradalign/kept/filler"] == 1 and metrics["gradalign/kept/top"] == 1


def test_nothing_to_train_on_is_an_error_that_counts_the_reasons(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES)
    groups = [make_group(f"c{i}", i, is_failed=True) for i in range(NUM_CANDIDATES)]
    with pytest.raises(RuntimeError, match="failed.*6"):
        step.run(1, candidates=groups)


def test_the_refresh_interval_decides_when_the_trusted_set_is_rolled_out(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, dots=[0.0] * NUM_CANDIDATES, refresh_interval=3)
    assert step.selector.needs_trusted(1)
    step.run(1)
    assert [step.selector.needs_trusted(s) for s in (2, 3, 4)] == [False, False, True]


def test_the_request_carries_what_was_configured(tmp_path, monkeypatch):
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, probe={"canary_problems": 3}, metric="adam")
    step.run(1)
    (request,) = step.requests
    assert (request.estimator, request.temperature, request.direction.metric) == ("ghost", 1.0, "adam")
    assert request.budget == TokenBudget(MAX_TOKENS, is_padded=False)
    assert request.probe.canary_problems == 3 == len(request.audited)


@pytest.mark.parametrize("is_needed", [False, True])
@pytest.mark.parametrize("is_configured", [False, True])
def test_response_derivatives_are_measured_where_the_score_uses_them(tmp_path, monkeypatch, is_needed, is_configured):
    cosine = dataclasses.replace(SCORES["cosine"], needs_response_derivatives=is_needed)
    monkeypatch.setitem(SCORES, "cosine", cosine)
    step = Step(tmp_path, monkeypatch, [0.0] * NUM_CANDIDATES, probe={"response_derivatives": is_configured})
    step.run(1)
    assert step.requests[0].probe.response_derivatives == (is_needed and is_configured)


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
    with caplog.at_level(logging.WARNING, logger=alignment.__name__):
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
        assert f"probe/{name}" in METRICS


def test_the_worker_takes_a_fresh_direction_else_the_stored_one_where_allowed():
    fresh, stored, none = Direction((), 2.0), Direction((), 1.0), Direction((), 0.0)
    worker = GradAlignWorker.__new__(GradAlignWorker)
    worker._direction = stored
    assert worker._usable(fresh, may_use_stored=False) is fresh
    assert worker._usable(none, may_use_stored=True) is stored
    assert worker._usable(none, may_use_stored=False) is None
    assert worker._usable(None, may_use_stored=True) is stored
