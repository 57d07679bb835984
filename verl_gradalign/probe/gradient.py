# SPDX-License-Identifier: Apache-2.0
"""Which parameters a gradient is of, and the module left as it was found after passes for measurement.

Works on plain modules, FSDP1 and FSDP2. It does not run passes and it does not reduce over ranks.

    with leave_no_trace(module):
        loss.backward()
        norms = [(name, parameter.grad.norm()) for name, parameter in trainable_parameters(module)]
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from verl_gradalign.probe.abandoned_pass import abandon_pass
from verl_gradalign.probe.fsdp import flat_handles, reshard

CHANCE = re.compile("dropout|pdrop|layerdrop|drop_path|drop_prob|drop_rate|jitter_noise")
"""In the names by which modules of transformers keep probabilities of what they leave out, or the noise they add."""


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of every parameter that requires a gradient, tied ones once, in the module's order.

    Under FSDP2 call it while the parameters are sharded, i.e. inside `leave_no_trace` and outside a pass: an unsharded
    module shows temporary parameters whose `.grad` nobody reduces.
    """
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return every parameter of the module, FSDP1's flat ones included."""
    # Under FSDP1 with use_orig_params=True the flat parameter, whose .grad the originals' .grad are views of, is not
    # among module.parameters().
    flat = [handle.flat_param for handle in flat_handles(module)]
    return list({id(parameter): parameter for parameter in [*module.parameters(), *flat]}.values())


def clear_gradients(module: nn.Module) -> None:
    """Set the gradient of every parameter to None."""
    for parameter in all_parameters(module):
        parameter.grad = None


def require_no_gradients(module: nn.Module) -> None:
    """Raise RuntimeError if a parameter already has a gradient, which the next backward pass would add to."""
    for name, parameter in trainable_parameters(module):
        if parameter.grad is not None:
            trouble = f"{name} already has a gradient, which would be counted into the first problem"
            remedy = "score inside leave_no_trace(module), which sets gradients aside and puts them back"
            raise RuntimeError(f"{trouble}; {remedy}")


def require_no_dropout(module: nn.Module) -> None:
    """Raise ValueError, naming the modules, if any dropout probability of the model is above 0."""
    active = {
        f"{name or type(submodule).__name__} ({attribute}={p})": attribute
        for name, submodule in module.named_modules()
        for attribute, p in vars(submodule).items()
        if isinstance(p, int | float) and not isinstance(p, bool) and p > 0
        # torch's own modules, and the probabilities that models hand to functions.
        if CHANCE.search(attribute) or (attribute == "p" and "Dropout" in type(submodule).__name__)
    }
    if active:
        # What a torch Dropout's p is called in the model's configuration is not known here.
        keys = sorted({attribute for attribute in active.values() if attribute != "p"}) or ["attention_dropout"]
        settings = " ".join(f"+actor_rollout_ref.model.override_config.{key}=0" for key in keys)
        trouble = f"dropout is active in {', '.join(list(active)[:5])}: gradients would depend on chance"
        raise ValueError(f"{trouble}. Remedy: set it to 0 in the model's configuration (verl: {settings})")


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Run passes without a backward: in train mode layers may wait for theirs, as those of verl's activation offload.

    Dropout is 0 in both modes (`require_no_dropout`); checkpointing, which eval mode lacks, keeps nothing without one.
    """
    training_flags = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in training_flags:
            submodule.training = training


@contextmanager
def leave_no_trace(module: nn.Module) -> Iterator[None]:
    """Set the module's gradients aside, and restore them and everything else that a pass touches. Collective-free.

    Restored, also after an exception: every `.grad` (the same tensor object), `requires_grad` and `training` flag, the
    states of Python's, NumPy's and torch's generators (CPU and the current CUDA device). After an exception the
    sharding machinery is put back between two passes, and gradients that it accumulated unsharded are dropped, so that
    the next training step is bit-identical (tests/distributed/test_fsdp.py).

    Not restored: parameters and buffers, which a backward pass does not change.
    """
    # First: an unsharded module shows temporary parameters, whose `.grad` is not the one to set aside.
    reshard(module)
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in all_parameters(module)]
    training_flags = [(submodule, submodule.training) for submodule in module.modules()]
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    clear_gradients(module)
    try:
        yield
    except BaseException:
        abandon_pass(module)
        clear_gradients(module)
        raise
    finally:
        for parameter, grad, requires_grad in gradients:
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for submodule, training in training_flags:
            submodule.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
