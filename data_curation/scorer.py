"""The scorer: how far a text models emotional regulation, in two tiers.

Tier 1 weighs words and pairs of words, for every document; tier 2 reads windows with a causal language model and
weighs its residual states, for the documents that tier 1 finds emotional or doubtful (`auto`).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from data_curation import features, kernels
from data_curation.facets import FACETS, MALADAPTIVE, STANCES

SHIPPED = Path(__file__).parent / "weights"
FORMAT = 1  # of the folder that `fit` writes
EMOTIONS = ("desperate", "calm", "angry", "afraid", "sad", "happy", "hopeful", "hostile", "panicked", "ashamed")
EMOTIONS += ("proud", "frustrated")
GATES = ("affect_present", "corner_cutting", "invalidation")  # all low: there is nothing to regulate
GREATEST = ("affect_present", "distress", "hostility", *MALADAPTIVE)  # of a document: its strongest window
WINDOWS = "list<struct<start:int32,end:int32,regulation:float32,affect_present:float32>>"

COLUMNS = dict.fromkeys(("regulation", "regulation_low", "regulation_high", *FACETS), "float32")
COLUMNS |= dict.fromkeys((f"{facet}_confidence" for facet in FACETS), "float32")
COLUMNS |= {"stance": "string", "arc": "float32"}
COLUMNS |= dict.fromkeys((f"emotion_{emotion}" for emotion in EMOTIONS), "float32")
COLUMNS |= {"tier": "int8", "windows": WINDOWS}


class Head(NamedTuple):
    """What a head's raw number means, at rising knots of it; between them linear. From cross-validated predictions."""

    raw: list[float]  # knots
    score: list[float]  # 0 to 1: mean label of the passages about that knot, made rising
    confidence: list[float]  # share of them whose label lies within 0.25, one level, of their score
    low: list[float]  # with `high` the interval that holds 90 % of their labels
    high: list[float]

    def at(self, raw: np.ndarray, what: str) -> np.ndarray:
        """`score`, `confidence`, `low` or `high` at raw numbers of any shape, float32."""
        return np.interp(raw, self.raw, getattr(self, what)).astype(np.float32)


class Tier(NamedTuple):
    """The fitted heads of one tier; `names` are regulation, the facets it knows, and the three stances."""

    number: int
    names: list[str]
    heads: dict[str, Head]  # of regulation and the facets
    bias: np.ndarray  # float32 [heads]
    settings: dict[str, Any]  # gates, threshold; tier 1: words, escalate; tier 2: layers, reads, model


def load_scorer(source: str = "default", tier: str = "auto", model: str | None = None) -> "Scorer":
    """Loads the shipped scorer or a folder that `curate fit` wrote.

    Args:
        tier: `1`, `2`, or `auto`: tier 2 for the documents that tier 1 finds emotional or doubtful.
        model: the model that tier 2 reads with, anything that `calibrate.models.load` takes; by default the one that
            it was fitted on.

    Raises:
        ValueError: no such tier, no scorer in the folder, a model where none is used, or one of another shape than the
            scorer's.

    Example:
        >>> load_scorer(tier="1").score(["I was furious, so I walked once round the block and then I rang her."])
    """
    if tier not in ("1", "2", "auto"):
        raise ValueError(f"`tier` {tier!r} is none of 1, 2, auto")
    folder = SHIPPED if source == "default" else Path(source)
    if not (folder / "scorer.json").is_file():
        raise ValueError(
            f"scorer {source!r}: no scorer.json there; give `default` or a folder that `curate fit` wrote"
        )
    content = (folder / "scorer.json").read_bytes()
    config = json.loads(content)
    if config.get("format") != FORMAT:
        raise ValueError(f"scorer {source!r} has format {config.get('format')}, not {FORMAT}; fit it again")
    if tier == "2" and "tier2" not in config:
        raise ValueError(f"scorer {source!r} has no tier 2; use tier 1, or fit it with `--model`")
    if model is not None and (tier == "1" or "tier2" not in config):
        why = "tier 1 reads with no model" if tier == "1" else f"scorer {source!r} has no tier 2"
        raise ValueError(f"`model` {model!r}: {why}; leave it out")
    digest = hashlib.sha256(tier.encode() + content)
    for file in ("tier1.safetensors", "tier2.safetensors"):
        if (folder / file).is_file():
            digest.update((folder / file).read_bytes())
    first = _first(folder, config) if tier != "2" else None
    second = _second(folder, config, model, digest) if tier != "1" and "tier2" in config else None
    return Scorer(first, second, digest.hexdigest()[:32])


def _tier(number: int, config: dict[str, Any], bias: np.ndarray) -> Tier:
    heads = {name: Head(**knots) for name, knots in config["heads"].items()}
    return Tier(number, config["names"], heads, bias, config["settings"])


class Words:
    """Weights of words and pairs: a text's number is a sum over its tokens, by the root of their squared idf."""

    def __init__(self, vocabulary: features.Vocabulary, idf: np.ndarray, weights: np.ndarray):
        self.vocabulary, idf = vocabulary, idf.astype(np.float32)[:, None]
        self.table = np.concatenate([idf * weights.astype(np.float32), idf**2], 1)

    def read(self, text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """Numbers of every window and then its thirds, float32 [windows, 1 + PARTS, heads]."""
        parts = features.sums(self.vocabulary, self.table, text, spans)
        whole = np.concatenate([parts.sum(1, keepdims=True), parts], 1)
        return whole[..., :-1] / np.sqrt(np.maximum(whole[..., -1:], np.float32(1e-9)))


class FirstTier:
    """Tier 1: raw numbers of windows from the words and pairs in them."""

    def __init__(self, tier: Tier, words: Words):
        self.tier, self.words = tier, words

    def read(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, None]:
        """Raw numbers [windows, 1 + PARTS, heads]: of the window and of its thirds; no emotions."""
        return self.words.read(text, spans) + self.tier.bias, None


class SecondTier:
    """Tier 2: raw numbers of windows from words and a language model's states, and its emotion readings."""

    def __init__(self, tier: Tier, words: Words, tensors: dict[str, np.ndarray], checkpoint):
        self.tier, self.words, self.tensors, self.checkpoint = tier, words, tensors, checkpoint
        self.embedding = kernels.Embedding(*(tensors[name] for name in kernels.Embedding._fields))

    def read(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray | None]:
        """Raw numbers [windows, 1 + PARTS, heads], and emotions in sigma of neutral text [windows, emotions]."""
        from data_curation import reader

        settings = self.tier.settings
        raw, emotions = self.words.read(text, spans) + self.tier.bias, []
        for window, (start, end) in enumerate(spans):
            states = reader.read(self.checkpoint, [text[start:end]], settings["layers"])[0]
            for part, third in enumerate((None, *reader.POOLS[1:])):
                # One point at a time: the last bits of a product of matrices depend on how many rows it has.
                point = self.embedding.project(reader.select(states, settings, third))
                raw[window, part] += self.embedding.alike(point) @ self.tensors["states"]
            if settings["emotions"]:
                emotions.append(reader.emotions(states, settings, self.tensors))
        return raw, np.stack(emotions).astype(np.float32) if emotions else None


def _first(folder: Path, config: dict[str, Any]) -> FirstTier:
    tensors = load_file(folder / "tier1.safetensors")
    words = {word: row for row, word in enumerate(config["tier1"]["settings"]["words"].split())}
    vocabulary = features.Vocabulary(words, tensors["pairs"])
    tier = _tier(1, config["tier1"], tensors["bias"])
    return FirstTier(tier, Words(vocabulary, tensors["idf"], tensors["weights"]))


def _second(folder: Path, config: dict[str, Any], model: str | None, digest) -> SecondTier:
    from calibrate import models

    settings = config["tier2"]["settings"]
    checkpoint = models.load(model or settings["model"])
    text = models.text_config(checkpoint.model)
    found, wanted = [text.hidden_size, text.num_hidden_layers], settings["shape"]
    if found != wanted:
        raise ValueError(
            f"model {checkpoint.name!r} has width and depth {found}, this scorer was fitted on {settings['model']!r} "
            f"with {wanted}; fit one for it with `curate fit --model {checkpoint.name}`"
        )
    digest.update(f"{checkpoint.weight_hash} {checkpoint.adapter_hash} {checkpoint.model.dtype}".encode())
    tensors = load_file(folder / "tier2.safetensors")
    tensors |= {name: tensors[name].astype(np.float32) for name in ("components", "points")}
    first = _first(folder, config).words  # both tiers have the same vocabulary
    words = Words(first.vocabulary, load_file(folder / "tier1.safetensors")["idf"], tensors["weights"])
    return SecondTier(_tier(2, config["tier2"], tensors["bias"]), words, tensors, checkpoint)


class Scorer:
    """Scores documents; `hash` names weights, settings, tier and the reading model."""

    def __init__(self, first: FirstTier | None, second: SecondTier | None, digest: str):
        self.first, self.second, self.hash = first, second, digest

    def score(self, texts: list[str]) -> list[dict[str, Any]]:
        """The columns of `COLUMNS`, in that order, of every text; independent of what other texts are with it.

        Raises:
            ValueError: a text is empty or blank; names its index.
        """
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {index} is empty; leave it out, a score needs words")
        if not texts:
            return []
        reading = self.first or self.second
        assert reading is not None
        rows = _read(reading, texts)
        if self.first and self.second:
            again = [index for index, row in enumerate(rows) if escalates(self.first.tier, row)]
            for index, row in zip(again, _read(self.second, [texts[index] for index in again]), strict=True):
                rows[index] = row
        return rows


def escalates(tier: Tier, row: dict[str, Any]) -> bool:
    """Whether `auto` reads a document again with tier 2: one of tier 1's gating facets reaches its score for that."""
    edges = tier.settings["escalate"]  # of a scorer without gating facets none: nothing says that tier 2 is not needed
    return not edges or any(row[name] >= value for name, value in edges.items())


def _read(reading: FirstTier | SecondTier, texts: list[str]) -> list[dict[str, Any]]:
    if not texts:
        return []
    spans = [features.windows(text) for text in texts]
    raws, emotions = zip(*(reading.read(text, span) for text, span in zip(texts, spans, strict=True)), strict=True)
    return documents(reading.tier, spans, np.concatenate(raws), emotions)


def documents(tier: Tier, spans: list[list[tuple[int, int]]], raw: np.ndarray, emotions) -> list[dict[str, Any]]:
    """Rows of documents from the raw numbers of all their windows, float32 [windows, 1 + PARTS, heads].

    A facet of a document is its mean over windows by length, and for what must not drown in a long text (`GREATEST`)
    its greatest. `regulation` and its interval weigh a window by length and `affect_present`. `arc` is the last third
    minus the first, in thirds of windows.
    """
    sizes = np.array([len(span) for span in spans])
    starts = np.cumsum(sizes) - sizes
    lengths = np.array([end - start for span in spans for start, end in span], np.float32)
    names = {name: column for column, name in enumerate(tier.names)}
    head = {name: tier.heads[name] for name in names if name in tier.heads}
    score = {name: head[name].at(raw[:, 0, names[name]], "score") for name in head}
    affect = score.get("affect_present", np.ones(len(lengths), np.float32))
    nothing = _nothing(tier, score)
    mass = lengths * np.where(nothing, np.float32(1e-6), np.maximum(affect, np.float32(0.05)))
    table = _table(head, score, raw[:, 0], names, (mass, lengths, starts))
    parts = head["regulation"].at(raw[:, 1:, names["regulation"]], "score")
    stances = np.add.reduceat(raw[:, 0, [names[stance] for stance in STANCES]] * lengths[:, None], starts)
    values = {name: column.tolist() for name, column in table.items()}
    empty = np.logical_and.reduceat(nothing, starts).tolist()
    regulations = [None if none else value for value, none in zip(score["regulation"].tolist(), nothing, strict=True)]
    rows, known = [], tier.settings.get("emotions", ())
    for index, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {name: column[index] for name, column in values.items()}
        row["stance"] = STANCES[int(stances[index].argmax())]
        row["arc"] = _arc(parts[start : start + size].ravel())
        if empty[index]:
            row |= dict.fromkeys(("regulation", "regulation_low", "regulation_high", "arc"))
        if emotions[index] is not None:
            means = _mean(emotions[index], lengths[start : start + size], np.zeros(1, int))[0]
            row |= {f"emotion_{name}": mean for name, mean in zip(known, means.tolist(), strict=True)}
        row["tier"] = tier.number
        window = zip(spans[index], regulations[start:], affect[start : start + size].tolist(), strict=False)
        row["windows"] = [_window(a, b, value, strength) for (a, b), value, strength in window]
        rows.append(row)
    return rows


def _table(
    head: dict[str, Head], score: dict[str, np.ndarray], raw: np.ndarray, names: dict[str, int], by: tuple
) -> dict[str, np.ndarray]:
    """Columns of documents: regulation with its interval by mass, facets and their confidence by length."""
    mass, lengths, starts = by
    table = {}
    for column, what in (("regulation", "score"), ("regulation_low", "low"), ("regulation_high", "high")):
        table[column] = _mean(head["regulation"].at(raw[:, names["regulation"]], what), mass, starts)
    for facet in (facet for facet in FACETS if facet in head):
        mean = _mean(score[facet], lengths, starts)
        table[facet] = np.maximum.reduceat(score[facet], starts) if facet in GREATEST else mean
        table[f"{facet}_confidence"] = _mean(head[facet].at(raw[:, names[facet]], "confidence"), lengths, starts)
    return table


def _window(start: int, end: int, regulation: float | None, affect: float) -> dict[str, Any]:
    return {"start": start, "end": end, "regulation": regulation, "affect_present": affect}


def _nothing(tier: Tier, score: dict[str, np.ndarray]) -> np.ndarray:
    """Which windows have nothing to regulate: all gating facets are low. None where the scorer has no gates."""
    low = [score[name] < gate for name, gate in tier.settings["gates"].items()]
    return np.logical_and.reduce(low) if low else np.zeros(len(score["regulation"]), bool)


def _mean(values: np.ndarray, mass: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means by document, weighted by mass [windows], of values [windows, ...]."""
    mass = mass.reshape(-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(values * mass, starts) / np.add.reduceat(mass, starts)


def _arc(parts: np.ndarray) -> float:
    third = len(parts) // 3
    return float(parts[-third:].mean() - parts[:third].mean())
