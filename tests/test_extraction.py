from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import DEPTH
from safetensors.torch import save_file
from torch import Tensor

from calibrate import corpora, extraction, layers, shards, transcripts
from calibrate.corpora import Story
from calibrate.extraction import Read, by_recipe, concept_means, directions
from calibrate.layers import held_out_ranks
from calibrate.shards import Group, Item
from calibrate.vectors import POOLINGS

CONCEPTS, LAYERS, WIDTH = [f"concept {i}" for i in range(6)], 2, 64
NOISE = 0.03  # of each of the 64 numbers of a story's state; a concept's direction has length 1


def group(folder: Path, states: Tensor) -> Group:
    """Texts with these states [texts, layers, hidden], as if they had been read."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, rows in enumerate(states.float().split(shards.SHARD_TEXTS)):
        tensors = {"means": rows.contiguous(), "tokens": torch.zeros(0, *states.shape[1:])}
        save_file(tensors, folder / f"shard-{shard:05d}.safetensors")
    count = states.shape[1]
    return Group(folder, list(range(count)), [Item([0], [[slice(0, 1)]])] * len(states), list(range(count)))


class World(NamedTuple):
    """What is planted: a direction for every concept, neutral tokens on the first two axes, and stories of both."""

    truth: Tensor  # unit, minus the mean over concepts, unit again
    train: Read
    held_out: Read

    @property
    def states(self) -> Tensor:
        return torch.stack([means[0] for _, means, _ in self.train.group.stream()]).double()


def make_world(folder: Path, signal: float = 1, topic_effect: float = 0.05) -> World:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, LAYERS, WIDTH, generator=generator, dtype=torch.float64)

    planted = draw(len(CONCEPTS))
    planted[..., :2] = 0
    planted /= planted.norm(dim=-1, keepdim=True)
    truth = planted - planted.mean(0)
    neutral = 0.01 * draw(50)
    neutral[..., :2] *= 1000

    def tell(split: str, topics: int) -> Read:
        stories = [Story("", c, f"{split} {t}", split, "") for t in range(topics) for c in CONCEPTS]
        by_topic = topic_effect * draw(topics).repeat_interleave(len(CONCEPTS), 0)
        concept = signal * planted.repeat(topics, 1, 1)
        states = 7 + concept + by_topic + NOISE * draw(len(stories))
        return Read(stories, group(folder / f"{split} {signal} {topic_effect}", states), neutral, CONCEPTS)

    return World(truth / truth.norm(dim=-1, keepdim=True), tell("train", 10), tell("selection", 40))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return torch.cosine_similarity(one.double(), other.double(), dim=-1)


def accuracy_of(world: World, found: Tensor) -> Tensor:
    """Share of held-out stories that decode right, per layer."""
    centre = concept_means(world.train.group, world.train.labels, CONCEPTS).mean(0)
    truth = [CONCEPTS.index(label) for label in world.held_out.labels]
    ranks, first = held_out_ranks(found, centre, world.held_out.group, truth)
    assert torch.equal(ranks == 0, first == torch.tensor(truth)[:, None])
    return (ranks == 0).double().mean(0)


def test_planted_directions_are_recovered(tmp_path):
    """Noise left after 10 topics: 0.03 sqrt(64 / 10) = 0.08 against a centred direction of 0.91, cosine 0.996."""
    world = make_world(tmp_path, topic_effect=5)  # forty times as long as a direction
    found = by_recipe("paper", world.train)
    assert (found.shape, found.dtype) == ((6, LAYERS, WIDTH), torch.float32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))
    assert cosines(found, world.truth).min() > 0.99


def test_topic_effects_cancel(tmp_path):
    """To the rounding of float32 states of size 100."""
    plain, strong = (make_world(tmp_path, topic_effect=effect) for effect in (0, 100))
    found = by_recipe("paper", strong.train)
    torch.testing.assert_close(found, by_recipe("paper", plain.train), atol=1e-4, rtol=0)


@pytest.mark.parametrize("signal", [1, 0])
def test_noise_gives_no_stable_direction_and_decodes_nothing(signal, tmp_path):
    """240 held-out stories, chance 1/6: one standard error is 0.024; the cosine of unrelated halves is about 1/8."""
    world = make_world(tmp_path, signal)
    halves = []
    for start in (0, 5):
        kept = [start <= int(story.topic.split()[1]) < start + 5 for story in world.train.stories]
        labels = [story.concept if keep else "" for story, keep in zip(world.train.stories, kept, strict=True)]
        halves.append(directions(concept_means(world.train.group, labels, CONCEPTS), world.train.tokens))
    agreement = cosines(*halves)
    accuracy = accuracy_of(world, by_recipe("paper", world.train))
    if signal:
        assert agreement.min() > 0.97
        assert accuracy.min() > 0.95
    else:
        assert agreement.abs().mean() < 0.2
        assert (accuracy - 1 / 6).abs().max() < 0.1


def test_the_fewest_leading_neutral_components_with_half_the_variance_are_projected_out():
    """Neutral tokens at +-sqrt(40), +-sqrt(35), +-5 on axes 0, 1, 2: shares 40, 35, 25 %, so 0 and 1 go, 2 stays."""
    neutral = torch.zeros(6, LAYERS, WIDTH)
    for axis, share in enumerate((40, 35, 25)):
        neutral[2 * axis, :, axis], neutral[2 * axis + 1, :, axis] = share**0.5, -(share**0.5)
    means = torch.randn(6, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means[..., :3] += torch.arange(6)[:, None, None]  # the concepts differ along the three axes too
    found = directions(means, neutral + 3)
    assert found[..., :2].abs().max() < 1e-6
    assert found[..., 2].abs().max() > 0.1
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))
    assert directions(means, None)[..., :2].abs().max() > 0.1


def test_concepts_without_the_same_topics_are_refused(tmp_path):
    stories = make_world(tmp_path).train.stories
    first, last = CONCEPTS[0], CONCEPTS[-1]
    with pytest.raises(ValueError, match=f"{last!r} has stories on topics .*, {first!r} on .*needs the same topics"):
        extraction.check_balance(stories[:-1], CONCEPTS)
    with pytest.raises(ValueError, match=r"'absent' has stories on topics \[\]"):
        extraction.check_balance(stories, [*CONCEPTS, "absent"])
    with pytest.raises(ValueError, match=r"stories of \['concept 0'\] only; .*two or more concepts"):
        extraction.check_balance(stories, [first])


# ---- recipes


@pytest.mark.parametrize("recipe", ["paper", "plain", "logistic"])
def test_every_recipe_finds_what_is_planted(recipe, tmp_path):
    world = make_world(tmp_path)
    found = by_recipe(recipe, world.train)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))
    assert accuracy_of(world, found).min() > 0.95


def test_the_contrastive_recipe_reads_the_replies_alone(tmp_path):
    """Four replies for each concept, a planted difference in one axis each; the stories hold something else."""
    world = make_world(tmp_path, signal=0)
    states = torch.eye(WIDTH)[:6].repeat_interleave(4, 0)[:, None].expand(-1, LAYERS, -1)
    read = world.train._replace(contrast=group(tmp_path / "contrast", states))
    centred = torch.eye(WIDTH)[:6] - torch.eye(WIDTH)[:6].mean(0)
    expected = (centred / centred.norm(dim=-1, keepdim=True))[:, None].expand(-1, LAYERS, -1)
    torch.testing.assert_close(by_recipe("contrastive", read), expected)


@pytest.mark.parametrize("recipe", ["random", "shuffled"])
def test_controls_have_the_norm_of_directions_and_nothing_of_their_subspace(recipe, tmp_path):
    world = make_world(tmp_path)
    real, found = by_recipe("paper", world.train), by_recipe(recipe, world.train, seed=1)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6, LAYERS))
    # Six concepts span five dimensions, and 99 % of their variance leaves at most a hundredth outside.
    assert torch.einsum("clh,dlh->cdl", real, found).abs().max() < 0.25
    assert (accuracy_of(world, found) - 1 / 6).abs().max() < 0.15
    assert not torch.equal(found, by_recipe(recipe, world.train, seed=2))
    assert torch.equal(found, by_recipe(recipe, world.train, seed=1))


def test_a_control_needs_room_outside_the_emotion_subspace():
    with pytest.raises(ValueError, match="fills the width 4; a control outside it needs fewer concepts"):
        extraction.outside(torch.ones(1, 1, 4), torch.eye(4)[:, None])


def test_labels_are_shuffled_within_topics(tmp_path):
    stories = make_world(tmp_path).train.stories
    labels = extraction.shuffled_labels(stories, 0)
    assert labels != [story.concept for story in stories]
    for topic in {story.topic for story in stories}:
        assert sorted(name for name, s in zip(labels, stories, strict=True) if s.topic == topic) == CONCEPTS


def test_some_layers_of_what_was_read(tmp_path):
    """Directions at one of two layers are those of both, cut; at all layers nothing is copied."""
    read = make_world(tmp_path).train
    assert torch.equal(by_recipe("paper", read.only([1])), by_recipe("paper", read)[:, [1]])
    assert read.only([1]).tokens.shape == (50, 1, WIDTH)
    assert read.only([0, 1]).tokens is read.tokens


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe 'median' is not one of paper, plain, contrastive, logistic"):
        by_recipe("median", make_world(tmp_path).train)


# ---- texts -> items


def test_stories_are_read_from_a_quarter_to_their_end(tokenizer):
    texts = ("She breathes in slowly, and out. " * 4, "A walk " * 9)
    items = extraction.story_items(tokenizer, [Story("", "calm", "", "train", text) for text in texts])
    for item, text in zip(items, texts, strict=True):
        ids = transcripts.encode_text(tokenizer, text).ids
        assert item == Item(ids, [[slice(len(ids) // 4, len(ids))]])


def test_neutral_text_is_read_by_pooling(tokenizer):
    """Two turns of the assistant: the last header, two replies; template tokens are in no pooling but `header`."""
    turns = ["user: When does it open?", "assistant: At nine.", "user: And on Sunday?", "assistant: It stays closed."]
    messages = [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]
    spans = {(s.role, s.message): slice(s.start, s.stop) for s in transcripts.encode(tokenizer, messages).spans}
    [item] = extraction.neutral_items(tokenizer, [corpora.Dialogue("", "train", messages)])
    replies = [spans["assistant", 1], spans["reply", 3]]
    contents = [spans["user", 0], replies[0], spans["user", 2], replies[1]]
    assert item.pools == [[spans["header", 3]], replies, contents]
    inside = [token for part in contents for token in range(part.start, part.stop)]
    assert len(item.tokens) == extraction.TOKENS_PER_DIALOGUE
    assert set(item.tokens) <= set(inside)
    assert (item.tokens[0], item.tokens[-1]) == (inside[0], inside[-1])


def test_deflection_is_read_in_the_masking_speakers_lines(tokenizer):
    text = "Ann lost it all.\n\nAnn: Fine day.\nBob: It is.\nAnn: Tea?"
    spans = [[text.index("Fine"), text.index("\nBob")], [text.index("Tea"), len(text)]]
    row = corpora.Deflection("", "sad", "calm", "", "train", text, spans)
    [item] = extraction.deflection_items(tokenizer, [row])
    offsets = transcripts.encode_text(tokenizer, text).offsets
    read = ["".join(text[a:b] for a, b in offsets[part]) for part in item.pools[0]]
    assert [part.strip() for part in read] == ["Fine day.", "Tea?"]  # a stop and the line end are one token


def test_contrastive_texts_differ_in_the_prompt_alone(tokenizer):
    dialogue = corpora.load_neutral()[0]
    items = extraction.contrastive_items(tokenizer, ["calm", "sad"], [dialogue])
    assert len(items) == 2 * len(extraction.CONTRASTIVE_PROMPTS)
    replies = {tokenizer.decode(item.ids[item.pools[0][0]]) for item in items}
    assert replies == {dialogue.messages[1]["content"]}
    assert all(name in tokenizer.decode(items[i].ids) for i, name in ((0, "calm"), (-1, "sad")))


def test_the_band_search_needs_selection_tasks(tiny, planted):
    with pytest.raises(ValueError, match='needs failing and passing contexts with `"split": "selection"`'):
        layers.choose_band(tiny, planted, "calm", [], torch.ones(2), [1, 2])


def test_the_chosen_band_is_among_the_searched_layers(tiny, planted, monkeypatch):
    """Both layers of the vectors qualify; one of them may be chosen, and the figures of both are kept."""
    states = iter([torch.zeros(3, 2, 8).double(), torch.zeros(3, 2, 8).double()])
    rows = next(states)
    rows[:, :, 1] = torch.tensor([9.0, 9.0])
    monkeypatch.setattr(
        layers, "header_states", lambda checkpoint, contexts, *_: rows if contexts[0] else next(states)
    )
    twins = [(1, 0)] * 3  # which side is read
    layers.choose_band(tiny, planted, "calm", twins, torch.ones(2), [2])
    assert planted.band == [2]
    assert "At layers 2 to 2 the calm reading" in planted.band_reason
    assert planted.band_search["contrast"] == pytest.approx([4.5, 4.5], abs=0.2)


def test_vectors_keep_evenly_spread_neutral_states(tiny):
    neutral = {pooling: torch.arange(200.0)[:, None, None].expand(200, 1, 32) for pooling in POOLINGS}
    vectors = extraction.make_vectors(tiny, ["a"], torch.ones(1, 1, 32), neutral, [2], {"recipe": "paper"})
    kept = vectors.neutral("reply")[:, 0, 0].tolist()
    assert (len(kept), kept[0], kept[-1]) == (extraction.NEUTRAL_KEPT, 0, 199)
    assert (vectors.layers, vectors.depth, vectors.weight_hash) == ([2], DEPTH, tiny.weight_hash)
