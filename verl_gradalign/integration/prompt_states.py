# SPDX-License-Identifier: Apache-2.0
"""The policy's hidden states over prompts: ids as verl's agent loop makes them, dealt to ranks, read by the actor.

On the driver:

    check_prompt_states(config, verl_config)     # before workers start
    states_of = PromptStates(prompt_tokens(verl_config), actor_rollout_wg, token_budget(config.probe, verl_config))
    state_PD = states_of([row["raw_prompt"] for row in rows])

Shape legend: P prompts, D numbers of a prompt: the last hidden state, and the mean over the prompt.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.engine.base import BaseEngine

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.integration.engine import VerlEngine, reading_mode
from verl_gradalign.integration.requests import sequence_parallel
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.passes import assign
from verl_gradalign.probe.prompt_states import prompt_states

KEY = "gradalign.forecast.features"
REMEDY = "take prompt out, e.g. gradalign.forecast.features=[source,text]"
ENGINES = ("fsdp", "fsdp2")

Tokens = Callable[[Any], list[int]]


def check_prompt_states(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Raise ValueError if `prompt` is asked for of an actor whose hidden states cannot be read."""
    if not config.is_forecast or "prompt" not in config.forecast.features:
        return
    actor = verl_config.actor_rollout_ref.actor
    refuse_prompt = partial(_refuse, list(config.forecast.features))
    if actor.strategy not in ENGINES or "fsdp_config" not in actor:
        refuse_prompt(f"actor_rollout_ref.actor.strategy={actor.strategy}, and states are read from FSDP only")
    if sequence_parallel(verl_config)[1] > 1:
        refuse_prompt("under sequence parallelism a rank has a part of each prompt (ulysses_sequence_parallel_size)")


def prompt_tokens(verl_config: DictConfig) -> Tokens:
    """Return the function that makes a chat's token ids, as verl's agent loop does for a first turn.

    verl's own chat template, arguments (data.apply_chat_template_kwargs) and length limit, from the left. Tools that a
    loop describes in the prompt are left out: they are the same for all.

    Raises: ValueError if the model is one for images: their part of the prompt is not read.
    """
    model: Any = omega_conf_to_dataclass(verl_config.actor_rollout_ref.model)
    if getattr(model.processor, "image_processor", None) is not None:
        path = verl_config.actor_rollout_ref.model.path
        _refuse(None, f"prompt reads text alone, and {path} has an image processor")
    builder = create_continuous_token_builder(
        model.tokenizer,
        hf_model_type=getattr(model.hf_config, "model_type", None),
        chat_template_kwargs=verl_config.data.get("apply_chat_template_kwargs", {}),
    )
    longest = int(verl_config.actor_rollout_ref.rollout.prompt_length)

    def tokens(messages: Any) -> list[int]:
        ids: list[int] = builder.build_initial_tokens(list(messages))[-longest:]
        return ids

    return tokens


class PromptStates:
    """Asks all data-parallel ranks of an actor for the hidden states of prompts.

    Args:
        tokens: makes a chat's token ids.
        workers: verl's worker group of `GradAlignWorker`, or what answers as it does.
        budget: what a micro-batch of one rank may hold.
    """

    def __init__(self, tokens: Tokens, workers: Any, budget: TokenBudget) -> None:
        self._tokens, self._workers, self._budget = tokens, workers, budget

    def __call__(self, prompts: Sequence[Any]) -> np.ndarray:
        """Return the prompts' states, float32 (prompts, 2 x hidden). Which rank reads which does not matter."""
        ids = [self._tokens(prompt) for prompt in prompts]
        dp_rank_of = list(self._workers._query_dispatch_info("actor"))
        rank_P = np.array(assign([len(of_prompt) for of_prompt in ids], max(dp_rank_of) + 1), dtype=np.int64)
        places = [np.flatnonzero(rank_P == rank) for rank in dp_rank_of]
        shares = [[ids[place] for place in mine] for mine in places]
        replies = self._workers.gradalign_prompt_features(shares, [self._budget] * len(shares))
        state_PD = np.zeros((len(ids), replies[0].shape[1]), dtype=np.float32)
        for mine, reply in zip(places, replies, strict=True):
            state_PD[mine] = reply
        return state_PD


def read_prompts(engine: BaseEngine, prompts: Sequence[Sequence[int]], budget: TokenBudget) -> np.ndarray:
    """Return the hidden states of this rank's prompts, float32 (prompts, 2 x hidden). Collective.

    On a worker; see `probe.prompt_states.prompt_states`. It leaves no trace in the actor.
    """
    with reading_mode(engine):
        on_rank = VerlEngine(engine, _table(prompts), 1.0, budget)
        return prompt_states(on_rank, len(prompts)).numpy()


def _table(prompts: Sequence[Sequence[int]]) -> TensorDict:
    """Return the prompts as rows without responses, a spare row of one token last."""
    ids = [torch.tensor(prompt, dtype=torch.int64) for prompt in (*prompts, (0,))]
    columns = {"input_ids": ids, "position_ids": [torch.arange(len(prompt)) for prompt in ids]}
    nested = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in columns.items()}
    return TensorDict(nested, batch_size=len(ids))


def _refuse(value: Any, why: str) -> NoReturn:
    refuse(KEY, ["prompt"] if value is None else value, why, REMEDY)
