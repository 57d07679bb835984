# SPDX-License-Identifier: Apache-2.0
"""`python -m verl_gradalign.cli`."""

from verl_gradalign.cli import app

app()
