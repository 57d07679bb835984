# SPDX-License-Identifier: Apache-2.0
"""Which engines the cases run on, and on which problems. Known to the processes and to the tests; no verl in here.

    for name, setup in exact_setups(world_size).items(): ...

Shape legend: P problems, R responses of a problem, G all trainable numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, Problem, build_model, draw_problem, load_float64
from verl_gradalign.config import DirectionConfig

STRATEGIES = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp-orig": {"strategy": "fsdp", "use_orig_params": True},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-kept": {"strategy": "fsdp2", "reshard_after_forward": False},
}
"""Name -> fields of verl's FSDPEngineConfig."""
MODELS = {"qwen2": ("qwen2", True, 32), "qwen3": ("qwen3", False, 32), "wide": ("qwen2", True, 48)}
"""Name -> (architecture, tied embeddings, hidden size). qwen2 has biases, qwen3 norms of queries and keys."""
LEARNING_RATE = 1e-3
WIDE = 4096
"""Tokens of a budget that takes all problems at once."""
ULYSSES = "packed_on_cpu"
"""Attention of engines whose ranks have slices of rows."""
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}

TRUSTED = [draw_problem(lengths, seed) for seed, lengths in enumerate([[5, 3, 4], [4, 6, 2, 3, 8]], 10)]
CANDIDATES = [
    *(draw_problem(lengths, seed) for seed, lengths in enumerate([[7, 1, 4, 3, 3], [3], [6, 6], [30, 2]], 20)),
    draw_problem([2, 2, 2], 24, advantage_scale=0.0),
    draw_problem([1, 5, 2, 4, 8, 2], 25),
]
"""Problems of one row and of six, very short and very long rows, and one without any advantage."""
TRAINED = [draw_problem([3, 6, 2, 5], seed, advantage_scale=5.0) for seed in range(100, 130)]
"""What the n-th training step sees."""
ADVANTAGES = (0.75, -1.0, 0.0, 1.5, -0.25, 0.5)
"""Of the responses of each problem, where a case gives advantages instead of coefficients."""
POOL_WEIGHTS = (0.25, 0.1, 0.0, 0.2, 0.25, 0.16)
"""Of the candidates in the direction that is made of them."""
SKETCH_RANK = 4
TRUSTED_CONFIGS = {
    "aggregate": DirectionConfig(),
    "units": DirectionConfig(aggregation="per_problem_unit"),
    "metric": DirectionConfig(metric="candidates"),
}
TEN_EACH = [draw_problem([15 + (i + k) % 2 for k in range(20)], 80 + i) for i in range(16)]
"""Problems of ten micro-batches of two responses each."""
TWO_RESPONSES = 2 * max(row.num_tokens for problem in TEN_EACH for row in problem)


def numbers_of_large(world_size: int) -> tuple[int, int]:
    """Return how many of TEN_EACH a group of processes scores at a time, twice: as many as share out evenly."""
    first = max(2, world_size)
    return first, 2 * first


MANY = [draw_problem([1 + (5 * i + 3 * k) % 9 for k in range(1 + i % 4)], 40 + i) for i in range(28)]
"""Enough problems for a rank correlation."""


@dataclass(frozen=True)
class Setup:
    """One way to configure verl's engine."""

    strategy: str
    model: str = "qwen3"
    is_checkpointed: bool = False
    is_packed: bool = False
    has_fixed_batches: bool = False
    """Whether verl's micro-batches have a number of rows, or of tokens."""
    defers_sync: bool = True
    is_offloaded: bool = False
    is_replicated: bool = False
    """Whether every rank has all parameters (hybrid sharding over groups of one)."""
    is_kept: bool = False
    """FSDP1's counterpart of fsdp2-kept."""
    num_slices: int = 1
    """Ranks that have slices of the same rows (Ulysses)."""
    is_fused: bool = False
    """Whether verl's fused kernels take the output layer's place."""
    has_adapters: bool = False
    excluded: str | None = None
    """Layers that get no adapter."""
    dtype: str = "fp64"


@dataclass(frozen=True)
class Other:
    """One way to make an engine of verl's BaseEngine alone (`other_engine.py`)."""

    model: str
    is_in_list: bool
    """Whether the module is in a list, as torchtitan's engine has it, or alone, as automodel's."""
    is_packed: bool
    has_fixed_batches: bool
    is_replicated: bool = False
    """Whether every rank has all parameters (hybrid sharding over groups of one)."""


OTHERS = {
    "torchtitan": Other("qwen3", is_in_list=True, is_packed=True, has_fixed_batches=False),
    "automodel": Other("qwen2", is_in_list=False, is_packed=False, has_fixed_batches=True),
    "replicated": Other("qwen2", is_in_list=False, is_packed=True, has_fixed_batches=False, is_replicated=True),
}


def exact_setups(world_size: int) -> dict[str, Setup]:
    """Return the engines whose scores must be the oracle's: under each strategy, every pair of settings occurs."""
    setups = {}
    # A single rank has nothing to keep.
    for strategy in STRATEGIES if world_size > 1 else ("fsdp", "fsdp-orig", "fsdp2"):
        setups |= {
            f"{strategy}-padded-qwen2": Setup(strategy, "qwen2", has_fixed_batches=True),
            f"{strategy}-packed-qwen3": Setup(strategy, "qwen3", is_packed=True, defers_sync=False),
            f"{strategy}-padded-qwen3-checkpointed": Setup(strategy, "qwen3", is_checkpointed=True, defers_sync=False),
            f"{strategy}-packed-qwen2-checkpointed": Setup(
                strategy, "qwen2", is_checkpointed=True, is_packed=True, has_fixed_batches=True
            ),
        }
    for strategy in ("fsdp", "fsdp-orig"):
        setups[f"{strategy}-kept"] = Setup(strategy, is_checkpointed=True, is_kept=True)
    for strategy in ("fsdp", "fsdp-orig", "fsdp2"):
        setups[f"{strategy}-offloaded"] = Setup(strategy, "qwen2", is_offloaded=True)
        # FSDP1 on one rank cannot train tied weights that keep their original parameters and are frozen.
        model = "qwen3" if strategy == "fsdp-orig" else "qwen2"
        setups[f"{strategy}-adapters"] = Setup(strategy, model, is_checkpointed=True, has_adapters=True)
    if world_size > 1:
        # Not FSDP1, which does not reduce gradients over replicas where a shard group has one rank.
        setups["fsdp2-replicated"] = Setup("fsdp2", "qwen2", is_replicated=True)
    return setups


def neutral_setups(world_size: int) -> dict[str, Setup]:
    """Return the engines that scoring must leave alone: not in float64, in which FSDP1 cannot clip gradients."""
    setups = {}
    for strategy in STRATEGIES if world_size > 1 else ("fsdp", "fsdp-orig", "fsdp2"):
        setups[f"{strategy}-fp32"] = Setup(strategy, "qwen2", dtype="fp32", has_fixed_batches=True)
        # Not tied: FSDP1 on one rank cannot train tied bf16 weights that keep their original parameters.
        setups[f"{strategy}-bf16-checkpointed"] = Setup(
            strategy, "qwen3", dtype="bf16", has_fixed_batches=True, is_checkpointed=True
        )
    return setups


PROMPTS = [
    [int(id) for id in problem[0].prompt] + list(range(3, 3 + length))
    for length, problem in zip((0, 5, 17, 1, 40, 8, 2), [*CANDIDATES, *TRUSTED], strict=False)
]
"""Token ids; one prompt has more tokens than all others together."""


def plain_states(model: nn.Module) -> Tensor:
    """Return what a plain forward pass says of PROMPTS: the last position's hidden state, and the mean over them."""
    found = []
    backbone = getattr(getattr(model, "base_model", model), "model", model)
    for prompt in PROMPTS:
        with torch.no_grad():
            state_TH = backbone.model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
        found.append(torch.cat([state_TH[-1], state_TH.mean(dim=0)]))
    return torch.stack(found)


SCORINGS = {
    "prompts": ("prompts", "none", False),
    "prompts-on-gradient": ("prompts", "none", True),
    "prompts-fail": ("prompts", "run", False),
    "prompts-fail-on-gradient": ("prompts", "run", True),
    "backward": ("backward", "none", False),
    "backward-on-gradient": ("backward", "none", True),
    "backward-loss-fails-at-once": ("backward", "loss 1", False),
    "backward-loss-fails-between": ("backward", "loss 2", False),
    "backward-loss-fails-between-on-gradient": ("backward", "loss 2", True),
    "backward-loss-fails-late-on-gradient": ("backward", "loss 8", True),
    "backward-fails-in-gradient": ("backward", "gradient", False),
    "backward-fails-in-gradient-on-gradient": ("backward", "gradient", True),
    "ghost": ("ghost", "none", False),
    "ghost-on-gradient": ("ghost", "none", True),
    "ghost-fails-in-forward": ("ghost", "forward", False),
    "ghost-fails-in-tap": ("ghost", "tap", False),
    "ghost-fails-in-tap-on-gradient": ("ghost", "tap", True),
    "finite-difference": ("finite_difference", "none", False),
    "finite-difference-on-gradient": ("finite_difference", "none", True),
    "finite-difference-fails-moved-back": ("finite_difference", "second pass", False),
    "finite-difference-fails-moved-back-on-gradient": ("finite_difference", "second pass", True),
}
"""Name -> (estimator, what is interrupted, whether a gradient lies there before). The direction's pass has two
micro-batches or more, so `loss 2` cuts it while its gradients are not synchronised; `loss 8` cuts a candidate's."""
SCORINGS_BF16 = (
    "prompts",
    "prompts-fail-on-gradient",
    "backward",
    "backward-loss-fails-between-on-gradient",
    "backward-loss-fails-late-on-gradient",
    "backward-fails-in-gradient-on-gradient",
    "ghost",
    "ghost-fails-in-forward",
    "ghost-fails-in-tap-on-gradient",
    "finite-difference",
    "finite-difference-fails-moved-back-on-gradient",
)
"""Those that are repeated in bf16 with gradient checkpointing."""


def scorings_of(setup: Setup) -> tuple[str, ...]:
    """Return the names of the scorings that an engine is put through."""
    return SCORINGS_BF16 if setup.dtype == "bf16" else tuple(SCORINGS)


def build_models(root: Path) -> None:
    """Write every model of MODELS to its folder under `root`."""
    for name, (architecture, is_tied, hidden_size) in MODELS.items():
        build_model(root / name, architecture, is_tied, hidden_size)


def reference_model(root: Path, model: str, has_adapters: bool) -> nn.Module:
    """Return the plain float64 model that the engines shard."""
    module = load_float64(root / model)
    if has_adapters:
        module = get_peft_model(module, LoraConfig(task_type=TaskType.CAUSAL_LM, bias="none", **LORA)).double()
        randomise_adapters(module)
    return module


def randomise_adapters(module: nn.Module) -> None:
    """Give all trainable parameters random values, the same in every process: a new adapter's B is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def oracle_scores(
    model: nn.Module,
    trusted: Sequence[Problem] = TRUSTED,
    candidates: Sequence[Problem] = CANDIDATES,
    part: str = "",
    metric_G: Tensor | None = None,
) -> dict[str, Any]:
    """Return the oracle's scores as a case reports them, of the parameters named `part` alone if given.

    Shapes: metric_G divides the direction elementwise.
    """
    flat = [torch.full((p.numel(),), part in name) for name, p in model.named_parameters() if p.requires_grad]
    in_part_G = torch.cat(flat).double()
    direction_G = torch.stack(problem_gradients_float64(model, trusted, TEMPERATURE)).sum(0)
    direction_norm = direction_G.norm().item()
    if metric_G is not None:
        direction_G = direction_G / metric_G
    direction_G = in_part_G * direction_G / direction_G.norm()
    gradient_PG = torch.stack(problem_gradients_float64(model, candidates, TEMPERATURE)) * in_part_G
    plain = [
        [[replace(row, coefficient=torch.ones_like(row.coefficient))] for row in problem] for problem in candidates
    ]
    width = max(len(rows) for rows in plain)
    derivatives = [[(g @ direction_G).item() for g in problem_gradients_float64(model, p, TEMPERATURE)] for p in plain]
    return {
        "dot": (gradient_PG @ direction_G).tolist(),
        "norm": gradient_PG.norm(dim=1).tolist(),
        "derivative": [row + [math.nan] * (width - len(row)) for row in derivatives],
        "direction_norm": direction_norm,
    }
