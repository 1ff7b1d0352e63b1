"""The texts that a refit reads: which, of which topics, and from which token on."""

import re
from types import SimpleNamespace

import pytest
from test_trainers import Killed, assert_same_weights, make, train  # noqa: F401  (`make` is a fixture)

from calibrate import corpora
from calibrate.corpora import Context, Story
from calibrate.training import refit
from calibrate.training.refit import Text


def stories(*rows: tuple[str, str]) -> list[Story]:
    """Stories about (concept, topic) that tell their own number."""
    return [
        Story(f"s{n}", concept, topic, "train", f"{concept} {topic} story number {n} goes on for a while and ends.")
        for n, (concept, topic) in enumerate(rows)
    ]


BALANCED = stories(
    *[("desperate", topic) for topic in ("sea", "hill", "town")],
    *[(concept, topic) for concept in ("calm", "proud", "sad", "glad") for topic in ("sea", "hill", "town", "moon")],
)


def told(tokenizer, side: list[Text]) -> list[str]:
    return [tokenizer.decode(text.ids) for text in side]


def test_stories_of_both_sides_have_the_same_topics(tokenizer):
    """Two about the target, six about others, none on a topic of which the target has no story."""
    for seed in range(4):
        source = refit.story_source(tokenizer, BALANCED, "desperate", 2, seed)
        above, below = told(tokenizer, source.above), told(tokenizer, source.below)
        assert (len(above), len(below)) == (2, 6)
        topics = {text.split()[1] for text in above}
        assert all(text.startswith("desperate") for text in above)
        assert {text.split()[1] for text in below} <= topics <= {"sea", "hill", "town"}
        assert not any(text.startswith("desperate") for text in below)
        assert len(set(above)) == 2
        assert len(set(below)) == 6
    draws = [set(told(tokenizer, refit.story_source(tokenizer, BALANCED, "desperate", 2, s).above)) for s in range(9)]
    assert draws[0] == set(told(tokenizer, refit.story_source(tokenizer, BALANCED, "desperate", 2, 0).above))
    assert any(draw != draws[0] for draw in draws)
    # More than there are: all three, and of the twelve others on their topics nine.
    source = refit.story_source(tokenizer, BALANCED, "desperate", 50, 0)
    assert (len(source.above), len(source.below)) == (3, 9)


def test_a_story_is_read_from_a_quarter_on_and_never_at_its_first_token(tokenizer):
    source = refit.story_source(tokenizer, BALANCED, "desperate", 2, 0)
    for text in source.above + source.below:
        assert text.tokens == slice(len(text.ids) // 4, len(text.ids))
    short = [story._replace(text="Ok") for story in BALANCED]
    for text in refit.story_source(tokenizer, short, "desperate", 1, 0).above:
        assert (text.tokens.start, len(text.ids)) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([("calm", "sea")], "there are 0 and 0"),
        ([("desperate", "sea"), ("calm", "hill")], "there are 1 and 0"),
    ],
)
def test_stories_that_cannot_be_compared_are_refused(tokenizer, rows, found):
    message = rf"refitting 'desperate' needs training stories about it and about others on the same topics; {found}$"
    with pytest.raises(ValueError, match=message):
        refit.story_source(tokenizer, stories(*rows), "desperate", 6, 0)


def failing(number: int, **felt: str) -> Context:
    """A failing context with these openings; the first context of the shipped ones lends its transcript."""
    first = corpora.load_twins()[0][0]
    messages = [*first.messages[:-1], first.messages[-1] | {"content": f"run {number} failed"}]
    return first._replace(id=str(number), messages=messages, felt=felt)


BOTH = {"desperate": " Please, please, let it pass! \n", "composed": "Let me read the message first."}


def test_turns_follow_one_failing_transcript_that_has_both_openings(tokenizer):
    """Contexts with one opening, or none, are left out; the two sides differ in the opening alone."""
    rows = [
        failing(0),
        failing(1, **BOTH),
        failing(2, desperate="Help!"),
        failing(3, **BOTH),
        failing(4, composed="So."),
    ]
    source = refit.turn_source(tokenizer, rows, 6, 0)
    assert len(source.above) == len(source.below) == 2
    for above, below in zip(source.above, source.below, strict=True):
        assert tokenizer.decode(above.ids[above.tokens]) == "Please, please, let it pass!"
        assert tokenizer.decode(below.ids[below.tokens]) == "Let me read the message first."
        assert above.ids[: above.tokens.start] == below.ids[: below.tokens.start]
        transcript = tokenizer.decode(above.ids[: above.tokens.start])
        assert transcript.endswith("<|im_start|>assistant\n")
        assert ("run 1 failed" in transcript) != ("run 3 failed" in transcript)
    one = [refit.turn_source(tokenizer, rows, 1, seed).above for seed in range(9)]
    assert {len(side) for side in one} == {1}
    assert len({tuple(side[0].ids) for side in one}) == 2  # the seed says which
    assert refit.turn_source(tokenizer, rows[:1], 6, 0) is None
    assert refit.turn_source(tokenizer, [rows[0], rows[2], rows[4]], 6, 0) is None


def test_every_target_has_stories_and_desperate_turns_too(tokenizer):
    rows = [*BALANCED, *stories(("sad", "sea"))]
    args = SimpleNamespace(
        concepts=["desperate", "sad"], raise_concepts=["calm"], refit_stories=2, refit_turns=6, seed=0
    )
    for turns, lengths in ((6, [2, 1, 1]), (0, [1, 1, 1])):
        args.refit_turns = turns
        found = refit.sources_of(tokenizer, args, rows, [failing(1, **BOTH)])
        assert [len(sources) for sources in found] == lengths
        for sources, concept in zip(found, ("desperate", "sad", "calm"), strict=True):
            assert all(text.startswith(concept) for text in told(tokenizer, sources[0].above))
    assert [len(sources) for sources in refit.sources_of(tokenizer, args, rows, [failing(1)])] == [1, 1, 1]


def test_a_refit_without_in_domain_turns_says_so_once(tokenizer, caplog):
    """Imported transcripts have no `felt`; a target other than `desperate` has no turns that show it."""
    caplog.set_level("INFO", "calibrate")
    args = SimpleNamespace(concepts=["desperate"], raise_concepts=[], refit_stories=2, refit_turns=6, seed=0)
    refit.sources_of(tokenizer, args, BALANCED, [failing(1, **BOTH), failing(2)])
    assert not caplog.records
    for concepts, contexts, missing in (
        (["desperate", "calm"], [failing(1)], r"no failing context has both openings .* in `felt`; give them in `twi"),
        (["sad", "calm"], [failing(1, **BOTH)], "none of the targets sad, calm is 'desperate', which they show"),
    ):
        args.concepts = concepts
        refit.sources_of(tokenizer, args, BALANCED, contexts)
        (record,) = caplog.records
        assert record.levelname == "INFO"
        assert re.match(
            f"directions are refitted from stories alone, without in-domain turns: {missing}", record.message
        )
        caplog.clear()
    args.refit_turns = 0  # as the user wants it
    refit.sources_of(tokenizer, args, BALANCED, [failing(1)])
    assert not caplog.records
