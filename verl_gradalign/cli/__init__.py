# SPDX-License-Identifier: Apache-2.0
"""The command `verl-gradalign`. Commands are thin: each calls one function of the package and prints its result.

Importing this package imports neither torch nor verl; commands import what they need when they run.

    verl-gradalign prepare --regime learnalign_gsm8k --from gsm8k=path/to/gsm8k --output data/gsm8k
"""

import os

# GNU OpenMP reads this when torch is imported: else its waiting threads spin, and slow a busy machine tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from verl_gradalign.cli import bench, compare, cost, doctor, hold_out, prepare, report, score  # noqa: F401  (each registers itself)
from verl_gradalign.cli.app import app

__all__ = ["app"]
