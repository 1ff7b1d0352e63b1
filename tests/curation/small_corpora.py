"""Small corpora, runs over them with the scorer of the tests, and what they left."""

import json
from pathlib import Path

import fake_scorer
import pyarrow as pa
import pyarrow.parquet as pq

from data_curation import runs
from data_curation.pipeline import Config

FAKE = {"load": fake_scorer.load, "types": fake_scorer.TYPES}
THOUSAND = 1000


def texts(number: int, name: str = "a") -> list[dict]:
    """Documents of a seeded kind: a third have nothing to regulate."""
    return [
        {
            "id": f"{name}-{i}",
            "text": f"{'NEUTRAL ' if i % 3 == 0 else ''}document {i} of {name}",
            "topic": f"t{i % 2}",
        }
        for i in range(number)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict], group: int = THOUSAND) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def score(source: Path, out: Path, workers: int = 1, **options) -> dict:
    return runs.score(str(source), out, config=Config(workers=workers), **FAKE | options)


def sidecar(out: Path, folder: str = "scores") -> dict[str, dict]:
    """Rows of all shards by id; every id once."""
    rows = [row for path in sorted((out / folder).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def four_files(folder: Path) -> Path:
    """Three parquet files and a JSONL, 46 documents."""
    for name in "abc":
        write_parquet(folder / f"{name}.parquet", texts(12, name))
    write_jsonl(folder / "d.jsonl", texts(10, "d"))
    return folder
