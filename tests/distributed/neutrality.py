# SPDX-License-Identifier: Apache-2.0
"""What scoring, whole or cut short, changes in an engine between its training steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.distributed.engines import accumulate, build_engine, finish_step, infer, train
from tests.distributed.interruptions import Interruption, interrupted
from tests.distributed.observations import differences, observe, observe_model
from tests.distributed.scoring import gather, read, score, tight_budget
from tests.distributed.setups import PROMPTS, SCORINGS, Setup, scorings_of
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead


def measure_neutrality(root: Path, setup: Setup) -> dict[str, Any]:
    """Return, for each scoring, what it changed at once and what differs after the next training step.

    Two equal engines take the same steps, and one of them is scored before each; so a difference shows in all later
    scorings too.
    """
    undisturbed, engine = (_prepare(root, setup) for _ in range(2))
    measured = {}
    for step, name in enumerate(scorings_of(setup), 1):
        estimator, interruption, has_gradient = SCORINGS[name]
        for one in (undisturbed, engine):
            if has_gradient:
                accumulate(one, step)
            one.module.eval()  # not what scoring runs in
        random.seed(step), np.random.seed(step), torch.manual_seed(step)
        before = observe(engine)
        assert has_gradient == any(value is not None for key, value in before.items() if key.startswith("gradient "))
        if not has_gradient:
            # As verl does before an update; it may leave parameters unsharded.
            infer(undisturbed)
            infer(engine)
        _score(engine, estimator, interruption)
        changed = differences(before, observe(engine))
        for one in (undisturbed, engine):
            if has_gradient:
                finish_step(one)
            else:
                train(one, step)
        expected = observe_model(undisturbed)
        assert all(value.isfinite().all() for value in expected.values() if isinstance(value, Tensor)), "diverged"
        differs = differences(expected, observe_model(engine))
        measured[name] = {
            "changed": sorted({key for keys in gather(changed) for key in keys}),
            "differs_after_step": sorted({key for keys in gather(differs) for key in keys}),
        }
    return measured


def _prepare(root: Path, setup: Setup) -> CpuFSDPEngineWithLMHead:
    engine = build_engine(root, setup)
    train(engine, step=0)  # fills the optimizer's state
    return engine


def _score(engine: CpuFSDPEngineWithLMHead, estimator: str, interruption: str) -> None:
    try:
        with interrupted(interruption, engine.module):
            if estimator == "prompts":
                read(engine, PROMPTS, max_tokens=20)
            else:
                score(engine, estimator, tight_budget(engine))
    except Interruption:
        assert interruption != "none"
    else:
        assert interruption == "none", "scoring was not interrupted"
