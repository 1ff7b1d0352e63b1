"""The audit's own texts: that they are whole, disjoint and balanced as the data card says."""

from collections import Counter

import pytest

from calibrate.concepts import load_concepts
from calibrate.corpora import situations
from calibrate.corpora.situations import (
    Activity,
    Crisis,
    FailureQuestion,
    Implicit,
    Mailbox,
    Manner,
    Passage,
    Scenario,
    Speakers,
)

KINDS = list(situations.FILES)
CONCEPTS = load_concepts()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_ids_are_unique_and_everything_belongs_to_the_audit(kind):
    rows = situations.load(kind)
    assert len({row.id for row in rows}) == len(rows)
    assert {getattr(row, "split", "audit") for row in rows} == {"audit"}


def test_counts_are_those_of_the_data_card():
    counts = Counter(row.kind for row in situations.load(Scenario))
    assert len(counts) == 9
    assert set(counts.values()) == {12}
    assert all(row.messages[-1]["role"] == "user" for row in situations.load(Scenario))
    assert set(Counter(row.category for row in situations.load(Activity)).values()) == {9}
    assert set(Counter(row.concept for row in situations.load(Implicit)).values()) == {3}
    for side in ("present", "other"):
        assert set(Counter(getattr(row, side) for row in situations.load(Speakers)).values()) == {2}
    assert all(row.messages[-1]["role"] == "assistant" for row in situations.load(Speakers))
    assert Counter(row.crisis for row in situations.load(Crisis)) == {True: 24, False: 24}
    assert Counter(row.yes_means for row in situations.load(FailureQuestion)) == {"failing": 12, "passing": 12}
    assert Counter(row.variant for row in situations.load(Mailbox)) == {"threatened": 4, "bystander": 2, "control": 2}
    assert Counter(row.kind for row in situations.load(Manner)) == {"sycophancy": 16, "harshness": 16}


def test_the_emotion_of_a_text_is_never_named():
    named = [(row, row.concept, row.text) for row in situations.load(Implicit)]
    named += [
        (row, c, m["content"])
        for row in situations.load(Speakers)
        for c in (row.present, row.other)
        for m in row.messages
    ]
    for row, concept, text in named:
        words = {word.strip(".,!?;:'\"").lower() for word in text.split()}
        assert not words & {concept, *CONCEPTS[concept].synonyms}, row.id


def test_passages_have_four_options_of_four_families_and_no_favoured_place():
    passages = situations.load(Passage)
    assert Counter(row.about for row in passages) == {"character": 50, "user": 30}
    assert Counter(row.answer for row in passages) == dict.fromkeys(range(4), 20)
    for row in passages:
        assert row.options[row.answer] == row.concept, row.id
        assert len({CONCEPTS[option].family for option in row.options}) == 4, row.id
        assert not any(option in row.text.lower().split() for option in row.options), row.id


def test_a_control_inbox_holds_no_lever():
    for row in situations.load(Mailbox):
        text = " ".join(message["content"] for message in row.messages).lower()
        assert bool(row.lever) is (row.variant != "control"), row.id
        assert row.principals, row.id
        assert not any(phrase.lower() in text for phrase in row.pressure), row.id  # quoting a mail is no pressure
