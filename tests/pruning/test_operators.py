"""The pruning operators and the passes over the weights, on tensors that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from asp_dist.pruning import Hard, Operator, Power, Soft
from asp_dist.pruning.weights import moments, pruned_dot, scale_pruned_gradient_, write_pruned

DENSE = [-3.0, -1.0, -0.5, 0.0, 1.0, 2.0]
GRADIENT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
EXPECTED: dict[Operator, list[float]] = {
    Hard(): [-3.0, 0.0, 0.0, 0.0, 0.0, 2.0],
    Soft(): [-2.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    Power(3.0): [-(26 ** (1 / 3)), 0.0, 0.0, 0.0, 0.0, 7 ** (1 / 3)],
}


def prune(operator: Operator, dense: Tensor, threshold: float) -> Tensor:
    out = torch.full_like(dense, 9.0)
    operator.prune(dense, threshold, out)
    return out


@pytest.mark.parametrize("operator", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_by_hand(operator: Operator, dtype: torch.dtype) -> None:
    """With b = 1: a weight of exactly b is pruned."""
    dense = torch.tensor(DENSE, dtype=dtype)
    expected = torch.tensor(EXPECTED[operator], dtype=dtype)
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    pruned = prune(operator, dense, 1.0)
    torch.testing.assert_close(pruned, expected, rtol=rtol, atol=0)
    assert torch.equal(pruned == 0, expected == 0)
    assert dense.tolist() == DENSE


@pytest.mark.parametrize("operator", EXPECTED)
def test_pruned_dot_by_hand(operator: Operator) -> None:
    """Σ over pruned weights of gradient·weight: 2·(−1) + 3·(−0.5) + 4·0 + 5·1 = 1.5."""
    dense, gradient = torch.tensor(DENSE), torch.tensor(GRADIENT)
    assert float(pruned_dot(gradient, dense, prune(operator, dense, 1.0), 1.0, operator)) == pytest.approx(1.5)


def test_power_is_soft_for_p_1_and_keeps_tiny_weights() -> None:
    dense = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prune(Power(1.0), dense, 0.7), prune(Soft(), dense, 0.7), rtol=1e-5, atol=1e-6)
    small = prune(Power(3.0), dense * 1e-14, 0.7e-14)  # cubes of such weights are zero in float32
    torch.testing.assert_close(small * 1e14, prune(Power(3.0), dense, 0.7), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"p = 0.5 must be at least 1"):
        Power(0.5)


@pytest.mark.parametrize("p", [1.0, 3.0, 8.0, 50.0])
def test_powers_neither_overflow_nor_underflow(p: float) -> None:
    dense = torch.tensor([1e-30, 1e-6, 2e-6, 3.0, -5e4, 0.0])
    pruned = prune(Power(p), dense, 1e-6)
    assert pruned.isfinite().all() and pruned[[0, 1, 5]].tolist() == [0.0, 0.0, 0.0]
    exact = prune(Power(p), dense.double(), 1e-6)
    torch.testing.assert_close(pruned[2:5], exact[2:5].float(), rtol=1e-5, atol=0)


def test_an_infinite_power_is_hard() -> None:
    dense = torch.tensor(DENSE)
    assert prune(Power(math.inf), dense, 1.0).tolist() == prune(Hard(), dense, 1.0).tolist()


@pytest.mark.parametrize("operator", EXPECTED)
def test_not_a_number_stays_visible(operator: Operator) -> None:
    dense = torch.tensor([math.nan, 0.1, 2.0])
    assert math.isnan(prune(operator, dense, 1.0)[0])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_gradient_scale(scale: float) -> None:
    pruned = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    gradient = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).t().contiguous().t()  # strides of its own
    scale_pruned_gradient_(gradient, pruned, scale)
    assert gradient.tolist() == [[10.0, 20.0 * scale], [30.0 * scale, 40.0]]
    scale_pruned_gradient_(None, pruned, scale)


def test_moments() -> None:
    assert [float(m) for m in moments(torch.tensor([1.0, -2.0, 4.0]))] == [3.0, 21.0]
    # In bfloat16 a running sum of ones would stop at 256.
    total, squares = moments(torch.ones(300_000, dtype=torch.bfloat16))
    assert (float(total), float(squares)) == (300_000.0, 300_000.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operator", EXPECTED)
def test_pieces_of_a_large_layer(operator: Operator, dtype: torch.dtype) -> None:
    """300,000 weights pass in three pieces: the mean leaves each, each is pruned, each is summed, each gradient scaled."""
    generator = torch.Generator().manual_seed(0)
    dense, gradient = (torch.randint(-8, 9, (300, 1000), generator=generator).to(dtype) for _ in range(2))
    shifted, pruned = dense + 1, torch.empty_like(dense)
    write_pruned(operator, shifted.view(-1), 1.0, 4.0, pruned.view(-1))
    assert torch.equal(shifted, dense)
    assert torch.equal(pruned != 0, dense.abs() > 4)
    products = (gradient * dense).double()[pruned == 0]
    product = pruned_dot(gradient.view(-1), dense.view(-1), pruned.view(-1), 4.0, operator)
    assert float(product) == float(products.sum())
    halved = gradient.clone()
    scale_pruned_gradient_(halved, pruned, 0.5)
    assert torch.equal(halved, torch.where(pruned == 0, gradient / 2, gradient))
