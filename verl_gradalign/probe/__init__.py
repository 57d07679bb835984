# SPDX-License-Identifier: Apache-2.0
"""Gradients of problems: objective, direction, estimators and the float64 oracle. Imports torch, never verl."""
