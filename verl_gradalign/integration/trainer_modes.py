# SPDX-License-Identifier: Apache-2.0
"""Which of verl's trainers select, and what to say of those that do not. Imports nothing of verl."""

OWN_MODES = ("gradalign", "gradalign_colocate_async", "gradalign_score")
OLD_TRAINER = "verl's old trainer knows no samplers, so it would train without selection"

_SEPARATE_ASYNC = (
    "selection is not supported there. Its rollout devices are never idle and receive weights over a device-to-device "
    "engine (nccl, nixl), which this package has not been shown to work with, and its steps are cut into mini-batches "
    "that would each have to be selected apart"
)


def foreign_mode(mode: str) -> tuple[str, str]:
    """Return why a trainer mode of verl's own, or an unknown one, does not select, and what to set instead."""
    if mode in ("separate_async", "gradalign_separate_async"):
        return _SEPARATE_ASYNC, "set trainer.v1.trainer_mode=gradalign (synchronous) or gradalign_colocate_async"
    if mode == "colocate_async":
        remedy = "set trainer.v1.trainer_mode=gradalign_colocate_async, which is verl's colocate_async with selection"
        return "verl's own trainer does not select", remedy
    return "verl's own trainer does not select", "set trainer.v1.trainer_mode=gradalign"


def refused_mode(mode: str) -> str:
    """Return the whole message for a trainer mode that does not select."""
    why, remedy = foreign_mode(mode)
    return f"trainer.v1.trainer_mode={mode}: {why}. Remedy: {remedy}."
