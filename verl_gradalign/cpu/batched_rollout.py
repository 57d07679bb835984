# SPDX-License-Identifier: Apache-2.0
"""Rollout in whole batches, through verl's `agent_loop_manager_class`: for many short responses on a CPU.

verl's own agent loop makes a remote call or three per response, which is right for responses that take seconds and
takes longer than the tiny model where they take a millisecond. Here one call generates what a step asks for, rewards
are computed where the trainer runs, and the rows go to TransferQueue at once. What is sampled is what verl's agent
loop samples (tests/e2e/test_series.py). One turn per response and rule-based rewards only; nothing overlaps.

    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_gradalign.cpu.batched_rollout.BatchedRollout
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import NonTensorData, TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils import hf_tokenizer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_gradalign.cpu.generate import Completion
from verl_gradalign.cpu.hf_rollout import server_name

logger = logging.getLogger(__name__)

# Columns that tell the agent loop what to do, and are no part of a trajectory.
INSTRUCTIONS = ("agent_name", "__rollout_n__", "__do_sample__", "validate")
# The columns that verl's tests read. A test is of more rows than a step, and a column is what a row's time goes into.
READ_IN_TESTS = ("prompts", "responses", "rm_scores", "num_turns", "extra_fields", "uid", "data_source", "reward_model")
# One object for all responses, so that it is wrapped once (`_columns`).
NONE: list[Any] = []
NO_IMAGES: dict[str, Any] = {}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


class BatchedRollout:
    """Stands in for verl's agent loop manager. Lives in the trainer's process.

    Raises: ValueError for another rollout than hf, a reward manager other than verl's naive one, or a teacher.
    """

    def __init__(self, config: DictConfig, teacher_client: Any = None) -> None:
        self._rollout = config.actor_rollout_ref.rollout
        if self._rollout.name != "hf" or teacher_client:
            raise ValueError(
                f"actor_rollout_ref.rollout.name={self._rollout.name}: the batched rollout is for hf, without "
                "distillation. Remedy: remove actor_rollout_ref.rollout.agent.agent_loop_manager_class"
            )
        self._tokenizer = hf_tokenizer(config.actor_rollout_ref.model.path)
        with open_dict(config):
            manager = load_reward_manager(config, self._tokenizer)
        if type(manager) is not NaiveRewardManager:
            raise ValueError(
                f"reward.reward_manager.name={config.reward.reward_manager.name}: the batched rollout knows naive only"
            )
        self._compute_score = manager.compute_score
        self._prompt_ids: dict[str, list[int]] = {}
        self.num_tokens = self.num_responses = 0
        """Generated so far, validation excluded."""

    @classmethod
    def create(
        cls, config: DictConfig, llm_client: Any, teacher_client: Any = None, reward_loop_worker_handles: Any = None
    ) -> BatchedRollout:
        """Return the manager; verl's task runner calls this."""
        return cls(config, teacher_client)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Answer every prompt as often as it says, reward the answers, and put them into TransferQueue."""
        is_validation = bool(prompts["validate"]) if "validate" in prompts else False
        rows = _rows(prompts)
        own = self._rollout.val_kwargs if is_validation else self._rollout
        counts = [int(row.get("__rollout_n__", own.n)) for row in rows]
        sampling = {name: own[name] for name in GREEDY}
        for do_sample in (True, False):
            places = [i for i, row in enumerate(rows) if bool(row.get("__do_sample__", True)) == do_sample]
            if places:
                asked = sampling if do_sample or is_validation else GREEDY
                self._answer([rows[i] for i in places], [counts[i] for i in places], asked, is_validation)

    def _answer(
        self, rows: Sequence[dict[str, Any]], counts: Sequence[int], sampling: Mapping[str, Any], is_validation: bool
    ) -> None:
        prompt_ids = [self._encode(row["raw_prompt"]) for row in rows]
        server = ray.get_actor(server_name(0))
        params = {**sampling, "repetition_penalty": 1.0, "logprobs": self._rollout.calculate_log_probs}
        completions, version = ray.get(server.generate_many.remote(prompt_ids, list(counts), params))
        if not is_validation:
            self.num_tokens += sum(len(c.token_ids) for group in completions for c in group)
            self.num_responses += sum(map(len, completions))
        keys, fields, tags, statuses = [], [], [], []
        for row, prompt, group in zip(rows, prompt_ids, completions, strict=True):
            shared = {name: value for name, value in row.items() if name not in INSTRUCTIONS}
            try:
                fields += [self._fields(prompt, c, {**shared, "session_id": i}, version) for i, c in enumerate(group)]
            except Exception:
                logger.exception("the reward of problem %s could not be computed", row["uid"])
                statuses.append("failure")
                continue
            statuses.append("finished")
            keys += [f"{row['uid']}_{i}_0" for i in range(len(group))]
            lengths = [(len(prompt), len(c.token_ids)) for c in group]
            tags += [
                {"status": "success", "prompt_len": asked, "response_len": answered, "seq_len": asked + answered}
                | {**_versions(version), "global_steps": row["global_steps"]}
                for asked, answered in lengths
            ]
        partition = "val" if is_validation else "train"
        if is_validation:
            fields = [{name: row[name] for name in READ_IN_TESTS} for row in fields]
        if keys:
            tq.kv_batch_put(keys=keys, fields=_columns(fields), tags=tags, partition_id=partition)
        uids = [row["uid"] for row in rows]
        tq.kv_batch_put(keys=uids, tags=[{"status": status} for status in statuses], partition_id=partition)

    def _encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if any(not isinstance(message["content"], str) for message in messages):
            raise ValueError(
                "a prompt has content that is no text, such as an image; the CPU platform answers text only. Remedy: "
                "train on text, or on the platform of your accelerator."
            )
        key = repr(messages)
        if key not in self._prompt_ids:
            ids = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            self._prompt_ids[key] = ids[-self._rollout.prompt_length :]
        return self._prompt_ids[key]

    def _fields(
        self, prompt: list[int], completion: Completion, row: Mapping[str, Any], version: int
    ) -> dict[str, Any]:
        """Return a response and its reward as verl's workers read a trajectory."""
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        result = self._compute_score(
            data_source=row["data_source"],
            solution_str=text,
            ground_truth=row["reward_model"]["ground_truth"],
            # verl's reward managers do not pass the session on; a reward that draws at random wants it.
            extra_info={**row.get("extra_info", {}), "session_id": row["session_id"], "num_turns": 2},
        )
        result = result if isinstance(result, dict) else {"score": result, "acc": result}
        if result["score"] is None:
            raise ValueError("the reward function returned None")
        output = AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=completion.token_ids,
            response_mask=[1] * len(completion.token_ids),
            response_logprobs=completion.log_probs if self._rollout.calculate_log_probs else None,
            multi_modal_data={},
            num_turns=2,
            metrics=AgentLoopMetrics(),
            reward_score=result["score"],
            extra_fields={**_versions(version), "turn_scores": NONE, "tool_rewards": NONE, "reward_extra_info": result},
        )
        fields = {**output.as_dict(), **row}
        fields.pop("multi_modal_data", None)
        fields["loss_mask"] = fields["response_mask"]
        fields["input_ids"] = torch.cat([fields["prompts"], fields["responses"]])
        fields["position_ids"] = torch.arange(len(fields["input_ids"]))
        fields["multi_modal_inputs"] = NO_IMAGES
        return fields


def _rows(batch: TensorDict) -> list[dict[str, Any]]:
    """Return every prompt's columns."""
    columns = {}
    for name, value in batch.items():
        if isinstance(value, NonTensorData):
            columns[name] = [value.data] * len(batch)
        else:  # a column at once: indexing one by row takes ten times as long
            columns[name] = list(value) if isinstance(value, torch.Tensor) else value.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Sequence[dict[str, Any]]) -> TensorDict:
    """Return the rows as verl's own agent loop would put them.

    What rows share, such as a prompt's columns or a reward, is wrapped once: wrapping took longer than generating.
    """
    wrapped: dict[bytes, NonTensorData] = {}

    def wrap(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        key = pickle.dumps(value)
        if key not in wrapped:
            wrapped[key] = NonTensorData(data=value)
        return wrapped[key]

    return list_of_dict_to_tensordict([{name: wrap(value) for name, value in row.items()} for row in rows])


def _versions(version: int) -> dict[str, int]:
    """Return the versions of the weights that a response was sampled with, as verl notes them: one, all along."""
    return dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), version)
