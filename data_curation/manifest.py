"""What a folder of results was made from, so that nothing else is ever mixed into it; and whether it is complete."""

import hashlib
import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_curation.documents import ROW, ShardReader, place, row_number
from data_curation.inputs import Shard, digest
from data_curation.writing import key_hash, write_json

LAYOUT = 2
MANIFEST, SHARDS, STATE = "run.json", "shards.json", "state"
PARTS = (STATE, "scores", "columns", "weights", "documents", "kept", "dropped", "tagged", "cooldown")
FILES = ("set_aside.jsonl", "table.json")
SHOWN = 60  # characters of a value in a message
AT_ONCE = 1 << 18  # hashes of ids in memory


def open_run(
    out: Path, kind: str, made_from: dict[str, Any], shards: list[Shard], fresh: bool = False, **told: Any
) -> None:
    """Makes a folder of results, or finds the one that was begun with exactly this; `told` is kept, not compared.

    With `fresh` what the folder holds of an earlier run is removed, whatever that was made from.

    Raises:
        ValueError: the folder holds something else, or was begun with another input, scorer or option.
    """
    ranges = json.dumps([(shard.name, shard.file, shard.start, shard.stop) for shard in shards])
    cut = f"{len(shards)} (digest {hashlib.blake2b(ranges.encode(), digest_size=8).hexdigest()})"
    made_from = json.loads(json.dumps({"kind": kind, "layout": LAYOUT, **made_from, "shards": cut}))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder")
    if (out / MANIFEST).is_file():
        before = load(out)
        if _value(before, "kind") != kind:
            raise ValueError(f"{out} holds the result of `curate {_value(before, 'kind')}`; name another folder")
        changed = sorted(key for key in before["made_from"] | made_from if _value(before, key) != made_from.get(key))
        if not changed and not fresh:
            return
        if not fresh:
            what = "; ".join(_told(key, _value(before, key), made_from.get(key)) for key in changed[:3])
            raise ValueError(f"{out} was begun otherwise: {what}; take another --out, or --fresh to replace it")
        write_json(out / MANIFEST, before | {"complete": False})  # first: a stop in the midst leaves nothing complete
        for part in PARTS:
            if (out / part).exists():
                shutil.rmtree(out / part)
        for file in FILES:
            (out / file).unlink(missing_ok=True)
    elif out.is_dir() and any(path.name != SHARDS and path.suffix != ".partial" for path in out.iterdir()):
        raise ValueError(f"{out} holds other files and is no run of `curate`; name a new folder")
    write_json(out / SHARDS, shards)
    write_json(out / MANIFEST, {"made_from": made_from, "told": told, "complete": False})


def load(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of results."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of results of `curate`: it holds no {MANIFEST}") from error
    if not isinstance(content, dict) or "kind" not in (content.get("made_from") or ()):
        raise ValueError(f"{folder / MANIFEST} is not that of a run of `curate`; name another folder")
    return content


def load_complete(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished run of one kind, whose input is still as it was."""
    manifest = load(folder)
    if (found := manifest["made_from"]["kind"]) != kind:
        raise ValueError(f"{folder} is the result of `curate {found}`, and of `curate {kind}` is wanted")
    if manifest["made_from"].get("layout") != LAYOUT:
        raise ValueError(f"{folder} is of another version of `curate`; run its `curate {kind}` again, with --fresh")
    if not manifest["complete"]:
        raise ValueError(f"{folder} is not complete; run its `curate {kind}` again, it goes on where it stopped")
    for path, before in manifest["made_from"]["input"].items():
        if not Path(path).is_file() or digest(path) != before:
            raise ValueError(f"{path} is not as it was when it was scored; score the input again")
    return manifest


def load_shards(folder: Path) -> list[Shard]:
    return [Shard(*values) for values in json.loads((folder / SHARDS).read_text(encoding="utf-8"))]


def finish(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Marks a folder of results as complete."""
    manifest = load(out) | {"complete": True, "figures": figures}
    write_json(out / MANIFEST, manifest)
    return manifest


def _value(manifest: dict[str, Any], key: str) -> Any:
    return manifest["made_from"].get(key)


def _told(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        files = sorted(path for path in before | now if before.get(path) != now.get(path))
        return f"{key}: {len(files)} changed, such as {files[0]}"
    before, now = (text if len(text := str(value)) <= SHOWN else text[:SHOWN] + "..." for value in (before, now))
    return f"{key} was {before} and is {now}"


def totals(state: Path, shards: list[Shard], out: Path, whole: bool = False) -> dict[str, int]:
    """Counts of a stage over all shards, after every output was found to hold what its record says.

    Args:
        whole: every row of the files was to be read, not those with a score only.
    """
    sums: dict[str, int] = {}
    for rank, shard in enumerate(shards):
        record = json.loads((state / "records" / f"{rank:05d}.json").read_text(encoding="utf-8"))
        stats = json.loads((state / "stats" / f"{rank:05d}.json").read_text(encoding="utf-8"))
        counts = record["counts"] | {"set_aside": len(record["faults"])}
        read = stats[0]["stats"].get("documents", 0)
        read = read if isinstance(read, int) else read["total"]
        if (whole and shard.rows not in (None, read)) or (counts["rows"] + counts["set_aside"] != read):
            wrong = f"{shard.rows} rows in the file, {read} read, {counts['rows']} written"
            raise ValueError(f"{shard.path} ({shard.name}): {wrong}, {counts['set_aside']} set aside; report this")
        for name, (size, rows) in record["files"].items():
            path = out / name
            sound = path.is_file() and path.stat().st_size == size
            if not sound or (path.suffix == ".parquet" and pq.read_metadata(path).num_rows != rows):
                raise ValueError(f"{path} does not hold the {rows} rows that were written; remove it and run again")
        for key, value in counts.items():
            sums[key] = sums.get(key, 0) + value
    return sums


def faults(state: Path, shards: list[Shard]) -> list[dict[str, Any]]:
    """The rows that were set aside, in input order."""
    found = []
    for rank, shard in enumerate(shards):
        for fault in json.loads((state / "records" / f"{rank:05d}.json").read_text())["faults"]:
            row = row_number(shard, fault["number"])
            found.append({"file": shard.path, "row": row, "reason": fault["reason"]})
    return found


def repeated_id(state: Path, reader: ShardReader) -> str | None:
    """One line about an id that occurs twice. Reads sorted hashes range by range, so that memory stays flat."""
    files = [state / "ids" / f"{rank:05d}.bin" for rank in range(len(reader.shards))]
    ends = np.cumsum([file.stat().st_size // 8 for file in files])
    if not len(ends) or not ends[-1]:
        return None
    # One file: a map of each shard would be an open file of each.
    with tempfile.TemporaryFile(dir=state) as joined:
        for file in files:
            joined.write(file.read_bytes())
        joined.flush()
        maps = np.split(np.memmap(joined, dtype=np.uint64, mode="r"), ends[:-1])
    return _repeated(maps, reader)


def _repeated(maps: list[np.ndarray], reader: ShardReader) -> str | None:
    parts = 1 + sum(len(hashes) for hashes in maps) // AT_ONCE
    edges = [np.uint64(min(2**64 * i // parts, 2**64 - 1)) for i in range(parts + 1)]
    for i, (low, high) in enumerate(pairwise(edges)):
        last = i == parts - 1  # the topmost hash belongs to the last range
        ranges = [(hashes, *np.searchsorted(hashes, [low, high])) for hashes in maps]
        merged = np.sort(np.concatenate([h[a : len(h) if last else b] for h, a, b in ranges]))
        twice = merged[1:][merged[1:] == merged[:-1]]
        if len(twice) and (found := _where(reader, {int(value) for value in twice[:1000]})):
            return found
    return None


def _where(reader: ShardReader, hashes: set[int]) -> str | None:
    """Reads the input again to name the rows; None where ids only share a hash."""
    places: dict[str, str] = {}
    reader.set_aside = True
    for rank, shard in enumerate(reader.shards):
        for document in reader.run(None, rank, len(reader.shards)):
            if document.id and key_hash(document.id) in hashes:
                here = place(shard, document.metadata[ROW])
                if document.id in places:
                    return f"{here}: the id {document.id!r} is that of {places[document.id]} too"
                places[document.id] = here
    return None
