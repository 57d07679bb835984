# SPDX-License-Identifier: Apache-2.0
"""What each row of an update contributes along the direction, measured in the passes that train on it.

A row's contribution is its part of <g, v / |v|>, where g is the gradient that the update really takes: its output
gradients carry advantage, importance ratio, clipping and loss weights already. So contributions of all rows add up to
the product of the whole gradient, however rows are dealt to micro-batches and ranks. There are no norms: these need
whole problems. Of several mini-batches the later ones see the policy that the earlier ones have moved; nothing is
corrected for that. Gradients, and so the update, are bit for bit those without taps.

    with measuring(module, readings, num_rows, device) as meter:
        log_prob = module(...)                          # one micro-batch: rows 3, 0 and 2
        meter.begin([3, 0, 2], layout, units=1 / dp_size, dtype=torch.float32)
        log_prob.register_hook(partial(meter.note_coefficients, row_N=row_N, is_counted_N=is_counted_N))
        loss.backward()
    meter.contribution_KR[0]

Shape legend: R rows of the update, B rows of a micro-batch, N its tokens, K readings.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.tap_points import TapPoint
from verl_gradalign.probe.taps import Gather, Taps, tapped

UNIFORM = 1e-3
"""By how much the coefficients of a row's tokens may differ, as a share of their mean, to count as one: in float32 the
pass that gave the log-probs of the sampler, in other micro-batches, differs from the update's by about 1e-5."""
UNIFORM_HALF = 5e-2
"""The same in half precision, where these passes differ by a few per cent."""


@dataclass(frozen=True)
class Reading:
    """One way to read the direction (`probe/replica.py`): the layers' rules, and what they are given of it."""

    points: Sequence[TapPoint]
    gather: Gather


@dataclass(frozen=True)
class _Pass:
    """A micro-batch whose backward pass may be running."""

    rows: Sequence[int]
    units: float


@contextmanager
def measuring(
    module: nn.Module, readings: Sequence[Reading], num_rows: int, device: torch.device, tolerance: float = UNIFORM
) -> Iterator["UpdateMeter"]:
    """Tap the module while it is trained on `num_rows` rows; no tap is left, also after an exception.

    Each reading has taps of its own. Call it while the module is sharded.
    """
    with ExitStack() as stack:
        taps = [stack.enter_context(tapped(module, r.points, r.gather, False, freezes=False)) for r in readings]
        yield UpdateMeter(taps, num_rows, device, tolerance)


class UpdateMeter:
    """Notes what micro-batches give for the rows of an update. A row is measured in the first pass over it only."""

    def __init__(self, taps: Sequence[Taps], num_rows: int, device: torch.device, tolerance: float) -> None:
        self._taps, self._tolerance = taps, tolerance
        self.contribution_KR = torch.full((len(taps), num_rows), torch.nan, dtype=torch.float64, device=device)
        """Each row's part of <g, v / |v|> by each reading; nan of a row that no pass has shown yet."""
        self.derivative_R = torch.full((num_rows,), torch.nan, dtype=torch.float64, device=device)
        """By the first reading, v / |v| . grad log pi(y): the contribution over the coefficient that all counted tokens
        of the row have; nan where they have several, or none but zero, or where the loss takes more than log-probs."""
        self._unseen = set(range(num_rows))
        self._sum_K: Tensor | None = torch.zeros(len(taps), dtype=torch.float64, device=device)
        self._pass: _Pass | None = None
        self._coefficient_B: Tensor | None = None
        self._has_other_terms: Tensor | None = None

    @property
    def passed(self) -> tuple[int, int]:
        """Leading axes of the activations of the forward pass, (lines, width)."""
        return self._taps[0].passed

    def begin(self, rows: Sequence[int], layout: Layout, units: float, dtype: torch.dtype) -> None:
        """Start the backward pass of a micro-batch whose forward pass has run, and end the one before.

        `units` times the gradient of this rank's loss is its part of the update's; `dtype` is the accumulation dtype.
        """
        self.end()
        if self._taps[0].is_idle:
            self._sum_K = None
            return
        scale_B = torch.ones(len(rows), dtype=dtype, device=self.derivative_R.device)
        for taps in self._taps:
            taps.begin(layout, scale_B)
        self._pass = _Pass(rows, units)

    def note_coefficients(self, grad_N: Tensor, row_N: Tensor, is_counted_N: Tensor) -> None:
        """Note the loss's gradient by the log-prob of each token of the micro-batch: from a hook on them.

        Shapes: row_N int64, the place of each token's row in the micro-batch; is_counted_N, whether the token is one of
            the response's that count.
        """
        if self._pass is not None:
            number = len(self._pass.rows)
            self._coefficient_B = row_coefficients(grad_N, row_N, is_counted_N, number, self._tolerance)

    def note_other_term(self, grad: Tensor) -> None:
        """Note the loss's gradient by something else than log-probs, such as entropies: from a hook on it."""
        is_used = (grad != 0).any()
        self._has_other_terms = is_used if self._has_other_terms is None else self._has_other_terms | is_used

    def end(self) -> None:
        """End the micro-batch whose backward pass has run, if there is one.

        Raises: RuntimeError if a layer was not part of the pass.
        """
        current, self._pass = self._pass, None
        if current is None:
            return
        derivative_KB = torch.stack([taps.end().derivative_R.double() for taps in self._taps])
        contribution_KB = derivative_KB * current.units
        if self._sum_K is not None:
            self._sum_K += contribution_KB.sum(dim=1)
        fresh = [place for place, row in enumerate(current.rows) if row in self._unseen]
        place_B = torch.tensor(fresh, dtype=torch.int64, device=derivative_KB.device)
        row_B = torch.tensor([current.rows[place] for place in fresh], dtype=torch.int64, device=derivative_KB.device)
        self.contribution_KR[:, row_B] = contribution_KB[:, place_B]
        self.derivative_R[row_B] = self._derivatives(derivative_KB[0])[place_B]
        self._unseen.difference_update(current.rows)
        self._coefficient_B = self._has_other_terms = None

    def _derivatives(self, derivative_B: Tensor) -> Tensor:
        """Return the rows' products over their coefficients, both of this rank's loss; nan where there is none."""
        if self._coefficient_B is None:
            return torch.full_like(derivative_B, torch.nan)
        quotient_B = derivative_B / self._coefficient_B
        return quotient_B if self._has_other_terms is None else quotient_B.masked_fill(self._has_other_terms, torch.nan)

    def take_sum(self) -> Tensor | None:
        """Return the sum of contributions since the last call, (readings,), after the backward passes of a mini-batch.

        None if some of its passes were not measured. Once every row has been seen, further passes are left alone.
        """
        self.end()
        total, self._sum_K = self._sum_K, torch.zeros(len(self._taps), dtype=torch.float64, device=self._device)
        for taps in self._taps:
            taps.is_idle = not self._unseen
        return total

    @property
    def _device(self) -> torch.device:
        return self.derivative_R.device


def row_coefficients(grad_N: Tensor, row_N: Tensor, is_counted_N: Tensor, num_rows: int, tolerance: float) -> Tensor:
    """Return the coefficient that all counted tokens of each row have, and no other has any, else nan, (rows,) float64.

    nan too where it is zero: the gradient says nothing of the log-prob then.
    """
    counted_N, grad_N = is_counted_N.double(), grad_N.double()
    sums_2R = grad_N.new_zeros(2, num_rows).index_add(1, row_N, torch.stack([grad_N * counted_N, counted_N]))
    mean_R = sums_2R[0] / sums_2R[1]
    error_N = (grad_N - mean_R.nan_to_num()[row_N] * counted_N).abs()
    error_R = torch.zeros_like(mean_R).scatter_reduce(0, row_N, error_N, "amax")
    is_one_R = (mean_R != 0) & (error_R <= tolerance * mean_R.abs())
    return mean_R.masked_fill(~is_one_R, torch.nan)
