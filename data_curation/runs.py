"""What `curate score`, `filter`, `tag` and `reweight` do: folders of results from one input or from scores."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_curation import blocks, manifest, selection
from data_curation.documents import Picked, ScoredReader, ShardReader, SidecarReader
from data_curation.inputs import Shard, columns_of, find
from data_curation.pipeline import Config, run
from data_curation.writing import ShardWriter, write_bytes, write_json

LOCAL = Config()
MAX_CHARACTERS = 20_000_000  # of one document; a longer one is a broken file more often than a text
ADDED = {"weight": pa.float32(), "copies": pa.int32()}


def score(
    source: str,
    out: Path,
    tier: str = "auto",
    scorer: str = "default",
    model: str | None = None,
    text_column: str = "text",
    id_column: str | None = None,
    number_rows: bool = False,
    split: str | None = None,
    max_characters: int = MAX_CHARACTERS,
    set_aside: bool = False,
    shard_mb: int = 16,
    config: Config = LOCAL,
    fresh: bool = False,
    load: Callable = blocks.load_default,
    types: dict[str, pa.DataType] | None = None,
) -> dict[str, Any] | None:
    """Scores a corpus into `OUT/scores`, a parquet file for each shard, keyed by document id.

    Returns:
        the finished manifest; None where the shards were handed to Slurm.

    Raises:
        ValueError: what cannot be read, written or mixed; one line for each row or file.
    """
    if shard_mb < 1 or max_characters < 1:
        raise ValueError(f"`--shard-mb` {shard_mb} and `--max-characters` {max_characters} are at least 1")
    if number_rows and id_column is not None:
        raise ValueError(f"`--number-rows` and `--id-column` {id_column!r}: ids are one or the other; give one")
    found, out = find(source, shard_mb << 20, split), out.resolve()
    if Path(source).is_dir() and out.is_relative_to(Path(source).resolve()):
        raise ValueError(f"`--out` {out} lies in the input {source}, and would be read as a part of it; take another")
    scorer = str(Path(scorer).resolve()) if Path(scorer).is_dir() else scorer  # workers may stand elsewhere
    if not number_rows:
        id_column = _ids(found.columns, id_column)
    for option, column in (("--text-column", text_column), ("--id-column", id_column)):
        if column is not None:
            check_column(found.columns, option, column)
    loaded = load(source=scorer, tier=tier, model=model)
    reading = loaded.second or loaded.first  # what its scores are compared with by default comes from the fit
    told = {"threshold": reading.tier.settings["threshold"] if reading else None, "scorer": scorer, "model": model}
    made_from = {"input": found.digests, "scorer": loaded.hash, "tier": tier, "text_column": text_column}
    made_from |= {"id_column": id_column, "max_characters": max_characters}
    manifest.open_run(out, "score", made_from, found.shards, fresh, **told)
    state = out / manifest.STATE / "score"
    without_ids = id_column is None and not number_rows
    reader = ShardReader(found.shards, text_column, id_column, (), set_aside, max_characters, without_ids)
    sidecar = (types or blocks.column_types()) | {"characters": pa.int32()}
    annotator = blocks.RegulationScorer(scorer, tier, model, loaded.hash, load)
    writer = ShardWriter(found.shards, str(out), str(state), ("scores", sidecar))
    if not run([reader, annotator, writer], found.shards, out, "score", config):
        return None
    figures = manifest.totals(state, found.shards, out, whole=True)
    if repeated := manifest.repeated_id(state, reader):
        raise ValueError(f"{repeated}; name a column of unique ids with --id-column, or take --number-rows")
    if aside := manifest.faults(state, found.shards):
        write_bytes(out / "set_aside.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in aside))
    return manifest.finish(out, figures)


def _ids(columns: dict[str, list[str]], id_column: str | None) -> str | None:
    """The column of ids: the one named, or `id` where all files have it."""
    having = [path for path, names in columns.items() if "id" in names]
    if id_column is not None or not having:
        return id_column
    if lacking := [path for path, names in columns.items() if "id" not in names]:
        other = "give --number-rows, or --id-column with a column that all files have"
        raise ValueError(f"{having[0]} has a column 'id' and {lacking[0]} has none; {other}")
    return "id"


def check_column(columns: dict[str, list[str]], option: str, column: str) -> None:
    """Raises ValueError where no file has the column that an option names."""
    there = dict.fromkeys(name for names in columns.values() for name in names)
    if there and column not in there:
        raise ValueError(f"`{option}` {column!r}: no such column; there are {', '.join(there)}")


class Scores(NamedTuple):
    """A finished run of `curate score`, to be read again beside its documents."""

    folder: Path
    manifest: dict[str, Any]
    shards: list[Shard]

    def reader(self, columns: tuple[str, ...] | None) -> ScoredReader:
        made_from = self.manifest["made_from"]
        options = {name: made_from[name] for name in ("text_column", "id_column", "max_characters")}
        return ScoredReader(self.shards, str(self.folder), columns=columns, **options)

    def made_from(self, **options: Any) -> dict[str, Any]:
        """What a result of these scores depends on."""
        before = self.manifest["made_from"]
        read = ("scorer", "input", "text_column", "id_column", "max_characters")
        scores = {"scores": str(self.folder), "rows": self.manifest["figures"]["rows"]}
        return scores | {name: before[name] for name in read} | options

    def columns(self, named: list[tuple[str, str | None]]) -> tuple[str, ...]:
        """The columns of the input that options name, each once; ValueError where there is no such column."""
        known, chosen = columns_of(self.shards), [(option, column) for option, column in named if column]
        for option, column in chosen:
            check_column(known, option, column)
        return tuple(dict.fromkeys(column for _, column in chosen))

    def tables(self, names: list[str]) -> Iterator[pa.Table]:
        """These columns of the sidecar, a shard at a time."""
        for shard in self.shards:
            yield pq.read_table(self.folder / "scores" / f"{shard.name}.parquet", columns=names)


def open_scores(folder: Path) -> Scores:
    folder = folder.resolve()
    scores = Scores(folder, manifest.load_complete(folder, "score"), manifest.load_shards(folder))
    for rank, shard in enumerate(scores.shards):
        for name in (f"scores/{shard.name}.parquet", f"state/score/records/{rank:05d}.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is gone; run its `curate score` again, it writes what is missing")
    return scores


def added_types(scores: Scores, **more: pa.DataType) -> dict[str, pa.DataType]:
    """The scores that go with every document that is written, and what a command adds; windows stay in the sidecar."""
    schema = pq.read_schema(scores.folder / "scores" / f"{scores.shards[0].name}.parquet")
    return {field.name: field.type for field in schema if field.name not in ("id", "windows")} | more


def filter_tail(
    folder: Path, out: Path, below: float, max_share: float = 0.05, config: Config = LOCAL, fresh: bool = False
) -> dict[str, Any] | None:
    """Writes `OUT/kept` and `OUT/dropped`, the latter with a reason for each document.

    Raises:
        ValueError: more than `max_share` of the documents would go.
    """
    scores = open_scores(folder)
    if not 0 < below < 1 or not 0 < max_share <= 1:
        raise ValueError(f"`--below` {below:g} and `--max-share` {max_share:g} lie between 0 and 1")
    number = sum(
        int((upper_end(table) < np.float32(below)).sum()) for table in scores.tables(["regulation", "regulation_high"])
    )
    rows = scores.manifest["figures"]["rows"]
    if number > max_share * rows:
        more = f"{number} of {rows} documents ({number / rows:.1%}) lie below {below:g}, more than --max-share"
        raise ValueError(f"{more} {max_share:g}: a filter is for the tail; lower --below, or use `curate reweight`")
    steps = [scores.reader(None), blocks.RegulationFilter(below, drop=False)]
    made_from, most = scores.made_from(below=below), max_share * rows
    added = {"filter_reason": pa.string()}
    return _documents(scores, out, "filter", made_from, steps, added, config, fresh, most=most)


def upper_end(table: pa.Table) -> np.ndarray:
    """What a filter goes by, as `blocks.drop_reason`: float32 [documents], NaN where there is no score."""
    regulation, high = (table[name].to_numpy().astype(np.float32) for name in ("regulation", "regulation_high"))
    return np.where(np.isnan(high), regulation, high)


def by_reason(document) -> list[str]:
    return ["dropped" if document.metadata["filter_reason"] else "kept"]


def by_cooldown(document) -> list[str]:
    return ["cooldown" if document.metadata["cooldown"] else "tagged"]


def by_copies(document) -> list[str]:
    return ["documents"] * document.metadata["copies"] or ["dropped"]


ROUTES = {"filter": by_reason, "tag": by_cooldown, "reweight": by_copies}


def tag(
    folder: Path,
    out: Path,
    edges: tuple[float, float],
    tokens: tuple[str, str, str],
    drop_out: float = 0.1,
    untagged: float = 0.1,
    seed: int = 0,
    config: Config = LOCAL,
    fresh: bool = False,
) -> dict[str, Any] | None:
    """Writes `OUT/tagged` with control tokens and `OUT/cooldown` without, for the end of training."""
    if not 0 < edges[0] < edges[1] < 1:
        raise ValueError(f"`--edges` {edges[0]:g} {edges[1]:g}: two rising numbers between 0 and 1")
    if not all(tokens) or len(set(tokens)) < 3:
        raise ValueError(f"`--tokens` {', '.join(map(repr, tokens))}: three different texts")
    if not 0 <= drop_out < 1 or not 0 <= untagged < 1:
        raise ValueError(f"`--drop-out` {drop_out:g} and `--untagged` {untagged:g} lie between 0 and 1")
    scores = open_scores(folder)
    made_from = scores.made_from(edges=edges, tokens=tokens, drop_out=drop_out, untagged=untagged, seed=seed)
    steps = [scores.reader(None), blocks.Tagger(edges, tokens, drop_out, untagged, seed)]
    added = {"tag": pa.string(), "tag_reason": pa.string()}
    return _documents(scores, out, "tag", made_from, steps, added, config, fresh)


def _documents(
    scores: Scores, out: Path, kind: str, made_from: dict, steps: list, added: dict, config: Config, fresh: bool,
    figures: dict[str, Any] | None = None, sidecar: tuple[str, dict[str, pa.DataType]] | None = None,
    most: float = math.inf,
) -> dict[str, Any] | None:  # fmt: skip
    """Runs a selection that writes documents, and checks that each went somewhere, and at most `most` of a filter."""
    out = out.resolve()
    manifest.open_run(out, kind, made_from, scores.shards, fresh)
    state = out / manifest.STATE / kind
    text_column = scores.manifest["made_from"]["text_column"]
    types = added_types(scores, **added)
    writer = ShardWriter(scores.shards, str(out), str(state), sidecar, ROUTES[kind], types, text_column)
    if not run([*steps, writer], scores.shards, out, kind, config):
        return None
    sums = manifest.totals(state, scores.shards, out)
    if (rows := scores.manifest["figures"]["rows"]) != sums["rows"]:
        raise ValueError(f"{scores.folder} holds {rows} scores, and {sums['rows']} documents were read; score again")
    if kind != "reweight" and sums["rows"] != sum(sums.get(name, 0) for name in FOLDERS[kind]):
        raise ValueError(f"{out}: of {sums['rows']} documents some were neither kept nor dropped; report this")
    if sums.get("dropped", 0) > most:
        raise ValueError(f"{out}: {sums['dropped']} documents were dropped, {most:g} may be; report this")
    return manifest.finish(out, sums | ({"fit": figures} if figures else {}))


FOLDERS = {"filter": ("kept", "dropped"), "tag": ("tagged", "cooldown"), "reweight": ("documents", "dropped")}


def reweight(
    folder: Path,
    out: Path,
    beta: float = 1.0,
    floor: float = 0.25,
    cap: float = 4.0,
    topic: str | None = None,
    form: str | None = None,
    sample: bool = False,
    seed: int = 0,
    config: Config = LOCAL,
    fresh: bool = False,
) -> dict[str, Any] | None:
    """Writes `OUT/weights` (id, weight, copies), and with `sample` the documents in as many copies.

    Without a column for the topic or the format all documents count as one of it: words of a text would group texts
    by the very emotions that are to be weighed.
    """
    scores, out = open_scores(folder), out.resolve()
    made_from = scores.made_from(beta=beta, floor=floor, cap=cap, topic=topic, format=form, sample=sample, seed=seed)
    columns = scores.columns([("--topic-column", topic), ("--format-column", form)])
    selection.check(beta, floor, cap)
    manifest.open_run(out, "reweight", made_from, scores.shards, fresh)
    if columns and not pick_columns(scores, out, columns, config):
        return None
    fit = selection.fit_weights(_corpus(scores, out, topic, form), beta, floor, cap)
    table = fit.table | {"columns": [topic, form]}
    write_json(out / "table.json", table)
    steps = [blocks.Reweighter(table, topic, form, seed)]
    if sample:
        picked = [Picked(columns)] if columns else []
        steps = [scores.reader(None), *picked, *steps]
        added = (scores, out, "reweight", made_from, steps, ADDED, config, False)
        return _documents(*added, fit.figures, ("weights", ADDED))
    state = out / manifest.STATE / "reweight"
    beside = str(out / "columns") if columns else None
    steps = [SidecarReader(scores.shards, str(scores.folder / "scores"), beside), *steps]
    writer = ShardWriter(scores.shards, str(out), str(state), ("weights", ADDED))
    if not run([*steps, writer], scores.shards, out, "reweight", config):
        return None
    sums = manifest.totals(state, scores.shards, out)
    return manifest.finish(out, sums | {"fit": fit.figures})


def pick_columns(scores: Scores, out: Path, columns: tuple[str, ...], config: Config) -> bool:
    """Copies the user's own columns, as texts and keyed by id, to `OUT/columns`."""
    names = pq.read_schema(scores.folder / "scores" / f"{scores.shards[0].name}.parquet").names
    if taken := [name for name in columns if name in names]:
        raise ValueError(f"the column {taken[0]!r} bears the name of a score; rename it in the input")
    state = out / manifest.STATE / "columns"
    sidecar = ("columns", dict.fromkeys(columns, pa.string()))
    writer = ShardWriter(scores.shards, str(out), str(state), sidecar)
    return run([scores.reader(columns), Picked(columns), writer], scores.shards, out, "columns", config)


def _corpus(scores: Scores, out: Path, topic: str | None, form: str | None) -> selection.Corpus:
    """Scores, lengths and the places of topic and format of every document: 16 bytes each."""
    names: dict[str, dict[str, int]] = {"topic": {}, "format": {}}
    parts: dict[str, list[np.ndarray]] = {"regulation": [], "characters": [], "topic": [], "format": []}
    for shard, table in zip(scores.shards, scores.tables(["regulation", "characters"]), strict=True):
        parts["regulation"].append(table["regulation"].to_numpy().astype(np.float32))
        parts["characters"].append(table["characters"].to_numpy().astype(np.int32))
        for what, column in (("topic", topic), ("format", form)):
            values = ["all"] * table.num_rows
            if column:
                beside = pq.read_table(out / "columns" / f"{shard.name}.parquet", columns=[column])
                values = list(map(str, beside[column].to_pylist()))
            known = names[what]
            parts[what].append(np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int32))
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return selection.Corpus(
        joined["regulation"], joined["characters"], list(names["topic"]), joined["topic"], list(names["format"]),
        joined["format"],
    )  # fmt: skip
