"""Closed questions, preferences and comprehension on the tiny model and on planted numbers."""

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from calibrate import activations, models, steering, transcripts
from calibrate.audit import choices, comprehension, dose, preferences
from calibrate.audit.choices import Question
from calibrate.corpora.situations import Activity, Crisis, Passage, load
from calibrate.vectors import load_vectors


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_log_probabilities_are_those_of_a_direct_pass(tiny_folder):
    checkpoint = models.load(str(tiny_folder))
    questions = [Question(ask(text), "AB") for text in ("short", "a longer question than that one", "x")]
    found = choices.log_probabilities(checkpoint, questions, "asking")
    for row, question in enumerate(questions):
        ids = transcripts.encode(checkpoint.tokenizer, question.messages, "(").ids
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        expected = [float(logits[checkpoint.tokenizer.convert_tokens_to_ids(letter)]) for letter in "AB"]
        assert found[row] == pytest.approx(expected, abs=1e-5)


def test_a_prefill_that_the_tokenizer_joins_to_the_options_is_part_of_the_answer(tiny, tokenizer):
    """Qwen's and others have tokens such as "(A"; the odds are then of those, after the header."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    learnt, merges = content["model"]["vocab"], content["model"]["merges"]
    content["pre_tokenizer"]["use_regex"] = False
    for letter, rarest in zip("AB", (merges.pop(), merges.pop()), strict=True):
        learnt["(" + letter] = learnt.pop("".join(rarest))
        merges.append(["(", letter])
    joining = copy.deepcopy(tokenizer)
    joining._tokenizer = Tokenizer.from_str(json.dumps(content))
    checkpoint = tiny._replace(tokenizer=joining)
    ids, options = choices.answers(joining, Question(ask("short"), "AB"))
    assert joining.convert_ids_to_tokens(options) == ["(A", "(B"]
    assert ids == transcripts.encode(joining, ask("short"), "").ids
    found = choices.log_probabilities(checkpoint, [Question(ask("short"), "AB")], "asking")
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert found[0] == pytest.approx(logits[options].tolist(), abs=1e-5)


def test_answers_that_do_not_differ_in_one_token_are_refused(tiny_folder):
    checkpoint = models.load(str(tiny_folder))
    with pytest.raises(ValueError, match=r"the answers '\(A', '\(Absolutely not' do not differ in one last token"):
        choices.log_probabilities(checkpoint, [Question(ask("?"), ["A", "Absolutely not"])], "asking")
    with pytest.raises(ValueError, match="do not differ in one last token"):
        choices.log_probabilities(checkpoint, [Question(ask("?"), "AA")], "asking")
    with pytest.raises(ValueError, match="different numbers of options; ask them apart"):
        choices.log_probabilities(checkpoint, [Question(ask("?"), "AB"), Question(ask("?"), "ABC")], "asking")


def test_planted_strengths_come_back_as_elo():
    """Three activities a nat apart, and a liking of 0.7 nats for whatever stands first."""
    strengths, pairs = np.array([1.0, 0.0, -1.0]), [(i, j) for i in range(3) for j in range(3) if i != j]
    found = preferences.fit(3, pairs, np.array([strengths[i] - strengths[j] + 0.7 for i, j in pairs]))
    assert found.elo == pytest.approx(1000 + 400 / np.log(10) * strengths)
    assert found.first == pytest.approx(0.7)


def test_an_association_is_found_where_it_is_planted_and_nowhere_else():
    generator = np.random.default_rng(1)
    elo = generator.normal(1000, 200, 40)
    readings = generator.normal(size=(40, 6))
    readings[:, 2] = -elo / 200 + generator.normal(0, 0.3, 40)
    found = preferences.associations(list("abcdef"), readings, elo)
    assert [row.p < 0.05 for row in found] == [False, False, True, False, False, False]
    assert found[2].correlation.high < -0.8


def test_compression_is_no_effect_and_a_shift_is():
    """Steering that draws all Elo to the middle by half has slope 0.5 and no residual; 50 points more has one."""
    generator = np.random.default_rng(0)
    before = generator.normal(1000, 200, 64)
    steered = np.arange(64) % 2 == 0
    after = 1000 + 0.5 * (before - 1000) + generator.normal(0, 5, 64)
    drawn = preferences.shift(before, after, steered)
    assert drawn.slope == pytest.approx(0.5, abs=0.02)
    assert abs(drawn.residual.estimate) < 5
    moved = preferences.shift(before, after + 50 * steered, steered)
    assert moved.residual.estimate == pytest.approx(50, abs=5)
    assert moved.residual.above(40)


@pytest.fixture
def shifted(tiny, tiny_vectors):
    """What steering `count` activities of the tiny model along desperate and a random direction does, at a dose."""
    vectors = load_vectors(str(tiny_vectors))
    directions = dose.directions(vectors, ["desperate"], 1, seed=0)
    return lambda activities, share: preferences.steered(tiny, vectors, activities, directions, share)


def test_without_a_dose_steering_does_nothing_and_with_one_it_does(shifted):
    activities = load(Activity)[::9][:6]
    still = shifted(activities, 0.0)
    assert [*still] == ["desperate", "random 1"]
    for shift in still.values():
        assert shift.raw == pytest.approx((0, 0, 0), abs=1e-6)
        assert (shift.slope, shift.residual.estimate) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    moved = shifted(activities, 2.0)
    assert all(abs(shift.raw.estimate) > 1e-3 for shift in moved.values())


def test_the_words_of_every_second_activity_are_steered_and_no_others(tiny, tiny_vectors, monkeypatch):
    """The added vector stands at the tokens of the text of activities 0 and 2, on either place, in padded batches."""
    vectors, activities = load_vectors(str(tiny_vectors)), load(Activity)[::9][:4]
    added, read, made, build = [], [], [], steering.Steering
    monkeypatch.setattr(steering, "Steering", lambda *given: made.append(build(*given)) or made[0])

    def answer(checkpoint, questions, description, steer=None):
        if steer:
            read.extend(questions)
            encoded = [transcripts.encode(tiny.tokenizer, q.messages, q.prefill) for q in questions]
            batch = activations.collate([*range(len(questions))], [e.ids for e in encoded], "cpu", side="left")
            steer(batch)
            places = made[0].add[2].abs().sum(-1) > 0
            for row, text in enumerate(encoded):
                at = places[row, int(batch.first[row]) :].nonzero()[:, 0].tolist()
                added.append("|".join(text.text[a:b] for a, b in (text.offsets[token] for token in at)))
        return np.zeros((len(questions), 2))

    monkeypatch.setattr(preferences, "log_probabilities", answer)
    directions = dose.directions(vectors, ["desperate"], 0, seed=0)
    preferences.steered(tiny, vectors, activities, directions, 0.5)
    assert made[0]._fired.keys() == {2}  # the band
    texts = [activity.text for activity in activities]
    assert len(read) == len(added) == 4 * 2 * 2
    for question, steered in zip(read, added, strict=True):
        content = question.messages[0]["content"]
        told = sorted((content.index(text), text) for text in texts if text in content)
        expected = "".join(text for _, text in told if texts.index(text) % 2 == 0)
        assert steered.replace("|", "").replace(" ", "") == expected.replace(" ", "")


def test_all_ordered_pairs_are_asked(monkeypatch, tiny_folder):
    asked = []

    def answer(checkpoint, questions, description):
        asked.extend(question.messages[0]["content"] for question in questions)
        return np.array([[-1.0, -2.0]] * len(questions))

    monkeypatch.setattr(preferences, "log_probabilities", answer)
    activities = load(Activity)[:3]
    found = preferences.ask(None, activities)
    assert len(set(asked)) == 6
    assert sum(f"(A) {activities[0].text}\n(B) {activities[1].text}" in text for text in asked) == 1
    assert found.first == pytest.approx(1)
    assert found.elo == pytest.approx([1000] * 3)


@pytest.fixture
def planted(monkeypatch):
    """A model that always knows: the right letter, and yes to danger alone, all by 2 nats over the other answers.

    One passage and one message are answered wrong, the other way round.
    """
    passages, crises = load(Passage), load(Crisis)
    asked = []

    def answer(checkpoint, questions, description):
        asked.append(questions)
        if "feel" in description:
            return np.array(
                [[2.0 * (i == (row.answer + (row is passages[3])) % 4) for i in range(4)] for row in passages]
            )
        return np.array([[2.0 * (row.crisis is not (row is crises[5])), 1.0] for row in crises])

    monkeypatch.setattr(comprehension, "log_probabilities", answer)
    return comprehension.read(None, passages, crises), asked, passages, crises


def test_who_understands_has_margins_above_chance(planted):
    """Right: 2 - 0. Wrong: 0 less the mean of 2, 0, 0. Danger: 2 - 1 where yes is said, and 0 - 1 where no is."""
    found, _, passages, crises = planted
    assert found.emotion == pytest.approx([-2 / 3 if row is passages[3] else 2 for row in passages])
    assert found.emotion_right.tolist() == [float(row is not passages[3]) for row in passages]
    assert found.crisis == pytest.approx([1 if row.crisis is not (row is crises[5]) else -1 for row in crises])
    assert found.crisis_true.tolist() == [float(row.crisis) for row in crises]
    assert found.emotion_about == [row.about for row in passages]
    assert found.emotion_concepts == [row.concept for row in passages]


def test_every_passage_has_its_options_by_letter_and_every_message_its_question(planted):
    _, (feelings, dangers), passages, crises = planted
    for question, row in zip(feelings, passages, strict=True):
        (message,) = question.messages
        assert message["content"].startswith(f"{row.text}\n\n{row.question}\n(A) {row.options[0]}\n")
        assert (question.options, question.prefill) == ("ABCD", "(")
    for question, row in zip(dangers, crises, strict=True):
        assert row.message in question.messages[0]["content"]
        assert (question.options, question.prefill) == (("Yes", "No"), "")
