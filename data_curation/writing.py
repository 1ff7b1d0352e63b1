"""The datatrove block that ends a shard: outputs written aside, renamed when all are complete, then the counts."""

import gzip
import hashlib
import json
import os
import socket
from array import array
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_curation.documents import BATCH_ROWS, FAULT, ROW, VALUES, Documents, Fault
from data_curation.inputs import Shard

GROUP_ROWS = 5 * BATCH_ROWS  # of a parquet row group: readers in step need groups that batches divide


def aside_of(path: Path) -> Path:
    """The name to write to first; two hosts that write the same shard do not share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def write_bytes(path: Path, content: bytes) -> None:
    with _told(str(path)):
        aside = aside_of(path)
        try:
            aside.write_bytes(content)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, json.dumps(content, indent=1).encode() + b"\n")


def key_hash(key: str) -> int:
    """64 bits of an id."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class ShardWriter(PipelineStep):
    """Writes a parquet file of columns (`sidecar`: folder and types), or documents where `route` says, or both.

    The record of a shard, written last, says how many rows were read, written where, and set aside, and the size and
    the rows of each file. A shard that ends with an error leaves one line in `state/failures` instead, so that every
    executor reports alike.
    """

    type, name = "💽 - WRITER", "shard"

    def __init__(
        self,
        shards: list[Shard],
        out: str,
        state: str,
        sidecar: tuple[str, dict[str, pa.DataType]] | None = None,
        route: Callable[[Document], list[str]] | None = None,
        added: dict[str, pa.DataType] | None = None,
        text_column: str = "text",
    ):
        super().__init__()
        self.shards, self.out, self.state = shards, out, state
        self.sidecar, self.route, self.added, self.text_column = sidecar, route, added or {}, text_column

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        state, shard = Path(self.state), self.shards[rank]
        failure = state / "failures" / f"{rank:05d}.json"
        self.counts, self.faults, self.hashes = {"rows": 0, "characters": 0}, [], array("Q")
        try:
            with _together(self.out) as files:
                yield from self._write(data, shard, files)
            self._record(state, rank, shard, files)
            failure.unlink(missing_ok=True)
        except (ValueError, OSError, MemoryError, pa.ArrowException) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            line = line if isinstance(error, Fault) else f"{shard.path}: {line}"
            with suppress(Fault):  # a full disk cannot hold the line either
                write_json(failure, {"name": shard.name, "line": line})
            raise Fault(line) from error

    def _write(self, data, shard: Shard, files: dict[str, "_File"]) -> Iterator[Document]:
        if self.sidecar:
            folder, types = self.sidecar
            schema = pa.schema([("id", pa.string()), *types.items()])
            files[folder] = _Table(Path(self.out) / folder / f"{shard.name}.parquet", schema)
        for document in data:
            if FAULT in document.metadata:
                self.faults.append({"number": document.metadata[ROW], "reason": document.metadata[FAULT]})
                continue
            self._count("rows")
            self._count("characters", len(document.text))
            if self.sidecar:
                self.hashes.append(key_hash(document.id))
                files[self.sidecar[0]].add({"id": document.id, **document.metadata})
            if document.metadata.get("holds_token"):
                self._count("holds_token")
            for place in self.route(document) if self.route else ():
                if place not in files:
                    files[place] = _documents(Path(self.out) / place, shard, self.added)
                self._count(place)
                files[place].add(self._row(shard, document))
            yield document

    def _row(self, shard: Shard, document: Document) -> dict[str, Any]:
        values = document.metadata[VALUES]
        if twice := values.keys() & self.added.keys():
            raise Fault(f"{shard.path}: has a column {sorted(twice)[0]!r} already, which is to be added; rename it")
        scores = {name: document.metadata.get(name) for name in self.added}
        return {**values, self.text_column: document.text, **scores}

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def _record(self, state: Path, rank: int, shard: Shard, files: dict[str, "_File"]) -> None:
        """Sorted hashes of the ids, then the counts with the files and the rows that were set aside."""
        if self.sidecar:
            hashes = np.sort(np.array(self.hashes, dtype=np.uint64))
            write_bytes(state / "ids" / f"{rank:05d}.bin", hashes.tobytes())
        written = {os.path.relpath(f.path, self.out): (f.path.stat().st_size, f.written) for f in files.values()}
        record = {"name": shard.name, "counts": self.counts, "faults": self.faults, "files": written}
        write_json(state / "records" / f"{rank:05d}.json", record)


@contextmanager
def _told(out: str) -> Generator[None]:
    """Turns an error of the file system into one line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise Fault(f"cannot write to {out} ({reason}); what is complete stays: make room and run again") from error


@contextmanager
def _together(out: str) -> Generator[dict[str, "_File"]]:
    """Files of one shard, renamed when all are closed; after an error none of them stays."""
    files: dict[str, _File] = {}
    try:
        with _told(out):
            yield files
            for file in files.values():
                file.close()
            for file in files.values():
                os.replace(file.aside, file.path)
    finally:
        for file in files.values():
            with suppress(OSError):
                file.close()
            file.aside.unlink(missing_ok=True)


class _Table:
    """Rows -> a parquet file of a given schema: neither a first None nor a late column changes a type."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.aside, self.schema, self.rows, self.written = path, aside_of(path), schema, [], 0
        self.writer = pq.ParquetWriter(self.aside, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.written += 1
        if len(self.rows) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, self.rows = self.rows, []
        columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in self.schema]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=GROUP_ROWS)

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.writer.close()


class _Lines:
    """Rows -> a JSONL file, compressed as its ending says; the same rows give the same bytes."""

    def __init__(self, path: Path):
        self.path, self.aside, self.written = path, aside_of(path), 0
        self.raw = open(self.aside, "wb")  # noqa: SIM115 -- closed with the shard
        self.file: Any = self.raw
        if path.name.endswith(".gz"):
            self.file = gzip.GzipFile("", "wb", fileobj=self.raw, mtime=0)
        elif path.name.endswith(".zst"):
            self.file = zstandard.ZstdCompressor().stream_writer(self.raw, closefd=False)

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self.written += 1

    def close(self) -> None:
        if not self.raw.closed:
            try:
                self.file.close()
            finally:
                self.raw.close()


_File = _Table | _Lines


def _documents(folder: Path, shard: Shard, added: dict[str, pa.DataType]) -> _File:
    """A file in the format of the input: parquet for parquet and Arrow, JSONL with its compression for JSONL."""
    if shard.kind == "jsonl":
        ending = next(e for e in (".jsonl.gz", ".jsonl.zst", ".jsonl") if shard.path.endswith(e))
        return _Lines(folder / f"{shard.name}{ending}")
    if shard.kind == "parquet":
        schema = pq.read_schema(shard.path)
    else:
        with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
            schema = stream.schema
    # The metadata of pandas or `datasets` names the old columns only.
    fields = [*schema, *(pa.field(name, kind) for name, kind in added.items())]
    return _Table(folder / f"{shard.name}.parquet", pa.schema(fields))
