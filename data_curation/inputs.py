"""Input files -> shards. A shard is one task: a range of a file, small enough to be redone after a kill."""

import gzip
import hashlib
import io
import json
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
DIGESTED = 1 << 16  # bytes at either end of a file that tell it from another of the same size
LOOKED_AT = 100  # rows of a JSONL file that say which columns it has


class Shard(NamedTuple):
    """A range of one file, and where it stands in what the user gave."""

    name: str  # of its outputs, without an ending
    file: str  # below what the user named
    path: str
    kind: str  # parquet, jsonl, arrow (a stream file of `datasets`)
    start: int  # first row group, byte or record batch
    stop: int  # one past the last; -1: to the end
    first: int | None  # number of its first row in the file, from 0; None within a JSONL file
    rows: int | None  # None where only reading tells


class Source(NamedTuple):
    """What the user named, resolved."""

    shards: list[Shard]
    columns: dict[str, list[str]]  # of each file that has a row that can be read
    digests: dict[str, str]  # file -> size and digest of both ends


def find(source: str, shard_bytes: int, split: str | None = None) -> Source:
    """The shards of a file, a folder (parquet, JSONL, or a dataset saved to disk) or a Hub id, in a fixed order.

    Raises:
        ValueError: there is nothing to read; says what was looked for.
    """
    files = _files(source, split)
    ranges = [_RANGES[kind](path, shard_bytes) for _, path, kind in files]
    parts = [_parts(_stem(name), len(found)) for (name, _, _), found in zip(files, ranges, strict=True)]
    taken = Counter(part for names in parts for part in names)
    shards: list[Shard] = []
    for (name, path, kind), found, names in zip(files, ranges, parts, strict=True):
        if any(taken[part] > 1 for part in names):
            names = _parts(name, len(found))
        shards += [Shard(part, name, path, kind, *one) for part, one in zip(names, found, strict=True)]
    for name, count in Counter(shard.name for shard in shards).items():
        if count > 1:
            both = " and ".join(shard.path for shard in shards if shard.name == name)
            raise ValueError(f"{both} would be written to one name, {name!r}; rename one")
    packed = [shard for shard in shards if shard.path.endswith((".gz", ".zst"))]
    if large := [shard.path for shard in packed if os.path.getsize(shard.path) > shard_bytes]:
        logger.warning("compressed JSONL cannot be split, each file is one task: %s (%d such)", large[0], len(large))
    return Source(shards, columns_of(shards), {path: digest(path) for _, path, _ in files})


def digest(path: str) -> str:
    """Size and digest of both ends of a file: cheap, and enough to notice that it was replaced."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(DIGESTED)
        file.seek(max(size - DIGESTED, 0))
        return f"{size}-{hashlib.blake2b(head + file.read(DIGESTED), digest_size=12).hexdigest()}"


def columns_of(shards: list[Shard]) -> dict[str, list[str]]:
    """Names of the columns of each file that has a row that can be read."""
    wholes = {shard.path: shard._replace(start=0, stop=-1) for shard in shards}
    return {path: names for path, whole in wholes.items() if (names := _columns(whole))}


def _columns(shard: Shard) -> list[str]:
    """Names of the columns of a file, of JSONL the keys of its first rows. Empty where it cannot be read."""
    keys: dict[str, None] = {}
    try:
        if shard.kind == "parquet":
            return pq.read_schema(shard.path).names
        if shard.kind == "arrow":
            with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
                return stream.schema.names
        rows = (_keys(line) for _, _, line in lines(shard, 1 << 26))
        for names in islice(filter(None, rows), LOOKED_AT):
            keys |= dict.fromkeys(names)
    except (ValueError, OSError, EOFError, zlib.error):
        pass  # named with its row when the shard is read
    return list(keys)


def _keys(line: bytes | None) -> list[str]:
    try:
        row: Any = orjson.loads(line or b"")
    except orjson.JSONDecodeError:
        return []
    return list(row) if isinstance(row, dict) else []


def open_lines(path: str) -> io.BufferedIOBase:
    """A JSONL file, plain or compressed, to read bytes from."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstd(path), 1 << 16)
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames. zstandard's own reader takes a truncated frame for the end of the file."""

    def __init__(self, path: str):
        self.file = open(path, "rb")  # noqa: SIM115 -- closed by `close`
        self.decoder, self.ready = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self.ready:
            packed = self.decoder.unused_data if self.decoder and self.decoder.eof else b""
            # A few kilobytes may unpack to very many.
            packed = packed or self.file.read(1 << 13)
            if not packed:
                if self.decoder and not self.decoder.eof:
                    raise EOFError("a zstd frame is truncated")
                return 0
            if self.decoder is None or self.decoder.eof:
                self.decoder = zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = memoryview(self.decoder.decompress(packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def _parts(stem: str, number: int) -> list[str]:
    """Names of the shards of a file."""
    return [f"{stem}.{part:05d}" for part in range(number)] if number > 1 else [stem]


def _stem(name: str) -> str:
    for ending in (*reversed(ENDINGS), ".arrow"):
        name = name.removesuffix(ending)
    return name


def _files(source: str, split: str | None) -> list[tuple[str, str, str]]:
    """(name, path, kind) of each file, sorted by name."""
    path = Path(source)
    if split and "[" in split:
        raise ValueError(f"`--split` {split!r}: only whole splits are read; name one without brackets")
    if split and (path.is_file() or path.is_dir()) and not (path / "dataset_dict.json").is_file():
        raise ValueError(f"`--split` {split!r}: {source} has no splits; only a Hub id or a saved `DatasetDict` has")
    if path.is_file():
        if not source.endswith(ENDINGS):
            raise ValueError(f"{source} is none of {', '.join(ENDINGS)}")
        return [(path.name, os.path.abspath(path), _kind(source))]  # of a link its own name, which has the ending
    if not path.is_dir():
        if "://" in source or source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise ValueError(f"{source} is no file, no folder, and no Hub id such as owner/name")
        return _hub(source, split)
    if saved := _saved(path, split):
        return saved
    found = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and not file.name.startswith("."))
    found = [file for file in found if not file.is_dir()]  # Spark names folders so
    if linked := [folder for folder in path.rglob("*") if folder.is_symlink() and folder.is_dir()]:
        raise ValueError(f"{linked[0]} is a link to a folder, which is not followed; read that folder by itself")
    if lost := [file for file in found if not file.exists()]:
        raise ValueError(f"{lost[0]} is a link to nothing; mend or remove it")
    if not found:
        raise ValueError(f"{source} holds nothing to read: no {', '.join(ENDINGS)}, and no dataset saved to disk")
    return [(str(file.relative_to(path)), os.path.abspath(file), _kind(file.name)) for file in found]


def _kind(name: str) -> str:
    return "parquet" if name.endswith(".parquet") else "jsonl"


def _saved(path: Path, split: str | None = None) -> list[tuple[str, str, str]]:
    """The Arrow files of `Dataset.save_to_disk`, or of a split of a `DatasetDict`, by default of each."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split and split not in splits:
            raise ValueError(f"`--split` {split!r} is none of {path}; there are {', '.join(splits)}")
        splits = [split] if split else splits
        if lost := [name for name in splits if not (path / name / "state.json").is_file()]:
            raise ValueError(f"{path} names the split {lost[0]!r}, and {path / lost[0]} holds none; copy it whole")
        return [(f"{split}/{name}", file, kind) for split in splits for name, file, kind in _saved(path / split)]
    if not (path / "state.json").is_file():
        return []
    names = [part["filename"] for part in json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]]
    return [(name, str((path / name).resolve()), "arrow") for name in names]


def _hub(name: str, split: str | None) -> list[tuple[str, str, str]]:
    """The Arrow files that `datasets` makes of a Hub id; its code, if it has any, is never run."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no file or folder here, and as a Hub id: {str(error).splitlines()[0]}") from error
    paths = [part["filename"] for part in dataset.cache_files]
    return [(f"{name.replace('/', '--')}/{Path(path).name}", path, "arrow") for path in paths]


Range = tuple[int, int, int | None, int | None]  # start, stop, first, rows


def _parquet(path: str, shard_bytes: int) -> list[Range]:
    """Row groups that fill a shard; a row group is never cut. A file that cannot be opened fails in its task."""
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return [(0, -1, 0, None)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return _fill([(group.num_rows, group.total_byte_size) for group in groups], shard_bytes)


def _arrow(path: str, shard_bytes: int) -> list[Range]:
    sizes = []
    try:
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
            sizes = [(batch.num_rows, batch.nbytes) for batch in stream]
    except (pa.ArrowInvalid, OSError):
        return [(0, -1, 0, None)]
    return _fill(sizes, shard_bytes)


def _fill(sizes: list[tuple[int, int]], shard_bytes: int) -> list[Range]:
    ranges, start, first, rows, filled = [], 0, 0, 0, 0
    for i, (num_rows, num_bytes) in enumerate(sizes):
        if rows and filled + num_bytes > shard_bytes:
            ranges.append((start, i, first, rows))
            start, first, rows, filled = i, first + rows, 0, 0
        rows, filled = rows + num_rows, filled + num_bytes
    return [*ranges, (start, len(sizes), first, rows)]


def _jsonl(path: str, shard_bytes: int) -> list[Range]:
    """Byte ranges; a row belongs to the range in which it begins. Compressed: one range."""
    size = os.path.getsize(path)
    parts = 1 if path.endswith((".gz", ".zst")) else max(1, math.ceil(size / shard_bytes))
    if parts == 1:
        return [(0, -1, 0, None)]
    edges = [size * i // parts for i in range(parts + 1)]
    return [(start, stop, None if start else 0, None) for start, stop in pairwise(edges)]


_RANGES = {"parquet": _parquet, "arrow": _arrow, "jsonl": _jsonl}


def lines(shard: Shard, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(number from 0, first byte, line) of the rows of a JSONL shard; None for a line of more than `limit` bytes."""
    with open_lines(shard.path) as file:
        position = 0
        if shard.start:
            file.seek(shard.start - 1)
            position = shard.start - 1 + _skip(file)
        number = 0
        while shard.stop == -1 or position < shard.stop:
            line = file.readline(limit + 1)
            if not line:
                return
            length = len(line)
            if length > limit and not line.endswith(b"\n"):
                length, line = length + _skip(file), None
            if line is None or line.strip():
                yield number, position, line
            number, position = number + 1, position + length


def _skip(file: io.BufferedIOBase) -> int:
    """Reads past the next line end, without keeping what it reads; the number of bytes."""
    total = 0
    while piece := file.readline(1 << 20):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


def lines_before(shard: Shard) -> int:
    """Lines of a plain JSONL file before a shard: counted only to name a row.

    It goes on from the last shard that it was asked about: whoever asks in order reads a file once.
    """
    at, count = _COUNTED.get(shard.path, (0, 0))
    if at > shard.start:
        at, count = 0, 0
    with open(shard.path, "rb") as file:
        file.seek(at)
        while at < shard.start and (piece := file.read(min(shard.start - at, 1 << 22))):
            at, count = at + len(piece), count + piece.count(b"\n")
        _COUNTED[shard.path] = at, count
        if shard.start:  # the line that spans the start belongs to the shard before
            file.seek(shard.start - 1)
            count += file.read(1) != b"\n"
    return count


_COUNTED: dict[str, tuple[int, int]] = {}  # path -> a byte, and how many lines end before it
