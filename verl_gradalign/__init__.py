# SPDX-License-Identifier: Apache-2.0
"""verl-gradalign: train on the problems whose policy gradient points along a trusted one.

The package is a plugin: `pip install verl-gradalign` is enough for verl to find it, and one word on the stock
entry point turns it on (`python -m verl.trainer.main_ppo ... +gradalign=cosine`). `score_problems` scores problems
without verl. Importing this module imports neither torch nor verl.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_gradalign.probe.score_problems import Response, score_problems

__version__ = "0.1.0"
__all__ = ["Response", "__version__", "score_problems"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are asked for."""
    if name in ("Response", "score_problems"):
        from verl_gradalign.probe import score_problems

        return getattr(score_problems, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
