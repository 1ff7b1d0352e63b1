import html
import json
import re

import pytest
from records import BASELINE, LEVELS, SPREAD, make_record

from calibrate import report, stats, transcripts
from calibrate.audit import readers
from calibrate.audit.profile import TokenTrace
from calibrate.audit.verdict import Finding, Verdict

SCRIPT = "<script>alert(1)</script>"
MESSAGES = [
    {"role": "user", "content": f"Déjà vu: 日本語 🙂👩‍🚀\n\n\tif a < b && b > 'c': {SCRIPT}\n"},
    {"role": "assistant", "content": 'Done. "n̈" &amp; ünïcode — fin'},
]
VERDICT = Verdict("evasion", [Finding("evasion", f"because {SCRIPT}"), Finding("no effect", "nothing")], {"x": "why"})


def elements(page: str, tag: str) -> list[str]:
    """The visible text of every element that opens with `tag`, in order; tags in it are left out."""
    found = re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag.split()[0]}>", page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", inner)).strip(" ") for inner in found]


@pytest.fixture
def audits(planted, tokenizer, monkeypatch):
    """Records before and after and of a control, with hostile names and a transcript that needs escaping."""
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    planted.concepts[1] = SCRIPT
    planted.recipe = {"stories_by": SCRIPT}
    planted.set_band([2], f"reason {SCRIPT}")
    encoded = transcripts.encode(tokenizer, MESSAGES)
    roles = [span.role for span in encoded.spans for _ in range(span.start, span.stop)]
    trace = TokenTrace(encoded.text, encoded.offsets, roles, [(-1) ** i * i * 0.25 for i in range(len(roles))])
    header = {"failing": {0: LEVELS + 0.5 + SPREAD}, "passing": {0: LEVELS}}
    records = [
        make_record(planted, BASELINE),
        make_record(planted, header, model=f"tuned {SCRIPT}", options={"adapter": SCRIPT}, kl=0.01),
        make_record(planted, {**header, "failing": {0: LEVELS + 1.9}}),
    ]
    return [record._replace(profile=record.profile._replace(trace=trace)) for record in records]


def write(folder, audits, verdict=VERDICT) -> str:
    """Writes the report of these audits and returns the page."""
    before, after, control = audits
    report.write(folder, verdict, before, after, readers.compare(before, after), readers.compare(before, control))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_needs_no_network_and_no_scripts(audits, tmp_path):
    page = write(tmp_path, audits)
    tags = set(re.findall(r"<([a-z]+)", page))
    assert {"html", "table", "svg"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "a"})
    for word in ("http", "//", "@import", " src=", " onload=", "javascript"):
        assert word not in page
    # Marks and clipping paths of the figures refer to each other inside the page.
    assert all(target == "#" for target in re.findall(r"href=\"(.)|url\((.)", page) for target in target if target)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}


def test_every_value_is_escaped(audits, tmp_path):
    """Planted: a model, an option, a finding, a concept (table, figure), the band's reason, a recipe, a transcript."""
    whole = TokenTrace(SCRIPT, [(0, len(SCRIPT))], ["user"], [1.0])  # one token, which no piece's markup breaks up
    page = write(tmp_path, [audits[0]._replace(profile=audits[0].profile._replace(trace=whole)), *audits[1:]])
    assert SCRIPT not in page
    assert f"because {SCRIPT}" in elements(page, "p")
    assert f"tuned {SCRIPT}" in elements(page, "code")
    assert {SCRIPT, "audit after: adapter", "vectors: stories_by"} <= set(elements(page, "td"))
    assert SCRIPT in elements(page, "text")  # of the figure
    assert any(text.endswith(f"reason {SCRIPT}") for text in elements(page, "p"))


def test_the_outcome_comes_first_and_figures_are_tables(audits, tmp_path):
    """Falls: 1.5 sigma trained, 0.1 in the control arm; no passing twin moved, so specificity is 1."""
    page = write(tmp_path, audits)
    assert re.search(r"<body>\s*<h1>Outcome: evasion</h1>", page)
    assert elements(page, "title") == ["Outcome: evasion"]
    assert "no effect: nothing" in elements(page, "li")
    cells = elements(page, "td")
    for label, trained, control in (
        ("fall on failing contexts, turn header (sigma)", "1.5 [", "0.1 ["),
        ("specificity (1: only failing contexts moved)", "1 [", "not formed"),
        ("KL(reference || trained) on neutral text (nats per token)", "0.01 [", "not formed"),
        ("desperate", "5.5 [", "4 ["),  # mean level 3.5 + 2 before, 3.5 + 0.5 after
    ):
        one, other = cells[cells.index(label) + 1 : cells.index(label) + 3]
        assert one.startswith(trained)
        assert other.startswith(control)


def test_heat_map_shows_the_transcript_and_nothing_else(audits, tmp_path):
    """Characters of several bytes and of several tokens, newlines, tabs and markup come out as they went in."""
    page = write(tmp_path, audits)
    assert elements(page, 'div class="trace"') == [audits[0].profile.trace.text] * 2
    for role, message in zip(("user", "reply"), MESSAGES, strict=True):
        spans = re.findall(rf'<span class="{role}"[^>]*>(.*?)</span>', page, re.DOTALL)
        assert html.unescape("".join(spans)) == 2 * message["content"]


def test_heat_map_pieces_by_hand(planted):
    """A gap, two tokens of one character, a token that overlaps it, clamping at 4 sigma, and an uncovered end."""
    trace = TokenTrace("a 🙂b c ", [(0, 1), (2, 3), (2, 3), (2, 4), (5, 6)], ["user"] * 5, [2.0, -1.0, 9.0, 8.0, 0.0])
    record = make_record(planted)
    pieces = report._heat(record._replace(profile=record.profile._replace(trace=trace)))
    assert [(piece["text"], piece["role"], piece["reading"], piece["colour"]) for piece in pieces] == [
        ("a", "user", 2.0, "rgba(181,68,46,0.50)"),
        (" ", "template", None, "transparent"),
        ("🙂", "user", -1.0, "rgba(31,95,168,0.25)"),
        ("b", "user", 8.0, "rgba(181,68,46,1.00)"),
        (" ", "template", None, "transparent"),
        ("c", "user", 0.0, "rgba(31,95,168,0.00)"),
        (" ", "template", None, "transparent"),
    ]


def test_json_says_what_the_page_says(audits, tmp_path):
    write(tmp_path, audits)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no NaN
    assert read["outcome"] == "evasion"
    assert [finding["outcome"] for finding in read["findings"]] == ["evasion", "no effect"]
    assert read["after"] == f"tuned {SCRIPT}"
    assert read["change"]["fall_failing"]["estimate"] == pytest.approx(1.5, abs=1e-3)
    assert read["control"]["fall_failing"]["estimate"] == pytest.approx(0.1, abs=1e-3)
    assert read["texts"] == {"failing": 8, "passing": 8, "neutral": 8}


def test_two_writes_give_the_same_bytes(audits, tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, audits)
    write(tmp_path / "two", audits)  # over an earlier report
    for name in ("report.html", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
