# SPDX-License-Identifier: Apache-2.0
"""verl-gradalign: train on the problems whose policy gradient points along a trusted one.

The package is a plugin: `pip install verl-gradalign` is enough for verl to find it, and one word on the stock
entry point turns it on (`python -m verl.trainer.main_ppo ... +gradalign=cosine`). Importing this module imports
neither torch nor verl.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
