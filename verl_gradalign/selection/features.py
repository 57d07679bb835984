# SPDX-License-Identifier: Apache-2.0
"""What a problem is known by before it was ever measured, as numbers that a forecast is linear in.

    sources = Sources(problem_ids, {"data_source": values})     # as many values as there are problems
    one_hot_SF = sources.of(shortlist)
    counts_SB = hashed_ngrams(["what is 1 + 1?", "reverse abc"])

Shape legend: S problems of a shortlist, F features, A all problems of the pool, B buckets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WIDE = 1.0
"""Prior standard deviation of the constant and of what is one-hot, in units of the score's typical size: as good as no
prior. Of a single measurement's spread most is noise; kinds of problems differ by a fraction of it."""
NARROW = 0.3
"""Of all numbers of a projection together: they refine what the sources say. Each number has variance 1, so k of them
have a prior of NARROW / sqrt(k), and account for a tenth of the scores' variance unless measurements say more."""
MAX_VALUES = 64
"""Values of a column that have a feature each, the rest's included."""
OTHER = "other"

BUCKETS_LOG2 = 12
NGRAM_SIZES = (3, 4, 5)
DIGITS = str.maketrans("123456789", "0" * 9)


@dataclass(frozen=True)
class Features:
    """The features of a shortlist, in its order."""

    values_SF: np.ndarray
    """float64; the same F numbers, in the same order, throughout a run."""
    prior_F: np.ndarray
    """How much of a score each feature may explain before anything was measured: the prior standard deviation of its
    weight, in units of the scores' typical size; above 0. Wide for a source, narrow for a projection of prompts."""


def narrow_prior(num: int) -> np.ndarray:
    """Return the prior standard deviations of `num` numbers of variance 1 that refine what the sources say."""
    return np.full(num, NARROW / math.sqrt(max(num, 1)))


class Sources:
    """One-hot of what problems are of. Which values have a feature is decided by the whole pool, once.

    A column of one value only says no more than the constant and has none. Eight bytes a problem are kept, and one for
    each column.

    Args:
        problem_ids: int64, distinct.
        values: of every problem, in the order of `problem_ids`, by column.
    """

    def __init__(self, problem_ids: np.ndarray, values: Mapping[str, Sequence[str]]) -> None:
        order_A = np.argsort(problem_ids, kind="stable")
        self._problem_id_A = problem_ids[order_A]
        self._columns: list[tuple[np.ndarray, int]] = []
        self.names: list[str] = []
        """Of the features, column=value."""
        for column, of_all in values.items():
            known, code_A = _codes(of_all)
            if len(known) > 1:
                self._columns.append((code_A[order_A], len(known)))
                self.names += [f"{column}={value}" for value in known]

    def of(self, problem_ids: np.ndarray) -> np.ndarray:
        """Return the problems' features, float64 (problems, features)."""
        place_S = np.searchsorted(self._problem_id_A, problem_ids)
        one_hot = [np.eye(num)[code_A[place_S]] for code_A, num in self._columns]
        return np.hstack([np.zeros((len(problem_ids), 0)), *one_hot])


def _codes(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the values that have a feature, the most frequent first, and every problem's place among them, uint8."""
    counts = Counter(values)
    known = sorted(counts, key=lambda value: (-counts[value], value))
    if len(known) > MAX_VALUES:
        known = [*known[: MAX_VALUES - 1], OTHER]
    place_of = {value: place for place, value in enumerate(known)}
    # Where all have a feature, none is looked up in vain.
    codes = (place_of.get(value, MAX_VALUES - 1) for value in values)
    return known, np.fromiter(codes, dtype=np.uint8, count=len(values))


def hashed_ngrams(texts: Sequence[str]) -> np.ndarray:
    """Return how often runs of three to five bytes stand in each text, float32 (texts, buckets).

    All digits count as one: a problem's numbers are chance, how long they are is not. Square roots of counts, each
    text's of length 1, so that long texts weigh as much as short ones.

    Source: feature hashing, Weinberger et al. 2009 (arXiv 0902.2206).
    """
    counts_SB = np.stack([np.zeros(1 << BUCKETS_LOG2), *map(_ngram_counts, texts)])[1:]
    norm_S = np.sqrt(counts_SB.sum(axis=1, keepdims=True))
    return (np.sqrt(counts_SB) / np.maximum(norm_S, 1)).astype(np.float32)


def _ngram_counts(text: str) -> np.ndarray:
    codes = np.frombuffer(f" {text.translate(DIGITS)} ".encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint64)
    # Polynomials of the bytes modulo 2^64, spread by Fibonacci hashing; a base of its own for each length.
    bases = (np.uint64(0x100000001B3 + 2 * size) for size in NGRAM_SIZES)
    hashes = [
        sliding_window_view(codes, size) @ base ** np.arange(size, dtype=np.uint64)
        for size, base in zip(NGRAM_SIZES, bases, strict=True)
        if len(codes) >= size
    ]
    spread = np.concatenate([np.zeros(0, np.uint64), *hashes]) * np.uint64(0x9E3779B97F4A7C15)
    return np.bincount((spread >> np.uint64(64 - BUCKETS_LOG2)).astype(np.int64), minlength=1 << BUCKETS_LOG2)
