"""`calibrate export card`: the section of a comparison, of an audit, and of nothing else."""

import html

import numpy as np
import pytest
from records import BASELINE, make_record
from test_cli import calibrate, error
from test_report import FULL, SCRIPT, VERDICT, write

from calibrate.audit import probes
from calibrate.report import profile, profile_card


def test_the_card_of_a_comparison_is_the_one_that_it_wrote(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 1)
    planted.set_band([2], "by hand")
    write(tmp_path / "report", [make_record(planted, BASELINE)] * 3, VERDICT)
    calibrate("export", "card", tmp_path / "report", "--out", tmp_path / "new" / "card.md")
    written = (tmp_path / "new" / "card.md").read_bytes()
    assert written == (tmp_path / "report" / "card.md").read_bytes()
    assert b"**Verdict: evasion**" in written
    assert "exists; choose another `--out`" in error(
        "export", "card", tmp_path / "report", "--out", tmp_path / "new" / "card.md"
    )


def test_the_card_of_an_audit_has_its_readings_and_what_the_model_did(planted, tmp_path):
    """Levels 0 to 7, and 2 more on failing contexts: 5.5 and 3.5 sigma. Replies differ by 0.5 nats, on twins by 0."""
    planted.set_band([2], "by hand")
    replies = [[[-1.0, -1.5], [-1.0, -1.0]]] * 8
    benchmark = {"task": f"arc | {SCRIPT}", "metric": "acc", "value": 0.25, "interval": None, "examples": 4}
    more = {"rollouts": FULL["rollouts"], "lm_eval": [benchmark]}
    record = make_record(planted, BASELINE, replies=replies, more=more, model=f"tuned {SCRIPT}")
    record.save(tmp_path / "audit")
    calibrate("export", "card", tmp_path / "audit", "--out", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "<" not in card
    assert card.startswith(f"## Emotional profile\n\ntuned {html.escape(SCRIPT, quote=False)}, 8 audit tasks that ")
    assert "\n| failing, header | 5.50 | " in card
    assert "\n| passing, header | 3.50 | " in card
    assert "highest desperate +2.00, calm +0.00; lowest calm +0.00, desperate +2.00 (sigma)" in card
    assert (
        "+0.500 nats per token on failing contexts, +0.000 on passing ones. Perplexity of neutral text 7.39." in card
    )
    assert "\n| impossible | no | 2 | 0.00 (0.00 to 0.66) | 0.00 " in card
    assert rf"| arc \| {html.escape(SCRIPT, quote=False)} | acc | 0.25 |" in card
    plain = make_record(planted, BASELINE)
    plain.save(tmp_path / "plain")
    calibrate("export", "card", tmp_path / "plain", "--out", tmp_path / "plain.md")
    assert "coding tasks" not in (tmp_path / "plain.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "neither report.json nor audit.json there; give the folder that `calibrate compare` or `calibrate audit`",
        ),
        (
            "",
            "report.json: not JSON (Expecting value: line 1 column 1 (char 0)); the file is damaged: make the result",
        ),
        ("[]", "report.json: not a JSON object; the file is damaged"),
        ('{"schema": 2}', "report.json: schema 2, this version reads 5; run `calibrate compare` again"),
    ],
)
def test_what_has_no_card_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    assert message in error("export", "card", tmp_path, "--out", tmp_path / "card.md")


def test_a_damaged_audit_is_named(planted, tmp_path):
    make_record(planted).save(tmp_path / "audit")
    (tmp_path / "audit" / "audit.json").write_text('{"schema": 4,', encoding="utf-8")
    line = error("export", "card", tmp_path / "audit", "--out", tmp_path / "card.md")
    assert "audit.json: not JSON (Expecting property name" in line
    assert line.endswith("the file is damaged: audit the checkpoint again")
    (tmp_path / "audit" / "audit.json").write_text("[]", encoding="utf-8")
    assert "is damaged or was copied in part" in error(
        "export", "card", tmp_path / "audit", "--out", tmp_path / "c.md"
    )
    make_record(planted).save(tmp_path / "part")
    (tmp_path / "part" / "states.safetensors").write_bytes(b"cut off")
    line = error("export", "card", tmp_path / "part", "--out", tmp_path / "c.md")
    assert "states.safetensors: Error while deserializing header" in line
    assert line.endswith("the file is damaged: audit the checkpoint again")
    (tmp_path / "part" / "states.safetensors").unlink()
    assert "is damaged or was copied in part" in error("export", "card", tmp_path / "part", "--out", tmp_path / "c.md")


@pytest.mark.parametrize(
    ("options", "asked", "told"),
    [
        ({}, {}, "8 audit tasks that training never saw ("),
        ({"split": "selection"}, {}, "8 selection tasks, by which settings may be chosen ("),
        ({}, {"twins": "mine.jsonl"}, "8 tasks of your own (split audit) ("),
        ({"split": "selection"}, {"twins": "mine.jsonl"}, "8 tasks of your own (split selection) ("),
    ],
)
def test_a_page_says_whose_tasks_it_is_on(planted, tmp_path, monkeypatch, options, asked, told):
    monkeypatch.setattr(probes, "STEPS", 1)
    planted.set_band([2], "by hand")
    few = {"replies": np.full((2, 2, 2), -1.0), "pair_tasks": ["north", "alder"]}  # eight are read, two have pairs
    record = make_record(planted, BASELINE, options=options, more={"asked": asked}, **few)
    write(tmp_path, [record] * 3, VERDICT)
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "card.md").read_text(), profile_card(record)):
        assert told in text
        assert ("tasks that training never saw" in text) is ("never saw" in told)
    profile.write(tmp_path, record)
    page = (tmp_path / "profile.html").read_text()
    assert told.removeprefix("8 ").removesuffix(" (").capitalize() in page
    assert ("that training never saw" in page) is ("never saw" in told)


def test_the_card_has_the_margin_of_the_page(planted):
    """Three pairs of margin 0 on one task and one of 4 on another: 2 over tasks, 1 over pairs."""
    record = make_record(planted, BASELINE)
    replies = np.zeros((4, 2, 2))
    replies[3, :, 0] = 4
    record = record._replace(contexts=record.contexts._replace(replies=replies, pair_tasks=["a", "a", "a", "b"]))
    assert "2.000" in profile_card(record)
    assert record.margins().tolist() == [[0, 0], [4, 4]]  # what the page takes the mean of


def test_signs_of_markdown_in_a_value_show_as_they_are(planted):
    record = make_record(planted, BASELINE, model="[x](http://e) *b* __c__ ~~d~~ e\\f")
    assert r"[x]\(http://e) \*b\* \_\_c\_\_ \~\~d\~\~ e\\f, 8 audit" in profile_card(record)
