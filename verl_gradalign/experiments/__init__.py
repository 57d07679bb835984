# SPDX-License-Identifier: Apache-2.0
"""Whole comparisons of ways to choose problems: runs of verl, their results as one table, and figures."""
