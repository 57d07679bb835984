# SPDX-License-Identifier: Apache-2.0
"""Student's distribution without scipy: how wide an interval is, in standard errors."""

import numpy as np

Z_95 = 1.959964
"""Of the normal distribution, for a two-sided interval of 95%."""
Z_90 = 1.644854
"""... of 90%."""


def student_t(freedom: np.ndarray, z: float = Z_95) -> np.ndarray:
    """Return the half width of a two-sided interval in standard errors, within 1% from 3 degrees of freedom on.

    `z` is the normal distribution's half width of the same interval.

    Source: Cornish and Fisher's expansion, Abramowitz and Stegun 26.7.5.
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return np.asarray(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
