# SPDX-License-Identifier: Apache-2.0
"""The parts of the kit, in order of value: what each shows, how long it may take, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

HOME = "verl_gradalign.bench"


@dataclass(frozen=True)
class Part:
    """Something that is measured in a process of its own."""

    name: str
    shows: str
    function: str
    """`module:function`, which takes `Options` and yields records."""
    expected_s: float
    """A guess from counts of operations for an 80 GB GPU, on which it was not run."""
    limit_s: float
    """Where the kit has `plan.USUAL_MINUTES`."""
    dry_s: float
    """Measured on two CPU cores with other work on them, in a dry run."""
    packages: tuple[str, ...] = ()
    """Without any of which it is skipped."""
    gpu_packages: tuple[str, ...] = ()
    """The same, unless it is a dry run."""
    needs_model: bool = False

    def missing(self, is_dry_run: bool, has_model: bool) -> str | None:
        """Return why the part cannot be run here, as far as that is known without running it."""
        if self.needs_model and not has_model:
            return "no --model FOLDER was given"
        needed = self.packages if is_dry_run else self.packages + self.gpu_packages
        missing = [package for package in needed if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


VERL = ("verl", "ray", "transfer_queue")
PARTS = (
    Part("environment", "devices, versions, precision, speed of products", f"{HOME}.environment:run", 20, 60, 7),
    Part(
        "exactness",
        "float32 and bf16 scores against plain autograd, 0.5B and 1.5B, problems of 8k to 64k tokens",
        f"{HOME}.exactness:run",
        *(360, 600, 12),
    ),
    Part(
        "neutrality",
        "weights, gradients, optimizer, buffers, generators and the next step, bit for bit",
        f"{HOME}.neutrality:run",
        *(90, 240, 2),
    ),
    Part(
        "speed",
        "update, estimators and measuring in the update side by side: time, memory, gathers",
        f"{HOME}.speed:run",
        *(420, 600, 10),
    ),
    Part("ranks", "the same on all devices together under FSDP2", f"{HOME}.several:run", 240, 360, 20),
    Part("calculator", "computed memory and operations against measured ones", f"{HOME}.calculator:run", 120, 240, 3),
    Part("packed", "packed rows with flash attention against padded ones", f"{HOME}.packed:run", 90, 180, 3),
    Part("fp16", "fp16 scores against float32, problems of 12,800 tokens", f"{HOME}.variants:fp16", 90, 180, 2),
    Part("offload", "parameters in CPU memory", f"{HOME}.variants:offload", 60, 180, 2),
    Part("lora", "adapters: scores, time and memory", f"{HOME}.variants:lora", 60, 180, 3, packages=("peft",)),
    Part(
        "grpo",
        "ten steps of GRPO by verl with and without selection, a tiny model",
        f"{HOME}.grpo:tiny_model",
        *(300, 480, 100),
        packages=VERL,
        gpu_packages=("vllm",),
    ),
    Part(
        "model",
        "the same with the model of --model",
        f"{HOME}.grpo:own_model",
        *(420, 720, 100),
        packages=VERL,
        gpu_packages=("vllm",),
        needs_model=True,
    ),
)
NAMES = tuple(part.name for part in PARTS)
