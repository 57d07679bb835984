# SPDX-License-Identifier: Apache-2.0
"""A trainer of verl that chooses what it trains on.

A few of verl's methods are extended; everything else of a step (log-probs, advantages, update, weight push,
checkpoints, validation) is verl's own.
"""

import logging
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gradalign.errors import require_all
from verl_gradalign.integration import run_identity
from verl_gradalign.integration.checks import check_data, read_config, verl_checks
from verl_gradalign.integration.forecasting import Forecasting
from verl_gradalign.integration.in_flight import InFlight
from verl_gradalign.integration.measuring import MeasuringTrainer
from verl_gradalign.integration.model_check import check_model
from verl_gradalign.integration.prompts import PROBLEM_ID, PromptTable, joined, problems_of
from verl_gradalign.integration.read_ahead import ReadAhead
from verl_gradalign.integration.requests import row_use
from verl_gradalign.integration.reward_check import REMEDY, failures_in_words, reward_of_empty_answer
from verl_gradalign.integration.rollouts import (
    keep_rows,
    needs_completion,
    needs_log_probs,
    on_all_ranks,
    read_responses,
    read_step,
    stored_rows,
)
from verl_gradalign.integration.sampler import GradAlignAsyncSampler, GradAlignSampler, use_own_sampler
from verl_gradalign.integration.selector import AlignmentSelector
from verl_gradalign.integration.worker import GradAlignWorker, use_own_workers
from verl_gradalign.log.columns import StepSeconds
from verl_gradalign.log.run_log import RunNotes
from verl_gradalign.metrics import named
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.curriculum import Curriculum, Draw
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.scores import score_of
from verl_gradalign.selection.select import REASONS
from verl_gradalign.selection.state_file import load_state, save_state

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class SelectionTrainer(MeasuringTrainer):
    """Rolls out more candidates than it trains on, and the trusted sets; trains on the best.

    Mixed into a trainer of verl. `verl_mode` is that trainer's name, `sampler_class` what waits for its groups,
    `worker_class` what its actor is.
    """

    verl_mode: str
    sampler_class: type[GradAlignSampler] | type[GradAlignAsyncSampler]
    worker_class: type[GradAlignWorker] = GradAlignWorker
    _has_warned_of_failures = False

    def __init__(self, config: DictConfig) -> None:
        self.gradalign = read_config(config)
        checks = *verl_checks(self.gradalign), check_data, run_identity.check_identity
        require_all((partial(check, self.gradalign, config) for check in checks), check_model(self.gradalign, config))
        self._identity = run_identity.identity(self.gradalign, config)
        self._use_own_sampler(config)
        super().__init__(config)
        if not isinstance(self.replay_buffer, self.sampler_class):
            raise ValueError(
                f"trainer.v1.sampler.custom_sampler.name={config.trainer.v1.sampler.custom_sampler.name}: "
                f"this trainer mode needs a {self.sampler_class.__name__}. Remedy: remove the override, or derive your "
                f"sampler from verl_gradalign.integration.sampler.{self.sampler_class.__name__}."
            )
        self._score = score_of(self.gradalign.score)
        self._in_flight = InFlight()
        self._ahead = ReadAhead(self.gradalign, config)
        self._draw = Draw((), 0)
        self._sending_s = 0.0
        self._sums: dict[str, float] = {}
        """Metrics of the step, added up over its selections: verl would report the mean of several."""

    @property
    def trainer_mode(self) -> str:
        """verl compares this with the names of its own modes to learn how training goes."""
        return self.verl_mode

    @trainer_mode.setter
    def trainer_mode(self, _: str) -> None:
        return None

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self._pool = PromptTable(self.train_dataset)
        # verl's own data loader serves a plain random run, so it must tell problems apart too.
        self.train_dataset.dataframe = self.train_dataset.dataframe.add_column(PROBLEM_ID, self._pool.problem_ids)
        self._init_trusted()
        self._curriculum = self._new_curriculum()
        folder = Path(self.config.trainer.default_local_dir) / "gradalign"
        has_wandb = "wandb" in self.config.trainer.logger
        self._notes = RunNotes(
            self.gradalign, folder, run_identity.about_run(self.config), self._pool, self._decode, has_wandb
        )
        self._selector = AlignmentSelector(self.gradalign, self.config, self._pool.num_rows)
        self.replay_buffer.attach(self._in_flight, self._choose, self._nothing_answered, self._look_ahead)

    def _new_curriculum(self) -> Curriculum | Forecasting | None:
        """Return what decides which problems a step rolls out. None: verl's own data loader does."""
        chooses = self._score.rank is not None
        if not chooses and self.gradalign.schedule == "step":
            return None
        return Curriculum(self.gradalign, self._pool.problem_ids, self.config.data.train_batch_size, chooses=chooses)

    def _decode(self, token_ids: Any) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        use_own_workers(self.role_worker_mapping, self.worker_class)

    def on_init_end(self) -> None:
        """Refuse, before anything is rolled out, an actor that cannot be scored."""
        if self._score.needs_gradients:
            config = self.gradalign
            use = row_use(config, self.config)
            self.actor_rollout_wg.gradalign_check(config.estimator, config.probe, use, config.measures_in_update)
        super().on_init_end()

    def prepare_step(self) -> dict[str, Any]:
        """Send the step's problems, and the trusted sets when the direction is stale, to the rollout."""
        started = time.perf_counter()
        self._send_problems()
        self._sending_s = time.perf_counter() - started
        return {}

    def _send_problems(self) -> None:
        step = self.global_steps
        if self._curriculum is None:
            batch = self._next_train_batch()
            self._draw = Draw(tuple(problem.problem_id for problem in problems_of(batch)), 0)
        else:
            self._draw = self._draw_problems(step)
            is_larger = self._draw.is_scored and self.gradalign.schedule in ("round", "once", "staged")
            batch = self._candidates(self._draw.problem_ids, self.gradalign.curriculum.n if is_larger else None)
        batches = [batch]
        for name, problem_ids in self._due_trusted(step).items():
            table, n = self._trusted[name]
            batches.append(table.batch(problem_ids, step, n or self._rollout_n))
            self._in_flight.add(problems_of(batches[-1], name))
        for together in joined(batches):
            self._submit_batch_to_rollout(together)
        # Each of a step's updates takes its share.
        self._in_flight.num_candidates = len(self._draw.problem_ids) // self.parameter_sync_step
        self._in_flight.takes_trusted = True
        # Kept responses are of many steps, so none is waited for.
        self._in_flight.takes_trusted_singly = self._kept_responses is not None
        self._in_flight.waits_for_trusted = self._kept_responses is None and not self._selector.has_direction

    def _draw_problems(self, step: int) -> Draw:
        assert self._curriculum is not None
        return self._curriculum.draw(step)

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """Return further candidates: what verl asks for to fill up evicted groups, or ahead of the first step.

        Raises: RuntimeError if the step's draw holds every problem already.
        """
        if self._curriculum is None:
            batch = super()._next_train_batch(num_prompts)
            self._in_flight.add(problems_of(batch))
            return batch
        further = self._curriculum.refill(num_prompts or self.config.data.train_batch_size)
        if not further:
            raise RuntimeError(
                "algorithm.filter_groups asks for more candidates, but all problems of data.train_files are in this "
                "step already. Remedy: add problems, lower gradalign.oversample, or set algorithm.filter_groups.enable="
                "False."
            )
        return self._candidates(further, None, is_drawn=False)

    def _candidates(self, problem_ids: tuple[int, ...], n: int | None, is_drawn: bool = True) -> TensorDict:
        batch = self._pool.batch(problem_ids, self.global_steps, n or self._rollout_n)
        self._in_flight.add(self._sent(problems_of(batch), is_drawn))
        return batch

    def _sent(self, problems: Sequence[Problem], is_drawn: bool) -> Sequence[Problem]:
        """Return problems as they are noted in flight; `is_drawn`: they are the step's draw, in its order."""
        return problems

    def _choose(
        self, batch: KVBatchMeta, uids: Sequence[str], failed: set[str], step: int
    ) -> tuple[KVBatchMeta, dict[str, float]]:
        """Carry out the step's selection, for the sampler: return the rows to train on and metrics.

        Raises: RuntimeError if no group can be trained on.
        """
        started = time.perf_counter()
        groups, trusted = self._read(batch, uids, failed)
        choice, metrics = self._select(batch, groups, trusted, step)
        kept = keep_rows(batch, self._trained(groups, trusted, choice, step), self._rollout_n)
        if not kept.keys:
            counts = Counter(REASONS[code] for code in choice.selection.reason_P)
            raise RuntimeError(f"step {step}: {failures_in_words(counts, len(groups))} {self._ask_reward()}")
        self._warn_of_failures(groups)
        metrics |= self._selector.direction_age(step, self._draw.is_scored)
        self._add("tokens/trained", sum(tag["response_len"] for tag in kept.tags))
        self._add("responses/trained", len({key.rsplit("_", 1)[0] for key in kept.keys}))
        self._add("seconds/selection", time.perf_counter() - started)
        return kept, named(metrics)

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """Make verl's step: one selection and update, or several."""
        self._sums = {}
        batch = super().step(metrics, timing_raw)
        metrics |= named(self._sums)
        return batch

    def _read(
        self, batch: KVBatchMeta, uids: Sequence[str], failed: set[str]
    ) -> tuple[list[Group], dict[str, list[Group]]]:
        """Return the groups that the sampler took: candidates, and those of each trusted set."""
        taken = self._in_flight.take(uids)
        # A direction of just these is that of all the step's updates, so it is made ahead of the first.
        self._in_flight.takes_trusted = self._kept_responses is not None
        if self.verl_mode == "sync":
            self._in_flight.retain(())  # what was not taken has been evicted
        config, is_scored = self.gradalign, self._draw.is_scored
        ahead = self._ahead.take(uids, is_scored)
        self._ahead.retain({problem.uid for problem in self._in_flight})
        if batch.keys and needs_completion(config, self.config, is_scored):
            self.free_rollout()
            self._complete(batch, taken)
        return read_step(taken, batch, failed, config, self.config, is_scored, ahead)

    def _look_ahead(self, uids: Container[str], tags: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
        """Read finished groups, for the sampler, while it waits for others."""
        finished = [problem for problem in self._in_flight if problem.uid in uids]
        self._ahead.read(finished, tags, self._draw.is_scored, seconds)

    def _select(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> tuple[Choice, dict[str, float]]:
        """Measure the candidates and choose among them; return the choice, noted in the log, and its metrics."""
        reply = self._measure_step(batch, groups, trusted, step) if self._draw.is_scored else None
        choice = self._selector.choose(groups, reply, self._draw, step, is_planned=self._curriculum is not None)
        # Before rows are cleared: the log shows some of the responses.
        read = partial(read_responses, batch.partition_id)
        return choice, self._notes.record(step, read, groups, choice, reply, trusted) | self._kept_metrics()

    def _nothing_answered(self) -> str:
        """Return the message for a step of which no group was answered."""
        return f"step {self.global_steps}: no group has an answer with a reward. {self._ask_reward()}"

    def _ask_reward(self) -> str:
        """Return what the reward function says of an empty answer to a problem of the step, and what to do."""
        problem_ids = self._draw.problem_ids or self._pool.problem_ids.tolist()
        prompt = self._pool.batch(problem_ids[:1], self.global_steps, 1)
        workers = self.reward_loop_manager.reward_loop_worker_handles
        return f"{reward_of_empty_answer(workers, prompt, self.tokenizer.eos_token_id)} {REMEDY}"

    def _warn_of_failures(self, groups: Sequence[Group]) -> None:
        """Say once what the reward function does to a problem where groups fail."""
        failures = Counter(group.failure for group in groups if group.is_failed)
        if failures and not self._has_warned_of_failures:
            self._has_warned_of_failures = True
            logger.warning("%s %s", failures_in_words(failures, len(groups)), self._ask_reward())

    def _trained(
        self, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], choice: Choice, step: int
    ) -> list[Group]:
        """Return the groups that are trained on in this step, in the order in which they were sent."""
        kept = [groups[place] for place in sorted(choice.selection.kept)]
        is_of_step = not isinstance(self._curriculum, Curriculum) or self.gradalign.schedule == "step"
        if is_of_step or not self._draw.is_scored or not kept:
            return kept
        assert isinstance(self._curriculum, Curriculum)
        best_first = [groups[place].problem.problem_id for place in choice.selection.kept]
        trained = set(self._curriculum.keep(step, best_first))
        return [group for group in kept if group.problem.problem_id in trained]

    def _complete(self, batch: KVBatchMeta, taken: Sequence[Problem]) -> None:
        """Add what is read of rows and not there yet: rewards of a colocated model, values, the actor's log-probs."""
        if self.reward_loop_manager.reward_loop_worker_handles is None:
            super()._compute_reward_colocate(batch)
            self._rewarded = set(batch.keys)
        if self.use_critic:
            on_all_ranks(batch, super()._compute_values, self.actor_rollout_wg, self.tokenizer.eos_token_id)
        if self._draw.is_scored and needs_log_probs(self.gradalign, self.config):
            rows = stored_rows(batch, taken, self.gradalign)
            on_all_ranks(rows, super()._compute_old_log_prob, self.actor_rollout_wg, self.tokenizer.eos_token_id)

    def _compute_reward_colocate(self, batch: KVBatchMeta, metrics: dict[str, Any] | None = None) -> KVBatchMeta:
        """Rewards that were computed before the selection are not computed again."""
        if set(batch.keys) <= getattr(self, "_rewarded", set()):
            return batch
        return super()._compute_reward_colocate(batch, metrics)

    def _save_checkpoint(self) -> None:
        """Write the selection's state first: verl's tracker file, written last, makes both valid at once."""
        folder = Path(self.config.trainer.default_local_dir).absolute() / f"global_step_{self.global_steps}"
        curriculum = None if self._curriculum is None else self._curriculum.state()
        in_flight = [asdict(problem) for problem in self._in_flight]
        state = {**self._selector.state(), "curriculum": curriculum, "in_flight": in_flight}
        state["trusted"] = self._save_trusted(folder)
        save_state(run_identity.state_file(folder), self._identity, state)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._notes.begin(self.global_steps)
        folder = run_identity.resume_folder(self.config)
        if folder is None or not self.global_steps or not run_identity.saved_state_file(folder).exists():
            return
        path = run_identity.saved_state_file(folder)
        state = load_state(path)
        self._selector.restore(state, has_direction=self._load_trusted(folder, state["trusted"]))
        if self._curriculum is not None:
            self._curriculum.restore(state["curriculum"])
        self._in_flight.add(Problem(**values) for values in state["in_flight"])
        # A synchronous step leaves nothing in flight; of an asynchronous one, what verl restored is still to come.
        restored = (tq.kv_list("train") or {}).get("train", {}) if self.verl_mode != "sync" else {}
        self._in_flight.retain(restored)
        # verl fills up its warm-up to so many prompts, of which a trusted one is none that a step takes.
        self._restored_tq_prompt_count -= len(self._in_flight.trusted())
        logger.info("resumed the selection of step %d from %s", self.global_steps, path)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        seconds = StepSeconds(
            step=timing_raw["step"],
            # verl's sampling waits for the groups and then has them chosen among.
            rollout=max(0.0, self._sending_s + timing_raw["gen"] - self._sums["seconds/selection"]),
            selection=self._sums["seconds/selection"],
            update=timing_raw.get("update_actor", 0.0),
        )
        metrics.update(self._notes.end_step(global_steps, metrics, seconds, self.logger))

    def _validate(self) -> dict[str, float]:
        metrics: dict[str, float] = super()._validate()
        self._notes.note_validation(self.global_steps, metrics)
        return metrics

    def _use_own_sampler(self, verl_config: DictConfig) -> None:
        use_own_sampler(verl_config, type(self).__name__, self.sampler_class, self.gradalign.poll_interval_s)
