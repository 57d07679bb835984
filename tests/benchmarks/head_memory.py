# SPDX-License-Identifier: Apache-2.0
"""What a scoring pass of ghost holds at most, by the size of the vocabulary.

    python -m tests.benchmarks.head_memory

A Qwen2 of hidden size 256 and four layers, one micro-batch, float32. Prints a line of JSON for each number of tokens
and vocabulary: megabytes at the highest point, and, of the wider vocabulary, what it takes more than the narrow one's,
beside the output layer's parameters, their direction and a chunk of logits, as a ratio.
"""

from __future__ import annotations

import json
from dataclasses import replace

from tests.benchmarks.cases import BASE, build_model, draw_problems
from tests.benchmarks.counting import peak_bytes
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.head import plain_head
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.sizes import CHUNK_ELEMENTS
from verl_gradalign.types import ProblemRows

MB, ROWS, FLOAT = 2**20, 8, 4
NARROW, WIDE = 1_024, 151_936


def peak(num_tokens: int, vocabulary: int) -> int:
    """Return the bytes that a pass over one problem of so many tokens holds at most, the direction's included."""
    case = replace(
        BASE, hidden_size=256, intermediate_size=1024, num_layers=4, vocabulary=vocabulary, num_problems=1,
        rows_per_problem=ROWS, tokens_per_row=num_tokens // ROWS, max_tokens=num_tokens,
    )  # fmt: skip
    module = build_model(case).train()
    rows = [row for problem in draw_problems(case) for row in problem]
    engine = PlainEngine(module, rows, 1.0, num_tokens)
    share = ProblemRows("0", tuple(range(ROWS)), ROWS, num_tokens, num_tokens // ROWS)
    shards = tuple(parameter.detach().clone() for _, parameter in trainable_parameters(module))
    estimator = ESTIMATORS["ghost"](ProbeConfig(response_derivatives=False))
    with leave_no_trace(module):
        plain_head(engine)
        return peak_bytes(lambda: estimator.score(engine, [share], Direction(shards, 1.0)), "cpu")


def main() -> None:
    for num_tokens in (8_192, 16_384):
        narrow, wide = peak(num_tokens, NARROW), peak(num_tokens, WIDE)
        head = 2 * FLOAT * WIDE * 256  # its parameters, and their direction
        allowed = 1.2 * narrow + head + FLOAT * CHUNK_ELEMENTS
        found = {"tokens": num_tokens, "narrow_mb": round(narrow / MB), "wide_mb": round(wide / MB)}
        print(json.dumps({**found, "of_allowed": round(wide / allowed, 3)}), flush=True)


if __name__ == "__main__":
    main()
