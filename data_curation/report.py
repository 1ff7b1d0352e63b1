"""A run and what was selected from it -> one self-contained HTML page that opens offline, and a dataset card."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_curation import manifest
from data_curation.documents import ROW
from data_curation.facets import FACETS
from data_curation.pipeline import Config
from data_curation.runs import Scores, open_scores, pick_columns, upper_end
from data_curation.writing import write_bytes

BINS = 20
EXAMPLES, EXCERPT = 4, 600  # on either side of a threshold; characters of each
SAMPLED = 8  # shards whose documents may be examples: each has to be read
MOST_GROUPS = 40  # rows of a group table
FEWEST = 20  # scored documents of a group that is compared
TITLE = "Text scored by the emotional regulation that it models"
OURS = {"report.html": "<title>Curation: ", "README.md": f"pretty_name: {TITLE}\n"}  # near the beginning of each
ESCAPES = {ord(sign): f"\\{sign}" for sign in "\\|[]*_~@"}
ESCAPES |= str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "'", "\n": " ", "\r": " "})
OPTIONS = ("below", "edges", "tokens", "drop_out", "untagged", "seed", "beta", "floor", "cap", "topic", "format")
OPTIONS += ("sample",)


class Share(NamedTuple):
    """A share with its Wilson interval (95 %)."""

    share: float
    low: float
    high: float


class Cut(NamedTuple):
    """A number that parts documents, by their regulation or by the upper end of its interval."""

    at: float
    upper: bool

    @property
    def name(self) -> str:
        return "upper end of the interval " if self.upper else ""

    def values(self, table: pa.Table) -> np.ndarray:
        """What is compared with it, float32 [documents], NaN where there is no score."""
        return upper_end(table) if self.upper else table["regulation"].to_numpy().astype(np.float32)


def wilson(count: int, total: int) -> Share:
    """`count` of `total`; the interval holds for independent documents, and is too narrow where sources repeat."""
    z, share = 1.959964, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))


def write(
    folder: Path,
    results: list[Path],
    out: Path,
    groups: tuple[str, ...] = (),
    threshold: float | None = None,
    config: Config = Config(),  # noqa: B008 -- immutable
) -> None:
    """Writes report.html and README.md. Every value is escaped, in the page for HTML and in the card for Markdown.

    Groups are compared by what a filter among the results kept, or without one, or where it is given, by `threshold`.

    Raises:
        ValueError: a folder is not complete, or of other scores, no such column, or `out` holds another README.md.
    """
    for name, begin in OURS.items():
        if (out / name).exists() and begin not in (out / name).read_bytes()[:1000].decode(errors="replace"):
            raise ValueError(f"{out / name} is not by `curate report`; choose another `--out`")
    scores = open_scores(folder)
    groups = scores.columns([("--group-columns", group) for group in groups])
    parts = [_result(path, scores) for path in results]
    filters = [cut for part in parts for cut in part["cuts"] if cut.upper and threshold is None]
    if threshold is None:
        threshold = scores.manifest["told"]["threshold"] or 0.5
    own = Cut(threshold, upper=False)
    cuts = sorted({own, *(cut for part in parts for cut in part["cuts"])})
    data: dict[str, Any] = {
        "folder": str(folder), "threshold": threshold, "results": parts,
        **{name: scores.manifest[name] for name in ("made_from", "told", "figures")}, **_distributions(scores),
        "examples": _examples(scores, cuts), "groups": _groups(scores, results, groups, [*filters, own][0], config),
    }  # fmt: skip
    data["files"] = len(data["made_from"]["input"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(data=data)
    markdown = environment.overlay(autoescape=False, finalize=_markdown)
    card = markdown.get_template("card.md.jinja").render(data=data)
    write_bytes(out / "report.html", page.encode())
    write_bytes(out / "README.md", (_header(data) + card).encode())


def _markdown(value: Any) -> Any:
    """A value that shows as it is in Markdown: neither markup, nor the end of a table's cell."""
    if not isinstance(value, str):
        return value
    value = value.translate(ESCAPES)
    return value.replace("://", ":\\//").replace("www.", "www\\.")  # bare addresses become links too


def _header(data: dict[str, Any]) -> str:
    """The YAML block of a Hugging Face dataset card."""
    rows = data["figures"]["rows"]
    size = next(name for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
                                         (1e7, "1M<n<10M"), (math.inf, "n>10M")) if rows < limit)  # fmt: skip
    header = {
        "pretty_name": TITLE,
        "tags": ["emotional-regulation", "data-curation", "datatrove"],
        "size_categories": [size],
        "configs": [{"config_name": "scores", "data_files": "scores/**/*.parquet"}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _result(path: Path, scores: Scores) -> dict[str, Any]:
    found = manifest.load(path)
    made_from = found["made_from"]
    if made_from["kind"] not in ("filter", "tag", "reweight") or not found["complete"]:
        raise ValueError(f"{path} is no finished result of `curate filter`, `tag` or `reweight`")
    wanted = json.loads(json.dumps(scores.made_from()))
    if other := [name for name, value in wanted.items() if made_from.get(name) != value]:
        raise ValueError(f"{path} was made from other scores ({made_from['scores']}; differing: {', '.join(other)})")
    if manifest.load_shards(path) != scores.shards:
        raise ValueError(f"{path} was made from these scores when they were in other shards; make it again")
    options = {name: made_from[name] for name in OPTIONS if name in made_from}
    cuts = [Cut(made_from["below"], upper=True)] if "below" in made_from else []
    cuts += [Cut(edge, upper=False) for edge in made_from.get("edges", [])]
    counts = {name: value for name, value in found["figures"].items() if name != "fit"}
    if made_from["kind"] == "reweight" and not made_from["sample"]:
        counts.pop("characters")  # no text was read
    fit = found["figures"].get("fit", {})
    return {"path": str(path), "kind": made_from["kind"], "options": options, "cuts": cuts,
            "counts": counts, "fit": fit}  # fmt: skip


def _distributions(scores: Scores) -> dict[str, Any]:
    """Histogram of regulation, and of each facet the mean and the share above one half; a shard at a time."""
    columns = ["regulation", *FACETS, "stance", "tier"]
    edges = np.linspace(0, 1, BINS + 1)
    histogram, scored = np.zeros(BINS, dtype=int), 0
    sums, above = dict.fromkeys(FACETS, 0.0), dict.fromkeys(FACETS, 0)
    known, counts = dict.fromkeys(FACETS, 0), {"stance": {}, "tier": {}}
    for table in scores.tables(columns):
        values = table["regulation"].to_numpy()
        values = values[~np.isnan(values)]
        histogram += np.histogram(np.clip(values, 0, 1), edges)[0]
        scored += len(values)
        for name in FACETS:
            facet = table[name].to_numpy()
            facet = facet[~np.isnan(facet)]
            sums[name], above[name] = sums[name] + float(facet.sum()), above[name] + int((facet > 0.5).sum())
            known[name] += len(facet)
        for name, sum_ in counts.items():
            for pair in table[name].value_counts().to_pylist():
                sum_[str(pair["values"])] = sum_.get(str(pair["values"]), 0) + pair["counts"]
    facets = [(name, sums[name] / known[name], above[name] / known[name]) for name in FACETS if known[name]]
    bars = list(zip(edges.tolist(), edges[1:].tolist(), histogram.tolist(), strict=False))
    return {
        "bars": bars,
        "tallest": max(int(histogram.max()), 1),
        "scored": scored,
        "facets": facets,
        "counts": counts,
    }


def _examples(scores: Scores, cuts: list[Cut]) -> list[dict[str, Any]]:
    """The documents nearest to each cut on either side, from evenly spaced shards."""
    ranks = np.unique(np.linspace(0, len(scores.shards) - 1, SAMPLED).astype(int)).tolist()
    near: dict[tuple[Cut, str], list[tuple[float, int, int]]] = {}
    for rank in ranks:
        shard = scores.shards[rank]
        path = scores.folder / "scores" / f"{shard.name}.parquet"
        table = pq.read_table(path, columns=["regulation", "regulation_high"])
        for cut in cuts:
            values, edge = cut.values(table), np.float32(cut.at)
            for side, chosen in (("below", values < edge), ("at or above", values >= edge)):
                rows = np.flatnonzero(chosen)
                rows = rows[np.argsort(np.abs(values[rows] - edge), kind="stable")[:EXAMPLES]]
                found = [(abs(float(values[row]) - cut.at), rank, int(row)) for row in rows]
                near[cut, side] = sorted(near.get((cut, side), []) + found)[:EXAMPLES]
    wanted = {(rank, row) for found in near.values() for _, rank, row in found}
    texts = _texts(scores, wanted)
    return [
        {"side": f"{cut.name}{side} {cut.at}", "documents": [texts[rank, row] for _, rank, row in found]}
        for (cut, side), found in near.items()
    ]


def _texts(scores: Scores, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Excerpts and scores of documents, named by shard and by row of its sidecar."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    reader = scores.reader(())
    for rank in sorted({rank for rank, _ in wanted}):
        last = max(row for r, row in wanted if r == rank)
        for row, document in enumerate(reader.run(None, rank, len(scores.shards))):
            if (rank, row) in wanted:
                values = document.metadata
                highest = sorted(((values[name] or 0, name) for name in FACETS), reverse=True)[:4]
                found[rank, row] = {
                    "id": document.id, "text": document.text[:EXCERPT], "cut": len(document.text) > EXCERPT,
                    "regulation": values["regulation"], "upper": values["regulation_high"],
                    "stance": values["stance"], "row": values[ROW],
                    "facets": ", ".join(f"{name} {value:.2f}" for value, name in highest),
                }  # fmt: skip
            if row == last:
                break
    return found


def _groups(
    scores: Scores, results: list[Path], columns: tuple[str, ...], cut: Cut, config: Config
) -> list[dict[str, Any]]:
    """For each group: how many have a score, how many of them reach the cut, and what the results did."""
    if not columns:
        return []
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        pick_columns(scores, Path(folder), columns, config)
        return [_group(scores, results, Path(folder), column, cut) for column in columns]


def _group(scores: Scores, results: list[Path], folder: Path, column: str, cut: Cut) -> dict[str, Any]:
    sums: dict[str, np.ndarray] = {}  # group -> documents, scored, kept, sum of weights
    weights = [path / "weights" for path in results if (path / "weights").is_dir()][:1]
    tables = scores.tables(["regulation", "regulation_high"])
    for shard, table in zip(scores.shards, tables, strict=True):
        values = cut.values(table)
        names = list(map(str, pq.read_table(folder / "columns" / f"{shard.name}.parquet")[column].to_pylist()))
        weight = np.zeros(len(names))
        if weights:
            weight = pq.read_table(weights[0] / f"{shard.name}.parquet")["weight"].to_numpy()
        labels, place = np.unique(np.array(names, dtype=object), return_inverse=True) if names else ([], [])
        parts = (np.ones(len(names)), ~np.isnan(values), values >= np.float32(cut.at), weight)
        counted = np.stack([np.bincount(place, part, len(labels)) for part in parts], 1) if len(names) else []
        for label, row in zip(labels, counted, strict=True):
            sums[label] = sums.get(label, np.zeros(4)) + row
    total = sum(sums.values(), np.zeros(4))
    rows = []
    for label, (number, scored, kept, weight) in sorted(sums.items(), key=lambda item: -item[1][0])[:MOST_GROUPS]:
        share = wilson(int(kept), int(scored)) if scored >= FEWEST else None
        others = (total[2] - kept) / (total[1] - scored) if total[1] > scored else 0
        ratio = share.share / others if share and others else None
        rows.append({"name": label, "documents": int(number), "scored": int(scored), "kept": share, "ratio": ratio,
                     "weight": weight / number if weights else None})  # fmt: skip
    return {
        "column": column,
        "cut": f"{cut.name or 'regulation '}at {cut.at}",
        "rows": rows,
        "left": max(0, len(sums) - MOST_GROUPS),
    }
