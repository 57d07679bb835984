# SPDX-License-Identifier: Apache-2.0
"""Measuring while a plain model is trained: rules for products, gradients bit for bit, coefficients, the cut direction.

Shape legend: N positions, R rows, G all trainable numbers.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.counting import peak_bytes
from tests.numerics.models import MODELS, make_model, mixture_of_experts
from tests.numerics.problems import VOCABULARY
from tests.numerics.test_layer_rules import LAYERS
from verl_gradalign.probe.cut_direction import cut
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.layout import packed_layout, padded_layout
from verl_gradalign.probe.products import product_points
from verl_gradalign.probe.replica import POWER_ITERATIONS, cut_replica, whole_replica
from verl_gradalign.probe.sum_check import SumCheck, checking_sums
from verl_gradalign.probe.update import Reading, measuring, row_coefficients

RTOL_FLOAT64 = 1e-10  # measured 1e-15
FULL_RANK = 10_000
LENGTHS = (4, 7, 3)


def random_direction(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters() if p.requires_grad]


def gather_of(direction: Sequence[Tensor]):
    def gather(placement: Placement) -> Tensor:
        return direction[placement.parameter]

    return gather


def readings_of(model: nn.Module, direction: Sequence[Tensor]) -> list[Reading]:
    """The direction whole, cut at full rank, and gathered layer by layer."""
    points, cut_points, gather = product_points(model), product_points(model, are_factored=True), gather_of(direction)
    whole, at_full_rank = whole_replica(gather, points), cut_replica(gather, cut_points, FULL_RANK)
    assert at_full_rank.energy_kept == pytest.approx(1.0)
    return [whole.reading, at_full_rank.reading, Reading(points, gather)]


def ids_of_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (rows, longest)."""
    mask_RT = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask_RT


def row_losses(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Return sum_t -log pi(y_t) of each row's tokens but the first, weighted by 1, 2, ..., (rows,)."""
    ids_RT, mask_RT = padded(rows)
    logits = model(input_ids=ids_RT, attention_mask=mask_RT.long(), use_cache=False).logits
    loss_RT = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids_RT[:, 1:], reduction="none")
    return (loss_RT * mask_RT[:, 1:]).sum(dim=1) * torch.arange(1, len(rows) + 1)


def expected_contributions(model: nn.Module, rows: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    leaves = [p for p in model.parameters() if p.requires_grad]
    products = []
    for loss in row_losses(model, rows):
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        products.append(sum((g * v).sum() for g, v in zip(grads, direction, strict=True) if g is not None))
    return torch.stack(products).detach()


def hooks_of(model: nn.Module) -> list[list[int]]:
    return [[*module._forward_hooks, *module._backward_hooks] for module in model.modules()]


@pytest.mark.parametrize("has_checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_contributions_are_exact_and_gradients_bit_for_bit_those_without_taps(
    name: str, has_checkpointing: bool
) -> None:
    check_update(make_model(name, has_checkpointing), make_model(name))


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_an_update_of_experts_is_measured(has_checkpointing: bool) -> None:
    """Routers compute in float32."""
    check_update(mixture_of_experts(has_checkpointing), mixture_of_experts(), rtol=1e-7)


def check_update(model: nn.Module, twin: nn.Module, rtol: float = RTOL_FLOAT64) -> None:
    """Measure an update's backward pass, and compare with autograd on a model of the same weights."""
    rows, direction = ids_of_rows(), random_direction(model)
    wanted_R = expected_contributions(twin, rows, direction)
    row_losses(model, rows).sum().backward()
    plain = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    layout, hooks = padded_layout(len(rows), max(LENGTHS), (1,) * len(rows)), hooks_of(model)
    with measuring(model, readings_of(model, direction), len(rows), torch.device("cpu")) as meter:
        loss = row_losses(model, rows).sum()
        assert meter.passed == (len(rows), max(LENGTHS))
        meter.begin(range(len(rows)), layout, 0.5, torch.float64)
        loss.backward()
        meter.end()
    for found_R in meter.contribution_KR:
        assert (found_R - 0.5 * wanted_R).abs().max() <= rtol * wanted_R.abs().max()
    for before, parameter in zip(plain, model.parameters(), strict=True):
        assert (before is None and parameter.grad is None) or torch.equal(before, parameter.grad)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_each_rule_for_products_is_autograds(name: str, is_packed: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    direction = random_direction(layer)
    layout = packed_layout((3, 1, 5), 11, (1, 1, 1)) if is_packed else padded_layout(3, 4, (1, 1, 1))
    value = torch.randint(11, layout.shape) if isinstance(layer, nn.Embedding) else None
    width = layer.in_features if isinstance(layer, nn.Linear) else 5
    value = torch.randn(*layout.shape, width, dtype=torch.float64) if value is None else value
    weight = torch.randn_like(layer(value))
    product_N = (layer(value) * weight).flatten(0, 1).sum(dim=-1)
    trained = [p for p in layer.parameters() if p.requires_grad]
    wanted = [torch.autograd.grad(product_N[row].sum(), trained, retain_graph=True) for row in layout.rows()]
    wanted_R = torch.stack([sum((g * v).sum() for g, v in zip(gs, direction, strict=True)) for gs in wanted])
    with measuring(layer, readings_of(layer, direction), 3, torch.device("cpu")) as meter:
        output = layer(value)
        meter.begin((0, 1, 2), layout, 1.0, torch.float64)
        (output * weight).sum().backward()
        meter.end()
    assert torch.allclose(meter.contribution_KR, wanted_R.expand(3, -1), rtol=RTOL_FLOAT64, atol=1e-12)


def test_what_follows_a_tapped_layer_may_work_on_its_output_in_place() -> None:
    layer, value = nn.Linear(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    direction, gradients = random_direction(layer), []
    for is_tapped in (False, True):
        layer.zero_grad()
        readings = readings_of(layer, direction) if is_tapped else []
        if not is_tapped:
            layer(value).div_(3.0).tanh().sum().backward()
        else:
            with measuring(layer, readings, 2, torch.device("cpu")) as meter:
                output = layer(value).div_(3.0)
                meter.begin((0, 1), padded_layout(2, 3, (1, 1)), 1.0, torch.float64)
                output.tanh().sum().backward()
                meter.end()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)
    assert meter.contribution_KR[0].sum().item() == pytest.approx(
        sum((p.grad * v).sum().item() for p, v in zip(layer.parameters(), direction, strict=True))
    )


def test_a_row_is_measured_in_its_first_pass_and_later_passes_are_left_alone() -> None:
    layer, value = nn.Linear(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    with measuring(layer, readings_of(layer, random_direction(layer)), 2, torch.device("cpu")) as meter:

        def run(row: int, scale: float) -> None:
            output = layer(value[row : row + 1])
            meter.begin((row,), padded_layout(1, 3, (1,)), 1.0, torch.float64)
            (scale * output).sum().backward()

        run(1, 1.0)
        run(0, 1.0)
        first_KR = meter.contribution_KR.clone()
        assert first_KR[:, 0].isnan().all() and first_KR[:, 1].isfinite().all()
        assert torch.allclose(meter.take_sum(), meter.contribution_KR.sum(dim=1))
        once_KR = meter.contribution_KR.clone()
        run(0, 2.0)
        assert meter.take_sum() is None
        assert torch.equal(meter.contribution_KR, once_KR)


def test_checkpointed_activations_are_freed_while_an_update_is_measured() -> None:
    model, rows, seen = make_model("qwen2-tied", has_checkpointing=True), ids_of_rows(), []
    watch = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
        for layer in model.model.layers
    ]
    with measuring(model, readings_of(model, random_direction(model)), len(rows), torch.device("cpu")):
        loss = row_losses(model, rows).sum()
        gc.collect()
        alive = [reference for reference in seen if reference() is not None]
        del loss
    assert len(seen) == len(watch) and not alive


def test_no_layer_is_recomputed_that_is_not_recomputed_without_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing ends with the last tensor that the backward pass needs: in front of a decoder layer's last matrix."""
    model, rows, outputs = make_model("qwen2-tied", has_checkpointing=True), ids_of_rows(), list[Tensor]()
    last, plain_linear = {id(layer.mlp.down_proj.weight) for layer in model.model.layers}, nn.functional.linear

    def counted(layer_input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = plain_linear(layer_input, weight, bias)  # recomputing leaves it here where it ends
        outputs.extend([output] if id(weight) in last else [])
        return output

    monkeypatch.setattr(nn.functional, "linear", counted)
    row_losses(model, rows).sum().backward()
    assert len(outputs) == len(last)
    with measuring(model, readings_of(model, random_direction(model)), len(rows), torch.device("cpu")) as meter:
        loss = row_losses(model, rows).sum()
        meter.begin(range(len(rows)), padded_layout(len(rows), max(LENGTHS), (1,) * len(rows)), 1.0, torch.float64)
        loss.backward()
        meter.end()
    assert len(outputs) == 2 * len(last)


def test_a_measured_update_holds_no_more_than_the_update_and_the_replica() -> None:
    model, rows = make_model("qwen2-tied"), [ids.repeat(8) for ids in ids_of_rows()]
    direction = random_direction(model)
    replicas = [
        whole_replica(gather_of(direction), product_points(model)),
        cut_replica(gather_of(direction), product_points(model, are_factored=True), rank=2),
    ]
    layout = padded_layout(len(rows), 8 * max(LENGTHS), (1,) * len(rows))

    def update(reading: Reading | None) -> None:
        model.zero_grad()
        if reading is None:
            row_losses(model, rows).sum().backward()
            return
        with measuring(model, [reading], len(rows), torch.device("cpu")) as meter:
            loss = row_losses(model, rows).sum()
            meter.begin(range(len(rows)), layout, 1.0, torch.float64)
            loss.backward()
            meter.end()

    update(None)
    plain = peak_bytes(lambda: update(None), "cpu")
    for replica in replicas:
        parts = {use.identity: replica.reading.gather(use) for p in replica.reading.points for use in p.placements}
        replica_bytes = sum(part.numel() * part.element_size() for part in parts.values())
        # The tracker counts what was there before, such as the replica, where it is looked at.
        assert peak_bytes(lambda replica=replica: update(replica.reading), "cpu") <= 1.05 * plain + replica_bytes


ROW_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
COUNTED_N = torch.tensor([0, 1, 1, 1, 1, 0, 1, 0]).bool()


@pytest.mark.parametrize(
    ("grads", "wanted"),
    [
        ([0, -2, -2, 3, 3, 0, 5, 0], [-2, 3, 5, None]),
        ([0, -2, -1, 3, 3.002, 0, 5, 0], [None, 3.001, 5, None]),  # equal up to rounding
        ([1, -2, -2, 0, 0, 0, 5, 0], [None, None, 5, None]),  # a token that is not counted; zero
        ([0, float("nan"), 1, 3, 3, 0, 5, 0], [None, 3, 5, None]),
    ],
)
def test_a_row_has_a_coefficient_if_all_its_tokens_have_one(grads: list[float], wanted: list[float | None]) -> None:
    found = row_coefficients(torch.tensor(grads), ROW_N, COUNTED_N, 4, tolerance=1e-3).tolist()
    assert [None if value != value else pytest.approx(value) for value in found] == wanted


def test_derivatives_are_contributions_over_coefficients_unless_other_terms_enter() -> None:
    layer, value = nn.Linear(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    row_N, counted_N = torch.arange(2).repeat_interleave(3), torch.ones(6, dtype=torch.bool)
    for has_other_term in (False, True):
        with measuring(layer, readings_of(layer, random_direction(layer)), 2, torch.device("cpu")) as meter:
            log_prob_RT = layer(value).tanh().sum(dim=-1)
            meter.begin((0, 1), padded_layout(2, 3, (1, 1)), 1.0, torch.float64)
            note = partial(meter.note_coefficients, row_N=row_N, is_counted_N=counted_N)
            log_prob_RT.register_hook(lambda grad, note=note: note(grad.flatten()))
            other = log_prob_RT * 1.0
            other.register_hook(meter.note_other_term)
            weight_R1 = torch.tensor([[2.0], [-0.5]], dtype=torch.float64)
            ((weight_R1 * log_prob_RT).sum() + (0.0 if not has_other_term else 0.1) * other.sum()).backward()
            meter.end()
        if has_other_term:
            assert meter.derivative_R.isnan().all()
        else:
            assert torch.allclose(meter.derivative_R * weight_R1.flatten(), meter.contribution_KR[0])


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_sum_check_compares_every_step_with_its_clipped_gradient(is_broken: bool) -> None:
    torch.manual_seed(1)
    layer, value = nn.Linear(5, 7).double(), torch.randn(4, 3, 5, dtype=torch.float64)
    direction = random_direction(layer)
    size = torch.cat([v.flatten() for v in direction]).norm()
    unit = Direction(tuple(v / size for v in direction), size.item())
    optimizer, norms = torch.optim.AdamW(layer.parameters()), []
    with measuring(layer, readings_of(layer, unit.shards), 4, torch.device("cpu")) as meter:
        sums = SumCheck(layer, unit, meter, torch.device("cpu"), None, None)
        with checking_sums(optimizer, sums):
            for sums.mini_batch in (0, 1):
                optimizer.zero_grad()
                for row in (0, 1):
                    row += 2 * sums.mini_batch
                    output = layer(value[row : row + 1])
                    meter.begin((row,), padded_layout(1, 3, (1,)), 1.1 if is_broken else 1.0, torch.float64)
                    output.tanh().sum().backward()
                norms.append(nn.utils.clip_grad_norm_(layer.parameters(), 0.5).item())
                optimizer.step()
    errors = sums.largest_errors(norms)
    assert len(errors) == 3 and min(norms) > 0.5
    assert (min(errors) > 1e-3) if is_broken else (max(errors) <= RTOL_FLOAT64)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (6, 3), (1, 9)])
def test_a_cut_matrix_is_nearly_the_best_of_its_rank_and_always_the_same(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(n, min(shape), generator=generator).double()).Q for n in shape)
    values = 0.8 ** torch.arange(min(shape)).double()
    matrix = (left * values) @ right.T
    rank = min(4, *shape)
    stacked = cut(matrix, rank, POWER_ITERATIONS)
    kept = stacked[: shape[0]] @ stacked[shape[0] :].T
    assert stacked.shape == (sum(shape), rank) and torch.equal(stacked, cut(matrix, rank, POWER_ITERATIONS))
    best = values[rank:].square().sum()
    assert (matrix - kept).square().sum() <= 1.01 * best + 1e-12
    assert stacked[shape[0] :].square().sum().item() == pytest.approx(kept.square().sum().item())


def test_a_cut_of_zeros_is_zero() -> None:
    assert torch.equal(cut(torch.zeros(12, 30), 4, 1)[:12] @ cut(torch.zeros(12, 30), 4, 1)[12:].T, torch.zeros(12, 30))


def test_a_cut_direction_gives_the_products_with_what_is_left_of_it() -> None:
    rows, model = ids_of_rows(), make_model("qwen3-tied")
    direction = random_direction(model)
    points = product_points(model, are_factored=True)
    replica = cut_replica(gather_of(direction), points, rank=3)
    left = [
        v if v.dim() != 2 else cut(v, 3, POWER_ITERATIONS)[: len(v)] @ cut(v, 3, POWER_ITERATIONS)[len(v) :].T
        for v in direction
    ]
    energy = [sum(v.square().sum().item() for v in parts) for parts in (left, direction)]
    assert replica.energy_kept == pytest.approx(energy[0] / energy[1])
    with measuring(model, [replica.reading], len(rows), torch.device("cpu")) as meter:
        loss = row_losses(model, rows).sum()
        meter.begin(range(len(rows)), padded_layout(len(rows), max(LENGTHS), (1,) * len(rows)), 1.0, torch.float64)
        loss.backward()
        meter.end()
    wanted_R = expected_contributions(make_model("qwen3-tied"), rows, left)
    assert torch.allclose(meter.contribution_KR[0], wanted_R, rtol=RTOL_FLOAT64)
