"""The command with the shipped scorer, tier 1."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from data_curation import facets, runs
from data_curation.pipeline import Config
from data_curation.scorer import COLUMNS, load_scorer


def test_the_shipped_scorer_through_the_engine(tmp_path):
    """Columns and types as promised, and each row as the scorer gives it for the text alone."""
    labels = Path(facets.__file__).parent / "labels/passages.jsonl"
    rows = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()[:40]]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows))
    done = runs.score(str(source), tmp_path / "out", tier="1", config=Config(workers=2))
    scorer = load_scorer(tier="1")
    assert done["made_from"]["scorer"] == scorer.hash
    assert done["told"]["threshold"] == scorer.first.tier.settings["threshold"]
    table = pq.read_table(tmp_path / "out/scores/a.parquet")
    assert table.schema.names == ["id", *COLUMNS, "characters"]
    for row, label in zip(table.to_pylist(), rows, strict=True):
        expected = scorer.score([label["text"]])[0]
        assert row["id"] == label["id"]
        assert row["windows"] == expected["windows"]
        assert all(row[name] == expected[name] for name in COLUMNS if name != "windows")
    dropped = runs.filter_tail(tmp_path / "out", tmp_path / "f", below=0.35, max_share=1)["figures"].get("dropped", 0)
    assert 0 < dropped < 30
