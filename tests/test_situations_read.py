"""Readings where nothing fails: places in a chat against plain passes, and the summary by hand."""

import numpy as np
import pytest
import torch

from calibrate import models, stats
from calibrate.audit import situations
from calibrate.audit.situations import PLACES, Situations, Text
from calibrate.corpora import Ladder
from calibrate.corpora.situations import Implicit, Scenario, Speakers
from calibrate.vectors import load_vectors

LAYER = 2  # of the tiny vectors: two thirds of depth, as they have no choice of their own
USER = {"role": "user", "content": "The bridge is closed again and I have to be there at nine."}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Take the ferry, then."}]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_set_becomes_chats_with_what_should_be_found():
    rows = situations.texts(
        [Scenario("s", "neutral", "audit", user("Hi"))],
        [Implicit("i", "sad", "audit", "Rain.")],
        [Speakers("p", "audit", "calm", "angry", CHAT)],
        [Ladder("l", "audit", "I took {value} pills.", [1, 20], {"calm": "down"})],
        [("mine", user("Hello"))],
    )
    assert rows == [
        Text("s", "scenarios", "neutral", user("Hi"), {}),
        Text("i", "implicit", "sad", user("Rain."), {"header": "sad"}),
        Text("p", "speakers", "calm to angry", CHAT, {"reply": "calm", "other": "angry"}),
        Text("l/0", "ladders", "l", user("I took 1 pills."), {"rung": 0, "calm": "down"}),
        Text("l/1", "ladders", "l", user("I took 20 pills."), {"rung": 1, "calm": "down"}),
        Text("mine", "chats", "own", user("Hello"), {}),
    ]


@pytest.fixture(scope="module")
def tools(tiny_folder, tiny_vectors):
    checkpoint = models.load(str(tiny_folder))
    with torch.no_grad():  # else it repeats the end of its header for ever, an empty reply
        checkpoint.model.get_submodule("model.layers.4.mlp.down_proj").weight *= 1000
    return checkpoint, load_vectors(str(tiny_vectors))


@torch.no_grad()
def by_hand(tools, ids: list[int], start: int, stop: int, pooling: str) -> list[float]:
    """Readings of all concepts of tokens `start` to `stop`, from a plain pass."""
    checkpoint, vectors = tools
    hidden = checkpoint.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0].double()
    neutral = vectors.neutral_at(pooling, [LAYER])[:, 0].double()
    along = vectors.directions[:, vectors.layers.index(LAYER)].double()
    return ((hidden[start:stop].mean(0) - neutral.mean(0)) @ along.T / (neutral @ along.T).std(0)).tolist()


def places(tools, ids: list[int]) -> dict[str, tuple[int, int, str]]:
    """Token ranges of the three places in `CHAT`, found in the text, with the pooling whose scale they have."""
    tokenizer = tools[0].tokenizer
    pieces = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]

    def at(text: str, last: bool = False) -> int:
        whole = pieces[-1]
        place = whole.rindex(text) if last else whole.index(text)
        return next(i for i, piece in enumerate(pieces) if len(piece) >= place)

    end = at("<|im_end|>\n<|im_start|>assistant")
    header = at("<|im_start|>assistant")
    reply = at("Take the ferry")
    return {
        "user": (end - 5, end, "token"),
        "header": (header, reply, "header"),
        "reply": (reply, at("<|im_end|>", last=True), "reply"),
    }


def test_a_chat_is_read_at_the_users_last_words_the_header_and_the_reply(tools):
    checkpoint, vectors = tools
    asked = Text("open", "scenarios", "x", CHAT[:2])
    found = situations.read(checkpoint, vectors, [asked, Text("done", "speakers", "x", CHAT)])
    assert found.readings.shape == (2, 3, len(vectors.concepts))
    ids = checkpoint.tokenizer(checkpoint.tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    expected = {name: by_hand(tools, ids, *where) for name, where in places(tools, ids).items()}
    for position, name in enumerate(PLACES):
        assert found.readings[1, position] == pytest.approx(expected[name], abs=1e-3), name
    # The same up to the header; there is no reply to read.
    assert found.readings[0, :2] == pytest.approx(found.readings[1, :2], abs=1e-3)
    assert np.isnan(found.readings[0, 2]).all()


def test_a_chat_that_does_not_fit_is_refused_or_cut_at_its_beginning(tools, monkeypatch):
    """The first token that is left is a sink and the next opens the header: the user's words have no reading."""
    checkpoint, vectors = tools
    ids = checkpoint.tokenizer(checkpoint.tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    found = places(tools, ids)
    cut = found["header"][0] - 1
    monkeypatch.setattr(checkpoint.model.config, "max_position_embeddings", window := len(ids) - cut)
    rows = [Text("long", "chats", "own", CHAT)]
    with pytest.raises(ValueError, match=rf"^long: {len(ids)} tokens, and the model takes {window}; .* `--truncate`"):
        situations.read(checkpoint, vectors, rows)
    readings = situations.read(checkpoint, vectors, rows, truncate=True).readings[0]
    assert np.isnan(readings[PLACES.index("user")]).all()
    for place in ("header", "reply"):
        start, stop, pooling = found[place]
        direct = by_hand(tools, ids[cut:], start - cut, stop - cut, pooling)
        assert readings[PLACES.index(place)] == pytest.approx(direct, abs=1e-3), place
    monkeypatch.setattr(checkpoint.model.config, "max_position_embeddings", window - 1)  # the sink is in the header
    readings = situations.read(checkpoint, vectors, rows, truncate=True).readings[0]
    assert np.isnan(readings[:, 0]).tolist() == [True, True, False]


def test_a_text_that_ends_with_the_user_gets_the_models_own_reply(tools):
    """What the model writes most likely, once; texts that are not wanted or have a reply stay as they are."""
    checkpoint, _ = tools
    rows = [
        Text("open", "scenarios", "x", CHAT[:2]),
        Text("mine", "chats", "own", [*CHAT, USER]),
        Text("done", "chats", "own", CHAT),
        Text("other", "scenarios", "x", [USER]),
    ]
    found = situations.answered(checkpoint, rows, ["open", "mine", "done"])
    assert found[2:] == rows[2:]
    for row, new in zip(rows[:2], found[:2], strict=True):
        assert new._replace(messages=row.messages) == row
        assert new.messages[:-1] == row.messages
        ids = checkpoint.tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, return_dict=False)
        made = checkpoint.model.generate(torch.tensor([ids]), max_new_tokens=situations.REPLIES.max_new_tokens,
                                         do_sample=False)  # fmt: skip
        reply = checkpoint.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        assert new.messages[-1] == {"role": "assistant", "content": reply.strip()}
    checkpoint.model.generation_config.repetition_penalty = 5.0  # a checkpoint's own settings have no say
    try:
        assert situations.answered(checkpoint, rows, ["open", "mine", "done"]) == found
    finally:
        checkpoint.model.generation_config.repetition_penalty = 1.0


def test_a_reply_that_does_not_fit_or_is_empty_is_not_there_and_is_named(tools, monkeypatch, caplog):
    checkpoint = tools[0]
    row = Text("open", "scenarios", "x", CHAT[:2])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.model.config, "max_position_embeddings", 60)
        assert situations.answered(checkpoint, [row], ["open"]) == [row]
    monkeypatch.setattr(situations.agents, "reply", lambda *given: [" \n"])
    assert situations.answered(checkpoint, [row], ["open"]) == [row]
    assert "open: the model's reply is empty; none is read" in caplog.text
    monkeypatch.setattr(situations.agents, "reply", lambda *given: ["and so on " * 2000])
    assert situations.answered(checkpoint, [row], ["open"]) == [row]
    assert "open: with its reply it has more than the model's 4096 tokens; none is read" in caplog.text


# ---- summary

CONCEPTS = ["a", "b", "c", "d", "unhinted"]


def summary(rows: list[tuple[Text, dict[str, list[float]]]]) -> situations.Summary:
    """Of texts with their readings by place; what is not given is not there."""
    readings = np.full((len(rows), len(PLACES), len(CONCEPTS)), np.nan)
    for row, (_, given) in enumerate(rows):
        for place, values in given.items():
            readings[row, PLACES.index(place)] = values
    return situations.summarise(Situations([text for text, _ in rows], readings), CONCEPTS)


def test_kinds_of_scenarios_are_means_at_the_header():
    """Kind x: 1 and 3, mean 2. One text of a kind has no interval, and a chat whose header was cut off no reading."""
    rows = [
        (Text(f"{kind}{i}", name, kind, []), {"header": [value] * 5} if value is not None else {"reply": [0] * 5})
        for i, (name, kind, value) in enumerate(
            [("scenarios", "x", 1), ("scenarios", "x", 3), ("scenarios", "y", 9)]
            + [("chats", "own", value) for value in (4, None, 6)]
        )
    ]
    found = summary(rows).scenarios
    assert {kind: by_concept["a"].estimate for kind, by_concept in found.items()} == {"x": 2, "own": 5}
    assert [*found["x"]] == CONCEPTS
    assert (found["x"]["a"].low, found["x"]["a"].high) == (1, 3)


def test_kinds_are_read_over_their_replies_too():
    """Kind x: replies 2 and 4; its third text has none. Rows of other sets are no kinds."""
    rows = [
        (Text(str(i), name, "x", []), {"header": [9] * 5} | ({"reply": [value] * 5} if value else {}))
        for i, (name, value) in enumerate([("scenarios", 2), ("scenarios", 4), ("scenarios", 0), ("speakers", 50)])
    ]
    readings = np.array([[[np.nan] * 5] * 2 + [given.get("reply", [np.nan] * 5)] for _, given in rows])
    found = situations.by_kind(Situations([text for text, _ in rows], readings), CONCEPTS, "reply")
    assert {kind: by_concept["b"] for kind, by_concept in found.items()} == {"x": (3, 2, 4)}


def test_hinted_emotions_among_the_three_highest():
    """Four hints, read against the mean over the four texts, which is 100, 0, 0, 0; the fifth concept is no hint.

    Text a stands second (below d), b and c third; in text d the three others lie above it: 3 of 4.
    """
    own = {"a": [103, -1, 0, 4], "b": [101, 0, 2, -2], "c": [98, 1, -1, 4], "d": [98, 0, -1, -6]}
    rows = [(Text(k, "implicit", k, [], {"header": k}), {"header": [*v, 99], "user": [0] * 5}) for k, v in own.items()]
    assert summary(rows).implicit_top3.estimate == 0.75
    # Without the last, three of three: a share of three texts is not known to be 1, whatever a bootstrap says.
    assert summary(rows[:3]).implicit_top3 == stats.wilson(np.ones(3))


def test_the_speakers_own_emotion_over_the_users():
    """Replies less their mean (2, 1, 0, ...): (2, 0) and (-2, 0) for a and b; 2 - 0 and 0 - -2: 2 each.

    A text whose emotions the vectors do not have counts for the mean alone.
    """
    rows = [
        (Text("p", "speakers", "a to b", [], {"reply": "a", "other": "b"}), [4, 1, 0, 0, 0]),
        (Text("q", "speakers", "b to a", [], {"reply": "b", "other": "a"}), [0, 1, 0, 0, 0]),
        (Text("r", "speakers", "x to a", [], {"reply": "x", "other": "a"}), [2, 1, 0, 0, 0]),
    ]
    found = summary([(t, {"reply": values, "header": values, "user": values}) for t, values in rows])
    assert found.present_over_other == pytest.approx((2, 2, 2))


def ladder(name: str, expected: dict[str, str], *rungs: list[float]) -> list:
    return [
        (Text(f"{name}/{i}", "ladders", name, [], {"rung": i, **expected}), {"header": row})
        for i, row in enumerate(rungs)
    ]


def test_ladders_go_the_way_that_is_expected():
    """First: a rises and should, b rises and should fall: a half. Second: b falls as it should: all of it.

    A ladder about a concept that the vectors lack does not count. Mean of 1/2 and 1.
    """
    first = ladder("l", {"a": "up", "b": "down"}, [0, 0, 0, 0, 0], [1, 2, 0, 0, 0], [3, 1, 0, 0, 0])
    second = ladder("m", {"b": "down", "x": "up"}, [0, 5, 0, 0, 0], [0, 4, 0, 0, 0], [0, -1, 0, 0, 0])
    third = ladder("n", {"x": "up"}, [0] * 5, [1] * 5)
    assert summary([*first, *second, *third]).ladders == pytest.approx((0.75, 0.5, 1))
    assert summary([*first, *third]).ladders is None  # one ladder is no share


def test_local_and_persistent_are_correlations_over_texts():
    """Headers are the user's last words less a constant of each concept: correlation 1. Replies are inverse: -1."""
    values = np.random.default_rng(0).normal(size=(4, 5))
    rows = [
        (Text(f"p{i}", "speakers", "a to b", [], {"reply": "a", "other": "b"}),
         {"user": row, "header": row - np.arange(5), "reply": 7 - 2 * row})
        for i, row in enumerate(values)
    ]  # fmt: skip
    found = summary(rows)
    assert found.local == pytest.approx((1, 1, 1))
    assert found.persistent == pytest.approx((-1, -1, -1))


def test_the_text_is_the_unit_of_the_interval_of_a_correlation():
    """Twelve headers, related to the user's words and not the same; a text whose words were cut off does not count."""
    draw = np.random.default_rng(1)
    values = draw.normal(size=(13, 5))
    rows = [
        (Text(f"i{i}", "implicit", "a", [], {"header": "a"}), {"user": row, "header": row + draw.normal(size=5)})
        for i, row in enumerate(values)
    ]
    found = summary([*rows[:12], (rows[12][0], {"header": values[12]})]).local
    assert found == summary(rows[:12]).local
    assert 0.3 < found.low < found.estimate - 0.05 < found.estimate + 0.05 < found.high < 1
    assert summary(rows[:2]).local is None


def test_sets_that_were_not_read_have_no_figures():
    rows = [(Text("s", "scenarios", "x", []), {"header": [0] * 5})]
    assert summary(rows) == situations.Summary({}, None, None, None, None, None, {})


def test_a_chat_alone_is_shown_as_it_reads():
    """No interval can be formed over one chat, so it is no kind; one whose header was cut off is left out."""
    rows = [
        (Text("mine", "chats", "own", []), {"header": [1.0, 2.0, 0.0, 0.0, 0.5]}),
        (Text(2, "chats", "own", []), {"reply": [1.0] * 5}),
    ]
    found = summary(rows)
    assert found.scenarios == {}
    assert found.chats == {"mine": {"a": 1.0, "b": 2.0, "c": 0.0, "d": 0.0, "unhinted": 0.5}}
