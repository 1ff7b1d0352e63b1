"""The blocks in a pipeline of the user's own, and what the commands write with them."""

import gzip
import json

import fake_scorer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from small_corpora import contents, score, sidecar, texts, write_jsonl, write_parquet

from data_curation.blocks import MapScorer, RegulationFilter, RegulationScorer, Reweighter, Tagger, share
from data_curation.pipeline import Config
from data_curation.runs import filter_tail, reweight, tag
from data_curation.selection import weight_of

TABLE = {"beta": 1.0, "floor": 0.25, "cap": 4.0, "overall": [0.5, 0.25], "topics": {"war": [0.25, 0.25]},
         "edges": [10, 20, 30], "scales": {"*\t*\t*": 1.0}, "columns": [None, None]}  # fmt: skip


def document(regulation, key="a", text="text", **metadata):
    return Document(text, key, metadata={"regulation": regulation, "characters": len(text), **metadata})


def lines(path):
    content = path.read_bytes()
    if path.name.endswith(".gz"):
        content = gzip.decompress(content)
    if path.name.endswith(".zst"):
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return [json.loads(line) for line in content.splitlines()]


def written(folder):
    rows = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        rows += pq.read_table(path).to_pylist() if path.suffix == ".parquet" else lines(path)
    return rows


def test_the_blocks_stand_in_a_pipeline_of_datatrove(tmp_path):
    """datatrove's own executor, reader and writers around the scorer and the filter with an exclusion writer."""
    write_jsonl(tmp_path / "in/a.jsonl", [{"id": str(i), "text": f"SCORE 0.{i}"} for i in range(10)])
    steps = [
        JsonlReader(str(tmp_path / "in")),
        RegulationScorer(load=fake_scorer.load),
        RegulationFilter(0.25, exclusion_writer=JsonlWriter(str(tmp_path / "dropped"), compression=None)),
        Reweighter(TABLE),
        JsonlWriter(str(tmp_path / "kept"), compression=None, output_filename="${rank}.jsonl"),
    ]
    LocalPipelineExecutor(steps, logging_dir=str(tmp_path / "logs"), workers=1).run()
    kept, dropped = written(tmp_path / "kept"), written(tmp_path / "dropped")
    assert [row["id"] for row in dropped] == ["0", "1", "2"]
    assert len(kept) == 7
    assert dropped[0]["metadata"]["filter_reason"].startswith(
        "regulation 0.000, at most 0.020, is below 0.25; highest:"
    )
    assert kept[0]["metadata"]["weight"] == pytest.approx(np.exp((0.3 - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"regulation": 0.09, "regulation_high": 0.12}, None),  # the interval reaches above
        ({"regulation": 0.09, "regulation_high": 0.1}, None),
        ({"regulation": None, "regulation_high": None}, None),
        ({"regulation": 0.12, "regulation_high": None}, None),
        ({"regulation": 0.05, "regulation_high": None}, "regulation 0.050, at most 0.050, is below 0.1"),
        ({"regulation": 0.05, "regulation_high": 0.08, "panic": 0.9, "despair": 0.4, "blame_rage": 0.2},
         "regulation 0.050, at most 0.080, is below 0.1; highest: panic 0.90, despair 0.40, blame_rage 0.20"),
    ],
)  # fmt: skip
def test_what_is_dropped_and_why(scores, reason):
    (one,) = RegulationFilter(0.1, drop=False).run([document(**scores)])
    found = one.metadata["filter_reason"]
    assert found == reason or (reason and found.startswith(reason))
    assert len(list(RegulationFilter(0.1).run([document(**scores)]))) == (reason is None)


@pytest.mark.parametrize(
    ("regulation", "topic", "weight"),
    [(0.5, "x", 1), (0.75, "x", np.e), (0.0, "x", 0.25), (1.0, "x", 4), (0.5, "war", np.e), (None, "x", 1)],
)
def test_a_weight_by_hand(regulation, topic, weight):
    """exp((r - mean) / deviation), between 0.25 and 4; of a topic with its own moments by those."""
    (one,) = Reweighter(TABLE | {"columns": ["topic", None]}, "topic").run([document(regulation, topic=topic)])
    assert one.metadata["weight"] == pytest.approx(weight)


def test_a_table_of_topics_needs_the_topics():
    """Without them every document had the weight of a topic that the table does not know."""
    with pytest.raises(
        ValueError, match=r"fitted with the columns {'topic': 'topic', 'format': None}, and {'topic': None"
    ):
        Reweighter(TABLE | {"columns": ["topic", None]})


def test_copies_are_the_weight_in_expectation_and_hang_on_the_id_alone():
    documents = [document(0.6, str(i)) for i in range(4000)]
    copies = [d.metadata["copies"] for d in Reweighter(TABLE, seed=3).run(documents)]
    weight = weight_of(TABLE, 0.6, "all", "all", 4)
    assert set(copies) == {int(weight), int(weight) + 1}
    assert np.mean(copies) == pytest.approx(weight, abs=0.03)
    again = Reweighter(TABLE, seed=3).run([document(0.6, str(i)) for i in reversed(range(4000))])
    assert [d.metadata["copies"] for d in again] == copies[::-1]
    other = [d.metadata["copies"] for d in Reweighter(TABLE, seed=4).run([document(0.6, str(i)) for i in range(4000)])]
    assert other != copies


def test_bands_drop_out_and_cooldown():
    tagger = Tagger((0.35, 0.65), ("<l>", "<m>", "<h>"), drop_out=0, untagged=0)
    scores = [0.0, 0.34, 0.35, 0.64, 0.65, 1.0, None]
    tagged = [d.text for d in tagger.run([document(score, str(i)) for i, score in enumerate(scores)])]
    assert tagged == ["<l>text", "<l>text", "<m>text", "<m>text", "<h>text", "<h>text", "text"]
    kept = [document(float(np.float32(score)), str(i)) for i, score in enumerate((0.35, 0.65))]
    assert [d.text for d in tagger.run(kept)] == ["<m>text", "<h>text"]  # 0.35 is 0.3499999940 as float32
    many = [document(0.9, str(i)) for i in range(5000)]
    reasons = [d.metadata["tag_reason"] for d in Tagger((0.35, 0.65), ("<l>", "<m>", "<h>"), 0.2, 0.1).run(many)]
    assert reasons.count("cooldown") / 5000 == pytest.approx(0.1, abs=0.015)
    assert reasons.count("drop-out") / 5000 == pytest.approx(0.9 * 0.2, abs=0.02)
    assert all(d.text.startswith("<h>") == (d.metadata["tag_reason"] == "high") for d in many)


def test_draws_of_different_purposes_do_not_go_together():
    pairs = np.array([(share(0, "cooldown", str(i)), share(0, "drop-out", str(i))) for i in range(3000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.05
    assert pairs.min() >= 0
    assert pairs.max() < 1


@pytest.fixture
def scored(tmp_path):
    """Parquet and JSONL in three compressions; ids, texts, and a number of each that must come through."""
    rows = [{"id": f"p{i}", "text": f"SCORE {i / 100:.2f} p{i:02d}", "topic": f"t{i % 2}", "n": i} for i in range(100)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    for name, pack in (("b.jsonl", bytes), ("c.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstandard.compress)):
        rows = [{"id": f"{name[0]}{i}", "text": f"NEUTRAL {i}", "topic": None, "n": i} for i in range(10)]
        (tmp_path / "in" / name).write_bytes(pack(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    score(tmp_path / "in", tmp_path / "scores")
    return tmp_path / "scores"


def test_filter_writes_every_document_somewhere_with_scores_and_reason(scored, tmp_path):
    done = filter_tail(scored, tmp_path / "out", below=0.055, max_share=0.05)
    kept, dropped = written(tmp_path / "out/kept"), written(tmp_path / "out/dropped")
    assert [row["id"] for row in dropped] == ["p0", "p1", "p2", "p3"]
    assert len(kept) == 126
    assert (done["figures"]["kept"], done["figures"]["dropped"]) == (126, 4)
    assert all(row["filter_reason"].startswith(f"regulation {row['regulation']:.3f}, at most") for row in dropped)
    assert all(row["filter_reason"] is None for row in kept)
    one = next(row for row in kept if row["id"] == "p50")
    assert (one["text"], one["n"], one["topic"], one["regulation"]) == ("SCORE 0.50 p50", 50, "t0", 0.5)
    assert {path.name for path in (tmp_path / "out/kept").iterdir()} == {
        "a.parquet", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst"
    }  # fmt: skip
    assert pq.read_schema(tmp_path / "out/kept/a.parquet").field("n").type == pa.int64()


def test_filter_is_for_the_tail(scored, tmp_path):
    told = r"18 of 130 documents \(13\.8%\) lie below 0\.2, more than --max-share 0\.05: a filter is for the tail"
    with pytest.raises(ValueError, match=told):
        filter_tail(scored, tmp_path / "out", below=0.2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"`--below` 1\.5 and `--max-share` 0\.05 lie between 0 and 1"):
        filter_tail(scored, tmp_path / "out", below=1.5)


def test_scores_at_the_edge_do_not_slip_past_the_greatest_share(tmp_path, monkeypatch):
    """An upper end of 0.35, as float32 a little less, was not counted as the tail, and then dropped 20 of 20."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": f"SCORE 0.33 {i}"} for i in range(20)])
    score(tmp_path / "a.jsonl", tmp_path / "scores")
    assert filter_tail(tmp_path / "scores", tmp_path / "out", below=0.35)["figures"]["kept"] == 20
    monkeypatch.setattr("data_curation.runs.upper_end", lambda table: np.ones(table.num_rows, np.float32))
    with pytest.raises(ValueError, match="20 documents were dropped, 1 may be; report this"):
        filter_tail(tmp_path / "scores", tmp_path / "low", below=0.36)
    assert not json.loads((tmp_path / "low/run.json").read_text())["complete"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_lost_or_cut_output_is_noticed(tmp_path, kind):
    """Of JSONL nothing said so; of parquet the same command failed for ever after."""
    rows = [{"id": str(i), "text": f"SCORE 0.{i}"} for i in range(10)]
    (write_parquet if kind == "parquet" else write_jsonl)(tmp_path / f"a.{kind}", rows)
    score(tmp_path / f"a.{kind}", tmp_path / "scores")

    def again(command, folder, *options, **more):
        out = tmp_path / command.__name__
        command(tmp_path / "scores", out, *options, **more)
        path = out / folder / f"a.{kind}"
        before = path.read_bytes()
        path.unlink()
        command(tmp_path / "scores", out, *options, **more)
        assert path.read_bytes() == before
        path.write_bytes(before[:-1])
        with pytest.raises(
            ValueError, match=rf"a\.{kind} does not hold the \d+ rows that were written; remove it and run"
        ):
            command(tmp_path / "scores", out, *options, **more)

    again(filter_tail, "kept", 0.3, max_share=1)
    again(tag, "tagged", (0.3, 0.7), ("<l>", "<m>", "<h>"))
    again(reweight, "documents", sample=True)


def test_scores_of_another_column_are_not_taken_for_the_same(tmp_path):
    """Scored again into the same folder, by other texts: the selection made before was still said to be complete."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "SCORE 0.1", "other": "SCORE 0.9"}])
    score(tmp_path / "a.jsonl", tmp_path / "scores")
    filter_tail(tmp_path / "scores", tmp_path / "out", 0.3, max_share=1)
    score(tmp_path / "a.jsonl", tmp_path / "scores", text_column="other", fresh=True)
    with pytest.raises(ValueError, match="out was begun otherwise: text_column was text and is other"):
        filter_tail(tmp_path / "scores", tmp_path / "out", 0.3, max_share=1)


def test_a_bad_byte_in_another_column_is_named(tmp_path):
    """It was taken for another document; the row that was set aside when scored is still passed over."""
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"ok", b"\xff"]).buffers())
    table = {"id": ["a", "b", "c"], "text": ["SCORE 0.5", "", "SCORE 0.6"], "url": bad}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    score(tmp_path / "a.parquet", tmp_path / "scores", set_aside=True)
    with pytest.raises(ValueError, match=r"a\.parquet, row 3: not UTF-8 \(byte 0xff at 0 of a value of 'url'\)"):
        filter_tail(tmp_path / "scores", tmp_path / "out", 0.1, max_share=1)


def test_a_text_without_words_is_named_by_its_document_or_row():
    scorer = RegulationScorer(load=fake_scorer.load)
    for text in ("", " \n", None):
        blank = Document("x", "b")
        blank.text = text
        with pytest.raises(ValueError, match="the document 'b' has no text; leave it out before it is scored"):
            list(scorer.run([document(0.5), blank]))
        with pytest.raises(ValueError, match=r"`text` of row 1 of a batch is .*, not a text with words in it; filter"):
            MapScorer(load=fake_scorer.load)({"text": ["fine", text]})


def test_tag_writes_tagged_and_cooldown(scored, tmp_path):
    done = tag(scored, tmp_path / "out", (0.3, 0.7), ("<l>", "<m>", "<h>"), untagged=0.2, drop_out=0.1)
    tagged, cooldown = written(tmp_path / "out/tagged"), written(tmp_path / "out/cooldown")
    assert len(tagged) == done["figures"]["tagged"]
    assert len(tagged) + len(cooldown) == 130
    assert cooldown
    assert all(row["tag"] is None and row["tag_reason"] == "cooldown" for row in cooldown)
    assert all(row["text"].startswith(row["tag"] or row["text"]) for row in tagged)
    assert {row["tag_reason"] for row in tagged} == {"low", "middle", "high", "drop-out", "nothing to regulate"}


def test_texts_that_hold_a_token_are_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "say <l> SCORE 0.5"}, {"id": 2, "text": "SCORE 0.5"}])
    score(tmp_path / "a.jsonl", tmp_path / "scores")
    assert tag(tmp_path / "scores", tmp_path / "out", (0.3, 0.7), ("<l>", "<m>", "<h>"))["figures"]["holds_token"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"edges": (0.7, 0.3)}, "`--edges` 0.7 0.3: two rising numbers between 0 and 1"),
        ({"tokens": ("a", "a", "b")}, "`--tokens` 'a', 'a', 'b': three different texts"),
        ({"drop_out": 1.0}, "`--drop-out` 1 and `--untagged` 0.1 lie between 0 and 1"),
    ],
)
def test_wrong_options_of_tag(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        tag(tmp_path, tmp_path / "out", **{"edges": (0.3, 0.7), "tokens": ("a", "b", "c"), **options})


def test_reweight_writes_weights_by_id_and_balances_the_topics(scored, tmp_path):
    done = reweight(scored, tmp_path / "out", topic="topic")
    weights, scores = sidecar(tmp_path / "out", "weights"), sidecar(scored)
    assert weights.keys() == scores.keys()
    assert all(weights[key]["weight"] == 1 for key in weights if key[0] != "p")
    by_topic = {
        t: sum(weights[f"p{i}"]["weight"] * scores[f"p{i}"]["characters"] for i in range(t, 100, 2)) for t in (0, 1)
    }
    before = {t: sum(scores[f"p{i}"]["characters"] for i in range(t, 100, 2)) for t in (0, 1)}
    assert by_topic == pytest.approx(before, rel=1e-5)
    assert weights["p95"]["weight"] > 2 > 0.5 > weights["p5"]["weight"]
    assert done["figures"]["fit"]["kl_after"] < 1e-9
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert (table["beta"], table["columns"]) == (1, ["topic", None])


def test_sample_writes_each_document_as_often_as_it_weighs(scored, tmp_path):
    done = reweight(scored, tmp_path / "out", topic="topic", sample=True, config=Config(workers=2))
    documents, dropped = written(tmp_path / "out/documents"), written(tmp_path / "out/dropped")
    weights = sidecar(tmp_path / "out", "weights")
    assert len(weights) == 130
    for key, row in weights.items():
        assert sum(d["id"] == key for d in documents) == row["copies"]
        assert sum(d["id"] == key for d in dropped) == (row["copies"] == 0)
    assert done["figures"]["documents"] == len(documents)
    assert dropped
    reweight(scored, tmp_path / "again", topic="topic", sample=True)
    assert contents(tmp_path / "out/documents") == contents(tmp_path / "again/documents")
    assert weights == sidecar(tmp_path / "again", "weights")


def test_a_topic_that_some_rows_lack_is_none_of_theirs_in_the_sample_too(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "topic" or i % 3} for i, row in enumerate(texts(30))]
    score(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "scores")
    reweight(tmp_path / "scores", tmp_path / "out", topic="topic", sample=True)
    reweight(tmp_path / "scores", tmp_path / "weights", topic="topic")
    assert sidecar(tmp_path / "out", "weights") == sidecar(tmp_path / "weights", "weights")


def test_results_of_other_options_are_not_mixed(scored, tmp_path):
    reweight(scored, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out was begun otherwise: beta was 1\.0 and is 2\.0"):
        reweight(scored, tmp_path / "out", beta=2.0)
    with pytest.raises(ValueError, match="is the result of `curate reweight`, and of `curate score` is wanted"):
        filter_tail(tmp_path / "out", tmp_path / "other", 0.1)
    with pytest.raises(ValueError, match=r"is no folder of results of `curate`: it holds no run\.json"):
        filter_tail(tmp_path / "in", tmp_path / "other", 0.1)


def test_an_input_that_changed_after_scoring_is_noticed(scored, tmp_path):
    path = tmp_path / "in/b.jsonl"
    path.write_bytes(path.read_bytes().replace(b"NEUTRAL 3", b"NEUTRAL 4"))
    with pytest.raises(ValueError, match=r"b\.jsonl is not as it was when it was scored; score the input again"):
        filter_tail(scored, tmp_path / "out", 0.01)


def test_an_edit_in_the_middle_of_a_large_file_is_noticed_by_its_ids(tmp_path):
    """The digest covers 64 KiB at both ends; what was changed between them shows when the rows stand side by side."""
    rows = [{"id": f"{i:04d}", "text": "NEUTRAL " + "x" * 200} for i in range(1000)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    score(path, tmp_path / "scores")
    path.write_bytes(path.read_bytes().replace(b'"0500"', b'"9999"'))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, row 501: '9999' is not what was scored there; score the input again"
    ):
        filter_tail(tmp_path / "scores", tmp_path / "out", 0.1)
    blank = json.dumps(rows[-400]).encode()
    path.write_bytes(path.read_bytes().replace(b'"9999"', b'"0500"').replace(blank, b" " * len(blank)))
    with pytest.raises(ValueError, match=r"row 602: '0601' is not what was scored there"):
        filter_tail(tmp_path / "scores", tmp_path / "out", 0.1)


def test_a_column_that_bears_the_name_of_a_score(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"id": "1", "text": "SCORE 0.5", "arc": "x"}])
    score(tmp_path / "a.parquet", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"a\.parquet: has a column 'arc' already, which is to be added; rename it"):
        filter_tail(tmp_path / "scores", tmp_path / "out", 0.1)
    with pytest.raises(ValueError, match="the column 'arc' bears the name of a score; rename it in the input"):
        reweight(tmp_path / "scores", tmp_path / "weights", topic="arc")


def test_rows_set_aside_when_scored_are_passed_over_later(tmp_path):
    rows = texts(5)
    write_jsonl(tmp_path / "a.jsonl", [*rows[:2], {"id": "bad"}, *rows[2:]])
    score(tmp_path / "a.jsonl", tmp_path / "scores", set_aside=True)
    assert filter_tail(tmp_path / "scores", tmp_path / "out", 0.01, max_share=1)["figures"]["rows"] == 5


def test_map_leaves_no_column_of_a_dataset_under_the_name_of_a_score():
    from datasets import Value

    scorer = MapScorer(load=fake_scorer.load)
    with pytest.raises(ValueError, match="the column 'tier' bears the name of a score; rename it in the dataset"):
        scorer({"text": ["a text"], "tier": [3]})
    with pytest.raises(ValueError, match="the column 'stance' bears the name of a score; rename it in the dataset"):
        scorer.features({"text": Value("string"), "stance": Value("string")})


def test_map_of_datasets_gives_the_same_scores_whatever_the_batches(tmp_path):
    """A first batch of nulls would fix `regulation` as null without the features."""
    from datasets import Dataset

    rows = [{"id": "n", "text": "NEUTRAL first"}, *texts(9)]
    dataset = Dataset.from_list(rows)
    scorer = MapScorer(load=fake_scorer.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_curation.blocks.column_types", lambda: fake_scorer.TYPES)
        features = scorer.features(dataset.features)
    one = dataset.map(scorer, batched=True, batch_size=1, features=features)
    assert one.to_list() == dataset.map(scorer, batched=True, features=features).to_list()
    expected = [fake_scorer.FakeScorer("default").score([row["text"]])[0]["regulation"] for row in rows]
    assert one["regulation"][:] == [None if x is None else pytest.approx(x) for x in expected]
    other = MapScorer(source="other", load=fake_scorer.load)
    assert dataset.map(other, batched=True, features=features)["regulation"][:] != one["regulation"][:]
