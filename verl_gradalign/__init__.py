# SPDX-License-Identifier: Apache-2.0
"""verl-gradalign: train on the problems whose policy gradient points along a trusted one.

The package is a plugin: `pip install verl-gradalign` is enough for verl to find it, and one word on the stock
entry point turns it on (`python -m verl.trainer.main_ppo ... +gradalign=cosine`). `score_problems` scores problems
without verl; `read_selection_log` reads what a run selected. Importing this module imports neither torch nor verl.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_gradalign.log.selection_log import read_selection_log
    from verl_gradalign.probe.responses import Response
    from verl_gradalign.probe.score_problems import score_problems
    from verl_gradalign.selection.scores import Score
    from verl_gradalign.types import Measurements

__version__ = "0.1.0"
__all__ = ["Measurements", "Response", "Score", "__version__", "read_selection_log", "score_problems"]

HOMES = {
    "Measurements": "verl_gradalign.types",
    "Response": "verl_gradalign.probe.responses",
    "read_selection_log": "verl_gradalign.log.selection_log",
    "Score": "verl_gradalign.selection.scores",
    "score_problems": "verl_gradalign.probe.score_problems",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
