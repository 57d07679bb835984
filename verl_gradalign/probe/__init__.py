# SPDX-License-Identifier: Apache-2.0
"""Gradients of problems: objective, direction, estimators, and audits of them. Imports torch, never verl."""
