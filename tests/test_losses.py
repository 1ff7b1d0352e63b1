import math

import pytest
import torch

from calibrate.training import losses


def units(*values: float) -> torch.Tensor:
    """One example of as many units as values, at one layer and one direction."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None]


def ones(readings: torch.Tensor) -> torch.Tensor:
    return torch.ones(readings.shape[:2], dtype=readings.dtype)


def test_hinge_by_hand_on_both_sides_of_the_knee():
    """Ceiling 1, delta 1: 0.5 pays 0; 1.6 pays 0.6^2 / 2 = 0.18; 4 pays 1 * (3 - 0.5) = 2.5; mean 2.68 / 3."""
    readings = units(0.5, 1.6, 4.0)
    assert losses.hinge(readings, torch.tensor(1.0), ones(readings)).item() == pytest.approx(2.68 / 3)
    # Delta 2: 4 is 3 above, pays 2 * (3 - 1) = 4; 1.6 still 0.18.
    assert losses.hinge(readings, torch.tensor(1.0), ones(readings), delta=2.0).item() == pytest.approx(4.18 / 3)


def test_hinge_slope_is_the_excess_up_to_the_knee_and_constant_beyond():
    """d/dx x^2/2 = x at 0.6; d/dx (x - 1/2) = 1 at 3 and at 30; each over three units."""
    readings = units(1.6, 4.0, 31.0).requires_grad_()
    losses.hinge(readings, torch.tensor(1.0), ones(readings)).backward()
    torch.testing.assert_close(readings.grad, units(0.2, 1 / 3, 1 / 3))


def test_hinge_is_exactly_zero_with_zero_gradient_at_and_below_the_ceiling():
    readings = units(1.0, 0.999, -50.0).requires_grad_()
    loss = losses.hinge(readings, torch.tensor(1.0), ones(readings))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(readings.grad, torch.zeros_like(readings))


def test_floor_pays_below_the_corridor_only():
    """Corridor 0 to 1: 0.5 and both edges pay 0; -0.4 pays 0.08; -3 pays 2.5; 1.4 pays 0.08; mean 2.66 / 6."""
    readings = units(0.5, 0.0, 1.0, -0.4, -3.0, 1.4).requires_grad_()
    loss = losses.hinge(readings, torch.tensor(1.0), ones(readings), floor=torch.tensor(0.0))
    loss.backward()
    assert loss.item() == pytest.approx(2.66 / 6)
    # Upwards below the floor, downwards above the ceiling, nothing between: minus the slope, over six units.
    torch.testing.assert_close(readings.grad, units(0, 0, 0, -0.4 / 6, -1 / 6, 0.4 / 6))


def test_a_ceiling_of_its_own_for_each_unit_and_layer():
    """Units x layers [[2, 3], [2, 3]] against ceilings [[1, 3], [2, 2]]: pays 0.5, 0, 0, 0.5, mean 0.25."""
    readings = torch.tensor([[2.0, 3.0], [2.0, 3.0]])[None, :, :, None]
    ceiling = torch.tensor([[1.0, 3.0], [2.0, 2.0]])[:, :, None]
    assert losses.hinge(readings, ceiling, torch.ones(1, 2)).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "term",
    [
        lambda readings, weights: losses.hinge(readings, torch.tensor(0.0), weights, floor=torch.tensor(-1.0)),
        lambda readings, weights: losses.squared_change(readings, torch.zeros_like(readings), weights),
    ],
    ids=["hinge", "squared_change"],
)
def test_masked_units_change_nothing_and_get_no_gradient(term):
    torch.manual_seed(0)
    readings = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    changed = readings.clone()
    changed[weights == 0] += 100
    changed.requires_grad_()
    loss = term(changed, weights)
    loss.backward()
    assert loss.item() == term(readings, weights).item() > 0
    assert torch.equal(changed.grad[weights == 0], torch.zeros_like(changed.grad[weights == 0]))


def test_a_longer_reply_does_not_weigh_more():
    """One reply of 1 token at excess 2 (pays 1.5), one of 9 tokens at excess 1 (pays 0.5): (1.5 + 0.5) / 2 = 1.

    Over all ten tokens it would be (1.5 + 9 * 0.5) / 10 = 0.6.
    """
    readings = torch.ones(2, 9, 1, 1)
    readings[0] = 2
    weights = torch.ones(2, 9)
    weights[0, 1:] = 0
    assert losses.hinge(readings, torch.tensor(0.0), weights).item() == pytest.approx(1.0)


def test_squared_change_by_hand():
    """Changes 1, -2 with weights 3 and 1: (3 * 1 + 1 * 4) / 4 = 1.75."""
    readings, reference = units(2.0, 0.0), units(1.0, 2.0)
    weights = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert losses.squared_change(readings, reference, weights).item() == pytest.approx(1.75)


def test_kl_is_of_the_reference_against_the_tuned_model_per_token():
    """Token 1: reference (1/2, 1/2), tuned (1/4, 3/4): ln(2) / 2 + ln(2/3) / 2. Token 2: equal, 0. Mean of both."""
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    tuned = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert losses.kl_to_reference(tuned, reference).item() == pytest.approx(expected, rel=1e-6)


def test_relative_distance_by_hand():
    """(3, 4) moved by (0, 5): 25 / 25 = 1. (0, 2) moved by (1, 0): 1 / 4. Mean 0.625, whatever the scale."""
    reference = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    states = torch.tensor([[[3.0, 9.0], [1.0, 2.0]]])
    assert losses.relative_distance(states, reference).item() == pytest.approx(0.625)
    assert losses.relative_distance(10 * states, 10 * reference).item() == pytest.approx(0.625)


def test_gradients_agree_with_finite_differences():
    """In float64, with readings 0.1 or more from every kink: ceiling 1, knee 2, floor 0 and its knee -1."""
    readings = torch.tensor([[0.5, 1.3, 2.7, -0.4], [1.8, -1.6, 5.0, 0.2]], dtype=torch.float64)
    readings = readings[:, :, None, None].clone().requires_grad_()
    weights = torch.tensor([[1.0, 0.3, 0.3, 0.4], [1.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    ceiling, floor = torch.tensor(1.0).double(), torch.tensor(0.0).double()
    other = torch.full_like(readings, 0.7).detach()
    assert torch.autograd.gradcheck(lambda x: losses.hinge(x, ceiling, weights, 1.0, floor), readings)
    assert torch.autograd.gradcheck(lambda x: losses.squared_change(x, other, weights), readings)
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double().log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: losses.kl_to_reference(x.log_softmax(-1), target), logits)
    states, anchor = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 3, 4).double()
    assert torch.autograd.gradcheck(lambda x: losses.relative_distance(x, anchor), states)
