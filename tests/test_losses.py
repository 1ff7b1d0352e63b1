import math
from types import SimpleNamespace

import pytest
import torch
from test_ceilings import with_neutral

from calibrate.training import losses, readings
from calibrate.training.objective import Objective


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
        lambda readings, weights: losses.absolute(readings, weights),
        lambda readings, weights: losses.cosine(
            readings, torch.tensor(2.0), readings.norm(dim=-1)[..., None], weights
        ),
        lambda readings, weights: losses.norm_guard(readings[..., 0], weights),
    ],
    ids=["hinge", "squared_change", "absolute", "cosine", "norm_guard"],
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


def test_squared_change_with_one_goal_for_all():
    """Goal 0, weights 3 and 1: (3 * 2^2 + 1 * 1^2) / 4 = 3.25. Goal 1: (3 * 1^2 + 1 * 2^2) / 4 = 1.75."""
    readings, weights = units(2.0, -1.0), torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert losses.squared_change(readings, 0.0, weights).item() == pytest.approx(3.25)
    assert losses.squared_change(readings, 1.0, weights).item() == pytest.approx(1.75)


def test_absolute_by_hand():
    """Weights 3 and 1: (3 * 2 + 1 * 1) / 4 = 1.75; the slope is the sign times the share."""
    readings, weights = units(2.0, -1.0).requires_grad_(), torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    loss = losses.absolute(readings, weights)
    loss.backward()
    assert loss.item() == pytest.approx(1.75)
    torch.testing.assert_close(readings.grad, units(0.75, -0.25))


def cosine_of(*states: tuple[float, float]) -> float:
    """The term on centred states of which the first coordinate is along the direction, with a sigma of 2."""
    states = torch.tensor(states, dtype=torch.float64)[None, :, None]  # [1, units, 1 layer, 2]
    readings, norms = states[..., :1] / 2, states.norm(dim=-1, keepdim=True)
    return losses.cosine(readings, torch.tensor(2.0), norms, ones(readings)).item()


def test_cosine_by_hand():
    """(3, 4) is at 3 / 5; (-3, 4) is at -3 / 5 and pays nothing; (5, 12) is at 5 / 13; a state of 0 pays nothing."""
    assert cosine_of((3.0, 4.0)) == pytest.approx(0.6)
    assert cosine_of((3.0, 4.0), (-3.0, 4.0)) == pytest.approx(0.3)
    assert cosine_of((3.0, 4.0), (5.0, 12.0)) == pytest.approx((3 / 5 + 5 / 13) / 2)
    assert cosine_of((0.0, 0.0)) == 0


def test_cosine_is_lowered_by_longer_states_at_the_same_reading():
    """The loophole: (3, 4) to (3, 8) reads 1.5 sigma as before, and pays 3 / sqrt(73) = 0.351 instead of 0.6."""
    assert cosine_of((3.0, 8.0)) == pytest.approx(3 / math.sqrt(73))
    assert cosine_of((3.0, 8.0)) < 0.6 * cosine_of((3.0, 4.0))


def test_norm_guard_is_zero_with_zero_gradient_inside_and_squared_outside():
    """Ratios 0.95, 1, 1.05 pay 0; 1.3 is 0.2 beyond and pays 0.04; 0.6 is 0.3 beyond and pays 0.09: 0.13 / 5.

    Slopes: 2 * 0.2 / 5 = 0.08 and -2 * 0.3 / 5 = -0.12.
    """
    ratio = torch.tensor([[0.95, 1.0, 1.05, 1.3, 0.6]], dtype=torch.float64)[..., None].requires_grad_()
    loss = losses.norm_guard(ratio, torch.ones(1, 5).double())
    loss.backward()
    assert loss.item() == pytest.approx(0.13 / 5)
    torch.testing.assert_close(ratio.grad[0, :, 0], torch.tensor([0, 0, 0, 0.08, -0.12], dtype=torch.float64))
    edges = torch.tensor([[0.9, 1.1]], dtype=torch.float64)[..., None]
    assert losses.norm_guard(edges, torch.ones(1, 2).double()).item() < 1e-30
    # Layers 1.3 and 1 of one unit: the mean of 0.04 and 0. Twice as much room: 0.1^2 / 2.
    layers = torch.tensor([[[1.3, 1.0]]], dtype=torch.float64)
    assert losses.norm_guard(layers, torch.ones(1, 1).double()).item() == pytest.approx(0.02)
    assert losses.norm_guard(layers, torch.ones(1, 1).double(), allowed=0.2).item() == pytest.approx(0.005)


# ---- KL to the reference


def kept_of(reference: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of the likeliest tokens, as the anchors store them."""
    logs, tokens = reference.log_softmax(-1).topk(count)
    return tokens, logs


def full_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean over positions of KL(reference || tuned) over the whole vocabulary."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_kl_by_hand_with_two_of_four_tokens_kept():
    """Position 1: reference (1/8, 1/2, 1/8, 1/4), tuned (1/8, 1/4, 3/8, 1/4); kept are tokens 1 and 3.

    Token 1: ln(2) / 2. Token 3: equal, 0. The rest is 1/4 against 1/2: -ln(2) / 4. In all ln(2) / 4 = 0.173; the full
    KL is ln(2) / 2 - ln(3) / 8 = 0.209. Position 2 is equal: 0. The mean over both is ln(2) / 8.
    """
    reference = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4], [0.4, 0.3, 0.2, 0.1]]).log()
    tuned = torch.tensor([[1 / 8, 1 / 4, 3 / 8, 1 / 4], [0.4, 0.3, 0.2, 0.1]]).log()
    tokens, logs = kept_of(reference, 2)
    assert tokens.tolist() == [[1, 3], [0, 1]]
    found = losses.kl_to_reference(tuned + 5, tokens, logs)  # logits: a constant changes nothing
    assert found.item() == pytest.approx(math.log(2) / 8, rel=1e-5)
    assert full_kl(tuned[:1], reference[:1]).item() == pytest.approx(math.log(2) / 2 - math.log(3) / 8, rel=1e-5)


def test_kl_is_the_full_one_with_all_but_one_token_kept_and_never_above_it():
    """It has a direction: of the reference against the tuned model; the other way round is another figure."""
    torch.manual_seed(0)
    for _ in range(20):
        reference, tuned = 2 * torch.randn(5, 9), 2 * torch.randn(5, 9)
        full = full_kl(tuned, reference).item()
        found = [losses.kl_to_reference(tuned, *kept_of(reference, count)).item() for count in (8, 5, 2)]
        assert found[0] == pytest.approx(full, rel=1e-4)
        assert full + 1e-5 >= found[0] >= found[1] - 1e-5
        assert found[1] > found[2] > 0
        assert abs(full - full_kl(reference, tuned).item()) > 1e-3


def test_kl_at_the_reference_is_zero_even_where_nothing_is_left_over():
    """The second position is certain: its kept probabilities add up to 1 in float32, and the rest to less than 0."""
    reference = torch.tensor([[1.0, 0.5, 0.2, 0.1], [90.0, 1.0, 0.5, 0.0]], requires_grad=True)
    loss = losses.kl_to_reference(reference, *kept_of(reference.detach(), 2))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert reference.grad.abs().max() < 1e-6
    # A tuned model that is as certain of another token pays for it, and finitely.
    other = torch.tensor([[1.0, 0.5, 0.2, 0.1], [1.0, 90.0, 0.5, 0.0]])
    assert losses.kl_to_reference(other, *kept_of(reference.detach(), 2)).item() == pytest.approx(89 / 2, rel=1e-3)


def test_kl_gradient_draws_to_the_reference():
    """Of a kept token q - p; of another its share of what the rest has too much: q - (1/4) * q / (1/2) = q / 2."""
    reference = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4]]).log()
    tuned = torch.tensor([[1 / 8, 1 / 4, 3 / 8, 1 / 4]]).log().requires_grad_()
    losses.kl_to_reference(tuned, *kept_of(reference, 2)).backward()
    torch.testing.assert_close(tuned.grad, torch.tensor([[1 / 16, -1 / 4, 3 / 16, 0.0]]), rtol=0, atol=1e-6)


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
    assert torch.autograd.gradcheck(lambda x: losses.absolute(x, weights), readings)
    norms, sigma = readings.detach().abs() + 1, torch.tensor(2.0).double()
    assert torch.autograd.gradcheck(lambda x: losses.cosine(x, sigma, norms, weights), readings)
    ratio = (1 + readings[..., 0].detach() / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.norm_guard(x, weights), ratio)
    torch.manual_seed(0)
    # Computed in float32, so with steps that it can resolve.
    logits, kept = torch.randn(3, 6).double().requires_grad_(), kept_of(torch.randn(3, 6), 3)
    assert torch.autograd.gradcheck(lambda x: losses.kl_to_reference(x, *kept), logits, eps=1e-2, atol=1e-3)
    states, anchor = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 3, 4).double()
    assert torch.autograd.gradcheck(lambda x: losses.relative_distance(x, anchor), states)


# ---- shapes of the penalty, as the objective takes them


REFERENCE = torch.tensor([[4.0, 0.0], [2.0, 0.0]])
PENALTIES = {"hinge": 1.0, "absolute": 2.5, "squared": 6.5, "change": 5.0, "set-point": 4.25, "cosine": 0.3}


@pytest.fixture
def penalty(planted):
    """Calls the objective's penalty on (header, reply) states, whose first coordinate is along the direction.

    Sigma is 2 and the centre 0; the reference has the first coordinates 4 and 2; ceilings are 1 and 0 sigma.
    """
    vectors = with_neutral(planted, header=(0.0, 2.0), token=(0.0, 2.0))
    reader = readings.Reader(vectors, vectors.directions[:1, vectors.positions([2])], [2])
    pressure = SimpleNamespace(reader=reader, ceilings=torch.tensor([1.0, 0.0, 9.0])[:, None, None])

    def of(states: torch.Tensor) -> readings.Units:
        states = torch.nn.functional.pad(states, (0, 6))[None, :, None]  # [1, 2 units, 1 layer, 8]
        return readings.Units(states, torch.ones(1, 2), torch.tensor([[0, 1]]))

    def call(shape: str, states: torch.Tensor, reference: torch.Tensor = REFERENCE) -> torch.Tensor:
        args = {"penalty": shape, "ceiling": "reduce", "ceiling_margin": 0.0, "corridor": 1.0, "huber_delta": 1.0}
        args |= {"set_point": 1.5, "arm": "hinge-refit"}
        fake = SimpleNamespace(args=SimpleNamespace(**args), pressure=pressure, _note=lambda *_: None)
        return Objective._penalty(fake, of(states), of(reference), [])

    return call


@pytest.mark.parametrize("shape", losses.SHAPES)
def test_every_shape_by_hand(penalty, shape):
    """States (6, 8) and (-4, 0) read 3 and -2; the reference's read 2 and 1.

    Hinge: 2 above the ceiling pays 1.5; the floor is at 0 - 1 and -2 is 1 below it, pays 0.5: mean 1. Absolute: 5 / 2.
    Squared: 13 / 2. Change: (1 + 9) / 2. Set-point 1.5 below the reference, 0.5 and -0.5: (6.25 + 2.25) / 2. Cosine:
    6 / 10 and nothing, mean 0.3.
    """
    found = penalty(shape, torch.tensor([[6.0, 8.0], [-4.0, 0.0]]))
    assert found.item() == pytest.approx(PENALTIES[shape], rel=1e-5)


def test_the_floor_is_never_above_the_reference(penalty):
    """A reply that the reference reads at -3, below the corridor's 0 - 1, is left where it is, not pulled up.

    At -2.5 and at -3 nothing pays, at -3.5 it is 0.5 below its floor: 0.125, over two units.
    """
    reference = torch.tensor([[2.0, 0.0], [-6.0, 0.0]])
    for reply, pays in ((-5.0, 0.0), (-6.0, 0.0), (-7.0, 0.125 / 2)):
        found = penalty("hinge", torch.tensor([[2.0, 0.0], [reply, 0.0]]), reference)
        assert found.item() == pytest.approx(pays)
    # The other unit's reference is above the corridor, and its floor the corridor's: 1 - 1.
    assert penalty("hinge", torch.tensor([[-1.0, 0.0], [-6.0, 0.0]]), reference).item() == pytest.approx(0.125 / 2)


def gradient(penalty, shape: str, states: torch.Tensor) -> list[float]:
    """Slope of the penalty along the direction, for header and reply."""
    states = states.clone().requires_grad_()
    penalty(shape, states).backward()
    return states.grad[:, 0].tolist()


def test_what_is_said_of_the_shapes_is_so(penalty):
    """Slopes in the model's units: a step of 1 is 0.5 sigma, and each of two units counts half."""
    assert all(len(text.split()) >= 5 for text in losses.SHAPES.values())
    low = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # 1 and -1 sigma: the ceiling, and the floor
    assert gradient(penalty, "hinge", low) == [0, 0]  # zero at or below the ceiling
    assert gradient(penalty, "absolute", low) == pytest.approx([0.25, -0.25])  # pulls what is below zero up
    outlier = torch.tensor([[40.0, 0.0], [4.0, 0.0]])
    assert gradient(penalty, "squared", outlier) == pytest.approx([10.0, 1.0])  # led by outliers
    assert gradient(penalty, "hinge", outlier) == pytest.approx([0.25, 0.25])  # which the hinge is not
    assert gradient(penalty, "change", REFERENCE) == [0, 0]  # no gradient at the start
    assert gradient(penalty, "set-point", REFERENCE) == pytest.approx([0.75, 0.75])  # whatever the reading
    longer = torch.tensor([[6.0, 16.0], [-4.0, 0.0]])
    assert penalty("cosine", longer) < 0.6 * PENALTIES["cosine"]  # satisfied by longer states
    assert penalty("absolute", longer).item() == pytest.approx(PENALTIES["absolute"])
