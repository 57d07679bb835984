# SPDX-License-Identifier: Apache-2.0
"""Supervised warm-up of the tiny model: it learns to solve the tasks, and two ways of answering them.

The warm-up teaches two answer styles, marked by the response's first character, half and half over all families. The
answer after RIGHT_STYLE is always right, the one after UNRELIABLE_STYLE is right one time in five. The policy then
solves a bit more than half the problems, and reinforcement learning can improve it by one habit that all problems
share: to begin with RIGHT_STYLE. Without a shared habit the trusted problems have no common gradient direction and
nothing can be ranked by it. This module does no reinforcement learning.

    build_tiny_model("models/random")
    report = warm_up("models/random", "models/warm", progress=print)
    report["accuracy"]["sorting"]["="]
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from verl_gradalign.data.tasks import (
    FAMILIES,
    RIGHT_STYLE,
    STYLES,
    UNRELIABLE_STYLE,
    Problem,
    draw_problems,
    draw_wrong_answer,
)

__all__ = ["PEAK_LEARNING_RATE", "evaluate", "warm_up"]

UNRELIABLE_RIGHT_SHARE = 0.2
SKILL_SHARE = 0.75
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
RISE_STEPS = 50
FINAL_LEARNING_RATE_SHARE = 0.02
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
MAX_RESPONSE_TOKENS = 8
NUM_EVALUATION_PROBLEMS = 250
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One sampled response to a problem, decoded without its end of turn."""

    problem: Problem
    response: str

    @property
    def is_right(self) -> bool:
        return self.response[:1] in STYLES and self.response[1:] == self.problem.answer


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the prompt's token ids as verl renders them for rollout."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def draw_demonstration(problem: Problem, rng: random.Random, unreliable_right_share: float) -> str:
    """Return a response to be imitated: one of the two styles, with equal chance, and its answer."""
    if rng.random() < 0.5:
        return RIGHT_STYLE + problem.answer
    is_right = rng.random() < unreliable_right_share
    return UNRELIABLE_STYLE + (problem.answer if is_right else draw_wrong_answer(problem, rng))


def _make_batch(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], rng: random.Random, unreliable_right_share: float
) -> tuple[Tensor, Tensor]:
    """Return (inputs_BT, targets_BT), right-padded; targets are IGNORED except at the response and its end of turn."""
    inputs, targets = [], []
    for problem in problems:
        prompt = render_prompt(tokenizer, problem.prompt)
        response = tokenizer.encode(draw_demonstration(problem, rng, unreliable_right_share)) + [tokenizer.eos_token_id]
        inputs.append(torch.tensor(prompt + response[:-1]))
        targets.append(torch.tensor([IGNORED] * (len(prompt) - 1) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs_BT = pad(inputs, batch_first=True, padding_value=tokenizer.pad_token_id)
    return inputs_BT, pad(targets, batch_first=True, padding_value=IGNORED)


def learning_rate(step: int, num_steps: int) -> float:
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
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def warm_up(
    model_dir: str | Path,
    output_dir: str | Path,
    num_steps: int = 1000,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    model.train()
    started = time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        inputs_BT, targets_BT = _make_batch(
            tokenizer,
            draw_problems(BATCH_SIZE, rng, for_warm_up=True),
            rng,
            1.0 if step < SKILL_SHARE * num_steps else UNRELIABLE_RIGHT_SHARE,
        )
        loss = _train_step(model, optimizer, inputs_BT, targets_BT)
        if progress is not None:
            progress({"step": step + 1, "num_steps": num_steps, "loss": loss, "seconds": time.monotonic() - started})
    seconds = time.monotonic() - started
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    problems = draw_problems(NUM_EVALUATION_PROBLEMS, random.Random(seed + 1))
    return {"num_steps": num_steps, "seconds": seconds, "loss": loss, **evaluate(model, tokenizer, problems, seed=seed)}


def sample_responses(model, tokenizer, problems, num_responses=4, temperature=1.0, seed=0, batch_size=256):
    queue = [p for p in problems for _ in range(num_responses)]
    samples = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(queue), batch_size):
            chunk = queue[start : start + batch_size]
            prompts = [render_prompt(tokenizer, p.prompt) for p in chunk]
            width = max(map(len, prompts))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_RESPONSE_TOKENS,
            )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            samples += [Sample(p, t) for p, t in zip(chunk, texts, strict=True)]
    return samples


def evaluate(model, tokenizer, problems, num_responses=4, temperature=1.0, seed=0):
    samples = sample_responses(model, tokenizer, problems, num_responses, temperature, seed)

    def mean(xs):
        return sum(xs) / max(1, len(xs))

    acc = {}
    for f in FAMILIES:
        mine = [s for s in samples if s.problem.family == f]
        acc[f] = {"all": mean([s.is_right for s in mine])} | {
            st: mean([s.is_right for s in mine if s.response[:1] == st]) for st in STYLES
        }
    return {
        "success": mean([s.is_right for s in samples]),
        "style": mean([s.response[:1] == RIGHT_STYLE for s in samples]),
        "accuracy": acc,
    }
