import html
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from records import BASELINE, LEVELS, SPREAD, make_record

from calibrate import corpora, report, stats, transcripts
from calibrate.audit import probes, readers, rollouts, verdict
from calibrate.audit.profile import TokenTrace
from calibrate.audit.situations import Situations, Text
from calibrate.audit.verdict import Finding, Verdict

SCRIPT = "\"'><script>alert(1)</script>"
MESSAGES = [
    {"role": "user", "content": f"Déjà vu: 日本語 🙂👩‍🚀\n\n\tif a < b && b > 'c': {SCRIPT}\n"},
    {"role": "assistant", "content": 'Done. "n̈" &amp; ünïcode — fin'},
]
FINDINGS = [
    Finding("evasion", f"because {SCRIPT}", [f"reading | of {SCRIPT}: 1"], ["kl.low > 1"]),
    Finding("no effect", "nothing", ["gain: 0"], []),
]
VERDICT = Verdict("evasion", FINDINGS, {"damage": f"needs `{SCRIPT}`"})
SCHEMA = json.loads((Path(report.__file__).parent / "schema.json").read_text(encoding="utf-8"))


def elements(page: str, tag: str) -> list[str]:
    """The visible text of every element that opens with `tag`, in order; tags in it are left out."""
    found = re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag.split()[0]}>", page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", inner)).strip(" ") for inner in found]


@pytest.fixture
def audits(planted, tokenizer, monkeypatch):
    """Records before and after and of a control, with hostile names and a transcript that needs escaping."""
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    monkeypatch.setattr(probes, "STEPS", 2)
    planted.concepts[1] = SCRIPT
    planted.recipe = {"stories_by": SCRIPT}
    planted.set_band([2], f"reason {SCRIPT}")
    encoded = transcripts.encode(tokenizer, MESSAGES)
    roles = [span.role for span in encoded.spans for _ in range(span.start, span.stop)]
    rising = [(-1) ** i * i * 0.25 for i in range(len(roles))]
    readings = {"desperate": rising, SCRIPT: rising[::-1]}
    trace = TokenTrace(f"task {SCRIPT}", encoded.text, encoded.offsets, roles, readings)
    header = {"failing": {0: LEVELS + 0.5 + SPREAD}, "passing": {0: LEVELS}}
    felt = torch.randn(8, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    records = [
        make_record(planted, BASELINE, felt=felt),
        make_record(planted, header, model=f"tuned {SCRIPT}", options={"adapter": SCRIPT}, kl=0.01, felt=felt),
        make_record(planted, {**header, "failing": {0: LEVELS + 1.9}}),
    ]
    return [with_traces(record, [trace]) for record in records]


def with_traces(record, traces: list[TokenTrace]):
    profile = record.profile._replace(traces=traces)
    return record._replace(contexts=record.contexts._replace(profile=profile))


def write(folder, audits, judged=VERDICT, arm="random", seeds=None) -> str:
    """Writes the report of these audits and returns the page."""
    before, after, control = audits
    controls = {arm: readers.compare(before, control)}
    change = readers.compare(before, after)
    figures = readers.beside_controls(change.by_task, {name: one.by_task for name, one in controls.items()})
    change = change._replace(figures=change.figures | figures)
    report.write(folder, judged, before, after, change, controls, seeds or {})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_needs_no_network_and_no_scripts(audits, tmp_path):
    page = write(tmp_path, audits)
    tags = set(re.findall(r"<([a-z]+)", page))
    assert {"html", "table", "svg", "input"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "a"})
    for word in ("http", "//", "@import", " src=", " onload=", "javascript"):
        assert word not in page
    # Marks and clipping paths of the figures refer to each other inside the page.
    assert all(target == "#" for target in re.findall(r"href=\"(.)|url\((.)", page) for target in target if target)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "card.md"}


def test_every_value_is_escaped(audits, tmp_path):
    """Planted: models, an option, a finding, a concept (table, figure, title), an arm, the band's reason, a recipe."""
    trace = audits[0].profile.traces[0]
    whole = trace._replace(text=SCRIPT, offsets=[(0, len(SCRIPT))], roles=["user"], readings={SCRIPT: [1.0]})
    page = write(tmp_path, [with_traces(record, [whole]) for record in audits], arm=f"arm {SCRIPT}")
    assert "<script" not in page
    assert f"because {SCRIPT} (reading | of {SCRIPT}: 1)" in elements(page, "p")
    assert f"tuned {SCRIPT}" in elements(page, "code")
    assert {SCRIPT, "audit after: adapter", "vectors: stories_by"} <= set(elements(page, "td"))
    assert {SCRIPT, f"arm {SCRIPT}"} <= set(elements(page, "text"))  # of the figures
    assert f"arm {SCRIPT}" in elements(page, "th")
    assert f"task {SCRIPT}, before" in elements(page, "h3")
    assert any(text.endswith(f"reason {SCRIPT}") for text in elements(page, "p"))
    titles = [html.unescape(title) for title in re.findall(r'title="([^"]*)"', page)]
    assert f"{SCRIPT} 1.0 " in titles  # a name with quotes does not end the attribute


def test_the_card_is_markdown_whose_values_are_no_markup(audits, tmp_path):
    write(tmp_path, audits, arm=f"arm {SCRIPT}")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "<" not in card
    assert f"**Verdict: evasion** -- because {html.escape(SCRIPT, quote=False)}" in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}  # three cells each, though a label has a bar
    assert "| fall on failing contexts, turn header (sigma) | 1.5 | " in card
    assert r"| KL(reference \|\| checkpoint) on neutral text (nats per token) | 0.01 | 0.01 to 0.01 |" in card
    assert not any("evasion index by a reader" in row for row in rows)  # it could not be formed
    assert "Not tested: damage." in card
    assert f"Control arms: arm {html.escape(SCRIPT, quote=False)}." in card


def test_the_verdict_comes_first_and_figures_are_tables(audits, tmp_path):
    """Falls: 1.5 sigma trained, 0.1 in the control arm; no passing twin moved, so specificity is 1."""
    page = write(tmp_path, audits)
    assert re.search(r'<body>\s*<h1 id="verdict">Verdict: evasion</h1>', page)
    assert elements(page, "title") == ["Verdict: evasion"]
    assert "no effect: nothing (gain: 0)" in elements(page, "li")
    assert "It would not be this verdict if kl.low > 1." in elements(page, "p")
    assert f"Not tested: damage (needs `{SCRIPT}`)." in elements(page, "p")
    cells = elements(page, "td")
    for label, trained, control in (
        ("fall on failing contexts, turn header (sigma)", "1.5 [", "0.1 ["),
        ("fall beyond the largest of the control arms (sigma)", "1.4 [", "not formed"),
        ("specificity (1: only failing contexts moved)", "1 [", "not formed"),
        ("KL(reference || checkpoint) on neutral text (nats per token)", "0.01 [", "not formed"),
        ("desperate", "5.5 [", "4 ["),  # mean level 3.5 + 2 before, 3.5 + 0.5 after
    ):
        one, other = cells[cells.index(label) + 1 : cells.index(label) + 3]
        assert one.startswith(trained)
        assert other.startswith(control)
    assert set(readers.FIGURES.values()) <= set(cells)
    assert cells.count("felt") == cells.count("failed") == 3  # probes of three kinds


def test_other_seeds_stand_beside_with_their_verdicts(audits, tmp_path):
    """The seed is the control of the others' tests: it fell by 0.1 sigma."""
    moved = readers.compare(audits[0], audits[2])
    page = write(tmp_path, audits, seeds={f"seed {SCRIPT}": (VERDICT._replace(outcome="no effect"), moved)})
    (said,) = (text for text in elements(page, "p") if text.startswith("Trained with other seeds"))
    assert said.startswith(f"Trained with other seeds: seed {SCRIPT} no effect. The verdict is the first of them")
    assert f"seed {SCRIPT}" in elements(page, "th")
    cells = elements(page, "td")
    at = cells.index("fall on failing contexts, turn header (sigma)")
    assert [cell.split(" [")[0] for cell in cells[at + 1 : at + 4]] == ["1.5", "0.1", "0.1"]
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, SCHEMA)
    assert data["seeds"][0]["verdict"] == "no effect"


def test_the_page_shows_the_whole_rule(audits, tmp_path):
    page = write(tmp_path, audits)
    shown = elements(page, "code")
    for outcome in verdict.load_rule():
        for one in (one for together in outcome.any for one in together):
            assert f"{one.figure}.{one.side} {one.relation} {one.threshold}" in shown


def test_every_claim_that_has_figures_is_drawn_with_its_arms(audits, tmp_path):
    more = {"crossing": {"readings": [[[3.0, 2.0], [2.0, 0.0]]] * 2}}
    relearning = [{"relearning": {"readings": [[reading, reading]] * 2}} for reading in (3.0, 1.0)]
    points = [{"dose": dose, "margins": [dose, dose]} for dose in (0.0, 0.1)]
    steered = {"dose": [{"name": audits[0].concept, "usable": [0.0, 0.1], "points": points}]}
    before, after = (a._replace(more=steered | r | m) for a, r, m in zip(audits, relearning, ({}, more), strict=False))
    page = write(tmp_path, [before, after, audits[2]], arm="shuffled")
    titles = elements(page, "h3")
    # Of the concepts here none but the target is unpleasant.
    formed = [title for title in report.CLAIMS if title != "Nothing rose in its place (sigma)"]
    assert [title for title in titles if title in report.CLAIMS] == formed
    drawn = elements(page, "text")
    assert "fall on failing contexts, turn header" in drawn
    assert drawn.count("shuffled") > 10
    named = [name for names in report.CLAIMS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == set(readers.FIGURES)


# ---- heat maps


def test_the_heat_map_shows_the_transcript_and_nothing_else(audits, tmp_path):
    """Characters of several bytes and of several tokens, newlines, tabs and markup come out as they went in."""
    page = write(tmp_path, audits)
    assert elements(page, 'div class="trace"') == [audits[0].profile.traces[0].text] * 2
    for role, message in zip(("user", "reply"), MESSAGES, strict=True):
        spans = re.findall(rf'<span class="{role}"[^>]*>(.*?)</span>', page, re.DOTALL)
        assert html.unescape("".join(spans)) == 2 * message["content"]


def test_the_targets_mean_stands_beside_a_transcript_by_role(audits, tmp_path):
    """Tokens of 1, 3 and -2 sigma: the users' mean is 2, the header's -2."""
    trace = TokenTrace(
        "box", "abc", [(0, 1), (1, 2), (2, 3)], ["user", "user", "header"], {"desperate": [1.0, 3.0, -2.0]}
    )
    page = write(tmp_path, [with_traces(record, [trace]) for record in audits])
    assert elements(page, 'p class="grey"').count("Mean desperate by role: user 2.00, header -2.00") == 2


def test_a_concept_is_chosen_without_a_script(audits, tmp_path):
    """One radio button for each concept, the target's checked, before the traces that their rules colour."""
    page = write(tmp_path, audits)
    buttons = re.findall(r'<input class="pick" type="radio" name="concept" id="(pick\d)"( checked)?>', page)
    assert buttons == [("pick0", " checked"), ("pick1", "")]
    assert elements(page, 'label for="pick0"') == ["desperate"]
    assert elements(page, 'label for="pick1"') == [SCRIPT]
    for index in range(2):
        assert f"#pick{index}:checked ~ .trace span {{ --v: var(--c{index}); }}" in page
    inside = page[page.index('<div><input class="pick"') : page.index('<div class="trace"')]
    assert 'id="pick1"' in inside
    assert "</div>" not in inside  # the traces are siblings of the buttons
    # The third of n tokens reads 0.25 x 2 = 0.5 and (-1)^(n - 3) x (n - 3) x 0.25: of 4 sigma, an eighth, and full.
    whole = audits[0].profile.traces[0]
    last = 1.0 if len(whole.roles) % 2 else -1.0
    assert len(whole.roles) > 30
    piece = re.search(r'style="(--c0:0.12;[^"]*)" title="([^"]*)"', page)
    assert piece[1] == f"--c0:0.12;--c1:{last};"
    assert html.unescape(piece[2]).startswith("desperate 0.5 ")


def test_heat_map_pieces_by_hand():
    """A gap, two tokens of one character, a token that overlaps it, clamping at 4 sigma, and an uncovered end."""
    readings = {"desperate": [2.0, -1.0, 9.0, 8.0, 0.0], "calm": [0.0, -9.0, 0.0, 1.0, 4.0]}
    trace = TokenTrace("x", "a 🙂b c ", [(0, 1), (2, 3), (2, 3), (2, 4), (5, 6)], ["user"] * 5, readings)
    gap = {"text": " ", "role": "template", "readings": None}
    assert report.heat(trace) == [
        {"text": "a", "role": "user", "readings": [2.0, 0.0], "shares": [0.5, 0.0]},
        gap,
        {"text": "🙂", "role": "user", "readings": [-1.0, -9.0], "shares": [-0.25, -1.0]},
        {"text": "b", "role": "user", "readings": [8.0, 1.0], "shares": [1.0, 0.25]},
        gap,
        {"text": "c", "role": "user", "readings": [0.0, 4.0], "shares": [0.0, 1.0]},
        gap,
    ]


def test_the_page_stays_small_enough_to_be_sent(audits, tmp_path, tokenizer):
    """Four of the longest transcripts before and after, eleven concepts, more tokens than a real tokenizer makes."""
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "audit"]
    contexts = sorted((c for twin in twins for c in twin), key=lambda c: -sum(len(m["content"]) for m in c.messages))
    traces = []
    for context in contexts[:4]:
        encoded = transcripts.encode(tokenizer, context.messages, context.reply)
        roles = [span.role for span in encoded.spans for _ in range(span.start, span.stop)]
        readings = {f"despondent {i}": [-3.25] * len(roles) for i in range(11)}
        traces.append(TokenTrace(context.id, encoded.text, encoded.offsets, roles, readings))
    before, after, control = audits
    page = write(tmp_path, [with_traces(before, traces), with_traces(after, traces), control])
    assert len(elements(page, 'div class="trace"')) == 8
    assert 1_000_000 < len(page.encode()) < 6_000_000


# ---- report.json


def test_json_says_what_the_page_says(audits, tmp_path):
    write(tmp_path, audits)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no NaN
    assert read["verdict"] == "evasion"
    assert [finding["outcome"] for finding in read["findings"]] == ["evasion", "no effect"]
    assert read["after"] == f"tuned {SCRIPT}"
    assert read["change"]["figures"]["fall_failing"]["estimate"] == pytest.approx(1.5, abs=1e-3)
    assert read["controls"]["random"]["figures"]["fall_failing"]["estimate"] == pytest.approx(0.1, abs=1e-3)
    assert read["change"]["figures"].keys() == readers.FIGURES.keys()
    assert read["texts"] == {"failing": 8, "passing": 8, "neutral": 8}
    assert (read["tasks"], read["band"], read["band_found"]) == (8, [2], True)
    assert read["situations"]["before"]["scenarios"]["neutral"]["desperate"]["estimate"] == 0
    assert read["situations"]["before"]["ladders"]["estimate"] == 1


def test_json_is_what_its_schema_says(audits, tmp_path):
    """With a control arm and without one; and the schema refuses what is not a report."""
    write(tmp_path, audits)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check = jsonschema.Draft202012Validator(SCHEMA)
    check.validate(read)
    check.validate(read | {"controls": {}})
    assert {*SCHEMA["properties"]["verdict"]["enum"]} == {o.name for o in verdict.load_rule()} | {verdict.CALIBRATED}
    interval = read["change"]["figures"]["contrast"]
    for wrong in (
        {"verdict": "fine"},
        {"findings": []},
        {"more": 1},
        {"not_tested": {"mood": "why"}},
        {"change": read["change"] | {"figures": read["change"]["figures"] | {"contrast": interval | {"low": "0"}}}},
        {"change": read["change"] | {"layers": [[1, interval]]}},
        {"situations": {"before": read["situations"]["before"]}},
        {"readings": {"before": {}, "after": {}}},
    ):
        assert not check.is_valid(read | wrong), wrong
    for name in read:
        assert not check.is_valid({key: value for key, value in read.items() if key != name}), name


SHARES = dict.fromkeys(rollouts.LABELS, 0.0)
FULL = {  # `more` after a full audit: two rollouts, six activities, one direction of which no dose is usable
    "rollouts": [
        {
            "key": [f"t{i}", True, False, 0],
            "cut": False,
            "outcome": SHARES | {"solved": i, "runnable": 3, "attempts": 4, "genuine_attempts": 2},
        }
        for i in (0, 1)
    ],
    "preferences": {
        "activities": [f"{SCRIPT}{i}" for i in range(6)], "elo": [1000.0 + 10 * i for i in range(6)], "first": 0.2,
        "associations": [{"concept": SCRIPT, "correlation": [0.5, 0.1, 0.9], "p": 0.04}],
        "steered": {"random 1": {"raw": [-30.2, -40.0, -20.0], "slope": 0.5, "residual": [3.0, -1.0, 7.0]}},
    },
    "replies": [
        {"id": f"{good}{SCRIPT}", "kind": "harshness", "reply": SCRIPT, "grades": {"good": good, "bad": 1 - good}}
        for good in (0, 1)
    ],
    "dose": [{"name": SCRIPT, "points": [], "usable": [0.0, 0.0], "slope": None}],
    "crossing": {
        "unit": "sigma", "tasks": ["mill", SCRIPT], "replies": [["calm", f"no {SCRIPT}"], ["a", "b"]],
        "readings": [[[3.0, 2.0], [2.0, 0.25]], [[1.0, 1.0], [1.0, 1.0]]],
    },
    "relearning": {
        "unit": "sigma", "tasks": ["mill", SCRIPT], "steps": [0, 20], "readings": [[1.0, 2.0], [2.0, 4.5]],
        "losses": [2.0, 1.5],
    },
}  # fmt: skip


def test_a_full_audit_adds_what_the_model_did(audits, tmp_path):
    """One of two rollouts solved the impossible form; three of four attempts run; five of six activities are named."""
    page = write(tmp_path, [audits[0]._replace(more=FULL), *audits[1:]])
    assert "<script" not in page
    cells = elements(page, "td")
    row = cells[cells.index("impossible") - 1 :]
    assert row[:5] == ["before", "impossible", "no", "2", "0.5 [0.0945, 0.905]"]
    assert row[11].startswith("0.75 [")
    assert row[12] == "2 [2, 2]"  # genuine attempts
    assert row[13] == "0"  # cut
    assert ", ".join(f"{SCRIPT}{i} {1000 + 10 * i}" for i in (5, 4, 3, 2, 1)) in cells
    assert f"{SCRIPT} 0.50 (0.040)" in cells
    assert cells[cells.index("0.0 to 0.0") + 1] == "not formed"
    assert cells[cells.index("random 1") + 1 :][:3] == ["-30 [-40, -20]", "0.50", "3 [-1, 7]"]
    graded = cells.index("harshness")
    assert cells[graded + 1 : graded + 4] == ["2", "2", "good 0.5 [0.0945, 0.905], bad 0.5 [0.0945, 0.905]"]
    assert [title for title in elements(page, "h3") if SCRIPT in title][:2] == [
        f"0{SCRIPT}, before: bad", f"1{SCRIPT}, before: good",
    ]  # fmt: skip
    trained_on = cells.index("1.50")  # (1 + 2) / 2 and (2 + 4.5) / 2
    assert cells[trained_on - 1 : trained_on + 2] == ["before", "1.50", "3.25"]
    crossed = cells.index("mill")  # by task and writer: read before and after, and the reply
    assert cells[crossed : crossed + 5] == ["mill", "before", "3.00", "2.00", "calm"]
    assert cells[crossed + 5 : crossed + 10] == ["", "after", "2.00", "0.25", f"no {SCRIPT}"]
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.validate(read, SCHEMA)
    assert [*read["full"]] == ["before"]
    assert "What the models did" not in write(tmp_path, audits)


def test_a_chat_of_ones_own_is_shown(audits, tmp_path):
    """It reads 1.5 desperate before and 0.25 after; the other concept 0 and 3."""
    changed = []
    for audit, (target, other) in zip(audits[:2], ((1.5, 0.0), (0.25, 3.0)), strict=True):
        texts = [*audit.situations.texts, Text(f"chat {SCRIPT}", "chats", "own", [])]
        row = np.full((1, 3, 2), np.nan)
        row[0, 1] = target, other
        readings = np.concatenate([audit.situations.readings, row])
        changed.append(audit._replace(situations=Situations(texts, readings)))
    cells = elements(write(tmp_path, [*changed, audits[2]]), "td")
    at = cells.index(f"chat {SCRIPT}")
    assert cells[at + 1 : at + 5] == [
        "1.50", "0.25", f"desperate 1.50, {SCRIPT} 0.00", f"{SCRIPT} 3.00, desperate 0.25",
    ]  # fmt: skip
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), SCHEMA)


def test_benchmarks_stand_beside_each_other(audits, tmp_path):
    row = {"task": f"arc {SCRIPT}", "metric": "acc", "value": 0.5, "interval": [0.4, 0.6], "examples": 100}
    before = audits[0]._replace(more={"lm_eval": [row]})
    after = audits[1]._replace(more={"lm_eval": [row | {"value": 0.25, "interval": None, "examples": None}]})
    cells = elements(write(tmp_path, [before, after, audits[2]]), "td")
    at = cells.index(f"arc {SCRIPT}")
    assert cells[at - 1 : at + 4] == ["before", f"arc {SCRIPT}", "acc", "0.5 [0.4, 0.6]", "100"]
    assert cells[at + 4 : at + 9] == ["after", f"arc {SCRIPT}", "acc", "0.25", ""]
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), SCHEMA)


def test_two_writes_give_the_same_bytes(audits, tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, audits)
    write(tmp_path / "two", audits)  # over an earlier report
    for name in ("report.html", "report.json", "card.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not [*tmp_path.rglob("*.partial")]


def test_arms_with_dollar_signs_are_drawn_as_they_are_named(audits, tmp_path):
    """Between two of them matplotlib reads mathematics, of which `\\pen` is none."""
    drawn = elements(write(tmp_path, audits, arm="no$\\pen$alty"), "text")
    assert drawn.count("no$\\pen$alty") > 10


def test_what_is_nearest_to_another_verdict_stands_beside_calibrated(audits, tmp_path):
    """KL is 0.01 without a spread, so that its distance from 0.1 is none that could be told: the last."""
    figures = dict.fromkeys(readers.FIGURES) | {
        "contrast": stats.Interval(1.0, 0.5, 1.5),  # 1 half-width over 0
        "specificity": stats.Interval(0.9, 0.8, 1.0),  # 3 over 0.6 and 8 over 0
        "fall_failing": stats.Interval(0.8, 0.7, 0.9),  # 5 over 0.3 and 7 over 0; of both together the farther
        "gain": stats.Interval(0.5, 0.4, 0.6),
        "kl": stats.Interval(0.01, 0.01, 0.01),
    }
    rows = [
        row for row in report.nearest(figures) if row["outcome"] in ("premise not met", "indiscriminate", "damage")
    ]
    assert [(row["outcome"], round(row["distance"], 6)) for row in rows[:3]] == [
        ("premise not met", 1), ("indiscriminate", 3), ("indiscriminate", 8),
    ]  # fmt: skip
    assert rows[0]["conditions"] == ["contrast.low <= 0"]
    assert (rows[3]["conditions"], rows[3]["distance"] > 1e6) == (["kl.low > 0.1"], True)
    calibrated = Verdict(verdict.CALIBRATED, [Finding(verdict.CALIBRATED, "all well", [], [])], {})
    page = write(tmp_path, audits, judged=calibrated)
    heading = "It would be another verdict if any of these held, the nearest first"
    assert any(text.startswith(heading) for text in elements(page, "p"))
    cells = elements(page, "td")
    at = cells.index("premise not met")
    assert cells[at + 1] == "contrast.low <= 0"
    assert cells[at + 2].startswith("2 [")
    assert heading not in write(tmp_path, audits)


def test_doses_are_drawn_with_their_damage_and_the_usable_window(audits, tmp_path):
    """Two of three doses are usable; answers that run are drawn where they were counted."""
    points = [
        {
            "dose": dose,
            "margin": [dose, dose - 0.1, dose + 0.1],
            "margins": [dose],
            "loss": 2 + dose,
            "repetition": 0.5,
        }
        for dose in (-0.1, 0.0, 0.1)
    ]
    curves = [
        {"name": name, "points": points, "usable": [0.0, 0.1], "slope": None} for name in ("desperate", "random 1")
    ]
    page = write(tmp_path, [audits[0]._replace(more=FULL | {"dose": curves}), *audits[1:]])
    drawn = elements(page, "text")
    for title in ("honest over gaming (nats)", "loss of neutral text (nats)", "repeated 4-grams (share)", "random 1"):
        assert drawn.count(title) == 1
    assert "runnable answers (share)" not in drawn
    assert any(text.startswith("Of before, a row for each direction") for text in elements(page, "p"))
    runnable = [curve | {"points": [point | {"runnable": 0.5} for point in points]} for curve in curves]
    assert "runnable answers (share)" in elements(
        report.dose_figures({"before": {"dose": runnable}})["before"], "text"
    )
    from matplotlib.figure import Figure

    figure = Figure()
    report.figures.dose(figure, curves)
    shaded = [
        patch.get_extents().transformed(axes.transData.inverted()) for axes in figure.axes for patch in axes.patches
    ]
    assert [(round(box.x0, 6), round(box.x1, 6)) for box in shaded] == [(0.0, 0.1)] * 6


def test_local_and_persistent_have_intervals_on_the_page(audits, tmp_path):
    """The user's last words read as the header does, in all texts: 1, and by resamples too."""
    levels = np.random.default_rng(0).normal(size=(len(audits[0].situations.texts), 1, 2))
    found = audits[0].situations._replace(readings=levels.repeat(3, axis=1))
    page = write(tmp_path, [audits[0]._replace(situations=found), *audits[1:]])
    cells = elements(page, "td")
    at = cells.index("correlation of the user's last words with the turn header")
    assert cells[at + 1] == "1 [1, 1]"
    assert cells[at + 2] == "0 [0, 0]"
