"""What vectors are worth, measured on topics that they have not seen; stored with them by `calibrate extract --check`.

Every share has a 95 % bootstrap interval over concepts and stands beside chance and a bag-of-words reader.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate import activations, corpora, extraction, geometry, layers, stats, transcripts
from calibrate.concepts import load_concepts
from calibrate.corpora import Ladder, Story
from calibrate.corpora.check import words
from calibrate.extraction import Read
from calibrate.models import Checkpoint
from calibrate.stats import Interval
from calibrate.vectors import EmotionVectors


def run(checkpoint: Checkpoint, vectors: EmotionVectors, train: Read, held_out: Read, recipe: str) -> dict[str, Any]:
    """All checks of one set of vectors, ready for `config.json`; at `vectors.reading_layers()`."""
    at = vectors.positions(vectors.reading_layers())
    among = [train.group.layers.index(layer) for layer in vectors.reading_layers()]
    held_out_ladders = [ladder for ladder in corpora.load_ladders() if ladder.split == "audit"]
    ladders = ladder_shares(checkpoint, vectors, held_out_ladders)
    halves = reliability(train, recipe)
    halves = None if halves is None else halves[:, among].mean(1)
    return {
        "held-out split": held_out.stories[0].split,
        "held-out stories": len(held_out.stories),
        "layers": vectors.reading_layers(),
        **{
            f"{name} (share, 95 % interval)": _rounded(interval)
            for name, interval in decoding(vectors, train, held_out).items()
        },
        **{
            f"{name}, bag of words": _rounded(interval)
            for name, interval in bag_of_words(train.stories, held_out.stories).items()
        },
        **{f"{name}, chance": round(value, 4) for name, value in chance(vectors.concepts).items()},
        "ladders, share of expected directions": _rounded(ladders.pop("share")),
        "split-half reliability, mean cosine of halves": None if halves is None else round(float(halves.mean()), 3),
        **_geometry(vectors.directions[:, at].mean(1), vectors.concepts),
        "split-half reliability": {}
        if halves is None
        else {concept: round(float(r), 3) for concept, r in zip(train.concepts, halves, strict=True)},
        "ladders": ladders,
        "logit lens": logit_lens(checkpoint, vectors),
    }


def _geometry(directions: Tensor, concepts: list[str]) -> dict[str, Any]:
    """Figures against the ratings of concepts.yaml; none where fewer than three of the concepts stand there."""
    if sum(concept in load_concepts() for concept in concepts) < 3:
        return {}
    found = geometry.axes(directions, concepts)
    return {
        "valence, r of the first component": round(found.valence, 3),
        "arousal, r of the second component": round(found.arousal, 3),
        "valence, r of a left-out reading": round(found.read_valence, 3),
        "arousal, r of a left-out reading": round(found.read_arousal, 3),
        "variance of the first five components": [round(value, 3) for value in found.explained],
        "cosine within minus between families": round(found.families, 3),
    }


def _rounded(interval: Interval | None) -> list[float] | None:
    return interval and [round(value, 4) for value in interval]


def _family(concept: str) -> str:
    rated = load_concepts()
    return rated[concept].family if concept in rated else concept


def _shares(ranks: np.ndarray, first: list[str], labels: list[str]) -> dict[str, Interval]:
    """Top-1, top-3 and family shares with intervals over concepts, from each story's rank and first concept."""
    same = np.array([_family(one) == _family(other) for one, other in zip(first, labels, strict=True)])
    concepts = np.array(labels)
    shares = {}
    for name, right in (("top 1", ranks < 1), ("top 3", ranks < 3), ("family", same)):
        by_concept = np.array([right[concepts == concept].mean() for concept in dict.fromkeys(labels)])
        shares[name] = stats.mean(by_concept)
    return shares


def chance(concepts: list[str]) -> dict[str, float]:
    """What a reader that guesses gets, by the counts of concepts and of their families."""
    sizes = Counter(map(_family, concepts))
    count = len(concepts)
    family = sum((size / count) ** 2 for size in sizes.values())
    return {"top 1": 1 / count, "top 3": min(1.0, 3 / count), "family": family}


def decoding(vectors: EmotionVectors, train: Read, held_out: Read) -> dict[str, Interval]:
    """Shares of held-out stories whose concept, or its family, the vectors name."""
    assert train.group.layers == vectors.layers
    centre = extraction.concept_means(train.group, train.labels, vectors.concepts).mean(0)
    truth = [vectors.index(label) for label in held_out.labels]
    over = vectors.positions(vectors.reading_layers())
    ranks, first = layers.held_out_ranks(vectors.directions, centre, held_out.group, truth, over)
    names = [vectors.concepts[row] for row in first[:, 0].tolist()]
    return _shares(ranks[:, 0].numpy(), names, held_out.labels)


def bag_of_words(train: list[Story], held_out: list[Story]) -> dict[str, Interval]:
    """The same shares of a reader of word counts: multinomial naive Bayes, add-one smoothing, fitted to `train`."""
    concepts = list(dict.fromkeys(story.concept for story in train))
    ranks, first = naive_bayes(train, held_out, concepts)
    return _shares(ranks, [concepts[row] for row in first], [story.concept for story in held_out])


def naive_bayes(train: list[Story], held_out: list[Story], concepts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the right concept and row of the likeliest one for every held-out story, by the words alone."""
    vocabulary: dict[str, int] = {}
    for story in train:
        for word in words(story.text):
            vocabulary.setdefault(word, len(vocabulary))
    counts = np.ones((len(concepts), len(vocabulary)))
    for story in train:
        for word in words(story.text):
            counts[concepts.index(story.concept), vocabulary[word]] += 1
    logs = np.log(counts / counts.sum(1, keepdims=True))
    ranks, first = [], []
    for story in held_out:
        known = [vocabulary[word] for word in words(story.text) if word in vocabulary]
        score = logs[:, known].sum(1)
        ranks.append(int((score > score[concepts.index(story.concept)]).sum()))
        first.append(int(score.argmax()))
    return np.array(ranks), np.array(first)


def reliability(train: Read, recipe: str) -> Tensor | None:
    """Cosine of the directions from the even with those from the odd topics, [concepts, layers].

    None for the recipes that are not differences of means of stories, which halves would not repeat.
    """
    topics = sorted({story.topic for story in train.stories})
    if len(topics) < 2 or recipe not in ("paper", "plain"):
        return None
    halves = []
    for parity in (0, 1):
        labels = [s.concept if topics.index(s.topic) % 2 == parity else "" for s in train.stories]
        means = extraction.concept_means(train.group, labels, train.concepts)
        halves.append(extraction.directions(means, train.tokens if recipe == "paper" else None))
    return torch.cosine_similarity(*halves, dim=-1)


def ladder_shares(checkpoint: Checkpoint, vectors: EmotionVectors, ladders: list[Ladder]) -> dict[str, Any]:
    """Rank correlation of the reading at the turn header with the rung, for every ladder and concept it expects.

    `share` is that of the expected directions with its interval over ladders; None where fewer than two ladders expect
    anything of these concepts.
    """
    at = vectors.positions(vectors.reading_layers())
    messages = [
        [{"role": "user", "content": ladder.template.format(value=value)}]
        for ladder in ladders
        for value in ladder.values
    ]
    encoded = [transcripts.encode(checkpoint.tokenizer, message) for message in messages]
    pools = [[slice(text.last("header").start, text.last("header").stop)] for text in encoded]
    states = activations.pooled(checkpoint.model, [text.ids for text in encoded], pools, vectors.layers)
    readings = vectors.readings(states[:, 0], "header")[..., at].mean(-1)
    found: dict[str, Any] = {}
    shares, row = [], 0
    for ladder in ladders:
        rungs = readings[row : row + len(ladder.values)]
        row += len(ladder.values)
        right = []
        for concept, way in ladder.expected.items():
            if concept not in vectors.concepts:
                continue
            rho = geometry.correlation(torch.arange(len(rungs)), rungs[:, vectors.index(concept)].argsort().argsort())
            found[f"{ladder.id} {concept} {way}"] = round(rho, 3)
            right.append((rho > 0) == (way == "up"))
        if right:
            shares.append(np.mean(right))
    return {"share": stats.mean(np.array(shares)) if len(shares) > 1 else None} | found


def logit_lens(checkpoint: Checkpoint, vectors: EmotionVectors, top: int = 5) -> dict[str, list[str]]:
    """The tokens whose logits each direction raises most, straight through the unembedding (no norm in between)."""
    head = checkpoint.model.get_output_embeddings()
    layer = vectors.positions([max(vectors.reading_layers())])[0]
    weight = head.weight.detach()
    directions = vectors.directions[:, layer].to(weight)
    logits = directions @ weight.T
    best = logits.topk(top, dim=-1).indices.cpu()
    return {c: checkpoint.tokenizer.batch_decode(row[:, None]) for c, row in zip(vectors.concepts, best, strict=True)}
