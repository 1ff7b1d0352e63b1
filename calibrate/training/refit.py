"""Directions that follow the model while it trains, from fixed texts, so that they cannot simply be moved away from.

Two sources: stories (a target concept minus the mean of others), and in-domain turns (a desperate minus a composed
opening of the same reply). Every turn follows a failing run: between failing and passing turns a direction would learn
"the test failed", and pressing that down trains complacency. Each source enters by its change relative to its own
length in the reference, so that the sampling noise of a few texts cancels: while the model has not moved, nor have the
directions.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibrate import extraction, transcripts
from calibrate.concepts import TARGET
from calibrate.corpora import Context, Story
from calibrate.training import arms
from calibrate.training.anchors import shuffled
from calibrate.vectors import EmotionVectors

logger = logging.getLogger(__name__)
UNION_NEW = 0.1  # length outside the old directions from which a new one is added to them


class Text(NamedTuple):
    """A tokenised text and the tokens whose mean state counts."""

    ids: list[int]
    tokens: slice


class Source(NamedTuple):
    """Texts on the two sides of a difference."""

    above: list[Text]
    below: list[Text]


States = Callable[[list[Text]], Tensor]  # mean state of each text's tokens, [texts, layers, hidden]


def story_source(tokenizer, stories: list[Story], concept: str, count: int, seed: int) -> Source:
    """Stories about `concept` against as many others on the same topics; `count` of each at most.

    Raises:
        ValueError: there are no stories about it, or none about others.
    """
    about = shuffled([story for story in stories if story.concept == concept], seed)[:count]
    topics = {story.topic for story in about}
    others = shuffled([s for s in stories if s.concept != concept and s.topic in topics], seed)[: 3 * len(about)]
    if not about or not others:
        raise ValueError(
            f"refitting {concept!r} needs training stories about it and about others on the same topics; there are "
            f"{len(about)} and {len(others)}"
        )

    def texts(rows: list[Story]) -> list[Text]:
        found = []
        for story in rows:
            ids = transcripts.encode_text(tokenizer, story.text).ids
            found.append(Text(ids, slice(max(1, int(extraction.START_FRACTION * len(ids))), len(ids))))
        return found

    return Source(texts(about), texts(others))


def turn_source(tokenizer, failing: list[Context], count: int, seed: int) -> Source | None:
    """Desperate against composed openings on the same failing transcripts; None where no context has them."""
    sides = []
    contexts = shuffled([c for c in failing if {"desperate", "composed"} <= c.felt.keys()], seed)[:count]
    for felt in ("desperate", "composed"):
        encoded = [transcripts.encode(tokenizer, c.messages, c.felt[felt].strip()) for c in contexts]
        spans = [text.last("reply") for text in encoded]
        sides.append([Text(text.ids, slice(span.start, span.stop)) for text, span in zip(encoded, spans, strict=True)])
    return Source(*sides) if contexts else None


class Refit:
    """Measures the sources in the model as it is now and turns the change into new directions.

    Args:
        start: the reference's directions [directions, layers, hidden] at `layers`, `rank` rows for each concept; of
            concepts to raise they are negative.
        sources: for each concept its sources; turns only for the concept that they show.
        raised: how many of the concepts, the last ones, are to be raised.
    """

    def __init__(
        self,
        vectors: EmotionVectors,
        layers: list[int],
        start: Tensor,
        sources: list[list[Source]],
        rank: int,
        raised: int = 0,
    ):
        self.start, self.sources, self.rank = start, sources, rank
        self.signs = [1.0] * (len(sources) - raised) + [-1.0] * raised
        neutral = vectors.neutral_at("token", layers).double()
        self._neutral = [  # leading components at every layer, [components, hidden]
            extraction.leading_components(rows - rows.mean(0), extraction.NEUTRAL_VARIANCE)
            for rows in neutral.unbind(1)
        ]
        self.at_start: list[list[Tensor]] = []
        self.fresh = start  # what the last refit found, before `hinge-union` adds it to the old ones

    def measure(self, states: States) -> list[list[Tensor]]:
        """Difference of every source, [layers, hidden], neutral components out; float64."""
        found = []
        for sources in self.sources:
            differences = [
                states(source.above).double().mean(0) - states(source.below).double().mean(0) for source in sources
            ]
            found.append([self._without_neutral(difference) for difference in differences])
        return found

    def _without_neutral(self, difference: Tensor) -> Tensor:
        rows = difference.clone()
        for layer, basis in enumerate(self._neutral):
            basis = basis.to(rows.device)
            rows[layer] -= rows[layer] @ basis.T @ basis
        return rows

    def directions(self, now: list[list[Tensor]], arm: str, current: Tensor) -> Tensor:
        """The next directions of an arm from what `measure` finds now.

        `hinge-refit`: the start plus the mean relative change of the sources. `hinge-retrain`: the sources alone.
        `hinge-union`: the refitted ones are added to `current`, orthogonal to them, up to `MAX_RANK` in all.
        """
        fresh = []
        for concept, (before, after) in enumerate(zip(self.at_start, now, strict=True)):
            start = self.start[concept * self.rank].double()
            lengths = [difference.norm(dim=-1, keepdim=True) for difference in before]
            if arm == arms.Arm.HINGE_RETRAIN:
                moved = torch.stack([a / n for a, n in zip(after, lengths, strict=True)]).mean(0)
            else:
                changes = [(a - b) / n for a, b, n in zip(after, before, lengths, strict=True)]
                # Of a concept to raise the start is its negative, so its sources count in that sense too.
                moved = start + self.signs[concept] * torch.stack(changes).mean(0)
            # The start's sign: of a concept to raise the sources are its opposite, and in a tuned model any may turn.
            sign = torch.where((moved * start).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            unit = sign * moved / moved.norm(dim=-1, keepdim=True)
            rest = self.start[concept * self.rank + 1 : (concept + 1) * self.rank]
            fresh.append(arms.orthonormal(torch.cat([unit[None].float(), rest])))
        self.fresh = found = torch.cat(fresh)
        if arm != arms.Arm.HINGE_UNION:
            return found
        # Those that are pressed stay as they are: the targets need not be orthogonal to one another.
        basis = arms.orthonormal(current)
        for row in found:
            # What is left of a direction that has hardly moved, or that another has just added, is noise.
            if len(basis) < arms.MAX_RANK and _outside(row, basis) > UNION_NEW:
                basis = arms.orthonormal(torch.cat([basis, row[None]]))
        return torch.cat([current, basis[len(current) :]])


def _outside(row: Tensor, rows: Tensor) -> float:
    """Mean over layers of the length of a unit direction outside the span of orthonormal rows."""
    inside = torch.einsum("lh,dlh->dl", row, rows).square().sum(0)
    return float((1 - inside).clamp(min=0).sqrt().mean())


def cosine(one: Tensor, other: Tensor) -> float:
    """Mean cosine of directions [directions, layers, hidden] with as many of `other`."""
    count = min(len(one), len(other))
    return float((one[:count] * other[:count]).sum(-1).mean())


def sources_of(tokenizer: Any, args, stories: list[Story], failing: list[Context]) -> list[list[Source]]:
    """The sources of every target concept; in-domain turns show the concept `desperate`."""
    concepts = [*args.concepts, *args.raise_concepts]
    wanted = args.refit_turns and TARGET in concepts
    turns = turn_source(tokenizer, failing, args.refit_turns, args.seed) if wanted else None
    if args.refit_turns and not turns:
        missing = (
            "no failing context has both openings (`desperate`, `composed`) in `felt`; give them in `twins`"
            if wanted
            else f"none of the targets {', '.join(concepts)} is {TARGET!r}, which they show"
        )
        logger.info("directions are refitted from stories alone, without in-domain turns: %s", missing)
    found = []
    for concept in concepts:
        sources = [story_source(tokenizer, stories, concept, args.refit_stories, args.seed)]
        found.append([*sources, *([turns] if turns and concept == TARGET else [])])
    return found
