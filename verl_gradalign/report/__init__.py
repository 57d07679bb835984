# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the selection log and summaries made from it."""
