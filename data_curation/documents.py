"""datatrove blocks that read the rows of a shard as documents, alone or beside their scores."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import Stats

from data_curation.inputs import Shard, lines, lines_before

Documents = Any  # an iterable of them: datatrove's own type is one that no generator function has
ROW, FAULT, VALUES = "_row", "_fault", "_values"  # in metadata: number in the shard, what is wrong, own columns
BATCH_ROWS = 1000
SCALE = 6  # bytes of JSON that one character takes at most


class Fault(ValueError):
    """One line about one row or one file."""


def row_number(shard: Shard, number: int) -> int:
    """Number from 1 in its file of a row whose number in the shard counts from 0."""
    return (lines_before(shard) if shard.first is None else shard.first) + number + 1


def place(shard: Shard, number: int) -> str:
    return f"{shard.path}, row {row_number(shard, number)}"


class ShardReader(PipelineStep):
    """The documents of shard `rank`, in the order of the file.

    A row that cannot be used ends the shard with its file and row, or with `set_aside` goes on as a document that
    holds its fault in place of a text, so that every row that was read is counted by who writes. `without_ids` says
    that there is no `id` where one could be: a row that has one all the same cannot be used.
    """

    type, name = "📖 - READER", "shard"

    def __init__(
        self,
        shards: list[Shard],
        text_column: str = "text",
        id_column: str | None = "id",
        columns: tuple[str, ...] | None = (),
        set_aside: bool = False,
        max_characters: int = 20_000_000,
        without_ids: bool = False,
    ):
        super().__init__()
        self.shards, self.without_ids = shards, without_ids
        self.text_column, self.id_column, self.columns = text_column, id_column, columns
        self.set_aside, self.max_characters = set_aside, max_characters

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        if world_size != len(self.shards):
            raise ValueError(f"{len(self.shards)} shards take {len(self.shards)} tasks, not {world_size}")
        self.stats = Stats(str(self))  # of this shard alone, also where one process reads several
        for document in self._read(rank):
            self.stat_update("documents")
            yield document

    def _read(self, rank: int) -> Iterator[Document]:
        shard = self.shards[rank]
        for number, position, values in self._rows(shard):
            document = self._document(shard, position, values)
            document.metadata[ROW] = number
            if FAULT in document.metadata and not self.set_aside:
                raise Fault(f"{place(shard, number)}: {document.metadata[FAULT]}")
            yield document

    def _document(self, shard: Shard, position: int | str, values: dict[str, Any] | str) -> Document:
        if isinstance(values, str):
            return Document("", "", metadata={FAULT: values})
        text: Any = values.get(self.text_column)
        key = values.get(self.id_column) if self.id_column else f"{shard.file}:{position}"
        if fault := self._fault(values, text, key):
            return Document("", "", metadata={FAULT: fault})
        kept = values if self.columns is None else {name: values.get(name) for name in self.columns}
        return Document(text, str(key), metadata={VALUES: kept})

    def _fault(self, values: dict[str, Any], text, key) -> str | None:
        if self.text_column not in values:
            return f"no column {self.text_column!r}; there are {', '.join(values) or 'none'}"
        if not isinstance(text, str):
            return f"{self.text_column!r} is {'null' if text is None else type(text).__name__}, not a text"
        if len(text) > self.max_characters:
            return f"a text of {len(text):,} characters; at most {self.max_characters:,} are read (--max-characters)"
        if not text or text.isspace():
            return "an empty text"
        if self.without_ids and "id" in values:
            return "has an `id`, and the first rows have none; give --id-column id, or --number-rows"
        if isinstance(key, bool) or not isinstance(key, str | int):
            return f"the id in {self.id_column!r} is {key!r}, neither text nor whole number"
        if key == "":
            return f"the id in {self.id_column!r} is empty"
        return None

    def _rows(self, shard: Shard) -> Iterator[tuple[int, int | str, dict[str, Any] | str]]:
        """(number in the shard, what to name the row by, its columns or what is wrong with it)."""
        number = 0
        try:
            if shard.kind == "jsonl":
                for number, byte, line in lines(shard, self.max_characters * SCALE + (1 << 20)):
                    # Within a plain file bytes are known at once, rows only by counting from its beginning.
                    packed = shard.path.endswith((".gz", ".zst"))
                    yield number, number + 1 if packed else f"byte{byte}", _parse(line)
                return
            for batch in self._batches(shard):
                for values in _unpack(batch):
                    yield number, (shard.first or 0) + number + 1, values
                    number += 1
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Fault(f"{place(shard, number)} or after: cannot be read ({reason})") from error

    def _batches(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        wanted = None
        if self.columns is not None:
            wanted = [self.text_column, *([self.id_column] if self.id_column else []), *self.columns]
        if shard.kind == "parquet":
            with pq.ParquetFile(shard.path) as file:
                names = set(file.schema_arrow.names)
                stop = file.num_row_groups if shard.stop == -1 else shard.stop
                columns = None if wanted is None else [name for name in dict.fromkeys(wanted) if name in names]
                if self.text_column not in names:
                    columns = None  # so that the message can name them
                yield from file.iter_batches(BATCH_ROWS, row_groups=list(range(shard.start, stop)), columns=columns)
            return
        with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
            for i, batch in enumerate(stream):
                if shard.stop != -1 and i >= shard.stop:
                    return
                if i >= shard.start:
                    if wanted is not None and self.text_column in batch.schema.names:
                        batch = batch.select([name for name in dict.fromkeys(wanted) if name in batch.schema.names])
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        yield batch.slice(start, BATCH_ROWS)


def _parse(line: bytes | None) -> dict[str, Any] | str:
    if line is None:
        return "a line too long to be read (--max-characters)"
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            return f"not UTF-8 (byte {wrong.object[wrong.start]:#04x} at {wrong.start} of the line)"
        return f"not JSON ({error})"
    return values if isinstance(values, dict) else f"a JSON {type(values).__name__}, not an object"


def _unpack(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; column by column, and value by value only where one cannot be read."""
    names = batch.schema.names
    try:
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield dict(zip(names, row, strict=True))
    except (ValueError, OverflowError):
        for i in range(batch.num_rows):
            yield _row(batch, i)


def _row(batch: pa.RecordBatch, i: int) -> dict[str, Any] | str:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[i].as_py()
        except UnicodeDecodeError as wrong:
            return f"not UTF-8 (byte {wrong.object[wrong.start]:#04x} at {wrong.start} of a value of {name!r})"
        except (ValueError, OverflowError) as wrong:  # a date before the year 1, or after 9999
            return f"a value of {name!r} that cannot be read ({wrong})"
    return row


class ScoredReader(ShardReader):
    """As ShardReader, with the scores of each document in its metadata; rows set aside when scored are passed over."""

    name = "scored shard"

    def __init__(self, shards: list[Shard], folder: str, **options):
        super().__init__(shards, set_aside=True, **options)
        self.folder = Path(folder)  # that `curate score` wrote

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        self.stats = Stats(str(self))
        shard = self.shards[rank]
        scored = SidecarReader(self.shards, str(self.folder / "scores")).run(None, rank, world_size)
        record = json.loads((self.folder / f"state/score/records/{rank:05d}.json").read_text(encoding="utf-8"))
        aside = {fault["number"] for fault in record["faults"]}
        for document in self._read(rank):
            if document.metadata[ROW] in aside:
                continue
            if fault := document.metadata.get(FAULT):  # in a column that was not read when scored
                raise Fault(f"{place(shard, document.metadata[ROW])}: {fault}")
            beside = next(scored, None)
            if beside is None or beside.id != document.id:
                where = place(shard, document.metadata[ROW])
                raise Fault(f"{where}: {document.id!r} is not what was scored there; score the input again")
            document.metadata |= beside.metadata
            self.stat_update("documents")
            yield document
        if next(scored, None) is not None:
            raise Fault(f"{shard.path}: more rows were scored than it holds now; score the input again")


class SidecarReader(PipelineStep):
    """The rows of a sidecar as documents without a text."""

    type, name = "📖 - READER", "sidecar"

    def __init__(self, shards: list[Shard], folder: str, beside: str | None = None):
        super().__init__()
        self.shards, self.folder, self.beside = shards, folder, beside

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        self.stats = Stats(str(self))
        files = [Path(folder) / f"{self.shards[rank].name}.parquet" for folder in (self.folder, self.beside) if folder]
        opened = [pq.ParquetFile(file) for file in files]
        wanted = [[name for name in file.schema_arrow.names if name != "windows"] for file in opened]
        readers = [file.iter_batches(BATCH_ROWS, columns=names) for file, names in zip(opened, wanted, strict=True)]
        for batches in zip(*readers, strict=True):
            for rows in zip(*map(_unpack, batches), strict=True):
                values = {name: value for row in rows for name, value in row.items()}
                self.stat_update("documents")
                yield Document("", values.pop("id"), metadata=values)


class Picked(PipelineStep):
    """Notes some of a document's own columns as texts in its metadata."""

    type, name = "✍ - ANNOTATOR", "columns"

    def __init__(self, columns: tuple[str, ...]):
        super().__init__()
        self.columns = columns

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data:
            values = document.metadata[VALUES]
            document.metadata |= {
                name: None if values.get(name) is None else str(values[name]) for name in self.columns
            }
            yield document
