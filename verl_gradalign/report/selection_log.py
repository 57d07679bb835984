# SPDX-License-Identifier: Apache-2.0
"""Where earlier versions had `verl_gradalign.read_selection_log`; code that imports it from here still runs."""

from verl_gradalign.log.selection_log import read_selection_log as read_selection_log
