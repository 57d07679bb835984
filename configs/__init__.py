# SPDX-License-Identifier: Apache-2.0
"""The Hydra groups `gradalign`, `platform` and `regime`, found through `pkg://verl_gradalign.configs`."""
