# SPDX-License-Identifier: Apache-2.0
"""From what an offline scoring is asked for to verl's configuration, and what must be the same to resume it.

config = compose_run(own_overrides(task, model, checkpoint))
require_same_plan(task.state, plan_of(task, config))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.files import file_fingerprint, replace_file
from verl_gradalign.integration.checks import read_config
from verl_gradalign.integration.offline.task import Checkpoint, ScoringTask, find_checkpoint
from verl_gradalign.integration.run_identity import installed_versions
from verl_gradalign.selection.state_file import flat

__all__ = ["own_overrides", "plan_of", "require_same_plan"]

# What decides rollouts and scores; everything else (devices, memory, micro-batches, loggers) may differ when a scoring
# is gone on with.
DECISIVE = (
    *("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo", "algorithm.gamma", "algorithm.lam"),
    *("data.prompt_key", "data.reward_fn_key", "data.max_prompt_length", "data.max_response_length", "data.seed"),
    *("data.train_max_samples", "data.truncation", "data.filter_overlong_prompts", "data.custom_cls"),
    *("data.apply_chat_template_kwargs", "data.tool_config_path", "data.function_tool_path", "data.tokenizer"),
    *("reward.custom_reward_function", "reward.reward_manager", "reward.reward_model.enable"),
    *("reward.reward_model.model_path",),
    *(f"actor_rollout_ref.model.{key}" for key in ("hf_config_path", "tokenizer_path", "custom_chat_template")),
    *(f"actor_rollout_ref.model.{key}" for key in ("external_lib", "lora_rank", "lora_alpha", "lora_adapter_path")),
    *(f"actor_rollout_ref.actor.{key}" for key in ("loss_agg_mode", "loss_scale_factor", "policy_loss.loss_mode")),
    *(f"actor_rollout_ref.actor.fsdp_config.{key}" for key in ("model_dtype", "dtype", "mixed_precision")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("name", "n", "temperature", "top_k", "top_p", "dtype", "seed")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("prompt_length", "response_length", "max_model_len")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("ignore_eos", "do_sample", "quantization", "multi_turn")),
    *(f"actor_rollout_ref.rollout.agent.{key}" for key in ("default_agent_loop", "agent_loop_config_path")),
    *(f"gradalign.{key}" for key in ("score", "advantage", "loss_agg_mode", "estimator", "success_threshold")),
    *(f"gradalign.{key}" for key in ("seed", "score_options", "direction", "validation.n", "probe.rank")),
    *(f"gradalign.probe.{key}" for key in ("relative_step", "pool_dots", "sketch_rank")),
)


def own_overrides(task: ScoringTask, model: Path, checkpoint: Checkpoint | None) -> list[str]:
    """Return all overrides of verl's entry point; the task's own stand last."""
    output = task.output.resolve()
    pool = _listed(task.pool)
    keys = {
        "+gradalign": "base",
        "gradalign.score": _quoted(task.score),
        "gradalign.seed": task.seed,
        "gradalign.schedule": "step",
        "gradalign.oversample": 1,
        "gradalign.validation.files": _listed(task.trusted),
        "gradalign.validation.n": "null" if task.trusted_responses is None else task.trusted_responses,
        "data.train_files": pool,
        # verl reads them whether it validates or not.
        "data.val_files": pool,
        "data.val_max_samples": 64,
        "data.train_batch_size": 1,
        "data.seed": task.seed,
        "algorithm.adv_estimator": "grpo",
        "critic.enable": "false",
        "actor_rollout_ref.model.path": _quoted(model),
        "actor_rollout_ref.actor.use_dynamic_bsz": "true",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
        "actor_rollout_ref.rollout.n": task.responses,
        "trainer.v1.trainer_mode": "gradalign_score",
        "trainer.default_local_dir": _quoted(output),
        "trainer.logger": "[console]",
        "trainer.resume_mode": "disable",
        "trainer.val_before_train": "false",
        "trainer.total_training_steps": 1,
        "hydra.run.dir": _quoted(task.state / "hydra"),
        "+scoring.folder": _quoted(task.state),
        "+scoring.chunk": task.problems_per_chunk,
        "+scoring.checkpoint": "null" if checkpoint is None else _quoted(checkpoint.folder),
    }
    contents = "[model,optimizer]" if "gradalign.direction.metric=adam" in task.overrides else "[model]"
    if checkpoint is not None:
        keys["actor_rollout_ref.actor.checkpoint.load_contents"] = contents
    return [*(f"{key}={value}" for key, value in keys.items()), *task.overrides]


def plan_of(task: ScoringTask, config: DictConfig) -> dict[str, Any]:
    """Return everything that must be the same for a scoring to be gone on with, by dotted key."""
    sets = read_config(config).validation.trusted_sets()
    reward = OmegaConf.select(config, "reward.custom_reward_function.path")
    decisive = {key: OmegaConf.select(config, key) for key in DECISIVE}
    return flat(
        {
            "pool": [file_fingerprint(path) for path in task.pool],
            "trusted": {s.name: {"weight": s.weight, "n": s.n, "files": _hashes(s.files)} for s in sets},
            "model": _stamps(task.model),
            "reward": {"file": _hashes([reward] if reward and Path(reward).is_file() else [])},
            "versions": {name: installed_versions().get(name) for name in ("verl", "verl-gradalign")},
            "verl": {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in decisive.items()},
        }
    )


def require_same_plan(state: Path, plan: Mapping[str, Any]) -> None:
    """Note the plan of a new scoring; of one that was begun, raise ValueError that names what is different now."""
    path = state / "plan.json"
    if not path.exists():
        replace_file(path, json.dumps(plan, indent=1))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{key} was {before.get(key)!r}, is {plan.get(key)!r}"
        for key in sorted({*before, *plan})
        if before.get(key) != plan.get(key)
    ]
    if differences:
        raise ValueError(
            f"--output {state.parent}: holds another scoring: {'; '.join(differences)}. Remedy: use another --output, "
            "or go back to the earlier values."
        )


def _hashes(files: Sequence[str | Path]) -> list[str]:
    return [file_fingerprint(Path(path)) for path in files]


def _stamps(model: Path) -> dict[str, list[int]]:
    """Return size and time of the files that hold a model; hashing them would take minutes."""
    checkpoint = find_checkpoint(model)
    folder, pattern = (model, "*") if checkpoint is None else (checkpoint.folder, "model_world_size_*.pt")
    kinds = (".safetensors", ".bin", ".pt", ".json", ".jinja")
    files = sorted(path for path in folder.glob(pattern) if path.suffix in kinds and path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _quoted(value: str | Path) -> str:
    """Return a value that Hydra takes as it is, whatever characters it has."""
    text = str(value).replace("'", "\\'")
    return f"'{text}'"


def _listed(paths: Sequence[Path]) -> str:
    return f"[{','.join(_quoted(path.resolve()) for path in paths)}]"
