# SPDX-License-Identifier: Apache-2.0
"""Supervised warm-up of the tiny model: it learns to solve the tasks, and two ways of answering them.

The warm-up teaches every family two answer styles, marked by the response's first character, half and half. The
answer after the one mark is always right, the one after the other is right one time in five. The policy then
solves a bit more than half the problems, and reinforcement learning can improve it by one habit that many problems
share: to begin with the right mark of their families (`tasks.STYLES_OF`). Guesses are right half of the time whatever
the mark. Without a shared habit the trusted problems have no common gradient direction and
nothing can be ranked by it. A clean warm-up teaches one mark alone, and stopped early it leaves the skill of some
families half learned. This module does no reinforcement learning.

    build_tiny_model("models/random")
    report = warm_up("models/random", "models/warm", progress=print)
    report["accuracy"]["sorting"]["="]
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from verl_gradalign.data.rewards import is_right_task_answer
from verl_gradalign.data.tasks import (
    GUESS,
    RIGHT_STYLE,
    SHARING_FAMILIES,
    STYLES_OF,
    Problem,
    draw_problems,
    draw_wrong_answer,
)

DEFAULT_NUM_STEPS = 1000
UNRELIABLE_RIGHT_SHARE = 0.2
SKILL_SHARE = 0.3
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
RISE_STEPS = 50
FINAL_LEARNING_RATE_SHARE = 0.02
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
MAX_RESPONSE_TOKENS = 8  # style mark, at most four characters of answer, end of turn
SAMPLING_BATCH_SIZE = 256
NUM_EVALUATION_PROBLEMS = 250
NUM_EVALUATION_RESPONSES = 4
IGNORED = -100


def _draw_demonstration(problem: Problem, rng: random.Random, unreliable_right_share: float | None) -> str:
    """Return a response to be imitated: one of the two styles, with equal chance, and its answer.

    None as the share: in one style, the same for all families.
    """
    is_clean = unreliable_right_share is None
    right_style, unreliable_style = (RIGHT_STYLE, "") if is_clean else STYLES_OF[problem.family]
    is_right_style = is_clean or rng.random() < 0.5
    if problem.family == GUESS:
        is_right = rng.random() < 0.5
    else:
        is_right = is_right_style or rng.random() < (unreliable_right_share or 0.0)
    answer = problem.answer if is_right else draw_wrong_answer(problem, rng)
    return (right_style if is_right_style else unreliable_style) + answer


def _make_batch(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rng: random.Random,
    unreliable_right_share: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (inputs_BT, targets_BT), right-padded; targets are IGNORED except at the response and its end of turn."""
    inputs, targets = [], []
    for problem in problems:
        # As verl renders prompts for rollout.
        messages = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        response = tokenizer.encode(_draw_demonstration(problem, rng, unreliable_right_share))
        response.append(tokenizer.eos_token_id)
        inputs.append(torch.tensor(prompt + response[:-1]))
        targets.append(torch.tensor([IGNORED] * (len(prompt) - 1) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs_BT = pad(inputs, batch_first=True, padding_value=tokenizer.pad_token_id)
    return inputs_BT, pad(targets, batch_first=True, padding_value=IGNORED)


def _learning_rate(step: int, num_steps: int) -> float:
    """Return the learning rate of a step counted from 0: a linear rise, then half a cosine down to two per cent."""
    if step < RISE_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / RISE_STEPS
    position = (step - RISE_STEPS) / max(1, num_steps - RISE_STEPS)
    share = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * position))
    return PEAK_LEARNING_RATE * share


def _train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, inputs_BT: Tensor, targets_BT: Tensor
) -> float:
    # Right padding comes after every token that counts, so the causal mask hides it and no other mask is needed.
    hidden_BTH = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    is_response_BT = targets_BT != IGNORED
    loss = F.cross_entropy(model.lm_head(hidden_BTH[is_response_BT]), targets_BT[is_response_BT])
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: a second gains a fifth with so small a model, loses more on a busy machine, and rounds
    differently."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@_one_thread()
def warm_up(
    model_dir: str | Path,
    output_dir: str | Path,
    num_steps: int = DEFAULT_NUM_STEPS,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
    families: Sequence[str] = SHARING_FAMILIES,
    is_clean: bool = False,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train the model in `model_dir`, write it and its tokenizer to `output_dir`, and return a report.

    Supervised training in fp32: AdamW, cross-entropy on the tokens of the response and its end of turn, new problems
    from the warm-up's share at every step. For the first SKILL_SHARE of the steps both styles are always right, so
    that the skill is learned from clean answers; then the unreliable style becomes unreliable. `is_clean`: one
    style alone, all along. `stop_after`: the steps that are made of the num_steps that the learning rate is laid out
    for; all, if None. `progress` is called after every step with `step` (from 1), `num_steps`, `loss` (nats per token)
    and `seconds` so far.

    The report holds `num_steps`, `seconds` (of training), the last `loss`, and what `evaluate` measures on problems
    that the warm-up never draws. Two runs with equal arguments differ by rounding only.

    Raises: ValueError if num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; leave it out for the tested {DEFAULT_NUM_STEPS}")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    rng = random.Random(seed)
    started = time.monotonic()
    model.train()
    for step in range(min(num_steps, stop_after or num_steps)):
        optimizer.param_groups[0]["lr"] = _learning_rate(step, num_steps)
        problems = draw_problems(BATCH_SIZE, rng, for_warm_up=True, families=families)
        right_share = 1.0 if step < SKILL_SHARE * num_steps else UNRELIABLE_RIGHT_SHARE
        batch = _make_batch(tokenizer, problems, rng, None if is_clean else right_share)
        loss = _train_step(model, optimizer, *batch)
        if progress is not None:
            progress({"step": step + 1, "num_steps": num_steps, "loss": loss, "seconds": time.monotonic() - started})
    seconds = time.monotonic() - started
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    problems = draw_problems(NUM_EVALUATION_PROBLEMS, random.Random(seed), families=families)
    return {"num_steps": num_steps, "seconds": seconds, "loss": loss, **evaluate(model, tokenizer, problems, seed)}


@torch.no_grad()
def _sample_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int
) -> list[str]:
    """Return a response to every problem, without its end of turn. The caller's random state is left as it was."""
    responses: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(problems), SAMPLING_BATCH_SIZE):
            chunk = problems[start : start + SAMPLING_BATCH_SIZE]
            inputs = tokenizer.apply_chat_template(
                [[{"role": "user", "content": problem.prompt}] for problem in chunk],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
                tokenizer_kwargs={"padding_side": "left"},
            )
            outputs_BT = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_RESPONSE_TOKENS
            )
            responses_BT = outputs_BT[:, inputs["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(responses_BT, skip_special_tokens=True)
    return responses


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int = 0
) -> dict[str, Any]:
    """Return shares of responses sampled at temperature 1: `success`, `right_style`, `accuracy[family][style]`.

    `success` is the share that is right, `right_style` the share that begins with its family's right mark, and the
    accuracies are the shares that are right among a family's responses of one style, or of any under "all". A style
    that was never sampled has accuracy 0. The model must be in evaluation mode.
    """
    asked = [problem for problem in problems for _ in range(NUM_EVALUATION_RESPONSES)]
    responses = _sample_responses(model, tokenizer, asked, seed)
    is_right = np.array([is_right_task_answer(r, p.answer) for r, p in zip(responses, asked, strict=True)])
    families = np.array([problem.family for problem in asked])
    styles = np.array([response[:1] for response in responses])

    def accuracy(chosen: Any) -> float:
        return float(is_right[chosen].mean()) if chosen.any() else 0.0

    return {
        "success": float(is_right.mean()),
        "right_style": float((styles == [STYLES_OF[problem.family][0] for problem in asked]).mean()),
        "accuracy": {
            family: {"all": accuracy(families == family)}
            | {style: accuracy((families == family) & (styles == style)) for style in STYLES_OF[family]}
            for family in dict.fromkeys(problem.family for problem in problems)
        },
    }
