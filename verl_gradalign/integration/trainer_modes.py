# SPDX-License-Identifier: Apache-2.0
"""Which of verl's trainers select, and what to say of those that do not. Imports nothing of verl."""

SEPARATE = "gradalign_separate_async"
OWN_MODES = ("gradalign", "gradalign_colocate_async", SEPARATE, "gradalign_score")
OLD_TRAINER = "verl's old trainer knows no samplers, so it would train without selection"


def foreign_mode(mode: str) -> tuple[str, str]:
    """Return why a trainer mode of verl's own, or an unknown one, does not select, and what to set instead."""
    why, remedy = "verl's own trainer does not select", "set trainer.v1.trainer_mode=gradalign"
    if mode == "colocate_async":
        remedy += "_colocate_async, which is verl's colocate_async with selection"
    if mode == "separate_async":
        remedy += "_colocate_async, or with +gradalign=forecast trainer.v1.trainer_mode=gradalign_separate_async"
    return why, remedy


def refused_mode(mode: str) -> str:
    """Return the whole message for a trainer mode that does not select."""
    why, remedy = foreign_mode(mode)
    return f"trainer.v1.trainer_mode={mode}: {why}. Remedy: {remedy}."
