# SPDX-License-Identifier: Apache-2.0
"""Where verl is imported: trainer, sampler, worker and engine adapter. No maths."""
