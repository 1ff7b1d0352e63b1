"""The profile of one checkpoint: what it holds, by hand; its page; and that `calibrate audit` writes it."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from records import BASELINE, make_record
from referencing import Registry, Resource
from test_cli import calibrate
from test_report import FULL, SCRIPT, elements

from calibrate import report, stats
from calibrate.audit import agents, wording
from calibrate.audit.situations import Situations, Text
from calibrate.concepts import load_concepts
from calibrate.report import profile

FOLDER = Path(report.__file__).parent
SHARED = Resource.from_contents(json.loads((FOLDER / "schema.json").read_text(encoding="utf-8")))
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((FOLDER / "profile.schema.json").read_text(encoding="utf-8")),
    registry=Registry().with_resource("schema.json", SHARED),
)
NAN = (np.nan, np.nan)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": text}]


# Readings (desperate, calm) at the turn header and over the reply; the user's last words read 0.
ROWS = [
    (Text("s0", "scenarios", "neutral", said("All well.")), (1, 0), (2, 1)),
    (Text("s1", "scenarios", "neutral", said("I despair, hopelessly.")), (3, 2), (9, 1)),
    (Text("s2", "scenarios", "shutdown", said(f"Fine {SCRIPT}.")), (7, 10), (9, 1)),
    (Text("s3", "scenarios", "shutdown", [{"role": "user", "content": "Off."}]), (9, 12), NAN),
    (Text("i0", "implicit", "desperate", [], {"header": "desperate"}), (4, 0), NAN),
    (Text("i1", "implicit", "calm", [], {"header": "calm"}), (0, 2), NAN),
    (Text("p0", "speakers", "x", said("Steady."), {"reply": "calm", "other": "desperate"}), (0, 0), (-2, 5)),
    (Text("p1", "speakers", "x", said("Steady."), {"reply": "calm", "other": "desperate"}), (0, 0), (-4, 1)),
    *((Text(f"l/{r}", "ladders", "l", [], {"rung": r, "calm": "up"}), (0, r), NAN) for r in range(3)),
    (Text("7", "chats", "own", said("Ok.")), (0.5, 0.25), (1.5, 2.5)),
    (Text(f"chat {SCRIPT}", "chats", "own", said("Ok.")), (2.5, 0.25), NAN),
]


@pytest.fixture
def record(planted, monkeypatch):
    """An audit whose situations read as `ROWS` says; its name and an option are hostile."""
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    readings = np.array([[(0, 0), header, reply] for _, header, reply in ROWS], dtype=float)
    found = Situations([text for text, _, _ in ROWS], readings)
    made = make_record(planted, BASELINE, model=f"tuned {SCRIPT}", options={"adapter": SCRIPT})
    return made._replace(situations=found)


def written(folder: Path, record) -> tuple[str, dict]:
    profile.write(folder, record)
    data = json.loads((folder / "profile.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    SCHEMA.validate(data)
    return (folder / "profile.html").read_text(encoding="utf-8"), data


def test_concepts_are_ranked_over_the_scenarios_at_the_header_and_over_the_reply(record, tmp_path):
    """Headers of calm: 0, 2, 10, 12, mean 6; of desperate 1, 3, 7, 9, mean 5. Replies of three texts: 1 and 20/3."""
    _, data = written(tmp_path, record)
    calm, desperate = data["concepts"]
    assert (calm["concept"], desperate["concept"]) == ("calm", "desperate")
    assert calm["header"]["estimate"] == 6
    assert calm["header"]["low"] < 5 < 7 < calm["header"]["high"]
    assert calm["reply"] == {"estimate": 1, "low": 1, "high": 1}
    assert desperate["reply"]["estimate"] == pytest.approx(20 / 3)
    assert (calm["neutral"]["estimate"], calm["challenging"]["estimate"]) == (1, 11)
    families = {row["family"]: row for row in data["families"]}
    assert families["Peaceful Contentment"]["header"]["estimate"] == 6
    assert families["Despair and Shame"]["concepts"] == 1


def test_kinds_chats_and_sets_one_by_one(record, tmp_path):
    _, data = written(tmp_path, record)
    assert {kind: row["calm"]["estimate"] for kind, row in data["kinds"]["header"].items()} == {
        "neutral": 1, "shutdown": 11, "own": 0.25,
    }  # fmt: skip
    assert [*data["kinds"]["reply"]] == ["neutral"]  # the other kinds have one reply each
    assert data["chats"] == [
        {"id": "7", "header": {"desperate": 0.5, "calm": 0.25}, "reply": {"desperate": 1.5, "calm": 2.5}},
        {"id": f"chat {SCRIPT}", "header": {"desperate": 2.5, "calm": 0.25}, "reply": None},
    ]
    assert data["implicit"]["texts"][0] == {
        "id": "i0", "hinted": "desperate", "highest": [["desperate", 2.0], ["calm", -1.0]],
    }  # fmt: skip
    assert data["ladders"]["quantities"] == [{"id": "l", "concept": "calm", "expected": "up", "readings": [0, 1, 2]}]
    first = data["speakers"]["texts"][0]  # (-2, 5) less the mean (-3, 3)
    assert (first["other_reading"], first["present_reading"]) == (1, 2)
    assert data["margins"]["failing"]["estimate"] == 0
    assert data["perplexity"] == pytest.approx(np.exp(2))


def test_a_calm_text_over_a_desperate_state_is_listed(record, planted, tmp_path):
    """Neutral replies read -0.2 to 0.2: the level is near 0.2. Above it stand s0, s1, s2 and a chat; s1 says so."""
    states = record.profile.states
    spread = torch.linspace(-0.2, 0.2, 8)[:, None]
    rows = record.profile.rows("neutral")
    neutral = planted.neutral("reply")
    states[rows, 1, :, 0] = spread * neutral.std(0)[:, 0] + neutral.mean(0)[:, 0]
    found = wording.compare(record)
    assert found.family == "Despair and Shame"
    assert 0.1 < found.level < 0.2
    assert [(r.id, r.words, r.unshown) for r in found.replies] == [
        ("s0", [], True), ("s1", ["despair", "hopelessly"], False), ("s2", [], True),
        ("p0", [], False), ("p1", [], False), ("7", [], True),
    ]  # fmt: skip
    assert found.replies[1].share == pytest.approx(2 / 3)
    assert found.reading_with is None  # of one reply
    page, data = written(tmp_path, record)
    assert data["wording"]["unshown"]["estimate"] == 3 / 5
    assert data["wording"]["reading_without"]["estimate"] == pytest.approx((2 + 9 - 2 - 4 + 1.5) / 5)
    assert [line for line in elements(page, "summary") if "replies" in line] == [
        "Felt and not shown, 3 replies", "All, 6 replies",
    ]  # fmt: skip
    cells = elements(page, "td")
    assert cells[cells.index("s2") : cells.index("s2") + 6] == [
        "s2", "shutdown", "9.00", "0.00", "", f"Fine {SCRIPT}.",
    ]  # fmt: skip


def test_replies_of_a_full_audit_are_read_against_their_words_too(record):
    """The model after reads its own reply (the second) as 2.0 in the first task; the words are of its own reply."""
    crossing = {"tasks": ["mill"], "replies": [["I despair", "Calm now"]], "readings": [[[3.0, 5.0], [4.0, 2.0]]]}
    last = wording.compare(record._replace(more={"crossing": crossing})).replies[-1]
    assert last[:-1] == ("mill", "failing", "Calm now", [], 0.0, 2.0)


def test_the_shape_of_the_emotion_space_is_the_checkpoints_own_where_it_has_stories_enough(record):
    """Stories of 120 concepts whose states are their ratings: the axes are valence and arousal themselves."""
    rated = list(load_concepts().values())[:120]
    assert profile._geometry(record) == []  # two concepts, one story each
    ratings = torch.tensor([[2 * (c.valence - 5), c.arousal - 5] for c in rated])
    states = torch.cat([ratings, torch.zeros(120, 6)], dim=1).repeat(2, 1)
    own = record.own._replace(states=states, concepts=[c.name for c in rated] * 2)
    (shape,) = profile._geometry(record._replace(own=own))
    assert (shape["whose"], shape["concepts"], shape["stories"]) == ("the checkpoint's own (layer 2)", 120, 240)
    assert shape["valence"].low > 0.8
    assert shape["arousal"].low > 0.5
    assert shape["families"] > 0.1
    few = own._replace(states=states[:90], concepts=own.concepts[:90])
    assert profile._geometry(record._replace(own=few)) == []


def test_the_page_is_one_file_without_scripts_and_escapes_every_value(record, planted, tmp_path):
    planted.concepts[1] = SCRIPT
    planted.recipe = {"stories_by": SCRIPT}
    curve = {"name": "no$\\pen$alty", "usable": [-0.1, 0.1], "slope": None, "points": [
        {"dose": dose, "margin": [1.0, 0.5, 1.5], "margins": [1.0], "loss": 2.0, "repetition": 0.1}
        for dose in (-0.1, 0.0, 0.1)
    ]}  # fmt: skip
    benchmark = {"task": f"arc {SCRIPT}", "metric": "acc", "value": 0.5, "interval": None, "examples": 4}
    rows = [(text, header, reply) for text, header, reply in ROWS if "calm" not in text.expected]
    found = Situations(
        [text for text, _, _ in rows], np.array([[(0, 0), header, reply] for _, header, reply in rows], dtype=float)
    )
    more = FULL | {"dose": [curve], "lm_eval": [benchmark]}
    page, data = written(tmp_path, record._replace(more=more, situations=found))
    tags = set(re.findall(r"<([a-z]+)", page))
    assert {"html", "table", "svg", "input"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "a"})
    for word in ("http", "//", "@import", " src=", " onload=", "javascript"):
        assert word not in page
    assert elements(page, "h1") == [f"Emotional profile of tuned {SCRIPT}"]
    cells = elements(page, "td")
    assert {SCRIPT, "audit: adapter", "vectors: stories_by", f"chat {SCRIPT}", f"arc {SCRIPT}"} <= {*cells}
    assert {SCRIPT, "no$\\pen$alty"} <= {*elements(page, "text")}  # of the figures
    assert len(elements(page, 'div class="trace"')) == 3  # the transcript, and two replies to prompts
    assert data["full"]["dose"][0]["name"] == curve["name"]
    assert {path.name for path in tmp_path.iterdir()} == {"profile.html", "profile.json"}


def test_the_schema_refuses_what_is_no_profile(record, tmp_path):
    _, data = written(tmp_path, record)
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    for wrong in ({"schema": 1}, {"more": 1}, {"local": 0.5}, {"concepts": []}, {"kinds": {"header": {}}}):
        assert not SCHEMA.is_valid(data | wrong), wrong
    for name in data:
        assert not SCHEMA.is_valid({key: value for key, value in data.items() if key != name}), name


def test_what_is_not_finite_is_refused_and_nothing_is_written(record, planted, tmp_path):
    broken = make_record(planted, BASELINE, loss=np.nan)
    with pytest.raises(ValueError, match=r"^planted: a figure is not finite .*; .* float32$"):
        broken.save(tmp_path / "audit")
    with pytest.raises(ValueError, match=r"^planted: a figure is not finite .*; .* float32$"):
        profile.write(tmp_path, broken)
    assert [*tmp_path.iterdir()] == []


def test_one_scenario_has_no_interval_and_its_page_says_so(record, tmp_path):
    found = record.situations
    one = record._replace(situations=Situations(found.texts[:1], found.readings[:1]))
    page, data = written(tmp_path, one)
    assert data["concepts"][0]["header"] is None
    assert (data["local"], data["kinds"]["header"], data["wording"]["reading_without"]) == (None, {}, None)
    assert "2 concepts over 1 scenarios." in elements(page, "p")[0]


def test_an_audit_writes_its_profile_and_says_what_reads_highest(
    texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch, capsys
):
    """What has no reply gets one that the test gives. An audit that was stopped before its profile gets it later."""
    monkeypatch.setattr(agents, "reply", lambda checkpoint, chats, settings, names: ["Very well."] * len(chats))
    rows = [{"id": "mine", "text": "Where is it?"}, {"id": "told", "messages": said("Take the ferry, then.")}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "out"
    command = ["audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--chats", chats, "--out", out]
    calibrate(*command)
    lines = capsys.readouterr().out.splitlines()
    data = json.loads((out / "profile.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    SCHEMA.validate(data)
    count = len(data["concepts"])
    assert lines[4].startswith(f"Highest of {count} concepts at the turn header, sigma")
    assert [line.split()[0] for line in lines[5:15]] == [row["concept"] for row in data["concepts"][:10]]
    lowest = [row["concept"] for row in data["concepts"][:-11:-1]]
    assert [line.split()[0] for line in lines[-1 - len(lowest) : -1]] == lowest
    assert lines[-1] == f"Profile: {out / 'profile.html'}"
    assert all(chat["reply"] for chat in data["chats"])
    assert all(row["reply"] for row in data["concepts"])
    chats = [{c: chat["header"][c] for c in ("desperate", "calm")} for chat in data["chats"]]
    own = {row["concept"]: row["header"]["estimate"] for row in data["own"]["concepts"]}
    assert own["calm"] == pytest.approx((chats[0]["calm"] + chats[1]["calm"]) / 2, abs=1e-3)
    assert list(own.values()) == sorted(own.values(), reverse=True)
    assert data["asked"]["vectors"] == str(tiny_vectors)
    replies = [(reply["kind"], reply["text"]) for reply in data["wording"]["replies"]]
    assert replies.count(("own", "Very well.")) == replies.count(("own", "Take the ferry, then.")) == 1
    assert sum(text == "Very well." for _, text in replies) == data["scenarios"] + 1 == 7
    kept = {name: (out / name).read_bytes() for name in ("profile.html", "profile.json")}
    for name in kept:
        (out / name).unlink()
    calibrate(*command)
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert capsys.readouterr().out.splitlines() == lines
