"""The `curate` command and its report."""

import functools
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_corpora import FAKE, contents, four_files, score, texts, write_jsonl, write_parquet

from data_curation import cli, report, runs
from data_curation.pipeline import load_config
from data_curation.writing import write_json


@pytest.fixture
def corpus(tmp_path):
    return four_files(tmp_path / "in")


@pytest.fixture
def curate(monkeypatch, capsys):
    """Runs the command in this process, with the scorer of the tests."""
    monkeypatch.setattr(runs, "score", functools.partial(runs.score, **FAKE))

    def run(*arguments) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, arguments)])
        cli.main()
        return tuple(capsys.readouterr())

    return run


def test_the_command_is_light_and_lists_its_verbs():
    check = (
        "import sys, data_curation.cli as cli\nsys.argv = ['curate', '--help']\ntry:\n    cli.main()\n"
        "except SystemExit:\n    print({'torch', 'pyarrow', 'datatrove'} & set(sys.modules))"
    )
    help_ = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout
    assert help_.endswith("set()\n")
    for verb in ("score", "reweight", "tag", "filter", "report", "fit", "label"):
        assert f"\n    {verb} " in help_


def test_from_a_corpus_to_a_report(curate, corpus, tmp_path):
    out, _ = curate("score", corpus, "--out", tmp_path / "scores")
    assert out == f"46 documents: 0 set aside\nResults: {tmp_path / 'scores'}\n"
    out, _ = curate("filter", tmp_path / "scores", "--out", tmp_path / "f", "--below", "0.1", "--max-share", "0.5")
    assert re.fullmatch(rf"46 documents: \d+ kept, \d+ dropped\nResults: {tmp_path / 'f'}\n", out)
    out, _ = curate("tag", tmp_path / "scores", "--out", tmp_path / "t", "--tokens", "<l>", "<m>", "<h>")
    assert re.match(r"46 documents: \d+ tagged, \d+ cooldown\n", out)
    out, _ = curate("reweight", tmp_path / "scores", "--out", tmp_path / "w")
    assert "of topic (none named: all one), format (all one) and length in quarters\nShift of the mix, KL" in out
    out, _ = curate("reweight", tmp_path / "scores", "--out", tmp_path / "s", "--sample", "--topic-column", "topic")
    assert re.match(r"46 documents: \d+ documents, \d+ dropped\n", out)
    assert "of topic (topic), format (all one)" in out
    folders = [tmp_path / name for name in "ftws"]
    out, _ = curate("report", tmp_path / "scores", *folders, "--out", tmp_path / "r", "--group-columns", "topic")
    assert out == f"Report: {tmp_path / 'r/report.html'}\nDataset card: {tmp_path / 'r/README.md'}\n"


def test_errors_are_lines_and_a_status(curate, corpus, tmp_path, capsys):
    write_jsonl(corpus / "e.jsonl", [{"id": "bad", "text": ""}])
    with pytest.raises(SystemExit) as ended:
        curate("score", corpus, "--out", tmp_path / "scores")
    assert capsys.readouterr().err == f"error: {corpus / 'e.jsonl'}, row 1: an empty text\n"
    assert str(ended.value).startswith("error: 1 of 5 shards are not complete")
    out, _ = curate("score", corpus, "--out", tmp_path / "scores", "--set-aside")
    assert f"Set aside: {tmp_path / 'scores/set_aside.jsonl'} names file, row and reason of each" in out
    with pytest.raises(SystemExit, match=r"error: .*nowhere is no folder of results of `curate`"):
        curate("filter", tmp_path / "nowhere", "--out", tmp_path / "f")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Values that would be markup, script or another cell where they are not escaped."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    wicked = '</div><script>alert("x")</script>|**bold**'
    rows = [
        {"id": f"{wicked}{i}", "text": f"SCORE {i / 60:.3f} {wicked}", "topic": f"{wicked}{i % 2}"} for i in range(60)
    ]
    write_parquet(tmp_path / "in/a.parquet", [*rows, *texts(9)])
    score(tmp_path / "in", tmp_path / "scores")
    runs.filter_tail(tmp_path / "scores", tmp_path / "f", 0.05, max_share=0.5)
    tokens = ("<script>", "<m>", "<h>")
    runs.tag(tmp_path / "scores", tmp_path / "t", (0.3, 0.7), tokens)
    runs.reweight(tmp_path / "scores", tmp_path / "w", topic="topic")
    report.write(tmp_path / "scores", [tmp_path / name for name in "ftw"], tmp_path / "r", groups=("topic",))
    return tmp_path


def test_the_report_is_one_page_that_escapes_every_value(hostile):
    page = (hostile / "r/report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"https?://|src=|@import", page)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page
    assert "<code>topic</code>" in page
    card = (hostile / "r/README.md").read_text()
    assert "<script" not in card
    assert all(line.count("|") - line.count("\\|") == 6 for line in card.splitlines() if "alert" in line)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["configs"] == [{"config_name": "scores", "data_files": "scores/**/*.parquet"}]
    assert header["size_categories"] == ["n<1K"]


def test_the_report_has_distributions_examples_groups_and_the_hash(hostile):
    page = html.unescape((hostile / "r/report.html").read_text())
    assert "hash <code>37a8eec1ce19687d</code>" in page
    assert "69 documents" in page
    bars = re.findall(r"<tr><td>0\.\d\d to \d\.\d\d</td><td class=\"n\">(\d+)</td>", page)
    assert len(bars) >= 20
    assert sum(map(int, bars[:20])) == 60 + 6
    for threshold in ("0.3", "0.5", "0.7"):
        assert f"<h3>Below {threshold}</h3>" in page
        assert f"<h3>At or above {threshold}</h3>" in page
    assert "<h3>Upper end of the interval below 0.05</h3>" in page
    assert "SCORE 0.500" in page[page.index("At or above 0.5") :]
    assert re.search(r"<td>topic</td><td>topic</td>", page)
    assert "Effective documents" in page
    found = report._result(hostile / "w", runs.open_scores(hostile / "scores"))
    assert found["counts"] == {"rows": 69, "set_aside": 0}  # no text was read, so no characters are counted


def test_a_report_is_of_results_of_these_scores(hostile, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", texts(20, "b"))
    score(tmp_path / "b.jsonl", tmp_path / "other")
    with pytest.raises(ValueError, match=r"/f was made from other scores \(.*/scores; differing: scores, rows, "):
        report.write(tmp_path / "other", [hostile / "f"], tmp_path / "r2")
    runs.filter_tail(tmp_path / "other", tmp_path / "f", 0.05, max_share=1)
    write_jsonl(tmp_path / "b.jsonl", texts(30, "c"))
    score(tmp_path / "b.jsonl", tmp_path / "other", fresh=True)
    told = r"/f was made from other scores \(.*/other; differing: rows, input\)"
    with pytest.raises(ValueError, match=told):
        report.write(tmp_path / "other", [tmp_path / "f"], tmp_path / "r2")
    runs.filter_tail(tmp_path / "other", tmp_path / "g", 0.05, max_share=1)
    score(tmp_path / "b.jsonl", tmp_path / "other", fresh=True, shard_mb=1)
    write_json(tmp_path / "g/shards.json", [])  # a small corpus has one shard, however it is cut
    with pytest.raises(
        ValueError, match="/g was made from these scores when they were in other shards; make it again"
    ):
        report.write(tmp_path / "other", [tmp_path / "g"], tmp_path / "r2")
    with pytest.raises(ValueError, match="/scores is no finished result of `curate filter`, `tag` or `reweight`"):
        report.write(hostile / "scores", [hostile / "scores"], tmp_path / "r2")
    before = contents(hostile / "r")
    report.write(hostile / "scores", [hostile / n for n in "ftw"], hostile / "r", groups=("topic",))
    assert contents(hostile / "r") == before


def test_a_report_overwrites_only_a_report(hostile, tmp_path):
    """The README.md of a repository stood in `--out`, and was gone; so was the page of `calibrate compare`."""
    report.write(hostile / "scores", [], tmp_path / "r")
    report.write(hostile / "scores", [], tmp_path / "r")
    for name in ("README.md", "report.html"):
        other = tmp_path / name
        other.mkdir()
        (other / name).write_text("years of work")
        with pytest.raises(ValueError, match=rf"{name}/{name} is not by `curate report`; choose another `--out`"):
            report.write(hostile / "scores", [], other)
        assert {path.name: path.read_text() for path in other.iterdir()} == {name: "years of work"}


def test_a_filters_report_goes_by_what_the_filter_goes_by(tmp_path):
    """Scores 0.2 to 0.6, upper ends 0.02 above: below 0.4 the filter drops what scores under 0.38.

    Of group a, at 0.37 and 0.39, half is kept; by the score alone none of it would be.
    """
    rows = [
        {"id": f"{g}{i}", "text": f"SCORE {value} {g}{i}", "group": g}
        for g, values in (("a", (0.37, 0.39)), ("b", (0.2, 0.6)))
        for i in range(20)
        for value in [values[i % 2]]
    ]
    write_parquet(tmp_path / "a.parquet", rows)  # fmt: skip
    score(tmp_path / "a.parquet", tmp_path / "scores")
    done = runs.filter_tail(tmp_path / "scores", tmp_path / "f", 0.4, max_share=1)["figures"]
    assert (done["kept"], done["dropped"]) == (20, 20)
    report.write(tmp_path / "scores", [tmp_path / "f"], tmp_path / "r", groups=("group",))
    page = (tmp_path / "r/report.html").read_text()
    assert "scored documents with the upper end of the interval at 0.4 or above" in page
    kept = dict(
        re.findall(r'<tr><td>([ab])</td><td class="n">20</td><td class="n">20</td><td class="n">([\d.]+)', page)
    )
    assert kept == {"a": "0.500", "b": "0.500"}
    below, above = (page.index(f"<h3>Upper end of the interval {side} 0.4</h3>") for side in ("below", "at or above"))
    assert "SCORE 0.37" in page[below:above]
    assert "SCORE 0.39" in page[above : above + 500]
    assert "regulation 0.370, at most 0.390" in page
    report.write(tmp_path / "scores", [tmp_path / "f"], tmp_path / "r", groups=("group",), threshold=0.4)
    assert "scored documents with the regulation at 0.4 or above" in (tmp_path / "r/report.html").read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("[x](http://evil.example/)", r"\[x\](http:\//evil.example/)"),
        ("![p](https://evil.example/a.png)", r"!\[p\](https:\//evil.example/a.png)"),
        ("www.evil.example a@b.example", r"www\.evil.example a\@b.example"),
        (r"\[x](y) *a* _b_ ~~c~~", r"\\\[x\](y) \*a\* \_b\_ \~\~c\~\~"),
        ("<b>&|`\n", "&lt;b&gt;&amp;\\|' "),
    ],
)
def test_a_value_shows_in_markdown_as_it_is(value, shown):
    assert report._markdown(value) == shown


def test_options_that_would_be_ignored_or_are_mistyped(hostile, tmp_path):
    with pytest.raises(ValueError, match="`--group-columns` 'topik': no such column; there are id, text, topic"):
        report.write(hostile / "scores", [], tmp_path / "r", groups=("topik",))
    for column in ("topic", "form"):
        option = "topic" if column == "topic" else "format"
        with pytest.raises(
            ValueError, match=f"`--{option}-column` 'topik': no such column; there are id, text, topic"
        ):
            runs.reweight(hostile / "scores", tmp_path / "w", **{column: "topik"})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(curate, corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: cannot write to .*file/out/shards\.json \(Not a directory\)"):
        curate("score", corpus, "--out", tmp_path / "file/out")
    curate("score", corpus, "--out", tmp_path / "s")
    (tmp_path / "s/shards.json").unlink()
    with pytest.raises(SystemExit, match=r"error: .*/s/shards\.json: No such file or directory$"):
        curate("filter", tmp_path / "s", "--out", tmp_path / "f")


def test_keep_rates_by_hand():
    """8 of 10: Wilson 0.490 to 0.943. Group a keeps 3 of 20 and the others 15 of 20: ratio 0.2."""
    assert report.wilson(8, 10) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)
    assert report.wilson(0, 10).low == 0


def test_the_threshold_is_that_of_the_scorer_unless_it_is_given(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(9))
    score(tmp_path / "a.jsonl", tmp_path / "scores")
    path = tmp_path / "scores/run.json"
    for fitted, given, shown in ((None, None, 0.5), (0.305, None, 0.305), (0.305, 0.6, 0.6)):
        content = json.loads(path.read_text())
        content["told"]["threshold"] = fitted
        path.write_text(json.dumps(content))
        report.write(tmp_path / "scores", [], tmp_path / "r", threshold=given)
        assert f"<h3>Below {shown}</h3>" in (tmp_path / "r/report.html").read_text()


def test_groups_are_compared_with_all_others(tmp_path):
    rows = [{"id": f"{g}{i}", "text": f"SCORE {0.9 if i < kept else 0.1} {g}{i}", "group": g}
            for g, kept in (("a", 3), ("b", 15)) for i in range(20)]  # fmt: skip
    write_parquet(tmp_path / "a.parquet", [*rows, {"id": "n", "text": "NEUTRAL", "group": "a"}])
    score(tmp_path / "a.parquet", tmp_path / "scores")
    report.write(tmp_path / "scores", [], tmp_path / "r", groups=("group",))
    cells = re.findall(r"<tr><td>([ab])</td>(.*?)</tr>", (tmp_path / "r/report.html").read_text())
    told = {name: re.sub(r"<[^>]+>", " ", row).split() for name, row in cells}
    assert told == {"a": ["21", "20", "0.150", "[0.052,", "0.360]", "0.20"],
                    "b": ["20", "20", "0.750", "[0.531,", "0.888]", "5.00"]}  # fmt: skip


def test_the_page_about_curation_runs_as_written(tmp_path):
    """Commands parse, the config loads for each executor, and the imports of the Python parts exist."""
    pages = [Path(__file__).parents[2] / name for name in ("docs/curation.md", "README.md")]
    page = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    commands = [line.split("#")[0].split()[1:] for line in page.splitlines() if re.match(r"curate \w+ \S+ ", line)]
    commands += [line.split()[2:] for line in page.splitlines() if line.startswith("# curate ")]
    assert len(commands) >= 9
    for command in commands:
        assert cli._parser().parse_args(command).run
    (config,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for executor in ("slurm", "ray", "local"):
        (tmp_path / "c.yaml").write_text(config.replace("executor: slurm", f"executor: {executor}"))
        assert load_config(tmp_path / "c.yaml", None).workers == 64
    blocks = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "data_curation" in part]
    assert len(blocks) == 2
    for block in blocks:
        exec("\n".join(line for line in block.splitlines() if line.startswith("from ")), {})
