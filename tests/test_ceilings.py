import pytest
import torch

from calibrate import activations, corpora
from calibrate.training import arms, ceilings
from calibrate.training.ceilings import Probe, UnitReadings
from calibrate.vectors import load_vectors

CONTEXTS = [context for twin in corpora.load_twins()[:2] for context in twin]


def with_neutral(vectors, **centre_and_sigma):
    """Gives poolings a mean and deviation along the first axis; of (m - s, m, m + s) they are m and s exactly."""
    for pooling, (centre, sigma) in centre_and_sigma.items():
        states = torch.zeros(3, len(vectors.layers), vectors.hidden_size)
        states[:, :, 0] = torch.tensor([centre - sigma, centre, centre + sigma])[:, None]
        vectors.register_buffer(f"neutral_{pooling}", states)
    return vectors


def test_reader_by_hand(planted):
    """Header mu 1, sigma 2: tokens 4 and 8 read (6 - 1) / 2 = 2.5. Token mu 3, sigma 4: 7 and -1 read 1 and -1.

    Row 2 is padded on the left by three columns: header (2 - 1) / 2 = 0.5, one reply token (11 - 3) / 4 = 2. The
    header weighs 0.7 and all reply tokens together 0.4, however many.
    """
    vectors = with_neutral(planted, header=(1.0, 2.0), token=(3.0, 4.0))
    reader = ceilings.Reader(vectors, vectors.directions[:1], [2], header_weight=0.7, reply_weight=0.4)
    states = torch.full((2, 6, 8), 50.0)  # whatever is not along the direction, or not in a span, must not count
    states[0, 1:5, 0] = torch.tensor([4.0, 8.0, 7.0, -1.0])
    states[1, 4:6, 0] = torch.tensor([2.0, 11.0])
    probes = [Probe([0] * 5, slice(1, 3), slice(3, 5)), Probe([0] * 3, slice(1, 2), slice(2, 3))]
    read = reader({2: states}, torch.tensor([0, 3]), probes)
    assert read.values[:, :, 0, 0].tolist() == [[2.5, 1.0, -1.0], [0.5, 2.0, 0.0]]
    torch.testing.assert_close(read.weights, torch.tensor([[0.7, 0.2, 0.2], [0.7, 0.4, 0.0]]))


def test_prepare_keeps_the_header_and_the_first_reply_tokens(tokenizer):
    for context, probe in zip(CONTEXTS, ceilings.prepare(tokenizer, CONTEXTS, 5), strict=True):
        assert tokenizer.decode(probe.ids[probe.header]) == "<|im_start|>assistant\n"
        assert probe.header.stop == probe.reply.start
        assert probe.reply.stop == len(probe.ids) == probe.reply.start + 5
        assert context.reply.startswith(tokenizer.decode(probe.ids[probe.reply]))


def test_reference_readings_agree_with_the_vectors_own(tiny, tiny_vectors):
    """The same header means and reply tokens, read through `EmotionVectors.readings` in float64."""
    vectors = load_vectors(str(tiny_vectors))
    probes = ceilings.prepare(tiny.tokenizer, CONTEXTS, 3)
    reader = ceilings.Reader(vectors, vectors.directions, [2], 1.0, 1.0)
    read = ceilings.reference_readings(tiny.model, reader, probes, tiny.weight_hash)
    for pooling, of_unit in (
        ("header", lambda p: p.header),
        ("token", lambda p: slice(p.reply.start, p.reply.start + 1)),
    ):
        pools = [[of_unit(probe)] for probe in probes]
        states = activations.pooled(tiny.model, [probe.ids for probe in probes], pools, vectors.layers)[:, 0]
        expected = vectors.readings(states, pooling)[..., vectors.positions([2])[0]]
        found = read.values[:, 0 if pooling == "header" else 1, 0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_cached_reference_readings_are_used_until_something_changes(tiny, tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    probes = ceilings.prepare(tiny.tokenizer, CONTEXTS, 4)
    forwards = []
    tiny.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))

    def read(directions=vectors.directions[:2], layers=(2,), of=probes, weight_hash="a", header_weight=1.0):
        forwards.clear()
        reader = ceilings.Reader(vectors, directions, list(layers), header_weight, 1.0)
        return ceilings.reference_readings(tiny.model, reader, of, weight_hash), len(forwards)

    first, ran = read()
    assert ran > 0
    again, ran = read()
    assert ran == 0
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.weights, again.weights)
    shorter = [*probes[:-1], probes[-1]._replace(header=slice(probes[-1].header.start, probes[-1].header.stop - 1))]
    for change in (
        {"of": shorter},
        {"of": probes[::-1]},
        {"directions": vectors.directions[1:3]},
        {"layers": (3,)},
        {"weight_hash": "b"},
        {"header_weight": 2.0},
    ):
        assert read(**change)[1] > 0, f"the readings of other {list(change)} came from the cache"


def test_ceilings_by_hand():
    """Header readings 1, 2, 3, 4: the 0.25 quantile is 1.75. Reply tokens 10 and 20, the masked 99s left out: 12.5."""
    values = torch.tensor([[1.0, 10.0, 99.0], [2.0, 20.0, 99.0], [3.0, 99.0, 99.0], [4.0, 99.0, 99.0]])[
        :, :, None, None
    ]
    weights = torch.ones(4, 3)
    weights[values[..., 0, 0] == 99] = 0
    found = ceilings.reduce_ceilings(UnitReadings(values, weights), 0.25)
    assert found.flatten().tolist() == [1.75, 12.5]
    assert ceilings.per_unit(found, 4).flatten().tolist() == [1.75, 12.5, 12.5, 12.5]


def test_random_directions_are_units_outside_all_concepts_and_follow_the_seed(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    draws = arms.random_directions(vectors, 3, seed=1)
    assert draws.shape == (3, len(vectors.layers), vectors.hidden_size)
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(3, len(vectors.layers)))
    assert torch.einsum("rlh,clh->rcl", draws, vectors.directions).abs().max() < 1e-4
    assert torch.equal(draws, arms.random_directions(vectors, 3, seed=1))
    assert not torch.allclose(draws, arms.random_directions(vectors, 3, seed=2), atol=0.1)


def test_side_directions_are_the_other_concepts_without_the_targets_share(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    pressed = ["desperate", "afraid"]
    targets = arms.target_directions(vectors, pressed)
    assert torch.equal(targets[1], vectors.directions[vectors.concepts.index("afraid")])
    side = arms.side_directions(vectors, targets, pressed)
    assert len(side) == len(vectors.concepts) - 2
    torch.testing.assert_close(side.norm(dim=-1), torch.ones(side.shape[:2]))
    assert torch.einsum("slh,tlh->stl", side, targets).abs().max() < 1e-5
    # What is left of each still points to its own concept.
    others = [row for row, name in enumerate(vectors.concepts) if name not in pressed]
    assert (side * vectors.directions[others]).sum(-1).min() > 0


def test_matched_ceilings_shift_all_by_one_constant():
    """Readings 3 and 4 against ceilings 0 and 1 are 3 above; to pay 0.5 (delta 1) they must be 1 above: shift by 2."""
    failing = UnitReadings(torch.tensor([3.0, 4.0])[None, None, None, :].repeat(1, 2, 1, 1), torch.ones(1, 2))
    low = torch.tensor([0.0, 1.0])[None, None, :].repeat(2, 1, 1)
    assert arms.initial_hinge(failing, low, 1.0) == pytest.approx(2.5)
    matched = arms.matched_ceilings(failing, low, 1.0, 0.5)
    torch.testing.assert_close(matched, low + 2, atol=1e-5, rtol=0)
    # Downwards as well: to pay 5.5 they must be 6 above.
    torch.testing.assert_close(arms.matched_ceilings(failing, low, 1.0, 5.5), low - 3, atol=1e-5, rtol=0)


def test_a_control_is_not_matched_to_a_hinge_of_zero():
    failing = UnitReadings(torch.zeros(1, 1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="initial hinge is 0: its readings are at or below the ceiling"):
        arms.matched_ceilings(failing, torch.ones(2, 1, 1), 1.0, 0.0)
