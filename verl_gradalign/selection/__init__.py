# SPDX-License-Identifier: Apache-2.0
"""From scores to the problems that are trained on: pure functions, without torch.distributed and without verl."""
