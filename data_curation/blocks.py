"""datatrove blocks: score, filter, reweight and tag documents; and the same for `datasets.map`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_curation.documents import FAULT, Documents, Fault

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1_000_000  # scores do not depend on either
WINDOW = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("regulation", pa.float32())])
WINDOW = pa.struct([*WINDOW, pa.field("affect_present", pa.float32())])


def load_default(source: str = "default", tier: str = "auto", model: str | None = None):
    """The scorer of `data_curation.scorer`, imported when a worker needs it."""
    from data_curation.scorer import load_scorer

    return load_scorer(source=source, tier=tier, model=model)


def column_types() -> dict[str, pa.DataType]:
    """Arrow types of a document's scores in their fixed order, without its id."""
    from data_curation.scorer import COLUMNS

    return {name: pa.list_(WINDOW) if kind.startswith("list") else arrow(kind) for name, kind in COLUMNS.items()}


def arrow(kind: str) -> pa.DataType:
    return pa.type_for_alias(kind)


def reaches(score: float, edge: float) -> bool:
    """Whether a score is at an edge or above it. Scores are kept as float32: the edge is taken so too."""
    return bool(np.float32(score) >= np.float32(edge))


def share(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on seed, purpose and id alone: no order of documents changes it."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class RegulationScorer(PipelineStep):
    """Adds the columns of the scorer to the metadata of each document.

    The model is loaded in the worker at its first document. With `expected_hash`, documents are refused where the
    scorer found under that name has become another one.
    """

    type, name = "✍ - ANNOTATOR", "emotional regulation"

    def __init__(
        self,
        source: str = "default",
        tier: str = "auto",
        model: str | None = None,
        expected_hash: str | None = None,
        load: Callable = load_default,
    ):
        super().__init__()
        self.source, self.tier, self.model, self.expected_hash, self.load = source, tier, model, expected_hash, load
        self.scorer = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"scorer": None}

    def loaded(self):
        """The scorer, loaded once in each worker."""
        if self.scorer is None:
            try:
                self.scorer = self.load(source=self.source, tier=self.tier, model=self.model)
            except OSError as error:
                raise ValueError(f"the scorer {self.source!r} cannot be loaded ({error})") from error
            if self.expected_hash not in (None, self.scorer.hash):
                is_now = f"the scorer {self.source!r} is {self.scorer.hash} now and was {self.expected_hash}"
                raise ValueError(f"{is_now} when the run began; start afresh with --fresh or another --out")
        return self.scorer

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for batch in _batches(data):
            sound = [document for document in batch if FAULT not in document.metadata]
            with self.track_time("batch"):
                rows = self.loaded().score([document.text for document in sound]) if sound else []
            for document, row in zip(sound, rows, strict=True):
                document.metadata |= row | {"characters": len(document.text)}
            yield from batch


def _batches(data: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in data:
        if FAULT not in document.metadata and (not document.text or document.text.isspace()):
            raise Fault(f"the document {document.id!r} has no text; leave it out before it is scored")
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class RegulationFilter(PipelineStep):
    """Drops documents of the low tail: those whose whole interval lies below `below`. A null score is never dropped.

    Args:
        below: threshold on `regulation_high`, the upper end of the interval of `regulation`.
        exclusion_writer: a datatrove writer for what is dropped, with its scores and `filter_reason`.
        drop: False only notes the reason and lets every document through.
    """

    type, name = "🔻 - FILTER", "emotional regulation"

    def __init__(self, below: float, exclusion_writer=None, drop: bool = True):
        super().__init__()
        self.below, self.exclusion_writer, self.drop = below, exclusion_writer, drop

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        with self.exclusion_writer or nullcontext() as writer:
            for document in data:
                reason = drop_reason(document.metadata, self.below)
                document.metadata["filter_reason"] = reason
                self.stat_update("total", "dropped" if reason else "forwarded")
                if reason is None or not self.drop:
                    yield document
                elif writer is not None:
                    writer.write(document, rank)


def drop_reason(scores: dict[str, Any], below: float) -> str | None:
    """Why a document belongs to the tail, with the facets that speak loudest for it; None where it is kept."""
    from data_curation.facets import MALADAPTIVE

    if scores["regulation"] is None:
        return None
    upper = scores["regulation"] if scores.get("regulation_high") is None else scores["regulation_high"]
    if reaches(upper, below):
        return None
    facets = sorted(((scores.get(name) or 0.0, name) for name in MALADAPTIVE), reverse=True)[:3]
    named = ", ".join(f"{name} {value:.2f}" for value, name in facets)
    return f"regulation {scores['regulation']:.3f}, at most {upper:.3f}, is below {below:g}; highest: {named}"


class Reweighter(PipelineStep):
    """Adds `weight`, and with a seed `copies`, by a table that `selection.fit_weights` made of the whole corpus.

    `copies` is the weight rounded up or down by a hash of seed and id, so that its expectation is the weight.
    """

    type, name = "⚖ - REWEIGHTER", "emotional regulation"

    def __init__(self, table: dict[str, Any], topic: str | None = None, format: str | None = None, seed: int = 0):
        super().__init__()
        if table.get("columns", [topic, format]) != [topic, format]:  # none in what `fit_weights` gives
            there, fitted = ({"topic": a, "format": b} for a, b in ((topic, format), table["columns"]))
            raise ValueError(f"the table was fitted with the columns {fitted}, and {there} are given; give those")
        self.table, self.topic, self.format, self.seed = table, topic, format, seed

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        from data_curation.selection import weight_of

        for document in data:
            scores = document.metadata
            topic, form = (str(scores.get(name)) if name else "all" for name in (self.topic, self.format))
            weight = weight_of(self.table, scores["regulation"], topic, form, scores["characters"])
            scores["weight"] = weight
            whole = int(weight)
            scores["copies"] = whole + (share(self.seed, "copies", document.id) < weight - whole)
            yield document


class Tagger(PipelineStep):
    """Puts a control token before the text of each document whose regulation is known.

    Args:
        edges: the two scores that part the three bands; a score on an edge belongs to the upper band.
        tokens: of the low, the middle and the high band.
        drop_out: share of the documents with a band that stay without a token, so that it can be absent later.
        untagged: share of all documents that stay without a token and go to the end of training (`cooldown`).
        seed: of both draws, which depend on it and on the id alone.
    """

    type, name = "🏷 - TAGGER", "emotional regulation"

    def __init__(
        self,
        edges: tuple[float, float],
        tokens: tuple[str, str, str],
        drop_out: float = 0.1,
        untagged: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.edges, self.tokens, self.drop_out, self.untagged, self.seed = edges, tokens, drop_out, untagged, seed

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data:
            scores = document.metadata
            if any(token in document.text for token in self.tokens):
                self.stat_update("texts that hold a token already")
                scores["holds_token"] = True
            scores["tag"], scores["tag_reason"] = self._tag(document)
            scores["cooldown"] = scores["tag_reason"] == "cooldown"
            if scores["tag"]:
                document.text = scores["tag"] + document.text
            self.stat_update(scores["tag_reason"])
            yield document

    def _tag(self, document: Document) -> tuple[str | None, str]:
        regulation = document.metadata["regulation"]
        if share(self.seed, "cooldown", document.id) < self.untagged:
            return None, "cooldown"
        if regulation is None:
            return None, "nothing to regulate"
        if share(self.seed, "drop-out", document.id) < self.drop_out:
            return None, "drop-out"
        band = sum(reaches(regulation, edge) for edge in self.edges)
        return self.tokens[band], ("low", "middle", "high")[band]


class MapScorer:
    """A function for `datasets.map` with `batched=True`; give `features` too, or a first batch of nulls fixes a type.

    Example:
        >>> score = MapScorer(tier="1")
        >>> dataset.map(score, batched=True, features=score.features(dataset.features))
    """

    def __init__(self, text_column: str = "text", source: str = "default", tier: str = "auto", model=None, **options):
        self.text_column = text_column
        self.block = RegulationScorer(source, tier, model, **options)
        # `datasets` finds an earlier result by what this object holds: a name would still match a changed scorer.
        self.block.expected_hash = self.block.loaded().hash

    def __getstate__(self) -> dict[str, Any]:
        block = self.block
        return {
            "text_column": self.text_column,
            "block": (block.source, block.tier, block.model, block.expected_hash, block.load),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.text_column, self.block = state["text_column"], RegulationScorer(*state["block"])

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        texts = batch[self.text_column]
        _check_free(batch)
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text or text.isspace():
                what = f"`{self.text_column}` of row {row} of a batch is {text!r}"
                raise ValueError(f"{what}, not a text with words in it; filter such rows out before `map`")
        rows = self.block.loaded().score(texts)
        return {name: [row[name] for row in rows] for name in rows[0]}

    def features(self, known):
        """The features of the result: those of the dataset and the score columns."""
        from datasets import Features

        _check_free(known)

        return Features({**known, **Features.from_arrow_schema(pa.schema(list(column_types().items())))})


def _check_free(columns) -> None:
    if taken := sorted({*columns} & {*column_types()}):
        raise ValueError(f"the column {taken[0]!r} bears the name of a score; rename it in the dataset")
