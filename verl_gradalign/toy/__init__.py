# SPDX-License-Identifier: Apache-2.0
"""The tiny model, its warm-up and the miniature regimes: what the demonstration and the tests train."""
