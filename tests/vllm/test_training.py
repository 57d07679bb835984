# SPDX-License-Identifier: Apache-2.0
"""verl trains on chosen problems with real vLLM as its rollout, which draws from the actor's weights.

One run, of a model that has exactly as many logits as its tokenizer has tokens: verl masks what vLLM has beyond them,
and the actor does not.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.runs import Run, Workplace, gradalign
from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.toy.model import build_tiny_model

pytestmark = pytest.mark.vllm

TIMEOUT_S = 1200
NUM_STEPS = 2
# Rollout and actor compute the same float32 forward, vLLM with kernels and a cache of its own: measured 9e-7.
RTOL_LOG_PROB = 1e-4
# What a rollout that missed the first step's update would show instead: measured 0.12, the median of all tokens.
LEAST_CHANGE = 100 * RTOL_LOG_PROB


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """An untrained model: it answers any problem with any byte, and `first_byte` likes half of them."""
    root = tmp_path_factory.mktemp("vllm")
    files = write_task_files(root / "data", num_pool=64, num_trusted=8, num_test=8, seed=0)
    # Untied: a tied head at random weights repeats its last token for ever.
    return Workplace(root, files, build_tiny_model(root / "model", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def run(workplace: Workplace) -> Run:
    folder = workplace.root / "run"
    folder.mkdir()
    command, environment = workplace.command(
        folder,
        *gradalign("confident_cosine", workplace.files),
        "reward.custom_reward_function.path=pkg://verl_gradalign.bench.made_up_rewards",
        "reward.custom_reward_function.name=first_byte",
        f"trainer.total_training_steps={NUM_STEPS}",
        # Large enough that the first update shows in every log-probability.
        "actor_rollout_ref.actor.optim.lr=2e-3",
        batched=False,
    )
    command[command.index("+platform=cpu")] = "+platform=cpu_vllm"
    environment |= {
        "VERL_USE_EXTERNAL_MODULES": "tests.vllm.observer",
        "OBSERVED_ROWS": str(folder / "observed.jsonl"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout + done.stderr
    (folder / "run.log").write_text(output, encoding="utf-8")
    assert done.returncode == 0, output[-6000:]
    return Run(folder, done.returncode, output)


def observed_rows(run: Run, step: int) -> list[dict]:
    """What `observer.py` wrote about the rows of a step."""
    lines = (run.folder / "observed.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["step"] == step]


def column(rows: list[dict], name: str) -> np.ndarray:
    """Return the log-probabilities of all tokens of the rows, end to end."""
    return np.concatenate([row[name] for row in rows])


def initial_log_probs(model: Path, rows: list[dict]) -> np.ndarray:
    """Return what a plain forward of the untrained model gives the tokens of the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for row in rows:
        ids_T = torch.tensor(row["prompt"] + row["response"])
        with torch.no_grad():
            log_probs_TV = policy(ids_T[None]).logits[0, :-1].log_softmax(-1)
        log_probs_T = log_probs_TV.gather(1, ids_T[1:, None])[:, 0]
        found.append(log_probs_T[-len(row["response"]) :].numpy())
    return np.concatenate(found)


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of any token, as a share of the expected log-probability."""
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def test_training_selects_with_vllm_as_the_rollout(run: Run) -> None:
    assert "vLLMHttpServer" in run.output
    assert len(run.steps) == NUM_STEPS
    for step, metrics in enumerate(run.steps, start=1):
        rows = [row for row in run.log if row["step"] == step]
        assert len(rows) == 16 and sum(row["kept"] for row in rows) == 4
        assert metrics["gradalign/live"] > 4
        assert metrics["gradalign/direction/norm"] > 0
        assert metrics["actor/grad_norm"] > 0
        assert len(run.trained_rows(step)) == len(observed_rows(run, step)) == 4 * 8


def test_rollout_log_probs_agree_with_the_actors(run: Run) -> None:
    for step in range(1, NUM_STEPS + 1):
        rows = observed_rows(run, step)
        assert largest_difference(column(rows, "rollout"), column(rows, "actor")) < RTOL_LOG_PROB


def test_pushed_weights_reach_vllm(run: Run, workplace: Workplace) -> None:
    """The first step's rollouts come from the initial weights, the second's from updated ones, as the actor's do."""
    first, second = observed_rows(run, 1), observed_rows(run, 2)
    assert largest_difference(column(first, "rollout"), initial_log_probs(workplace.model, first)) < RTOL_LOG_PROB
    moved = np.abs(column(second, "rollout") / initial_log_probs(workplace.model, second) - 1)
    assert np.median(moved) > LEAST_CHANGE
    assert largest_difference(column(second, "rollout"), column(second, "actor")) < RTOL_LOG_PROB
