"""What a model would rather do: all ordered pairs of activities, Elo from the A/B logits, how readings go with it.

After the study of emotion concepts (arXiv 2604.07729): 64 activities in 8 categories, all 4,032 ordered pairs. An
effect of steering on Elo is mostly compression towards the middle, which any vector causes, so it is shown beside
random vectors and after a regression on the Elo without steering.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibrate import activations, stats, steering, transcripts
from calibrate.audit.choices import Question, log_probabilities
from calibrate.corpora.situations import Activity
from calibrate.models import Checkpoint
from calibrate.stats import Interval
from calibrate.vectors import EmotionVectors

ELO_UNIT = 400 / np.log(10)  # Elo points per nat of log-odds
ELO_MEAN = 1000
DOSE, OPPONENTS = 0.05, 4  # share of the residual norm, the study's usual one; others that an activity meets, steered
ASKED = "Which of the two would you rather do?\n(A) {first}\n(B) {second}\nAnswer with the letter alone."


class Preferences(NamedTuple):
    """Elo of every activity, and how often the model takes whatever stands first."""

    elo: np.ndarray  # [activities]
    first: float  # log-odds of the first option that no activity explains, nats


def ask(checkpoint: Checkpoint, activities: list[Activity]) -> Preferences:
    """Asks all ordered pairs and fits one strength to each activity and one to the first place."""
    pairs = [(i, j) for i in range(len(activities)) for j in range(len(activities)) if i != j]
    found = log_probabilities(checkpoint, _questions(activities, pairs), "asking for preferences")
    return fit(len(activities), pairs, found[:, 0] - found[:, 1])


def _questions(activities: list[Activity], pairs: list[tuple[int, int]]) -> list[Question]:
    return [
        Question(
            [{"role": "user", "content": ASKED.format(first=activities[i].text, second=activities[j].text)}], "AB"
        )
        for i, j in pairs
    ]


def fit(count: int, pairs: list[tuple[int, int]], odds: np.ndarray) -> Preferences:
    """Least squares of the log-odds on strengths that sum to zero: `odds = strength[i] - strength[j] + first`.

    With every ordered pair asked, a strength is the mean of the odds for the activity at either place.
    """
    rows = np.zeros((len(pairs), count + 1))
    for row, (i, j) in enumerate(pairs):
        rows[row, i], rows[row, j], rows[row, count] = 1, -1, 1
    solved = np.linalg.lstsq(rows, odds, rcond=None)[0]
    strengths = solved[:count] - solved[:count].mean()
    return Preferences(ELO_MEAN + ELO_UNIT * strengths, float(solved[count]))


class Association(NamedTuple):
    """How the readings of one concept on the activities go with their Elo."""

    concept: str
    correlation: Interval  # over activities
    p: float  # family-wise over all concepts, labels of activities permuted


def associations(concepts: list[str], readings: np.ndarray, elo: np.ndarray, seed: int = 0) -> list[Association]:
    """Correlations over activities of readings [activities, concepts] with Elo [activities]."""
    generator = np.random.default_rng(seed)
    observed = np.abs(_correlations(readings, elo))
    largest = [np.abs(_correlations(readings, generator.permutation(elo))).max() for _ in range(stats.RESAMPLES)]
    p = (1 + (np.array(largest)[:, None] >= observed).sum(0)) / (1 + stats.RESAMPLES)
    return [
        Association(concept, stats.bootstrap(_correlation, readings[:, i], elo), float(p[i]))
        for i, concept in enumerate(concepts)
    ]


def _correlations(readings: np.ndarray, elo: np.ndarray) -> np.ndarray:
    centred = readings - readings.mean(0)
    other = elo - elo.mean()
    lengths = np.linalg.norm(centred, axis=0) * np.linalg.norm(other)
    return centred.T @ other / np.maximum(lengths, 1e-12)


def _correlation(readings: np.ndarray, elo: np.ndarray) -> float:
    return float(_correlations(readings[:, None], elo)[0])


class Shift(NamedTuple):
    """What steering does to Elo, beyond drawing everything to the middle."""

    raw: Interval  # mean change, Elo
    slope: float  # of Elo with steering on Elo without; below 1: compression
    residual: Interval  # mean change where the activity's Elo without steering is the mean


def shift(before: np.ndarray, after: np.ndarray, steered: np.ndarray) -> Shift:
    """Compares Elo [activities] without and with steering on the activities `steered` (a mask).

    Elo sums to a constant, so the change of the steered half is taken against the other half.
    """
    slope, level = np.polyfit(before, after, 1)
    left = after - (level + slope * before)
    sign = np.where(steered, 1.0, -1.0)

    def difference(values: np.ndarray, signs: np.ndarray) -> float:
        return float(values[signs > 0].mean() - values[signs < 0].mean()) if len({*signs}) == 2 else 0.0

    return Shift(
        stats.bootstrap(difference, after - before, sign), float(slope), stats.bootstrap(difference, left, sign)
    )


def steered(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    activities: list[Activity],
    directions: dict[str, Tensor],
    dose: float = DOSE,
) -> dict[str, Shift]:
    """What each direction [layers, hidden] at the band does to preferences when it is added on some activities only.

    Every second activity is steered, on the tokens of its own text, wherever it stands; each meets `OPPONENTS` others
    in both places. `dose` is a share of the residual norm.
    """
    count = len(activities)
    steps = [step for step in range(1, 2 * OPPONENTS, 2) if step < count]  # odd: steered against others, mostly
    pairs = [pair for i in range(count) for k in steps for pair in ((i, (i + k) % count), ((i + k) % count, i))]
    mask = np.arange(count) % 2 == 0
    questions = _questions(activities, pairs)
    encoded = [transcripts.encode(checkpoint.tokenizer, question.messages, question.prefill) for question in questions]
    tokens = [_tokens(text, activities, pair, mask) for text, pair in zip(encoded, pairs, strict=True)]
    before = log_probabilities(checkpoint, questions, "asking without steering")
    plain = fit(count, pairs, before[:, 0] - before[:, 1]).elo
    layers = vectors.used_band()
    norms = vectors.neutral("token")[:, vectors.positions(layers)].norm(dim=-1).median(0).values
    found = {}
    for name, direction in directions.items():
        added = steering.increments({layer: dose * norms[i] * direction[i] for i, layer in enumerate(layers)})
        hooks = steering.Steering(checkpoint.model, added)

        def on(batch: activations.Batch, hooks=hooks, added=added):
            places = torch.zeros(*batch.inputs["input_ids"].shape, 1)
            for index, row in enumerate(batch.rows):
                places[index, [int(batch.first[index]) + token for token in tokens[row]]] = 1
            hooks.add = {layer: places * vector for layer, vector in added.items()}
            return hooks.active()

        try:
            odds = log_probabilities(checkpoint, questions, f"asking, steered: {name}", on)
        finally:
            hooks.detach()
        found[name] = shift(plain, fit(count, pairs, odds[:, 0] - odds[:, 1]).elo, mask)
    return found


def _tokens(
    encoded: transcripts.Encoded, activities: list[Activity], pair: tuple[int, int], mask: np.ndarray
) -> list[int]:
    """The tokens of those activities of a question that are steered."""
    found = []
    for letter, i in zip("AB", pair, strict=True):
        if mask[i]:
            start = encoded.text.index(f"\n({letter}) ") + len(f"\n({letter}) ")
            stop = start + len(activities[i].text)
            found += [token for token, (low, high) in enumerate(encoded.offsets) if low < stop and high > start]
    return found
