# SPDX-License-Identifier: Apache-2.0
"""Which finished groups a selection is among, with TransferQueue replaced by what it would list."""

from collections import Counter

import pytest
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_gradalign.integration.in_flight import InFlight
from verl_gradalign.integration.sampler import TRAINER, GradAlignAsyncSampler, GradAlignSampler
from verl_gradalign.selection.groups import Problem


class Chooser:
    """Takes everything; candidates begin with c, trusted problems with t."""

    def __init__(self, buffer, uids, num_candidates, has_direction=True):
        self.asked = []
        self.in_flight = InFlight()
        trusted_set = {"c": None, "t": "trusted"}
        self.in_flight.add(Problem(uid, int(uid[1:]), "tasks", trusted_set[uid[0]]) for uid in uids)
        self.in_flight.num_candidates, self.in_flight.waits_for_trusted = num_candidates, not has_direction
        buffer.attach(self.in_flight, self.choose, lambda: "the reward function raises ValueError")

    def choose(self, batch, uids, failed, step):
        self.asked.append((sorted(uids), sorted(failed), step))
        return batch, {"gradalign/kept": 1.0}


def make(sampler, mode, **own):
    return sampler(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=2,
        max_off_policy_strategy="drop",
        sampler_kwargs={"poll_interval_s": 0.01, TRAINER: "GradAlignTrainer", **own},
        refill_fn=lambda num: num,
    )


def finish(buffer, uids, steps=None, failed=(), has_rows=True):
    """Let the groups be finished; older ones have smaller steps."""

    def sync():
        for uid in uids:
            (buffer.failure_keys if uid in failed else buffer.finished_keys)["train"].add(uid)
            buffer.prompt_global_steps["train"][uid] = (steps or {}).get(uid, 1)
            if has_rows:
                buffer.partitions["train"][f"{uid}_0_0"] = {"status": "success"}

    buffer._sync_metadata_from_transfer_queue = sync


@pytest.fixture(autouse=True)
def no_transfer_queue(monkeypatch):
    monkeypatch.setattr(ReplayBuffer, "_clear_groups", lambda *_: None)

    def materialize(self, partition, uids, snapshot):
        return KVBatchMeta(keys=[f"{uid}_0_0" for uid in uids], tags=[{}] * len(uids), partition_id=partition)

    monkeypatch.setattr(ReplayBuffer, "_materialize_batch", materialize)


def test_a_synchronous_selection_is_among_all_groups_of_the_step_failed_ones_included():
    buffer = make(GradAlignSampler, "sync")
    chooser = Chooser(buffer, ["c1", "c2", "t1"], 2)
    finish(buffer, ["c1", "c2", "t1"], failed=["c2"])
    batch, metrics = buffer.sample(3, "train", 1)
    assert chooser.asked == [(["c1", "c2", "t1"], ["c2"], 3)] and metrics["gradalign/kept"] == 1.0


def test_dapos_filter_never_takes_a_trusted_group_and_surplus_candidates_give_way(monkeypatch):
    buffer = make(GradAlignSampler, "sync", filter_groups_metric="reward", train_batch_size=2)
    Chooser(buffer, ["c1", "c2", "t1"], 2)
    monkeypatch.setattr(ReplayBuffer, "_dapo_filtered_keys", lambda *_: ({"c1", "t1"}, Counter()))
    assert buffer._dapo_filtered_keys("train")[0] == {"c1"}
    finish(buffer, ["c1", "c2", "c3", "t1"])
    buffer._sync_metadata_from_transfer_queue()
    uids, _, _ = buffer._select_prompt_uids("train", {"c1", "c2", "c3", "t1"}, 3)
    assert "t1" in uids and len(uids) == 3


@pytest.mark.parametrize(("sampler", "mode"), [(GradAlignSampler, "sync"), (GradAlignAsyncSampler, "colocate_async")])
def test_of_more_finished_candidates_than_needed_those_are_taken_that_were_sent_first(sampler, mode):
    """verl goes through a set of random names: a repeated run would choose among other candidates."""
    sent = [f"c{i}" for i in (7, 3, 9, 1, 8, 2)]
    buffer = make(sampler, mode)
    Chooser(buffer, [*sent, "t1"], 3)
    finish(buffer, [*sent, "t1"])
    buffer._sync_metadata_from_transfer_queue()
    # Asynchronously a batch is of so many candidates, and the trusted ones come on top of it.
    uids, _, _ = buffer._select_prompt_uids("train", {*sent, "t1"}, 4 if mode == "sync" else 3)
    assert [uid for uid in uids if uid != "t1"] == ["c7", "c3", "c9"] and "t1" in uids


def test_an_asynchronous_selection_takes_the_oldest_candidates_and_leaves_the_others_in_flight():
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    chooser = Chooser(buffer, ["c1", "c2", "c3", "t1"], num_candidates=2)
    finish(buffer, ["c1", "c2", "c3"], steps={"c1": 3, "c2": 2, "c3": 2})
    buffer.sample(3, "train", 1)
    assert chooser.asked == [(["c2", "c3"], [], 3)]  # the trusted group is not finished, and not waited for


@pytest.mark.parametrize(("is_singly", "taken"), [(False, ["c1"]), (True, ["c1", "t1"])])
def test_trusted_groups_whose_responses_are_kept_are_taken_as_they_finish(is_singly, taken):
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    chooser = Chooser(buffer, ["c1", "t1", "t2"], num_candidates=1)
    chooser.in_flight.takes_trusted_singly = is_singly
    finish(buffer, ["c1", "t1"])
    buffer.sample(1, "train", 1)
    assert chooser.asked == [(taken, [], 1)]


def test_trusted_groups_that_are_of_no_use_to_the_next_selection_stay_in_flight():
    buffer = make(GradAlignAsyncSampler, "separate_async")
    chooser = Chooser(buffer, ["c1", "t1"], num_candidates=1)
    chooser.in_flight.takes_trusted = False
    finish(buffer, ["c1", "t1"])
    buffer.sample(1, "train", 1)
    assert chooser.asked == [(["c1"], [], 1)]


def test_the_first_direction_is_waited_for():
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    chooser = Chooser(buffer, ["c1", "t1"], num_candidates=1, has_direction=False)
    finish(buffer, ["c1"])
    buffer._sync_metadata_from_transfer_queue()
    assert not buffer._has_enough_samples(1, "train", 1, {"c1"})
    finish(buffer, ["c1", "t1"])
    buffer.sample(1, "train", 1)
    assert chooser.asked[0][0] == ["c1", "t1"]


def test_stale_candidates_are_evicted_and_replaced_but_trusted_groups_stay():
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    chooser = Chooser(buffer, ["c1", "c2", "t1"], 1)
    finish(buffer, ["c1", "c2", "t1"], steps={"c1": 1, "c2": 4, "t1": 1}, failed=["t1"])
    buffer._sync_metadata_from_transfer_queue()
    stale, _, failed, _ = buffer._terminal_eviction_reasons(4, "train")
    assert stale == {"c1"} and failed == set()
    buffer._clear_groups("train", stale)
    assert {problem.uid for problem in chooser.in_flight} == {"c2", "t1"}


@pytest.mark.parametrize(("sampler", "mode"), [(GradAlignSampler, "sync"), (GradAlignAsyncSampler, "colocate_async")])
def test_a_step_without_any_answer_stops_with_what_the_trainer_knows(sampler, mode):
    """Of its own verl names a key that this sampler refuses, or replaces failed groups for ever."""
    buffer = make(sampler, mode)
    Chooser(buffer, ["c1", "c2", "t1"], 2)
    finish(buffer, ["c1", "c2", "t1"], failed=["c1", "c2", "t1"], has_rows=False)
    with pytest.raises(RuntimeError, match="^the reward function raises ValueError$"):
        buffer.sample(3, "train", 1)


def test_an_asynchronous_step_goes_on_while_some_candidates_are_answered():
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    Chooser(buffer, ["c1", "c2", "c3"], 2)
    finish(buffer, ["c1", "c2", "c3"], failed=["c1", "c2"], steps={"c3": 3})
    buffer._sync_metadata_from_transfer_queue()
    assert buffer._terminal_eviction_reasons(3, "train")[2] == {"c1", "c2"}


def test_trusted_groups_older_than_verl_allows_are_still_taken():
    """verl asserts that no stale group is selected; trusted ones are not trained on, and weighed by their age."""
    buffer = make(GradAlignAsyncSampler, "colocate_async")
    chooser = Chooser(buffer, ["t1", "c1"], num_candidates=1)
    finish(buffer, ["t1", "c1"], steps={"t1": 1, "c1": 4})
    buffer.sample(4, "train", 1)
    assert chooser.asked == [(["c1", "t1"], [], 4)]


def test_trusted_groups_do_not_count_as_samples_that_an_update_could_take():
    """verl hands devices back to training when so many groups can be trained on."""
    buffer = make(GradAlignAsyncSampler, "separate_async")
    Chooser(buffer, ["t1", "t2", "c1"], num_candidates=2)
    finish(buffer, ["t1", "t2", "c1"])
    assert buffer.get_sampleable_count(1, "train") == 1


def test_each_update_of_a_step_takes_the_oldest_groups_that_are_left():
    """separate_async cuts a step into updates, and asks for a batch before each."""
    buffer = make(GradAlignAsyncSampler, "separate_async")
    sent = ["c4", "c2", "c3", "c1"]
    chooser = Chooser(buffer, [*sent, "t1"], num_candidates=2)
    for _ in range(2):
        finish(buffer, [problem.uid for problem in chooser.in_flight])
        buffer.finished_keys.clear()
        buffer.sample(1, "train", 2)
        chooser.in_flight.take(chooser.asked[-1][0])
    assert [uids for uids, _, _ in chooser.asked] == [["c2", "c4", "t1"], ["c1", "c3"]]


MODES = {
    "sync": "gradalign",
    "colocate_async": "gradalign_colocate_async",
    "separate_async": "gradalign_colocate_async, or with .*gradalign_separate_async",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampler", [GradAlignSampler, GradAlignAsyncSampler])
def test_a_trainer_of_verls_own_is_refused_before_any_worker_starts_with_the_mode_to_set(sampler, mode):
    """verl builds the sampler first of all, from the configuration that +gradalign=... has changed."""
    with pytest.raises(
        ValueError, match=rf"trainer_mode={mode}: .*Remedy: set trainer\.v1\.trainer_mode={MODES[mode]}\b"
    ):
        sampler(trainer_mode=mode, sampler_kwargs=None)


@pytest.mark.parametrize(("sampler", "mode"), [(GradAlignSampler, "sync"), (GradAlignAsyncSampler, "colocate_async")])
def test_finished_groups_are_looked_at_while_others_are_generated(sampler, mode):
    buffer = make(sampler, mode)
    chooser, looked = Chooser(buffer, ["c1", "c2"], 2), []
    finish(buffer, ["c1"])

    def look(uids, tags, seconds):
        looked.append((sorted(uids), sorted(tags), seconds))
        finish(buffer, ["c1", "c2"])

    buffer.attach(chooser.in_flight, chooser.choose, lambda: "", look)
    buffer.sample(1, "train", 1)
    assert looked == [(["c1"], ["c1_0_0"], 0.01)] and chooser.asked == [(["c1", "c2"], [], 1)]


def test_what_goes_wrong_in_looking_is_not_told_as_a_step_without_answers():
    buffer = make(GradAlignSampler, "sync")
    chooser = Chooser(buffer, ["c1", "c2"], 2)
    finish(buffer, ["c1"])

    def look(*_):
        raise RuntimeError("the storage unit is gone")

    buffer.attach(chooser.in_flight, chooser.choose, lambda: "no answers", look)
    with pytest.raises(RuntimeError, match="the storage unit is gone"):
        buffer.sample(3, "train", 1)
