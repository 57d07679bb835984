# SPDX-License-Identifier: Apache-2.0
"""The model, built from its config alone on the driver: whether it can be scored, before any worker starts.

    for error in check_model(config, verl_config):
        ...

Parameters are on the meta device, so that a model of any size takes seconds and no memory. A small model of the same
architecture is then run once through the estimator (`model_trial`).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig
from verl.utils.import_utils import import_external_libs
from verl.utils.model import get_hf_auto_model_class, update_model_config

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.integration.hub import is_cached
from verl_gradalign.integration.model_trial import MAX_PARAMETERS, shrunk, try_estimator
from verl_gradalign.integration.requests import RowUse, row_use
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.probe.head import output_layer_of
from verl_gradalign.probe.tap_points import require_gradients, tap_points
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

MODEL = "actor_rollout_ref.model"
PATH = f"{MODEL}.path"
MAX_AS_IT_IS = 5e6
"""Parameters of a model that is tried in its own size."""


class ModelFromConfig(NamedTuple):
    """A model without weights."""

    hf_config: Any
    module: nn.Module
    """As verl trains it, adapters included; parameters on the meta device."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


class ModelRefusals(NamedTuple):
    """What is wrong with scoring a model."""

    errors: list[ValueError]
    untried: str
    """Why no small model of the architecture was run; empty if one was, or if there was no need to."""


def check_model(config: GradAlignConfig, verl_config: DictConfig) -> list[ValueError]:
    """Return every reason for which the model cannot be scored: what a launch asks before workers start.

    A model that cannot be built here is none: a driver may lack what the workers have. It is logged, and the worker
    checks the model that it has built.
    """
    path = str(verl_config.actor_rollout_ref.model.path)
    if not score_of(config.score).needs_gradients or path.startswith("hdfs:"):
        return []
    try:
        model = model_from_config(verl_config)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{MODEL}.target_modules="):
            return [error]
        logger.warning("%s=%s cannot be checked before workers start: %s", PATH, path, error)
        return []
    return model_refusals(config, verl_config, model).errors


def model_from_config(verl_config: DictConfig) -> ModelFromConfig:
    """Return the model as verl builds it, without weights.

    Raises: ValueError that names the key and the remedy if the path, the config or the adapters are wrong; whatever
        the model's own code raises.
    """
    model = verl_config.actor_rollout_ref.model
    import_external_libs(_plain(model.get("external_lib")))
    hf_config = _hf_config(model)
    with torch.device("meta"):
        return ModelFromConfig(hf_config, _built(hf_config, model))


def _hf_config(model: DictConfig) -> Any:
    """Return the model's config with verl's overrides of it."""
    key = "hf_config_path" if model.get("hf_config_path") else "path"
    path = str(model[key])
    is_local = is_cached(f"{MODEL}.{key}", path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, local_files_only=is_local)
    except Exception as error:
        why = f"its config cannot be read ({_first_line(error)})"
        remedy = "give the folder of a model in the format of transformers"
        if "trust_remote_code" in str(error):
            remedy = f"set {MODEL}.trust_remote_code=True if you trust the code in it"
        refuse(f"{MODEL}.{key}", path, why, remedy)
    overrides: Any = OmegaConf.to_container(OmegaConf.create(model.override_config), resolve=True)
    overrides = overrides.get("model_config", overrides)
    update_model_config(config, {name: value for name, value in overrides.items() if name != "attn_implementation"})
    if len(config.architectures or ()) != 1:
        why = f"its config names {config.architectures or 'no'} architectures; verl asks for one"
        refuse(f"{MODEL}.{key}", path, why, "write one class into architectures of its config.json")
    return config


def _built(hf_config: Any, model: DictConfig) -> nn.Module:
    """Return the module of the class that verl's engine takes, with adapters as it adds them."""
    auto_class = get_hf_auto_model_class(hf_config)
    # Attention has no parameters, and the machine that asks may lack the kernels of the one that trains.
    module: nn.Module = auto_class.from_config(
        hf_config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=model.trust_remote_code
    )
    if model.lora_rank <= 0:  # as verl: an adapter's path alone adds none
        return module
    from peft import LoraConfig, PeftConfig, TaskType, get_peft_model

    if adapter_path := model.get("lora_adapter_path"):
        try:
            adapters: Any = PeftConfig.from_pretrained(str(adapter_path))
        except Exception as error:
            remedy = "give the folder of an adapter of PEFT, or leave it out"
            refuse(f"{MODEL}.lora_adapter_path", adapter_path, _first_line(error), remedy)
        adapters.inference_mode = False
    else:
        names = ("target_modules", "target_parameters", "exclude_modules")
        plain: dict[str, Any] = {name: _plain(model.get(name)) for name in names}
        adapters = LoraConfig(task_type=TaskType.CAUSAL_LM, r=model.lora_rank, lora_alpha=model.lora_alpha, **plain)
    try:
        return get_peft_model(module, adapters)
    except ValueError as error:
        layers = sorted({name.rpartition(".")[2] for name, m in module.named_modules() if isinstance(m, nn.Linear)})
        remedy = f"name layers of the model ({', '.join(layers[:12])}), or set {MODEL}.target_modules=all-linear"
        refuse(f"{MODEL}.target_modules", model.get("target_modules"), _first_line(error), remedy)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def model_refusals(config: GradAlignConfig, verl_config: DictConfig, model: ModelFromConfig) -> ModelRefusals:
    """Return why a score by gradients cannot be taken of this model, as ValueErrors that name what to change."""
    errors: list[ValueError] = []
    checks: tuple[Callable[[nn.Module], None], ...] = (
        require_no_dropout,
        ESTIMATORS[config.estimator](config.probe).check,
        partial(check_row_use, config.estimator, row_use(config, verl_config)),
    )
    for check in checks:
        try:
            check(model.module)
        except ValueError as error:
            errors.append(error)
    if errors:
        return ModelRefusals(errors, "")
    try:
        return ModelRefusals([], _trial(config, verl_config, model))
    except ValueError as error:
        kind = type(model.module).__name__
        return ModelRefusals([ValueError(f"{kind}, tried in small: {error}")], "")


def check_row_use(estimator: str, use: RowUse, module: nn.Module) -> None:
    """Raise ValueError if this model cannot be scored the way that rows run through it."""
    if use.num_sharing > 1 and any(hasattr(getattr(m, "config", None), "vision_config") for m in module.modules()):
        why = "a model for images cuts its rows elsewhere than text models do, which scores do not follow"
        refuse(use.sharing_key, use.num_sharing, why, "set it to 1")
    head = output_layer_of(module)
    if use.is_fused and getattr(head, "bias", None) is not None:
        why = "leaves the output layer's bias out, which scores would not"
        refuse(f"{MODEL}.use_fused_kernels", True, why, "set it to False")
    if estimator != "ghost" or not (use.num_sharing > 1 or use.cuts_problems):
        return
    points = tap_points(module)
    if use.num_sharing > 1:
        why = f"{use.sharing_key}={use.num_sharing} gives ranks slices of its rows"
        require_gradients(points, why, "set it to 1, or gradalign.estimator=backward")
    if use.cuts_problems:
        why = f"a problem may be larger than a micro-batch (gradalign.probe.oversized={use.cuts_problems})"
        require_gradients(points, why, "set gradalign.probe.oversized=backward")


def _trial(config: GradAlignConfig, verl_config: DictConfig, model: ModelFromConfig) -> str:
    """Run a small model of the architecture once; return why that is not possible, or "".

    Raises: ValueError if it runs, and the estimator is wrong on it.
    """
    is_small = model.num_parameters <= MAX_AS_IT_IS
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hf_config = model.hf_config if is_small else shrunk(model.hf_config)
            with torch.device("meta"):
                size = sum(p.numel() for p in _built(hf_config, verl_config.actor_rollout_ref.model).parameters())
            if size > MAX_PARAMETERS:
                return f"it has {size / 1e6:.0f} M parameters when shrunk"
            module = _built(hf_config, verl_config.actor_rollout_ref.model)
    except Exception as error:  # what a model's own code makes of unusual sizes says nothing of the model
        return f"it cannot be shrunk ({type(error).__name__}: {_first_line(error)})"
    with torch.random.fork_rng(devices=[]):
        return try_estimator(module, config.estimator, config.probe)
