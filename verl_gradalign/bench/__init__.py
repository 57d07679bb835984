# SPDX-License-Identifier: Apache-2.0
"""The first hour on a GPU: what `verl-gradalign bench` measures, part by part, each in a process of its own.

`registry` says what there is, `plan` what is run and for how long, `kit` runs it, `page` shows it. The parts themselves
need torch and transformers; only `grpo` starts verl, as a user would.
"""
