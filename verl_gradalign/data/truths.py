# SPDX-License-Identifier: Apache-2.0
"""Ground truths as they come out of a parquet file, as text.

truth_text(numpy.int64(7))  # "7"
truth_text(float("nan"))  # ValueError: ground_truth=nan ...
"""

import math
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

REMEDY = "give text or a finite number in reward_model.ground_truth, or prepare the data again"
MISSING = {"", "nan", "<na>", "nat"}
"""What a missing value is as text, in lower case; "None" is not among them, as it may be an answer."""


def truth_text(truth: Any) -> str:
    """Return a ground truth as text: text as it is, numbers exactly as they are written, booleans as True and False.

    Raises: ValueError naming the truth if it is missing (None, nan, empty text), infinite, or neither text nor number.
    """
    if isinstance(truth, str):
        if truth.strip().lower() in MISSING:
            raise ValueError(f"ground_truth={truth!r} is missing; {REMEDY}")
        return truth
    if getattr(truth, "ndim", None) == 0 and not isinstance(truth, Real):  # numpy's booleans, arrays without dimension
        truth = truth.item()
    if isinstance(truth, bool):
        return str(truth)
    if not isinstance(truth, Real | Decimal):
        raise ValueError(f"ground_truth={truth!r} is of type {type(truth).__name__}; {REMEDY}")
    if not math.isfinite(truth):
        raise ValueError(f"ground_truth={truth!r} is not a finite number; {REMEDY}")
    if isinstance(truth, Rational):
        return str(truth)
    whole = math.floor(truth)
    return str(whole) if truth == whole else str(truth)
