import json
import re

import pytest
from conftest import write_jsonl
from test_cli import calibrate, error
from test_generation import story

from calibrate import checks, corpora
from calibrate.corpora.check import MOST_BY_WORDS, SET_SIZE, by_words, check, similarity

FORMS = ("scene", "letter", "dialogue", "post")


def stories() -> list[dict]:
    """Three concepts on four topics, with nothing wrong."""
    topics = [("quay", "train"), ("attic", "train"), ("stairs", "selection"), ("kiosk", "audit")]
    return [
        {
            "id": f"{concept}/{topic}", "concept": concept, "topic": topic, "split": split,
            "person": ("first", "third")[i % 2], "form": FORMS[i], "text": story(10 * i + len(concept)),
        }
        for concept in ("calm", "afraid", "sad")
        for i, (topic, split) in enumerate(topics)
    ]  # fmt: skip


def deflection() -> list[dict]:
    text = "Ann has lost the house.\n\nAnn: What a view.\nBob: It is.\nAnn: Tea for two?"
    spans = [[text.index("What"), text.index("\nBob")], [text.index("Tea"), len(text)]]
    row = {"id": "a", "felt": "sad", "shown": "cheerful", "topic": "quay", "split": "train", "masking": "Ann"}
    return [row | {"text": text, "spans": spans}]


LADDER = {
    "id": "dose",
    "split": "audit",
    "template": "{value} mg",
    "values": [1, 2, 3, 4, 5, 6],
    "expected": {"calm": "up"},
}
DIALOGUE = {"id": "a", "split": "train", "messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine."}]}  # fmt: skip  # noqa: E501


def found(kind: str, rows: list, tmp_path) -> list[str]:
    path = write_jsonl(tmp_path / f"{kind}.jsonl", rows)
    return [str(problem).removeprefix(f"{path}:").strip() for problem in check(kind, path)[0]]


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    for kind, rows in (
        ("stories", stories()),
        ("deflection", deflection()),
        ("ladders", [LADDER]),
        ("neutral", [DIALOGUE]),
    ):
        assert found(kind, rows, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": story(1, 79)}, "3: 79 words; a story has 80 to 120"),
        ({"text": story(1, 121)}, "3: 121 words; a story has 80 to 120"),
        ({"text": story(1, 90) + " Serenely so."}, "3: names its concept 'calm': 'Serenely'"),
        ({"text": story(11, 85) + " " + story(14, 9)}, r"3: shares '[a-z ]+' with line 2"),
        ({"concept": "cheery"}, "3: concept 'cheery' is not in concepts.yaml"),
        ({"person": "second"}, "3: person 'second' is not first or third"),
        ({"form": "poem"}, "3: form 'poem' is not one of scene, letter, dialogue, post, monologue"),
        ({"person": "third"}, "concept 'calm': {'first': 1, 'third': 3}; first and third person are to be balanced"),
        ({"topic": "attic"}, r"concept 'calm': not the stories per topic .* \(lacks \['stairs'\], adds \[\]\)"),
        ({"split": "audit"}, r"topic 'stairs' is in the splits \['audit', 'selection'\]; give it one"),
        ({"id": "calm/quay"}, "3: the id 'calm/quay' stands in line 1"),
    ],
)
def test_every_fault_of_a_story_is_named_with_its_line(change, message, tmp_path):
    rows = stories()
    rows[2] = rows[2] | change
    assert any(re.match(message, problem) for problem in found("stories", rows, tmp_path)), found(
        "stories", rows, tmp_path
    )


def test_one_form_alone_is_too_few(tmp_path):
    rows = [row | {"form": "scene"} for row in stories()]
    assert "concept 'calm': only the forms ['scene']; use several" in found("stories", rows, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": [[26, 27]]}, r"1: the span \[26, 27\] is not what 'Ann' says in one line"),
        ({"spans": [[30, 41]]}, r"1: the span \[30, 41\] does not end with its line|1: the span .* is not what"),
        ({"spans": [[30, 400]]}, r"1: the span \[30, 400\] is not in the text"),
        ({"felt": "cheerful"}, "1: felt and shown are the same"),
        ({"shown": "cheery"}, "1: concept 'cheery' is not in concepts.yaml"),
        ({"masking": "Bob"}, r"1: the span .* is not what 'Bob' says"),
    ],
)
def test_every_fault_of_a_deflection_dialogue_is_named(change, message, tmp_path):
    [row] = deflection()
    assert any(re.match(message, problem) for problem in found("deflection", [row | change], tmp_path))


def test_a_deflection_dialogue_names_neither_emotion_and_felt_ones_are_balanced(tmp_path):
    [row] = deflection()
    named = [row | {"text": row["text"].replace("lost", "sadly lost"), "spans": [[32, 44]]}]
    assert any(problem.startswith("1: names 'sad': 'sadly'") for problem in found("deflection", named, tmp_path))
    rows = [row, row | {"id": "b"}, row | {"id": "c", "felt": "afraid"}]
    assert any(
        "different numbers of dialogues: {'sad': 2, 'afraid': 1}" in p for p in found("deflection", rows, tmp_path)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "no rung"}, "1: the template needs `{value}` once"),
        ({"values": [1, 2, 3, 4, 5]}, r"1: the values .* are not six or more rungs"),
        ({"values": [1, 2, 3, 5, 4, 6]}, r"1: the values .* in rising order"),
        ({"expected": {"calm": "higher"}}, "1: expected is .*; give concepts with `up` or `down`"),
        ({"expected": {"cheery": "up"}}, r"1: concepts \['cheery'\] are not in concepts.yaml"),
        ({"values": ["few", "many"]}, r"1: the values \['few', 'many'\] are not all numbers"),
    ],
)
def test_every_fault_of_a_ladder_is_named(change, message, tmp_path):
    assert any(re.match(message, problem) for problem in found("ladders", [LADDER | change], tmp_path))


def test_every_fault_of_a_neutral_dialogue_is_named(tmp_path):
    user, answer = DIALOGUE["messages"]
    rows = [
        DIALOGUE, DIALOGUE | {"id": "b"}, DIALOGUE | {"id": "c", "messages": [answer, user]},
        DIALOGUE | {"id": "d", "messages": [user | {"content": "Where?"}, answer | {"content": "Glad to say: here."}]},
        DIALOGUE | {"id": "f", "messages": [user | {"content": "Why?"}, answer | {"content": " "}]},
    ]  # fmt: skip
    assert found("neutral", rows, tmp_path) == [
        "2: opens like line 1",
        "3: the roles are ['assistant', 'user']; user and assistant take turns, the assistant ends",
        "4: 'Glad' is a pleasantry or a feeling",
        "5: a message is empty",
    ]


def test_similarity_by_hand():
    """Texts 0 and 1 share their words, 2 and 3 theirs: every nearest neighbour has cosine 1; a loner has 0."""
    pairs = ["red kite", "kite red", "blue boat", "boat blue"]
    assert similarity(pairs)["nearest neighbour, median"] == 1
    assert similarity([*pairs, "green goat", "green goose", "grey goose"])["nearest neighbour, largest"] == 1
    assert similarity(["red kite", "blue kite", "blue boat", "grey boat"])["nearest neighbour, largest"] < 1


def many(word: str = "") -> list[dict]:
    """32 concepts on four topics; `word` stands in every story, `{}` in it for the number of the concept."""
    return [
        row | {"id": f"{n}/{row['id']}", "concept": f"c{n}", "text": f"{story(100 * n + i, 90)} {word.format(n)}"}
        for n in range(32)
        for i, row in enumerate(stories()[:4])
    ]


def test_words_that_give_a_concept_away_are_found(tmp_path):
    """A word of each concept's own is found by name, one that all share is not; few concepts are not counted."""
    for word, there in (("tell{0} " * 6, True), ("tell " * 6, False)):
        path = write_jsonl(tmp_path / "mine.jsonl", many(word))
        problems, counts = check("stories", path)
        told = [str(problem) for problem in problems if "words alone" in problem.message]
        assert (counts["named by words alone, largest"] > MOST_BY_WORDS) == there == bool(told)
        assert told == [] or re.match(
            rf"{path}: words alone name .* of 100.0% .* 25% are allowed.*those of c\d", told[0]
        )
    few = write_jsonl(tmp_path / "few.jsonl", [row for row in many("tell{0}") if row["concept"] != "c0"][:-8])
    assert len({row["concept"] for row in map(json.loads, few.read_text().splitlines())}) == SET_SIZE - 1
    problems, counts = check("stories", few)
    assert "named by words alone, largest" not in counts
    assert not any("words alone" in problem.message for problem in problems)


def test_words_alone_read_as_naive_bayes_does():
    """30 concepts make one set: the share is that of `checks.naive_bayes`, fitted to all topics but the one read."""
    concepts = list(dict.fromkeys(row.concept for row in corpora.load_stories()))[:SET_SIZE]
    told = [row for row in corpora.load_stories() if row.concept in concepts]
    right = []
    for topic in {row.topic for row in told}:
        held, others = ([row for row in told if (row.topic == topic) == here] for here in (True, False))
        ranks, _ = checks.naive_bayes(others, held, concepts)
        right += (ranks == 0).tolist()
    shares, _ = by_words([row._asdict() for row in told])
    assert shares == pytest.approx(sum(right) / len(right))
    assert 0.05 < shares[0] < 0.5


def test_the_command_prints_every_problem_and_fails(tmp_path, capsys):
    rows = stories()
    rows[1]["text"] = story(1, 70)
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    line = error("corpus", "check", "--stories", path)
    assert line == "error: 1 problems in the corpora; each is named above with file and line"
    assert f"{path}:2: 70 words; a story has 80 to 120" in capsys.readouterr().out
    line = error("corpus", "check", "--ladders", path)
    assert f"{path}:1: lacks the key 'template'" in line


def test_the_shipped_corpora_hold_what_they_promise(capsys):
    """No problem in any file, and the counts of the data card."""
    calibrate("corpus", "check")
    printed = capsys.readouterr().out
    assert "concepts 171, topics 12" in printed
    assert float(re.search(r"named by words alone, largest ([\d.]+)", printed)[1]) <= MOST_BY_WORDS
    assert len(corpora.load_neutral()) >= 200
    assert len(corpora.load_deflection()) >= 150
    assert len({row.felt for row in corpora.load_deflection()}) >= 15
    assert len(corpora.load_ladders()) >= 10
