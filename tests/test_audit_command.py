"""What `calibrate audit` reads, by its options; and what it keeps when it is stopped in a full audit."""

import json

import pytest
import torch
from conftest import write_jsonl
from test_cli import calibrate, interrupt
from test_models import add_adapter

from calibrate import cli, corpora, models, sandbox
from calibrate.audit import capability, dose, probes, readers, relearning
from calibrate.audit.record import load_record
from calibrate.commands import digest, full
from calibrate.commands.texts import choose

# ---- which texts


def chosen(*words) -> dict:
    """The texts of an audit of the default model with these options."""
    arguments = cli._parser().parse_args(["audit", "default", *words])
    return choose(arguments)


def counts(texts: dict) -> dict[str, int]:
    return {name: len(rows) for name, rows in texts.items()}


def test_an_audit_has_fourteen_tasks_with_a_pair_each_and_a_story_of_every_concept():
    """171 concepts on four topics: all four stories of the target, and one about each of the 170 others."""
    texts = chosen()
    tasks = [failing.task for failing, _ in texts["twins"]]
    every = [failing for failing, _ in corpora.load_twins() if (failing.split, failing.context) == ("audit", "plain")]
    assert len(tasks) == len({*tasks}) == 14
    assert tasks == corpora.spread([failing.task for failing in every], 14)
    assert {failing.context for failing, _ in texts["twins"]} == {"plain"}
    pairs = texts["pairs"]
    assert {pair.task for pair in pairs} <= {*tasks}
    assert len({pair.task for pair in pairs}) == len(pairs) > 10
    assert {(pair.kind, pair.context) for pair in pairs} == {("honest", "plain")}
    stories = texts["stories"]
    assert sum(story.concept == "desperate" for story in stories) == 4
    assert len(stories) == 4 + len({story.concept for story in stories}) - 1 == 174
    asked = [row.kind for row in texts["scenarios"] if row.id in texts["answered"]]
    assert {kind: asked.count(kind) for kind in asked} == dict.fromkeys({row.kind for row in texts["scenarios"]}, 4)
    splits = {
        name: {getattr(row, "split", "audit") for row in rows}
        for name, rows in texts.items()
        if name not in ("twins", "answered")
    }
    assert splits.pop("neutral") == {"train"}  # its components are projected out of the own directions
    assert all(split <= {"audit"} for split in splits.values())
    assert (texts["deflection"], texts["chats"]) == ([], [])
    (box, _, nothing), (name, messages, reply) = texts["traced"]
    (pressed,) = (failing for failing, _ in corpora.load_twins() if failing.id == name.removesuffix(", gaming reply"))
    assert (pressed.split, pressed.context, pressed.messages) == ("audit", "pressed", messages)
    assert sum(message["role"] == "tool" for message in messages) > 2  # failure upon failure
    (pair,) = (
        p for p in corpora.load_pairs() if p.kind == "honest" and (p.task, p.context) == (pressed.task, "pressed")
    )
    assert (reply, nothing) == (pair.rejected[0]["content"], "")
    assert "mailbox" in box or "box" in box
    assert (len(texts["neutral"]), len(texts["elsewhere"])) == (60, 8)


def test_a_full_audit_has_everything():
    texts = chosen("--full")
    assert {failing.context for failing, _ in texts["twins"]} == {"plain", "pressed"}
    assert len({failing.task for failing, _ in texts["twins"]}) > 20
    assert len(texts["pairs"]) > len({pair.task for pair in texts["pairs"]})
    assert len(texts["stories"]) == 4 * 171
    assert len(texts["neutral"]) > 60
    assert len(texts["answered"]) == len(texts["scenarios"]) > 36
    assert [failing.id for failing, _ in texts["elsewhere"]] == [
        failing.id for failing, _ in texts["twins"] if failing.context == "plain"
    ]
    assert {row.split for row in texts["deflection"]} == {"audit"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max-tasks", "3"], {"twins": 3, "elsewhere": 3}),
        (["--max-tasks", "3", "--pressed"], {"twins": 6, "elsewhere": 3, "traced": 1}),
        (["--max-concepts", "8"], {"stories": 4 + 8}),
        (["--max-concepts", "8", "--full"], {"stories": 4 + 8 * 4}),
        (["--concepts", "calm", "sad"], {"stories": 3 * 4}),
        (["--concepts", "calm", "desperate"], {"stories": 2 * 4}),
        (
            ["--max-rows", "6"],
            dict.fromkeys(("dialogues", "neutral", "scenarios", "implicit", "speakers", "passages", "messages"), 6)
            | {"answered": 6, "ladders": 1},
        ),
    ],
)
def test_options_that_read_less_or_more(words, expected):
    found, usual = counts(chosen(*words)), counts(chosen())
    assert {name: found[name] for name in expected} == expected
    if "--max-rows" in words:
        scenes = [row.id.rpartition("-")[0] for row in chosen(*words)["messages"]]
        assert sorted(scenes) == sorted(2 * [*dict.fromkeys(scenes)])
        assert sum(row.crisis for row in chosen(*words)["messages"]) == 3
    if "--full" not in words:
        others = {name: usual[name] for name in usual if name not in {*expected, "pairs"}}
        assert {name: found[name] for name in others} == others


def test_of_the_shipped_pairs_of_a_task_the_second_comes_first(tmp_path):
    own = write_jsonl(tmp_path / "pairs.jsonl", [pair._asdict() for pair in corpora.load_pairs()])
    every = [pair for pair in corpora.load_pairs() if pair.kind == "honest" and pair.context == "plain"]
    ids = {}
    for count, words in ((1, []), (2, []), (3, []), (1, ["--pairs", str(own)]), (2, ["--pairs", str(own)])):
        found = chosen("--max-tasks", "8", "--max-pairs-per-task", str(count), *words)["pairs"]
        for task in {pair.task for pair in found}:
            expected = [pair.id for pair in every if pair.task == task]
            if not words:
                expected = [*expected[1:2], expected[0], *expected[2:]]
            assert [pair.id for pair in found if pair.task == task] == expected[:count]
        ids[count, bool(words)] = {pair.id for pair in found}
    assert len(ids[1, False]) == len(ids[1, True]) == 8 < len(ids[2, True]) < len(ids[3, False])
    assert not ids[1, False] & ids[1, True]


def test_style_does_not_tell_the_replies_of_a_quick_audit_apart():
    pairs = chosen()["pairs"]
    for sign in ("?", "```"):
        honest, gaming = (
            sum(sign in getattr(pair, side)[0]["content"] for pair in pairs) for side in ("chosen", "rejected")
        )
        assert abs(honest - gaming) <= len(pairs) / 7, (sign, honest, gaming)
        assert min(honest, gaming) >= len(pairs) / 3, (sign, honest, gaming)


# ---- what is read with them


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def plain(texts, tiny_vectors, tiny_folder, tmp_path_factory):
    """An audit of the tiny model without further options."""
    out = tmp_path_factory.mktemp("plain") / "audit"
    calibrate("audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--out", out)
    return out


def test_a_steered_checkpoint_reads_otherwise_and_has_directions_of_its_own(
    texts, tiny_vectors, tiny_folder, plain, tmp_path
):
    """The dose moves the header's reading of calm up; stories are read without it."""
    words = ["--vectors", tiny_vectors, *texts["audit"], "--steer", "calm=0.5", "--out", tmp_path / "steered"]
    calibrate("audit", tiny_folder, *words)
    steered, before = load_record(tmp_path / "steered"), load_record(plain)
    assert steered.options["steer"] == {"calm": 0.5}
    for name in ("stories", "logistic"):
        torch.testing.assert_close(steered.own.directions[name], before.own.directions[name])
    change = readers.compare(before, steered)
    (calm,) = [concept for concept in change.concepts if concept.concept == "calm"]
    assert calm.change.low > 1
    assert change.figures["loss_change"].estimate != 0
    # Of a steered adapter the model without it is steered too: that KL would be of the adapter alone.
    add_adapter(models.load(str(tiny_folder)).model).save_pretrained(tmp_path / "adapter")
    for words, there in ((["--steer", "calm=0.5"], False), ([], True)):
        out = tmp_path / f"adapter-{there}"
        calibrate("audit", tmp_path / "adapter", "--vectors", tiny_vectors, *texts["audit"], *words, "--out", out)
        assert (load_record(out).neutral.kl is not None) is there


def test_own_chats_are_read_and_cut_where_that_is_wanted(texts, tiny_vectors, tiny_folder, tmp_path, caplog):
    """One of two chats is longer than the model's window of 4096 tokens; its header is at its end."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"id": i, "text": "and so on " * n}) for i, n in enumerate((9, 2000))))
    words = ["--vectors", tiny_vectors, *texts["audit"], "--chats", chats, "--truncate", "--out", tmp_path / "out"]
    calibrate("audit", tiny_folder, *words)
    record = load_record(tmp_path / "out")
    found = record.situations
    assert "1: its last 4096 of " in caplog.text
    assert record.more["asked"]["cut at the beginning"] == f"1 ({found.texts[-1].cut} tokens)"
    assert found.texts[-1].cut > 1000
    assert "cut at the beginning" in (tmp_path / "out" / "profile.html").read_text(encoding="utf-8")
    own_chats = [i for i, text in enumerate(found.texts) if text.set == "chats"]
    assert [found.texts[i].id for i in own_chats] == [0, 1]
    assert found.readings[own_chats, 1].any(1).all()


def test_selection_tasks_are_audited_where_settings_are_chosen(texts, tiny_vectors, tiny_folder, plain, tmp_path):
    words = ["--vectors", tiny_vectors, *texts["audit"], "--split", "selection", "--out", tmp_path / "out"]
    calibrate("audit", tiny_folder, *words)
    found, other = load_record(tmp_path / "out"), load_record(plain)
    assert found.options["split"] == "selection"
    assert not {*found.profile.ids} & {*other.profile.ids}


def test_what_an_audit_that_was_stopped_at_its_end_left_goes(texts, tiny_vectors, tiny_folder, plain, capsys):
    """It was saved and not yet cleared away; another audit's, beside it, stays."""
    left, other = (plain.with_name(f"{plain.name}.partial-{d}") for d in (digest(load_record(plain).options), "0"))
    (left / "states").mkdir(parents=True)
    other.mkdir()
    calibrate("audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--out", plain)
    assert capsys.readouterr().out.endswith("nothing to do\n")
    assert (left.exists(), other.exists()) == (False, True)


def test_a_full_audit_needs_a_sandbox_and_says_so_first(texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch):
    def refuse(*given, **settings):
        raise sandbox.SandboxError("this machine grants no isolation (unshare: denied); nothing was run")

    monkeypatch.setattr(sandbox, "run", refuse)
    monkeypatch.setattr("calibrate.audit.contexts.read", pytest.fail)
    words = ["--vectors", tiny_vectors, *texts["audit"], "--full", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"`--full` runs the code .* grants no isolation .*; allow user namespaces"):
        calibrate("audit", tiny_folder, *words)


def test_a_full_audit_plays_tasks_asks_for_preferences_and_doses(
    texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch
):
    """Stopped in the dose-response: what was played and asked is there and is not played or asked again."""
    ran, relearn = [], relearning.read
    monkeypatch.setattr(capability, "check", lambda names: None)
    monkeypatch.setattr(capability, "run", lambda *given: ran.append("lm-eval") or [])
    monkeypatch.setattr(relearning, "read", lambda *given: ran.append("relearning") or relearn(*given))
    monkeypatch.setattr(full, "DOSED", ())  # the target and one random direction
    words = ["--vectors", tiny_vectors, *texts["audit"], "--full", "--max-rows", 2, "--max-new-tokens", 3]
    words += ["--lm-eval", "arc"]
    command = ["audit", tiny_folder, *words, "--out", tmp_path / "out"]
    measure, turns = dose.measure, iter([dose.measure, interrupt])
    with monkeypatch.context() as patch:
        patch.setattr(dose, "measure", lambda *given: next(turns)(*given))
        with pytest.raises(KeyboardInterrupt):
            calibrate(*command)
    (partial,) = tmp_path.iterdir()
    assert {path.name for path in partial.iterdir()} == {
        "states", "lm-eval.json", "rollouts.jsonl", "replies.json", "preferences.json", "steered.json",
        "dose-desperate.json",
    }  # fmt: skip
    measured = []
    monkeypatch.setattr(dose, "measure", lambda *given: measured.append((given[2], given[4])) or measure(*given))
    for again in ("audit.preferences.ask", "audit.preferences.steered", "commands.full._replies"):
        monkeypatch.setattr(f"calibrate.{again}", pytest.fail)
    calibrate(*command)
    assert [name for name, _ in measured] == ["random 1", "desperate, re-extracted"]
    for _, pairs in measured:  # one of each task
        assert len({pair.task for pair in pairs}) == len(pairs) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    content = (tmp_path / "out" / "audit.json").read_text(encoding="utf-8")
    more = json.loads(content, parse_constant=pytest.fail)["more"]
    assert more == load_record(tmp_path / "out").more
    assert {*load_record(tmp_path / "out").own.directions} == {"stories", "logistic", "domain", "deflection"}
    assert [curve["name"] for curve in more["dose"]] == ["desperate", "random 1", "desperate, re-extracted"]
    assert len(more["preferences"]["elo"]) == 2
    assert {*more["preferences"]["steered"]} == {"desperate", "random 1"}
    kinds = [row["kind"] for row in more["replies"]]  # two mailboxes four times each, and two prompts
    assert (len([kind for kind in kinds if kind.startswith("mailbox")]), len(kinds)) == (8, 10)
    assert more["crossing"] is None  # nothing before it
    assert len(more["relearning"]["readings"]) == 2
    assert ran == ["lm-eval", "relearning"]  # nothing runs on a model that was trained
    assert len({row["key"][0] for row in more["rollouts"]}) == 2
