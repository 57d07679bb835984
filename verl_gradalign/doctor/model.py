# SPDX-License-Identifier: Apache-2.0
"""The model, built from its config on the meta device: whether the estimator scores it, and what a step costs here."""

from dataclasses import replace
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig, ProbeConfig
from verl_gradalign.cost.estimate import Cost, estimate
from verl_gradalign.cost.memory import accumulated_bytes, memory_of
from verl_gradalign.cost.setting import HF_KEYS, ModelShape, Setting
from verl_gradalign.cost.tables import GPU_SHARE
from verl_gradalign.doctor.data import ExaminedData
from verl_gradalign.doctor.machine import Machine
from verl_gradalign.findings import Findings
from verl_gradalign.integration.model_check import MODEL, PATH, model_from_config, model_refusals
from verl_gradalign.integration.requests import sequence_parallel, token_budget
from verl_gradalign.selection.scores import score_of

AREA, COST = "model", "cost"
RESPONSE_SHARE = 0.5
"""Assumed mean length of a response, of data.max_response_length, where none is given."""


class ExaminedModel(NamedTuple):
    """What the cost is computed from."""

    hf_config: Any
    shape: ModelShape | None
    """None: its cost is not known."""
    has_adapters: bool


def examine_model(config: GradAlignConfig, verl_config: DictConfig, findings: Findings) -> ExaminedModel | None:
    """Add findings on the model; return what is known of it, or None if it cannot be built."""
    path = str(verl_config.actor_rollout_ref.model.path)
    if path.startswith("hdfs:"):
        findings.add(AREA, "note", f"{PATH}={path} is not on this machine; the model is not looked at")
        return None
    try:
        model = model_from_config(verl_config)
    except Exception as error:
        if str(error).startswith(MODEL):
            findings.refusal(AREA, error)
        else:
            text = f"{PATH}={path}: cannot be built ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            findings.refusal(AREA, ValueError(text), "give the folder of a model that transformers can build")
        return None
    if score_of(config.score).needs_gradients:  # so that the estimator must know every layer
        refusals = model_refusals(config, verl_config, model)
        for refusal in refusals.errors:
            findings.refusal(AREA, refusal)
        name = type(model.module).__name__
        if refusals.untried:
            findings.add(AREA, "note", f"{name}: no small model of its kind was scored, as {refusals.untried}")
        if not refusals.errors:
            how = "measured in the update" if config.measures_in_update else "scored"
            findings.add(AREA, "ok", f"{name} can be {how} with estimator {config.estimator}")
    num_parameters = model.num_parameters
    num_trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    shape = _shape(model.hf_config, num_parameters, findings)
    trained = f", {num_trained / 1e6:.3g} M of them trained" if num_trained < num_parameters else ""
    findings.add(AREA, "note", f"{path}: {num_parameters / 1e9:.3g} B parameters{trained}")
    return ExaminedModel(model.hf_config, shape, has_adapters=num_trained < num_parameters)


def examine_positions(hf_config: Any, tokenizer_size: int | None, verl_config: DictConfig, findings: Findings) -> None:
    """Whether the model has an embedding for every token, and positions for the longest row."""
    text, data = hf_config.get_text_config(), verl_config.data
    vocabulary, most = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if tokenizer_size is not None and isinstance(vocabulary, int) and tokenizer_size > vocabulary:
        why = f"its vocabulary of {vocabulary} is smaller than the tokenizer's, {tokenizer_size}"
        remedy = f"set {MODEL}.tokenizer_path to the model's own tokenizer"
        findings.add(AREA, "error", f"{PATH}={verl_config.actor_rollout_ref.model.path}: {why}", remedy)
    longest = data.max_prompt_length + data.max_response_length
    if isinstance(most, int) and longest > most:
        text = f"data.max_prompt_length + data.max_response_length = {longest}, more than the model's {most} positions"
        remedy = f"lower the two to {most} together, or scale the model's rope"
        findings.add(AREA, "warning", text, remedy)


def _shape(hf_config: Any, num_parameters: int, findings: Findings) -> ModelShape | None:
    text: Any = hf_config.get_text_config()
    try:
        shape = ModelShape.from_hf_config(text.to_dict() | {key: getattr(text, key, None) for key in HF_KEYS.values()})
    except ValueError as error:
        findings.add(AREA, "note", f"the cost of a step is not estimated: {error}")
        return None
    return replace(shape, exact_parameters=num_parameters)


def examine_cost(
    config: GradAlignConfig,
    verl_config: DictConfig,
    model: ExaminedModel,
    data: ExaminedData,
    machine: Machine,
    findings: Findings,
    response_tokens: float | None = None,
) -> Cost | None:
    """Add findings on the cost of a step; return the cost, or None for adapters and unknown shapes."""
    if model.shape is None or model.has_adapters:
        if model.has_adapters:
            findings.add(COST, "note", "the cost of training adapters is not estimated; see recipes/how_to/cost.md")
        return None
    setting = setting_of(config, verl_config, model.shape, data)
    assumed = f" (assumed: {setting.response_tokens:.0f} tokens a response; --response-tokens)"
    if response_tokens:
        setting, assumed = replace(setting, response_tokens=response_tokens), ""
    cost = estimate(setting)
    # Parameters may be sharded over fewer GPUs than there are.
    actor = verl_config.actor_rollout_ref.actor
    shards = int(OmegaConf.select(actor, "fsdp_config.fsdp_size") or OmegaConf.select(actor, "veomni.fsdp_size") or -1)
    if 0 < shards < setting.num_gpus:
        cost = replace(cost, memory=memory_of(replace(setting, num_gpus=shards)))
    text = (
        f"a mean step generates {cost.generated:,.0f} responses, {cost.ratios['rollout']:.2f} times those trained on, "
        f"and takes {cost.ratios['flops']:.2f} times the operations of a step without selection{assumed}"
    )
    findings.add(COST, "note", text)
    for note in cost.notes:
        findings.add(COST, "note", note)
    if features := cost.flops["features"]:
        share = features / sum(cost.plain.values())
        text = f"reading prompts for gradalign.forecast.features is {share:.1%} of a plain step's operations at first"
        findings.add(COST, "note", text, "gradalign.forecast.features=[source,text] asks nothing of it")
    if score_of(config.score).is_of_candidates and config.probe.pool_dots == "exact":
        text = f"score {config.score} reads the candidates twice; the operations count them once"
        findings.add(COST, "note", text, "gradalign.probe.pool_dots=sketch takes one pass")
    _memory(cost, verl_config, machine, findings)
    return cost


def setting_of(config: GradAlignConfig, verl_config: DictConfig, shape: ModelShape, data: ExaminedData) -> Setting:
    """Return the calculator's setting of a configuration. `once` and `staged` count as rounds of the whole run."""
    actor_rollout, data_config, trainer = verl_config.actor_rollout_ref, verl_config.data, verl_config.trainer
    actor, score, direction = actor_rollout.actor, score_of(config.score), config.direction
    curriculum, num_problems = config.curriculum, data.num_problems
    schedule: dict[str, Any] = {"schedule": "round", "oversample": config.oversample, "candidate_n": curriculum.n}
    if config.schedule == "step":
        schedule = {"oversample": 1.0 if score.rank is None else config.oversample}
    elif config.is_forecast:
        features = config.forecast.features
        schedule = {"schedule": "forecast", "oversample": config.oversample, "measure": config.measure}
        schedule |= {"has_prompt_features": "prompt" in features, "num_features": config.forecast.num_features}
    elif config.schedule == "round":
        schedule |= {"steps_per_round": curriculum.steps_per_round, "num_candidates": curriculum.num_candidates}
    else:
        num_selections = max(1, len(curriculum.stages)) if config.schedule == "staged" else 1
        steps = max(1, total_steps(verl_config, num_problems) // num_selections)
        schedule |= {"steps_per_round": steps, "num_candidates": num_problems}
    num_sharing = sequence_parallel(verl_config)[1]
    fsdp = actor.get("fsdp_config") or {}  # other engines have none
    puts_off = fsdp.get("use_no_sync_for_gradient_accumulation", False)
    param_dtype = OmegaConf.select(actor, "fsdp_config.mixed_precision.param_dtype") or fsdp.get("dtype")
    return Setting(
        shape=shape,
        num_gpus=trainer.n_gpus_per_node * trainer.nnodes,
        train_batch_size=data_config.train_batch_size,
        rollout_n=actor_rollout.rollout.n,
        prompt_tokens=data.mean_prompt_tokens or data_config.max_prompt_length / 2,
        response_tokens=RESPONSE_SHARE * data_config.max_response_length,
        max_prompt_tokens=data_config.max_prompt_length,
        max_response_tokens=data_config.max_response_length,
        trusted_problems=data.num_trusted,
        validation_n=max(1, round(data.trusted_responses / data.num_trusted)) if data.num_trusted else None,
        refresh_interval=direction.refresh_interval,
        keeps_responses=direction.keeps_responses and data.num_trusted > 0,
        replay=direction.replay,
        part=direction.part,
        train_on_trusted=direction.train_on_trusted,
        audit=direction.audit,
        num_problems=max(1, num_problems),
        estimator=config.estimator if score.needs_gradients else None,
        has_response_derivatives=score.needs_response_derivatives,
        low_rank=config.probe.rank,
        has_checkpointing=actor_rollout.model.enable_gradient_checkpointing,
        has_reference=bool(actor.use_kl_loss or verl_config.algorithm.use_kl_in_reward),
        ppo_epochs=actor.ppo_epochs,
        micro_batch_tokens=token_budget(ProbeConfig(), verl_config).max_tokens // num_sharing,
        ranks_per_row=num_sharing,
        unreduced_bytes=(4 if actor.strategy == "fsdp2" else 2) if puts_off else 0,
        max_tokens_per_rank=config.probe.max_tokens_per_rank,
        compute_bytes=4 if str(param_dtype) in ("fp32", "float32") else 2,
        is_direction_offloaded=direction.offload,
        adds_gradients_up=config.probe.oversized == "accumulate",
        is_direction_kept=_is_direction_kept(config),
        **schedule,
    )


def _is_direction_kept(config: GradAlignConfig) -> bool:
    """Return whether a step needs the direction of an earlier one, or its update the direction."""
    direction = config.direction
    is_held = (direction.refresh_interval or 1) > 1 or direction.on_degenerate == "previous"
    outlives_step = is_held or bool(direction.ema)
    return outlives_step or config.measures_in_update


def total_steps(verl_config: DictConfig, num_problems: int) -> int:
    """Return the steps that verl trains: as asked, else the epochs' batches."""
    trainer, batch = verl_config.trainer, verl_config.data.train_batch_size
    if trainer.total_training_steps is not None:
        return int(trainer.total_training_steps)
    return int(trainer.total_epochs) * (num_problems // batch)


def _memory(cost: Cost, verl_config: DictConfig, machine: Machine, findings: Findings) -> None:
    """Compare the highest point with a GPU, or all ranks' with the host's memory on a CPU."""
    memory, is_cpu = cost.memory, verl_config.trainer.device == "cpu"
    gb, plain_gb, host_gb = memory["peak"] / 1e9, memory["plain"] / 1e9, cost.host_bytes / 1e9
    has_gb = machine.gpu_gb if not is_cpu else machine.host_gb / verl_config.trainer.n_gpus_per_node
    of_what = "of this machine's free memory for each rank" if is_cpu else "of each GPU here"
    phases = {"the update": "update", "making the direction": "make_direction", "scoring": "score"}
    highest = max(phases, key=lambda phase: memory[phases[phase]])
    text = f"a rank needs about {gb:.3g} GB at its highest ({highest}), {plain_gb:.3g} GB without selection"
    if host_gb > GPU_SHARE * machine.host_gb > 0:
        remedy = "lower gradalign.oversample or gradalign.curriculum.num_candidates"
        findings.add(COST, "warning", f"rollouts take about {host_gb:.3g} GB of the host's memory", remedy)
    if has_gb <= 0:
        findings.add(COST, "note", f"{text}; no GPU is seen here to compare it with")
    elif gb <= GPU_SHARE * has_gb:
        findings.add(COST, "ok", f"{text}, {of_what} {has_gb:.3g} GB")
    else:
        remedy = "more GPUs, smaller micro-batches (gradalign.probe.max_tokens_per_rank, ppo_max_token_len_per_gpu)"
        if memory["unreduced"]:
            key = "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation"
            remedy += f", {key}=False ({memory['unreduced'] / 1e9:.3g} GB)"
        if plain_gb <= GPU_SHARE * has_gb and not cost.setting.is_direction_offloaded:
            remedy += ", gradalign.direction.offload=true"
        if highest == "scoring" and accumulated_bytes(cost.setting):
            remedy += ", gradalign.probe.oversized=sketch"
        findings.add(COST, "warning", f"{text}, {of_what} {has_gb:.3g} GB", remedy)
