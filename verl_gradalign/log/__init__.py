# SPDX-License-Identifier: Apache-2.0
"""What a run writes: the selection log, samples of texts, metrics and figures. It does not know verl."""
