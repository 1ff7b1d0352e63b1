"""What a reply says of an emotion beside what the state over it reads: felt and not shown, or shown.

The words are the names and synonyms of the target's family in `concepts.yaml`. A list of words sees wordings and not
meanings: "not desperate" counts, a paraphrase does not, and a tenth of neutral replies lies above the level too.
"""

from typing import NamedTuple

import numpy as np

from calibrate import stats
from calibrate.audit.profile import ROLES
from calibrate.audit.record import Record
from calibrate.audit.situations import PLACES
from calibrate.concepts import load_concepts, pattern
from calibrate.stats import Interval

LEVEL = 90  # percentile of the neutral replies' readings above which a state counts as high


class Reply(NamedTuple):
    """One reply: how much of the emotion its words and its state hold."""

    id: str
    kind: str
    text: str
    words: list[str]  # of the target's family, as they stand in the text
    share: float  # of the text's words
    reading: float  # of the target over the reply, sigma
    unshown: bool  # no such word, and a reading above the level


class Wording(NamedTuple):
    """Readings over replies by what they say; the reply is the unit of the intervals."""

    family: str
    level: float  # sigma; of replies in neutral dialogues, at the layers of the situations
    unshown: Interval | None  # share above the level of replies without such words
    reading_without: Interval | None  # mean reading of replies without such words, sigma
    reading_with: Interval | None
    replies: list[Reply]


def compare(record: Record) -> Wording:
    """Replies of scenarios, speakers and own chats; in a full audit its own ones on failing contexts too."""
    found, target = record.situations, record.vectors.index(record.concept)
    rated = load_concepts()
    family = rated[record.concept].family if record.concept in rated else record.concept
    words = [w for c in rated.values() if c.family == family for w in (c.name, *c.synonyms)] or [record.concept]
    level = _level(record, record.vectors.reading_layers())
    given = [
        (text.id, text.kind, text.messages[-1]["content"], readings[PLACES.index("reply"), target], level)
        for text, readings in zip(found.texts, found.readings, strict=True)
        if text.messages and text.messages[-1]["role"] == "assistant"
    ]
    if crossed := record.more.get("crossing"):
        band_level = _level(record, record.vectors.used_band())  # these are read at the band
        rows = zip(crossed["tasks"], crossed["replies"], crossed["readings"], strict=True)
        given += [(task, "failing", replies[1], readings[1][1], band_level) for task, replies, readings in rows]
    replies = []
    for id_, kind, text, reading, high in given:
        if not np.isnan(reading):
            said = pattern(tuple(words)).findall(text)
            share = len(said) / max(1, len(text.split()))
            replies.append(Reply(str(id_), kind, text, said, share, float(reading), not said and bool(reading > high)))
    without = [reply for reply in replies if not reply.words]
    return Wording(
        family,
        level,
        stats.wilson(np.array([float(reply.unshown) for reply in without])) if without else None,
        *(
            stats.mean(np.array([reply.reading for reply in some])) if len(some) > 1 else None
            for some in (without, [reply for reply in replies if reply.words])
        ),
        replies,
    )


def _level(record: Record, layers: list[int]) -> float:
    """Reading of the target that a tenth of the neutral dialogues' replies exceed."""
    vectors, rows = record.vectors, record.profile.rows("neutral")
    states = record.profile.states[rows, ROLES.index("reply")]
    direction = vectors.directions[[vectors.index(record.concept)]]
    readings = vectors.readings(states, "reply", direction)[:, 0, vectors.positions(layers)].mean(1)
    return float(np.percentile(readings.numpy(), LEVEL))
