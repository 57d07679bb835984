# SPDX-License-Identifier: Apache-2.0
"""Batched, repeatable sampling from a transformers model, with the log-probability of every sampled token.

Each sequence draws from a separate generator, so what is sampled depends on its prompt, its seed and the weights,
and not on the sequences that happen to share its batch.

    generator = SequenceGenerator(model, tokenizer)
    completions = generator.generate([prompt_ids], SamplingParams(max_tokens=64, temperature=0.7), seeds=[0])

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import logits_process as processing
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, in the words of vLLM's sampling parameters.

    Raises: ValueError for a value outside its range, named with the remedy.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: all tokens
    n: int = 1  # completions per prompt
    stop: tuple[str, ...] = ()  # strings that end a completion, and are part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end a completion, besides the tokenizer's end of sequence
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    logprobs: bool = True

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 (all) or more"),
            ("n", self.n >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"sampling parameter {name}={getattr(self, name)} must be {rule}")

    @classmethod
    def from_request(cls, request: Mapping[str, Any], default_max_tokens: int) -> SamplingParams:
        """Read verl's sampling-parameter dictionary. Unknown keys raise ValueError: dropping one changes the policy."""
        known = dict(request)
        max_tokens = known.pop("max_tokens", known.pop("max_new_tokens", None))
        stop = known.pop("stop", None) or ()
        known["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        known["stop_token_ids"] = tuple(known.pop("stop_token_ids", None) or ())
        known["logprobs"] = bool(known.pop("logprobs", True))
        unknown = set(known) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"sampling parameters {sorted(unknown)} are not supported by the hf rollout; "
                f"it knows {sorted(cls.__dataclass_fields__)}"
            )
        return cls(max_tokens=default_max_tokens if max_tokens is None else max_tokens, **known)


@dataclass(frozen=True)
class Completion:
    """One sampled sequence, its end-of-sequence token included."""

    token_ids: list[int]
    log_probs: list[float]  # log pi(token) under the distribution drawn from (after temperature, top_k and top_p)
    stop_reason: str  # "stop", "length", or "aborted" if the caller stopped the batch first


@dataclass
class _SeededChoice(processing.LogitsProcessor):
    """Chooses the next token of every sequence with that sequence's own generator, and notes its log-probability.

    It runs last and leaves a single finite logit, so transformers' greedy decoding takes the token chosen here.
    argmax(log p - log e), with e exponential, is an exact draw from p (the Gumbel-max trick).
    """

    generators: list[torch.Generator] | None
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_p_BV = torch.log_softmax(scores.float(), dim=-1)
        keys_BV = log_p_BV
        if self.generators is not None:
            noise_BV = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
            keys_BV = log_p_BV - noise_BV.log()
        choice_B = keys_BV.argmax(dim=-1, keepdim=True)
        self.log_probs.append(log_p_BV.gather(1, choice_B).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter(1, choice_B, 0.0)


@dataclass
class _Ending(StoppingCriteria):
    """Ends every row once `should_stop` says so, and rows whose *generated* text contains a stop string.

    transformers' own criterion for stop strings also looks at the prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[str, ...]
    prompt_width: int
    should_stop: Callable[[], bool] | None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if self.should_stop is not None and self.should_stop():
            return torch.ones(len(input_ids), dtype=torch.bool)
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :]) if self.stop else [""] * len(input_ids)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts])


@dataclass
class SequenceGenerator:
    """Samples completions for batches of token-id prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Return `params.n` completions for each prompt, prompt-major; `seeds` holds one seed for each of them.

        `should_stop` is asked after every token; once it returns True, unfinished completions end as they are.
        Raises: ValueError if the number of seeds is not len(prompts) * n.
        """
        if len(seeds) != len(prompts) * params.n:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x n={params.n}: give one per completion")
        rows = [list(prompt) for prompt in prompts for _ in range(params.n)]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        is_greedy = params.temperature == 0
        choice = _SeededChoice(None if is_greedy else [torch.Generator().manual_seed(seed) for seed in seeds])
        end_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.tokenizer.eos_token_id})
        config = GenerationConfig(
            max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=sorted(end_ids) or None, pad_token_id=pad
        )
        # What `config` leaves unset transformers takes from the model's own settings, which must not change the policy.
        own, self.model.generation_config = self.model.generation_config, config
        try:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=processing.LogitsProcessorList([*_warpers(params), choice]),
                stopping_criteria=StoppingCriteriaList([_Ending(self.tokenizer, params.stop, width, should_stop)]),
            )
        finally:
            self.model.generation_config = own
        sampled = zip(output[:, width:].tolist(), torch.stack(choice.log_probs, dim=1).tolist(), strict=True)
        return [self._cut(tokens, log_probs, end_ids, params) for tokens, log_probs in sampled]

    def _cut(self, tokens: list[int], log_probs: list[float], end_ids: set[int], params: SamplingParams) -> Completion:
        """Drop what transformers appended to a finished row while the rest of its batch went on."""
        for i, token in enumerate(tokens):
            text = self.tokenizer.decode(tokens[: i + 1]) if params.stop else ""
            if token in end_ids or any(stop in text for stop in params.stop):
                return Completion(tokens[: i + 1], log_probs[: i + 1], "stop")
        return Completion(tokens, log_probs, "length" if len(tokens) == params.max_tokens else "aborted")


def _warpers(params: SamplingParams) -> list[processing.LogitsProcessor]:
    """Return transformers' own processors for `params`, in vLLM's order: penalty, temperature, top_k, top_p."""
    warpers = (
        (params.repetition_penalty != 1, processing.RepetitionPenaltyLogitsProcessor, params.repetition_penalty),
        (params.temperature not in (0, 1), processing.TemperatureLogitsWarper, float(params.temperature)),
        (params.top_k > 0, processing.TopKLogitsWarper, params.top_k),
        (params.top_p < 1, processing.TopPLogitsWarper, params.top_p),
    )
    return [warper(value) for is_wanted, warper, value in warpers if is_wanted]
