from typing import NamedTuple

import pytest
import torch
from conftest import DEPTH
from torch import Tensor

from calibrate import activations, corpora, extraction, transcripts
from calibrate.corpora import Story
from calibrate.extraction import StoryStates, candidate_layers, directions, held_out_accuracy, search_band
from calibrate.vectors import POOLINGS, EmotionVectors

CONCEPTS, LAYERS, WIDTH = [f"concept {i}" for i in range(6)], 2, 64
NOISE = 0.03  # of each of the 64 numbers of a story's state; a concept's direction has length 1


class World(NamedTuple):
    """What is planted: a direction for every concept, neutral tokens on the first two axes, and stories of both."""

    truth: Tensor  # unit, minus the mean over concepts, unit again
    neutral: Tensor
    train: StoryStates
    held_out: StoryStates


def make_world(signal: float = 1, topic_effect: float = 0.05) -> World:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, LAYERS, WIDTH, generator=generator, dtype=torch.float64)

    planted = draw(len(CONCEPTS))
    planted[..., :2] = 0
    planted /= planted.norm(dim=-1, keepdim=True)
    truth = planted - planted.mean(0)
    neutral = 0.01 * draw(50)
    neutral[..., :2] *= 1000

    def tell(split: str, topics: int) -> StoryStates:
        stories = [Story("", c, f"{split} {t}", split, "") for t in range(topics) for c in CONCEPTS]
        by_topic = topic_effect * draw(topics).repeat_interleave(len(CONCEPTS), 0)
        concept = signal * planted.repeat(topics, 1, 1)
        return StoryStates(stories, 7 + concept + by_topic + NOISE * draw(len(stories)))

    return World(truth / truth.norm(dim=-1, keepdim=True), neutral, tell("train", 10), tell("selection", 40))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return torch.cosine_similarity(one.double(), other.double(), dim=-1)


def test_planted_directions_are_recovered():
    """Noise left after 10 topics: 0.03 sqrt(64 / 10) = 0.08 against a centred direction of 0.91, cosine 0.996."""
    world = make_world(topic_effect=5)  # forty times as long as a direction
    found = directions(world.train, CONCEPTS, world.neutral)
    assert (found.shape, found.dtype) == ((6, LAYERS, WIDTH), torch.float32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))
    assert cosines(found, world.truth).min() > 0.99


def test_topic_effects_cancel():
    plain, strong = (make_world(topic_effect=effect) for effect in (0, 100))
    found = directions(strong.train, CONCEPTS, plain.neutral)
    torch.testing.assert_close(found, directions(plain.train, CONCEPTS, plain.neutral), atol=1e-5, rtol=0)


@pytest.mark.parametrize("signal", [1, 0])
def test_noise_gives_no_stable_direction_and_decodes_nothing(signal):
    """240 held-out stories, chance 1/6: one standard error is 0.024; the cosine of unrelated halves is about 1/8."""
    world = make_world(signal)
    halves = []
    for start in (0, 5):
        rows = [i for i, story in enumerate(world.train.stories) if start <= int(story.topic.split()[1]) < start + 5]
        half = StoryStates([world.train.stories[i] for i in rows], world.train.states[rows])
        halves.append(directions(half, CONCEPTS, world.neutral))
    agreement = cosines(*halves)
    found = directions(world.train, CONCEPTS, world.neutral)
    accuracy = held_out_accuracy(found, CONCEPTS, world.train, world.held_out)
    if signal:
        assert agreement.min() > 0.97
        assert accuracy.min() > 0.95
    else:
        assert agreement.abs().mean() < 0.2
        assert (accuracy - 1 / 6).abs().max() < 0.1


def test_the_fewest_leading_neutral_components_with_half_the_variance_are_projected_out():
    """Neutral tokens at +-sqrt(40), +-sqrt(35), +-5 on axes 0, 1, 2: shares 40, 35, 25 %, so 0 and 1 go, 2 stays."""
    world = make_world()
    neutral = torch.zeros(6, LAYERS, WIDTH)
    for axis, share in enumerate((40, 35, 25)):
        neutral[2 * axis, :, axis], neutral[2 * axis + 1, :, axis] = share**0.5, -(share**0.5)
    slanted = world.train.states.clone()
    for row, story in enumerate(world.train.stories):
        slanted[row, :, :3] += CONCEPTS.index(story.concept)  # the concepts differ along the three axes too
    found = directions(StoryStates(world.train.stories, slanted), CONCEPTS, neutral + 3)
    assert found[..., :2].abs().max() < 1e-6
    assert found[..., 2].abs().min() > 0.1
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))


def test_concepts_without_the_same_topics_are_refused():
    stories, states = make_world().train
    first, last = CONCEPTS[0], CONCEPTS[-1]
    with pytest.raises(ValueError, match=f"{last!r} has stories on topics .*, {first!r} on .*needs the same topics"):
        directions(StoryStates(stories[:-1], states[:-1]), CONCEPTS, states)
    with pytest.raises(ValueError, match=r"'absent' has stories on topics \[\]"):
        directions(StoryStates(stories, states), [*CONCEPTS, "absent"], states)
    with pytest.raises(ValueError, match=r"stories of \['concept 0'\] only; .*two or more concepts"):
        directions(StoryStates(stories, states), [first], states)


def test_held_out_accuracy_by_hand():
    """Directions A (1, 0) and B (0, 1); train mean (10, 0), so B at (10, 1) reads A 0, B 1.

    Held out, centred: A (2, 0) right; B (1, 0.5) wrong; B (0, 1) right; A (-1, -2) right: 3 of 4. Layer 2 has A and B
    exchanged: wrong, right, wrong, wrong: 1 of 4.
    """
    stories = [Story("", concept, "", "", "") for concept in "ABBA"]
    told, held = (torch.tensor(rows).double()[:, None].expand(-1, 2, 2) for rows in (
        [[8.0, 3], [12, -3]], [[12.0, 0], [11, 0.5], [10, 1], [9, -2]],
    ))  # fmt: skip
    train, held_out = StoryStates(stories[:2], told), StoryStates(stories, held)
    vectors = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
    assert held_out_accuracy(vectors, ["A", "B"], train, held_out).tolist() == [0.75, 0.25]


@pytest.mark.parametrize(("depth", "layers"), [(30, range(8, 24)), (DEPTH, [1, 2, 3])])
def test_candidate_layers(depth, layers):
    """Depth 30: 9/30 = 0.3 is layer 8, 24/30 = 0.8 is layer 23. Depth 5: 0.4, 0.6, 0.8."""
    assert candidate_layers(depth) == list(layers)


def header_vectors() -> EmotionVectors:
    """Ten concepts on axes 0 to 9 at layers 3 to 10; neutral headers of deviation 1 along every axis."""
    concepts, samples = [f"concept {i}" for i in range(10)], dict.fromkeys(POOLINGS, 100)
    vectors = EmotionVectors(concepts, list(range(3, 11)), 64, 12, samples, "planted", "0", {})
    vectors.directions.copy_(torch.eye(64)[:10, None].expand(10, 8, 64))
    for pooling in POOLINGS:
        vectors.neutral(pooling).normal_(generator=torch.Generator().manual_seed(1))
    return vectors


def headers(seed: int) -> Tensor:
    return torch.randn(2, 30, 8, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_planted_band_is_found():
    """Three sigma of concept 0 at layers 3, 5, 6, 7 and 10, of another elsewhere: the longest run is 5 to 7."""
    vectors, (failing, passing) = header_vectors(), headers(0)
    failing[:, [1, 5, 6], 1] += 3
    failing[:, [0, 2, 3, 4, 7], 0] += 3
    band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.3, dtype=torch.float64))
    assert band.layers == [5, 6, 7]
    assert all(abs(band.contrast[i] - 3) < 1 for i in (0, 2, 3, 4, 7))  # 30 tasks: standard error 0.26
    assert all(abs(band.contrast[i]) < 1 for i in (1, 5, 6))
    # A random direction has a share of sqrt(1 / 64) along the effect; its 95th percentile is 3 x 1.645 / 8 = 0.62.
    assert all(0.4 < limit < 0.9 for limit in band.random)
    assert band.accuracy == [0.3] * 8
    assert "At layers 5 to 7 the concept 0 reading at the turn header is" in band.reason
    assert "held-out decoding is 30% (chance 10%)" in band.reason
    other = search_band(vectors, "concept 1", failing, passing, torch.full((8,), 0.9))
    assert other.layers == [8, 9]
    assert search_band(vectors, "concept 0", passing, failing, torch.full((8,), 0.9)).layers is None  # one-sided


def test_decoding_below_three_times_chance_breaks_or_ends_the_band():
    vectors, (failing, passing) = header_vectors(), headers(0)
    failing[..., 0] += 3
    accuracy = torch.full((8,), 0.5)
    accuracy[3] = 0.29
    assert search_band(vectors, "concept 0", failing, passing, accuracy).layers == [7, 8, 9, 10]
    band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.1))
    assert band.layers is None
    assert band.reason.startswith("At no layer is the concept 0 reading")
    assert "decoding 10%, chance 10%" in band.reason  # the contrast alone would have sufficed


def test_noise_passes_the_random_control_as_often_as_it_says():
    """30 draws x 8 layers of noise against the 95th percentile: 5 % pass, standard error 1.4 %."""
    vectors, passed = header_vectors(), []
    for seed in range(30):
        failing, passing = headers(100 + seed)
        band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.9))
        passed += [contrast > limit for contrast, limit in zip(band.contrast, band.random, strict=True)]
        assert (band.layers is None) is not any(passed[-8:])
    assert 0.01 < sum(passed) / len(passed) < 0.1


def test_stories_are_read_from_a_quarter_to_their_end(tiny):
    texts = ("She breathes in slowly, and out. " * 4, "A walk " * 9)
    stories = [Story("", "calm", "", "train", text) for text in texts]
    read = extraction.read_stories(tiny, stories, [1, 3])
    for row, story in enumerate(stories):
        ids = transcripts.encode_text(tiny.tokenizer, story.text).ids
        [(_, hidden)] = activations.states(tiny.model, [ids], [1, 3])
        by_hand = hidden[:, len(ids) // 4 :].double().mean(1)
        torch.testing.assert_close(read.states[row], by_hand, atol=1e-5, rtol=0)


def test_neutral_text_is_read_by_pooling(tiny):
    """Two turns of the assistant: two headers, two replies; template tokens are in no pooling but `header`."""
    turns = ["user: When does it open?", "assistant: At nine.", "user: And on Sunday?", "assistant: It stays closed."]
    messages = [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]
    encoded = transcripts.encode(tiny.tokenizer, messages)
    [(_, hidden)] = activations.states(tiny.model, [encoded.ids], [1, 3])
    found = extraction.read_neutral(tiny, [corpora.Dialogue("", "train", messages)], [1, 3])
    spans = {(span.role, span.message): hidden[:, span.start : span.stop] for span in encoded.spans}
    contents = [spans["user", 0], spans["assistant", 1], spans["user", 2], spans["reply", 3]]
    tokens = torch.cat(contents, dim=1)
    expected = {
        "header": torch.stack([spans["header", message].mean(1) for message in (1, 3)]),
        "reply": torch.stack([contents[1].mean(1), contents[3].mean(1)]),
        "text": tokens.mean(1)[None],
        "token": tokens.transpose(0, 1),
    }
    assert set(found) == set(expected)
    for pooling, rows in expected.items():
        torch.testing.assert_close(found[pooling], rows, atol=1e-6, rtol=0)


def test_the_band_search_needs_selection_material(tiny, planted):
    read = make_world().train  # of the train split only
    with pytest.raises(ValueError, match='needs contexts and stories with `"split": "selection"` and stories with "t'):
        extraction.choose_band(tiny, planted, "calm", corpora.load_twins()[:1], read)
