# SPDX-License-Identifier: Apache-2.0
"""Offline scoring without verl's processes: what is refused, what is resumed, and what the files are made of."""

import fcntl
import json
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from typer.testing import CliRunner

from verl_gradalign.cli import app
from verl_gradalign.config import DirectionConfig, GradAlignConfig, TrustedSetConfig, ValidationConfig
from verl_gradalign.integration.compose import compose_run
from verl_gradalign.integration.offline import run as scoring_run
from verl_gradalign.integration.offline import trainer
from verl_gradalign.integration.offline.results import choose, scores_table
from verl_gradalign.integration.offline.run import identity_of
from verl_gradalign.integration.offline.store import OF_POOL, ROLLOUTS, Measured, ScoringStore, joined_scores
from verl_gradalign.integration.offline.task import ScoringTask, check_task, find_checkpoint, num_kept, verl_overrides
from verl_gradalign.integration.offline.trainer import check_scoring, chunks_of
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.types import ProblemScores

runner = CliRunner()
ON_CPU = ("+platform=cpu", "+regime=quickstart")


def write_problems(path, first, num, **columns):
    prompts = [[{"role": "user", "content": f"problem {i}"}] for i in range(first, first + num)]
    table = {"data_source": ["a"] * num, "prompt": prompts, **columns}
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture
def task(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    pool = write_problems(tmp_path / "pool.parquet", 0, 8)
    trusted = write_problems(tmp_path / "trusted.parquet", 100, 4)
    return ScoringTask(pool=(pool,), trusted=(trusted,), model=model, output=tmp_path / "out")


def invoke(task, *more):
    files = [part for path in task.pool for part in ("--pool", path)]
    files += [part for path in task.trusted for part in ("--trusted", path)]
    arguments = ["score", *files, "--model", task.model, "--output", task.output, *more]
    return runner.invoke(app, list(map(str, arguments)))


def test_a_good_task_is_not_refused(task):
    check_task(task)
    check_task(replace(task, trusted=(), score="learnalign", keep=8))


def test_a_pool_with_images_is_refused_before_anything_starts(task, tmp_path):
    """What is stored of a rollout is text: without its images a problem has another gradient."""
    rows = pq.read_table(task.pool[0])
    images = [[] for _ in range(len(rows) - 1)] + [[{"bytes": b"png", "path": None}]]
    path = tmp_path / "images.parquet"
    pq.write_table(rows.append_column("images", pa.array(images)), path)
    with pytest.raises(ValueError, match=f"--pool {path}: row {len(rows)} has images, .*Remedy: "):
        check_task(replace(task, pool=(path,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "cosin"}, "unknown; known are cosine"),
        ({"score": "random"}, "--score random: draws problems without looking"),
        ({"trusted": ()}, "--trusted: score cosine needs a trusted set"),
        ({"score": "learnalign"}, "score learnalign does not look at a trusted set"),
        ({"keep": 9}, "--keep 9: the pool has 8 problems only"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 2.5}, "keep=2.5"),
        ({"responses": 1}, "--responses 1: must be at least 2"),
        ({"trusted_responses": 1}, "--trusted-responses 1: must be at least 2"),
        ({"pool": (Path("absent.parquet"),)}, "--pool absent.parquet: no such file"),
        ({"model": Path("absent")}, "--model absent: is neither"),
        ({"overrides": ("data.train_files=x",)}, "data.train_files=x: is set by an option of this command. Remedy: use "
                                                 "--pool"),
        ({"overrides": ("+gradalign=dot",)}, "use --score"),
        ({"overrides": ("gradalign.schedule=forecast",)}, "gradalign.schedule=forecast: a pool is scored once"),
        ({"overrides": ("gradalign.measure=update",)}, "gradalign.measure=update: a pool is scored once"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_scored_is_refused_with_a_remedy(task, change, message):
    with pytest.raises(ValueError) as refusal:
        check_task(replace(task, **change))
    assert message in str(refusal.value) and "Remedy: " in str(refusal.value)


def test_files_that_are_no_problems_are_refused(task, tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_text("not parquet")
    with pytest.raises(ValueError, match="bad.parquet: is not Parquet"):
        check_task(replace(task, pool=(bad,)))
    pq.write_table(pa.table({"question": ["?"]}), bad)
    with pytest.raises(ValueError, match="has no column 'prompt', only question"):
        check_task(replace(task, trusted=(bad,)))
    check_task(replace(task, pool=(bad,), trusted=(bad,), overrides=("data.prompt_key=question",)))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), bad)
    with pytest.raises(ValueError, match="bad.parquet: is empty"):
        check_task(replace(task, pool=(bad,)))
    other = write_problems(tmp_path / "other.parquet", 8, 8, level=[1] * 8)
    with pytest.raises(ValueError, match=r"its columns are not those of .*pool.parquet: level"):
        check_task(replace(task, pool=(*task.pool, other)))


def test_a_share_or_a_number_of_problems_is_kept():
    assert [num_kept(keep, 10) for keep in (0.25, 1.0, 0.01, 2, 10)] == [2, 10, 1, 2, 10]


def write_shards(folder, num_ranks):
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text("{}")
    for rank in range(num_ranks):
        (actor / f"model_world_size_{num_ranks}_rank_{rank}.pt").touch()
    return actor


def test_verls_checkpoint_is_known_by_its_shards(tmp_path):
    actor = write_shards(tmp_path / "global_step_3", 2)
    for given in (actor, actor.parent):
        checkpoint = find_checkpoint(given)
        assert (checkpoint.folder, checkpoint.num_ranks) == (actor, 2)
    assert find_checkpoint(actor / "huggingface") is None
    (actor / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks the shards of ranks \[1\] of 2.*Remedy"):
        find_checkpoint(actor.parent)


def test_overrides_carry_odd_paths_and_the_users_come_last(task, tmp_path):
    odd = write_problems(tmp_path / "it's a=b, [c] {d}.parquet", 0, 8)
    odd_task = replace(task, pool=(odd, *task.pool), overrides=("algorithm.adv_estimator=rloo",))
    texts = verl_overrides(odd_task, task.model, None)
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(texts)}
    assert [str(path) for path in parsed["data.train_files"]] == [str(odd), str(task.pool[0])]
    assert parsed["actor_rollout_ref.model.path"] == str(task.model)
    assert parsed["algorithm.adv_estimator"] == "rloo" and parsed["scoring.chunk"] == 64


def compose(task, *overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose_run(verl_overrides(replace(task, overrides=(*ON_CPU, *overrides)), task.model, None))


def test_a_scoring_is_resumed_on_other_devices_but_not_with_other_rollouts(task):
    config, store = compose(task), ScoringStore(task.state)
    store.require_same_identity(identity_of(task, config))
    neutral = ("trainer.n_gpus_per_node=2", "gradalign.probe.max_tokens_per_rank=9")
    other_devices = compose(task, "actor_rollout_ref.rollout.gpu_memory_utilization=0.3", *neutral)
    store.require_same_identity(identity_of(task, other_devices))
    config.actor_rollout_ref.rollout.temperature = 0.5
    with pytest.raises(ValueError, match=r"holds another scoring: .*rollout.temperature was 1.0, is 0.5.*Remedy: use"):
        store.require_same_identity(identity_of(task, config))
    config.actor_rollout_ref.rollout.temperature = 1.0
    store.require_same_identity(identity_of(task, config))
    write_problems(task.trusted[0], 200, 4)
    with pytest.raises(ValueError, match="trusted.trusted.files was"):
        store.require_same_identity(identity_of(task, config))


def test_what_verl_would_refuse_after_minutes_is_refused_at_once(task, tmp_path):
    overlapping = replace(task, trusted=task.pool)
    result = invoke(overlapping, "--", *ON_CPU)
    assert result.exit_code == 2 and "also stand in data.train_files" in result.output
    result = invoke(task, "--", *ON_CPU, "no.such.key=1")
    assert result.exit_code == 2 and "no.such.key" in result.output
    actor = write_shards(tmp_path / "global_step_3", 2)
    result = invoke(replace(task, model=actor.parent), "--", *ON_CPU)
    assert result.exit_code == 2 and "was saved by 2 ranks" in result.output
    assert not list(task.output.glob("*.parquet"))


def test_the_identity_of_a_scoring_from_shards_has_all_that_is_loaded(task, tmp_path):
    actor = write_shards(tmp_path / "global_step_3", 1)
    (actor / "optim_world_size_1_rank_0.pt").touch()
    from_shards = replace(task, model=actor.parent)
    names = [
        {key for key in identity_of(from_shards, compose(task, *overrides)) if key.startswith("model.")}
        for overrides in ((), ("gradalign.direction.metric=adam",))
    ]
    weights = "model.model_world_size_1_rank_0.pt"
    assert names == [{weights}, {weights, "model.optim_world_size_1_rank_0.pt"}]


def test_critics_and_filtered_groups_are_refused():
    config = OmegaConf.create({"scoring": {}, "algorithm": {"adv_estimator": "gae", "filter_groups": {"enable": True}}})
    with pytest.raises(ValueError, match=r"adv_estimator=gae: there is no critic .*Remedy: set it to grpo"):
        check_scoring(config)
    config.algorithm.adv_estimator = "rloo"
    with pytest.raises(ValueError, match=r"filter_groups.enable=True: .*Remedy: set it to False"):
        check_scoring(config)


def test_two_processes_do_not_score_into_one_folder(task):
    task.state.mkdir(parents=True)
    with (task.state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = invoke(task, "--", *ON_CPU)
    assert result.exit_code == 2 and "another process is scoring into it" in result.output


def test_a_failed_run_shows_the_end_of_its_output_and_exits_with_1(task, tmp_path, monkeypatch):
    stand_in = tmp_path / "python"
    chatter = "for i in $(seq 50); do printf '\\033[36m(worker)\\033[0m still here\\n'; done"
    stand_in.write_text(f"#!/bin/sh\necho 'RuntimeError: out of memory on rank 3'\n{chatter}\nexit 7\n")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(scoring_run, "sys", SimpleNamespace(executable=str(stand_in), stderr=sys.stderr))
    result = invoke(task, "--", *ON_CPU)
    assert result.exit_code == 1, result.output
    assert "verl failed (exit 7)" in result.output and "out of memory on rank 3" in result.output


STUBBORN = """#!/bin/sh
trap '' TERM
printf '{"rolled' > {progress}; sleep 1; printf '{"rolled_out": 3}' > {progress}; sleep 60 &
wait; wait
"""


def test_verl_that_does_not_end_is_killed_and_half_a_progress_file_is_no_progress(task, tmp_path, monkeypatch):
    stand_in = tmp_path / "python"
    stand_in.write_text(STUBBORN.replace("{progress}", str(tmp_path / "progress.json")))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(scoring_run, "sys", SimpleNamespace(executable=str(stand_in)))
    monkeypatch.setattr(scoring_run, "TERMINATION_S", 0.5)

    def interrupt(progress):
        assert progress == {"rolled_out": 3}
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scoring_run._run([], tmp_path, interrupt)
    assert time.monotonic() - started < 20


def test_help_has_examples():
    result = runner.invoke(app, ["score", "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "--score learnalign" in text and "Exit code: 0 done, 1 verl failed, 2 bad input" in text


# What is stored, and what is made of it.


def row(problem_id, trusted_set=None, session=0, **values):
    plain = {"data_source": "a", "output": 0, "prompt": [1, 2], "response": [3], "response_mask": [1], "rewards": [0.5]}
    return {"trusted_set": trusted_set, "problem_id": problem_id, "session": session, **plain, **values}


def table(*rows):
    return pa.Table.from_pylist(list(rows), schema=ROLLOUTS)


def test_rollouts_are_stored_whole_and_known_by_trusted_set_and_problem(tmp_path):
    store = ScoringStore(tmp_path)
    sets = tuple(TrustedSetConfig(name=name, files=(f"{name}.parquet",)) for name in ("trusted", "other"))
    along = GradAlignConfig(validation=ValidationConfig(sets=sets))
    whole = GradAlignConfig(score="learnalign")
    assert store.members() == set() and list(store.units(along)) == []
    store.write_rollouts(table(row(0, "trusted"), row(3), row(3, session=1)), seconds=1.5)
    store.write_rollouts(table(row(1)), seconds=0.5)
    (tmp_path / "rollouts-000002.unfinished").write_text("killed here")
    assert store.members() == {("trusted", 0), (None, 3), (None, 1)}
    assert store.units(along) == {("rollouts-000000.parquet",): None, ("rollouts-000001.parquet",): None}
    assert store.units(whole) == {("rollouts-000000.parquet", "rollouts-000001.parquet"): None}
    assert [len(store.rollouts(OF_POOL, unit)) for unit in store.units(along)] == [2, 1]
    assert store.members(("rollouts-000000.parquet",)) == {("trusted", 0), (None, 3)}
    assert store.rollouts(OF_POOL, ("rollouts-000000.parquet",)).to_pylist() == [row(3), row(3, session=1)]
    assert store.rollouts(~OF_POOL).to_pylist() == [row(0, "trusted")]
    store.write_rollouts(table(row(7, "trusted")), seconds=1.0)
    assert len(store.units(along)) == 2 and len(list(store.units(whole))[0]) == 2
    assert store.num_trusted(along) == (2, 0) and store.num_trusted(whole) == ()
    assert store.rollout_seconds() == 3.0
    assert pq.read_schema(tmp_path / "rollouts-000000.parquet").equals(ROLLOUTS)


def test_stored_rows_come_back_from_transferqueue_as_they_were(monkeypatch):
    shelf = {}
    monkeypatch.setattr(trainer.tq, "kv_batch_put", lambda keys, fields, **_: shelf.update(keys=keys, fields=fields))
    monkeypatch.setattr(
        trainer.tq, "kv_batch_get", lambda keys, **_: shelf["fields"] if keys == shelf["keys"] else None
    )
    rows = [
        row(3),
        row(3, session=1, output=1, response=[], response_mask=[], rewards=[]),
        row(0, "my_set", prompt=[7]),
    ]
    batch, problems = trainer.load_rows(table(*rows))
    assert [(p.uid, p.problem_id, p.trusted_set) for p in problems] == [
        ("pool:3", 3, None),
        ("trusted:my-set:0", 0, "my_set"),
    ]
    assert batch.keys == ["pool:3_0_0", "pool:3_1_1", "trusted:my-set:0_0_0"]
    assert [tag["seq_len"] for tag in batch.tags] == [3, 2, 2]
    assert trainer.read_rows(batch, problems).to_pylist() == rows
    assert len(trainer.read_rows(batch, [])) == 0
    shelf["fields"]["position_ids"] = shelf["fields"]["position_ids"] + 1
    with pytest.raises(ValueError, match="its positions are not those of plain text"):
        trainer.read_rows(batch, problems)


def group(problem_id, rng, is_live=True):
    rewards = tuple(rng.integers(0, 2, 4).astype(float).tolist())
    return Group(
        problem=Problem(f"pool:{problem_id}", problem_id, "a"),
        keys=tuple(f"pool:{problem_id}_{session}_0" for session in range(4)),
        num_tokens=40,
        rewards=rewards,
        is_failed=False,
        is_live=is_live,
        advantages=tuple(rng.normal(size=4).tolist()),
        coefficients=(0.1, 0.2, -0.1, 0.3),
        halves=(0, 0, 1, 1),
        num_response_tokens=20,
    )


def measured(files, problem_ids, rng, trusted=(4,)):
    groups = tuple(group(i, rng, is_live=i % 5 > 0) for i in problem_ids)
    num = sum(g.is_live for g in groups)
    dot_P = torch.tensor(rng.normal(size=num))
    half_P = torch.tensor(rng.normal(size=num))
    scores = ProblemScores(
        uid=tuple(g.problem.uid for g in groups if g.is_live),
        dot_P=dot_P,
        norm_P=torch.tensor(rng.uniform(1, 3, size=num)),
        num_tokens_P=torch.full((num,), 40),
        response_derivative_PR=torch.tensor(rng.normal(size=(num, 4))),
        direction_norm=2.5,
        half_dot_P2=torch.stack([half_P, dot_P - half_P], dim=1),
    )
    metrics = {"direction/norm": 2.5, "reliability/direction_cosine": 0.5, "seconds/scores": 1.0}
    return Measured(files, trusted, groups, scores, metrics)


def test_what_was_measured_is_read_as_the_same_numbers(tmp_path):
    store, rng = ScoringStore(tmp_path), np.random.default_rng(0)
    for _ in range(4):
        store.write_rollouts(table(*(row(i, "trusted") for i in range(4)), row(4)), seconds=1.0)
    unit = ("rollouts-000003.parquet",)
    before = measured(unit, range(7), rng, trusted=(4,))
    first, *others = before.groups
    before = replace(before, groups=(replace(first, coefficients=(0.1, float("nan"), -0.1, 0.3)), *others))
    store.write_measured(before)
    config = GradAlignConfig(validation=ValidationConfig(files=("trusted.parquet",)))
    after = store.units(config)[unit]
    assert (after.files, dict(after.metrics)) == (before.files, dict(before.metrics))
    assert after.metrics["reliability/direction_cosine"] == 0.5
    assert str(after.groups) == str(before.groups)  # nan is not equal to itself
    for name in ("dot_P", "norm_P", "num_tokens_P", "response_derivative_PR", "half_dot_P2"):
        assert torch.equal(getattr(after.scores, name), getattr(before.scores, name)), name
    nothing = replace(before, groups=(), scores=empty(before.scores))
    store.write_measured(nothing)
    again = store.units(config)[unit].scores
    assert again.half_dot_P2.shape == (0, 2) and len(again.dot_P) == 0
    store.write_rollouts(table(row(5, "trusted")), seconds=1.0)
    assert store.units(config)[unit] is None  # it was along another direction


def empty(scores):
    columns = {name: getattr(scores, name)[:0] for name in ("dot_P", "norm_P", "num_tokens_P", "half_dot_P2")}
    return replace(scores, uid=(), response_derivative_PR=None, **columns)


def test_a_rollout_is_over_when_the_failed_problems_are_noted(tmp_path):
    store = ScoringStore(tmp_path)
    assert store.failed() is None
    problems = [Problem("u", 4, "a"), Problem("v", 1, "a", "trusted")]
    store.write_failed(problems)
    assert store.failed() == problems


def test_responses_of_different_numbers_are_joined_with_nan():
    rng = np.random.default_rng(0)
    first, second = measured(("f",), range(1, 4), rng), measured(("g",), range(6, 8), rng)
    narrow = replace(second.scores, response_derivative_PR=second.scores.response_derivative_PR[:, :2])
    joined = joined_scores([first, replace(second, scores=None), replace(second, scores=narrow)])
    assert joined.response_derivative_PR.shape == (5, 4)
    assert joined.response_derivative_PR[3:, 2:].isnan().all() and not joined.response_derivative_PR[:3].isnan().any()
    assert joined.uid == first.scores.uid + second.scores.uid
    assert joined_scores([replace(first, scores=None)]) is None


@pytest.mark.parametrize("score", ["cosine", "dot", "lower_bound", "confident_cosine", "cosine_learnability"])
def test_the_choice_does_not_depend_on_how_the_pool_was_cut(score):
    config = GradAlignConfig(score=score, validation=ValidationConfig(files=("trusted.parquet",)))
    parts = [
        measured(("f",), range(10), np.random.default_rng(0)),
        measured(("g",), [12, 11], np.random.default_rng(1)),
    ]
    swapped = parts[1].groups + parts[0].groups
    whole = Measured(("f", "g"), (4,), swapped, joined_scores(parts[::-1]), parts[0].metrics)
    failed = [Problem("u", 10, "a"), Problem("v", 0, "a", "trusted")]
    choices = [choose(config, measured, failed, 4, 13) for measured in (parts, [whole])]
    for (groups, columns, metrics), (other_groups, others, other_metrics) in zip(choices, choices[1:], strict=False):
        assert columns["problem_id"].tolist() == [g.problem.problem_id for g in groups] == list(range(13))
        assert groups == other_groups
        for name, values in columns.items():
            np.testing.assert_array_equal(values, others[name], name)
        assert metrics == pytest.approx(other_metrics, rel=1e-12, nan_ok=True)  # sums in another order
    columns = choices[0][1]
    assert sum(columns["kept"]) == 4 and columns["reason"][10] == "failed" and columns["reason"][0] == "dead"
    kept = [s for s, k in zip(columns["score"], columns["kept"], strict=True) if k]
    others = [s for s, r in zip(columns["score"], columns["reason"], strict=True) if r == "low_score"]
    assert min(kept) >= max(others)


def test_every_problem_of_the_pool_has_a_row_that_says_why_it_has_no_score():
    config = GradAlignConfig(validation=ValidationConfig(files=("trusted.parquet",)))
    parts = [measured(("f",), [0, 1, 3], np.random.default_rng(0))]
    _, columns, _ = choose(config, parts, [Problem("u", 4, "a")], 0.25, 5)
    pool = pa.table({"data_source": ["a", "a", "b", "a", "a"], "prompt": ["?"] * 5})
    rows = scores_table(columns, pool).to_pylist()
    assert [r["problem_id"] for r in rows] == list(range(5))
    assert [r["reason"] for r in rows if r["score"] is None] == ["dead", "left_out", "failed"]
    assert rows[2]["data_source"] == "b" and not rows[2]["kept"]
    for r in (rows[1], rows[3]):
        assert r["cosine"] == r["score"] == pytest.approx(r["dot"] / r["norm"])


def test_scores_that_compare_the_pool_with_itself_are_measured_all_at_once(tmp_path):
    store, trusted = ScoringStore(tmp_path), ValidationConfig(files=("trusted.parquet",))
    for problem_id in range(3):
        store.write_rollouts(table(row(problem_id)), seconds=1.0)
    scores = [GradAlignConfig(score=s) for s in ("learnalign", "pool_cosine", "norm")]
    scaled = DirectionConfig(metric="candidates")
    along = [GradAlignConfig(validation=trusted), GradAlignConfig(validation=trusted, direction=scaled)]
    assert [len(store.units(config)) for config in (*scores, *along)] == [1, 1, 3, 3, 1]


def test_only_what_is_not_rolled_out_is_in_the_chunks_trusted_problems_first():
    problem_ids = {"trusted": range(3), None: range(5)}
    done = {("trusted", 1), (None, 0), (None, 4)}
    assert chunks_of(problem_ids, done, 2) == [("trusted", [0, 2]), (None, [1, 2]), (None, [3])]


def test_summaries_are_json_without_nan(tmp_path):
    from verl_gradalign.files import without_nan

    assert json.dumps(without_nan({"a": {"b": float("nan"), "c": 1}}), allow_nan=False) == '{"a": {"b": null, "c": 1}}'
