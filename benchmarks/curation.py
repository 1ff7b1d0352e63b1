"""The curator's speed, each figure beside what it is measured against in the same run.

`python benchmarks/curation.py tier1`     documents a CPU second, beside fastText on the same documents
`python benchmarks/curation.py overhead`  reading, passing on and writing a sidecar, beside datatrove's parquet no-op
`python benchmarks/curation.py tier2`     beside the bare forward pass of the cut body over the same windows
`python benchmarks/curation.py workers`   wall time of `curate score` with one worker and with two
`python benchmarks/curation.py memory`    peak memory of a worker over ten thousand and over a million short documents

Documents are sentences of the labelled passages, drawn anew by a seeded generator. Sides take turns (A B A B ...), so
that a machine whose speed drifts does not decide; CPU seconds, which other processes do not change, unless said.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger as talk

from data_curation import blocks, facets, runs
from data_curation.documents import ShardReader
from data_curation.inputs import find
from data_curation.pipeline import Config
from data_curation.writing import ShardWriter

PASSAGES = Path(facets.__file__).parent / "labels/passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tier1", "overhead", "tier2", "workers", "memory", "peak"))
    parser.add_argument("--scorer", default="default", help="folder of a scorer (default: the shipped one)")
    parser.add_argument("--documents", type=int, help="(default: 1000, tier2 6, workers 60000)")
    parser.add_argument("--pairs", type=int, help="timed pairs (default: 5, workers 1)")
    parser.add_argument("--sizes", nargs=2, type=int, default=(10_000, 1_000_000), help="for memory")
    arguments = parser.parse_args()
    globals()[f"_{arguments.what}"](arguments)


def texts(number: int, length: int, seed: int = 0) -> list[str]:
    """Documents of about `length` characters: sentences of the labelled passages in a drawn order."""
    rows = [json.loads(line)["text"] for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
    sentences = [sentence for row in rows for sentence in re.split(r"(?<=[.!?]) ", row)]
    drawn, result = random.Random(seed), []
    for _ in range(number):
        parts, filled = [], 0
        while filled < length:
            parts.append(drawn.choice(sentences))
            filled += len(parts[-1]) + 1
        result.append(" ".join(parts)[:length])
    return result


def write(path: Path, documents: list[str], files: int = 1) -> Path:
    path.mkdir(parents=True)
    for i in range(files):
        part = documents[i::files]
        table = pa.table({"id": [f"{i}-{j}" for j in range(len(part))], "text": part})
        pq.write_table(table, path / f"{i:03d}.parquet", row_group_size=1000)
    return path


def compare(ours, theirs, pairs: int, clock=time.process_time) -> tuple[float, float, list[float]]:
    """Median seconds of both, and the ratio theirs / ours of every pair, sorted."""

    def seconds(call) -> float:
        start = clock()
        call()
        return clock() - start

    ours(), theirs()  # warm-up
    timed = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    first, second = (statistics.median(pair[side] for pair in timed) for side in (0, 1))
    return first, second, sorted(b / a for a, b in timed)


def told(name: str, ratios: list[float]) -> str:
    return (
        f"{name} {statistics.median(ratios):.2f} (median of {len(ratios)} pairs; {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def _tier1(arguments: argparse.Namespace) -> None:
    import fasttext

    documents = texts(arguments.documents or 1000, 3000)
    scorer = blocks.load_default(arguments.scorer, "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        rows = [json.loads(line) for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(f"__label__{(row['regulation'] or 0) > 5} {row['text']}\n".replace("\n", " ") + "\n"
                                for row in rows), encoding="utf-8")  # fmt: skip
        model = fasttext.train_supervised(str(path), dim=100, wordNgrams=2, epoch=5, thread=1, verbose=0)

    def theirs() -> None:
        for text in documents:  # `predict` of the wheel fails under numpy 2; this is what it calls
            model.f.predict(text.replace("\n", " ") + "\n", 2, 0.0, "strict")

    ours, other, ratios = compare(lambda: scorer.score(documents), theirs, arguments.pairs or 5)
    print(f"{len(documents)} documents of {len(documents[0])} characters, CPU seconds, one thread")
    print(f"tier 1   {len(documents) / ours:8.0f} documents a CPU second")
    print(f"fastText {len(documents) / other:8.0f} (dim 100, pairs of words, two labels)")
    print(told("tier 1's rate over fastText's:", ratios))


class NoScores:
    """Costs nothing and returns what a scorer returns: what is left is the engine."""

    def __init__(self, types: dict[str, pa.DataType]):
        self.row = dict.fromkeys(types, 0.5) | {"stance": "modelled", "tier": 1, "windows": None}
        self.hash = "none"

    def score(self, documents: list[str]) -> list[dict]:
        return [self.row for _ in documents]


def _overhead(arguments: argparse.Namespace) -> None:
    talk.disable("datatrove")
    documents = texts(arguments.documents or 4000, 3000)
    types = blocks.column_types()
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "in", documents)
        shards = find(str(source), 1 << 30).shards
        made = iter(range(10**6))

        def ours() -> None:
            out = str(Path(folder) / f"out{next(made)}")
            data = ShardReader(shards).run(None, 0, 1)
            block = blocks.RegulationScorer(load=lambda **_: NoScores(types))
            sidecar = ("scores", types | {"characters": pa.int32()})
            for _ in ShardWriter(shards, out, out, sidecar).run(block.run(data)):
                pass

        def theirs() -> None:
            writer = ParquetWriter(str(Path(folder) / f"theirs{next(made)}"))
            passed: Any = writer(ParquetReader(str(source))())
            deque(passed, maxlen=0)

        first, second, ratios = compare(ours, theirs, arguments.pairs or 5)
    print(f"{len(documents)} documents of {len(documents[0])} characters, CPU seconds")
    ours_each, theirs_each = (seconds / len(documents) * 1e6 for seconds in (first, second))
    print(f"curate    {ours_each:6.0f} microseconds a document (reads text, writes {len(types)} columns)")
    print(f"datatrove {theirs_each:6.0f} (parquet to parquet, nothing between)")
    print(told("curate's time over datatrove's:", sorted(1 / ratio for ratio in ratios)))


def _tier2(arguments: argparse.Namespace) -> None:
    import torch

    from calibrate import models
    from data_curation import features, reader

    documents = texts(arguments.documents or 6, 3000)
    scorer = blocks.load_default(arguments.scorer, "2")
    checkpoint, layers = scorer.second.checkpoint, scorer.second.tier.settings["layers"]
    windows = [text[start:end] for text in documents for start, end in features.windows(text)]
    ids = [checkpoint.tokenizer(window)["input_ids"][: reader.MAX_TOKENS] for window in windows]

    def bare() -> None:
        with torch.no_grad(), models.cut_after(checkpoint.model, max(layers)):
            for row in ids:
                models.decoder(checkpoint.model)(input_ids=torch.tensor([row]), use_cache=False)

    ours, _, ratios = compare(lambda: scorer.score(documents), bare, arguments.pairs or 5)
    tokens = sum(map(len, ids))
    print(f"{len(documents)} documents, {len(ids)} windows, {tokens} tokens, up to layer {max(layers)}, CPU seconds")
    print(f"tier 2 {tokens / ours:.0f} tokens a CPU second, {len(documents) / ours:.2f} documents")
    print(told("tier 2's rate over the bare forward's:", ratios))


def _workers(arguments: argparse.Namespace) -> None:
    """Wall time, and the CPU time of the busier worker: what wall time would be where nothing else runs."""
    documents = texts(2000, 3000) * ((arguments.documents or 60_000) // 2000)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "in", documents, files=12)
        made = iter(range(100))
        notes = Path(folder) / "notes"
        notes.mkdir()
        os.environ["NOTES"] = str(notes)

        def run(workers: int) -> tuple[float, float]:
            out = Path(folder) / f"out{next(made)}"
            for old in notes.iterdir():
                old.unlink()
            start = time.perf_counter()
            config = Config(workers=workers)
            runs.score(str(source), out, tier="1", scorer=arguments.scorer, config=config, load=load_noted)
            wall = time.perf_counter() - start
            busy = [json.loads(path.read_text())[1] for path in notes.iterdir()]
            return wall, max(busy)

        pairs = []
        for _ in range(arguments.pairs or 1):
            (wall, busy), (wall_two, busy_two) = run(1), run(2)
            pairs.append((wall / wall_two, busy / busy_two))
            print(f"one worker {wall:.1f} s (CPU {busy:.1f}), two {wall_two:.1f} s (busier one {busy_two:.1f})")
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(told("speed of two workers over one:", sorted(pair[0] for pair in pairs)))
    print(told("by the busier worker's CPU time:", sorted(pair[1] for pair in pairs)))


def _memory(arguments: argparse.Namespace) -> None:
    """Each size in a process of its own."""
    peaks = []
    for number in arguments.sizes:
        child = [sys.executable, __file__, "peak", "--documents", str(number), "--scorer", arguments.scorer]
        told = subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()
        peaks.append([float(value) for value in told])
        print(f"{number:9,} documents of 300 characters: worker {peaks[-1][0]:.0f} MiB, run {peaks[-1][1]:.0f} MiB")
    print(f"ratio of the worker's peaks {peaks[1][0] / peaks[0][0]:.2f}, of the run's {peaks[1][1] / peaks[0][1]:.2f}")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Noted:
    """A scorer that notes the greatest memory and the CPU time of its process at each batch."""

    def __init__(self, scorer):
        self.scorer, self.hash, self.first, self.second = scorer, scorer.hash, scorer.first, scorer.second

    def score(self, documents: list[str]) -> list[dict]:
        rows = self.scorer.score(documents)
        Path(os.environ["NOTES"], str(os.getpid())).write_text(json.dumps([peak_mib(), time.process_time()]))
        return rows


def load_noted(source: str, tier: str, model: str | None) -> Noted:
    return Noted(blocks.load_default(source, tier, model))


def _peak(arguments: argparse.Namespace) -> None:
    documents = texts(2000, 300)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        os.environ["NOTES"] = f"{folder}/notes"
        Path(os.environ["NOTES"]).mkdir()
        with path.open("w", encoding="utf-8") as file:
            for i in range(arguments.documents):
                file.write(json.dumps({"id": str(i), "text": documents[i % 2000]}) + "\n")
        runs.score(str(path), Path(folder) / "out", tier="1", scorer=arguments.scorer, load=load_noted)
        (note,) = Path(os.environ["NOTES"]).iterdir()
        print(json.loads(note.read_text())[0], peak_mib())


if __name__ == "__main__":
    main()
