"""The 171 readings where nothing has failed: scenarios, hinted emotions, two speakers, rising quantities, own chats.

One pass over all of them; each text is read at the end of the last user's message, at the turn header and, where there
is one, over the assistant's last reply. Own chats and scenarios (in a quick audit some of them) that end with the user
get a reply of the model's own.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch

from calibrate import activations, models, stats, transcripts
from calibrate.audit import agents
from calibrate.corpora import Ladder
from calibrate.corpora.situations import Implicit, Scenario, Speakers
from calibrate.models import Checkpoint
from calibrate.stats import Interval
from calibrate.vectors import EmotionVectors

PLACES = ("user", "header", "reply")
logger = logging.getLogger(__name__)
REPLIES = agents.Settings(max_new_tokens=24, temperature=0, batch=27)  # the likeliest tokens, few


class Text(NamedTuple):
    """A chat that is read, and what it is: the set, the kind within it, and what a reader should find, if anything."""

    id: str
    set: str  # scenarios, implicit, speakers, ladders or chats
    kind: str
    messages: list[dict[str, str]]
    expected: dict = {}
    cut: int = 0  # tokens at its beginning that were not read


class Situations(NamedTuple):
    """Readings of every text at every place, mean over the layers that are read, sigma."""

    texts: list[Text]
    readings: np.ndarray  # [texts, places, concepts]; nan where a text has no such place


def texts(
    scenarios: list[Scenario], implicit: list[Implicit], speakers: list[Speakers], ladders: list[Ladder],
    chats: list[tuple[str, list[dict[str, str]]]],
) -> list[Text]:  # fmt: skip
    """All rows as chats."""
    found = [Text(row.id, "scenarios", row.kind, row.messages) for row in scenarios]
    for row in implicit:
        messages = [{"role": "user", "content": row.text}]
        found.append(Text(row.id, "implicit", row.concept, messages, {"header": row.concept}))
    for row in speakers:
        expected = {"reply": row.present, "other": row.other}
        found.append(Text(row.id, "speakers", f"{row.present} to {row.other}", row.messages, expected))
    for row in ladders:
        for rung, value in enumerate(row.values):
            messages = [{"role": "user", "content": row.template.format(value=value)}]
            found.append(Text(f"{row.id}/{rung}", "ladders", row.id, messages, {"rung": rung, **row.expected}))
    return found + [Text(id_, "chats", "own", messages) for id_, messages in chats]


def answered(checkpoint: Checkpoint, rows: list[Text], wanted: list[str]) -> list[Text]:
    """The same texts, with the model's own reply where a wanted one has none yet.

    One stays without, and so without a reading over the reply, where the reply is empty or does not fit the window; a
    warning names it.

    Args:
        wanted: ids of the texts.
    """
    asked = [i for i, row in enumerate(rows) if row.id in wanted and row.messages[-1]["role"] != "assistant"]
    window = models.window(checkpoint.model) or 10**9
    found = list(rows)
    replies = agents.reply(checkpoint, [rows[i].messages for i in asked], REPLIES, [rows[i].id for i in asked])
    for i, reply in zip(asked, replies, strict=True):
        if reply is None:
            continue  # named already: there was no room for one
        whole = [*rows[i].messages, {"role": "assistant", "content": reply.strip()}]
        if not reply.strip():
            logger.warning("%s: the model's reply is empty; none is read", rows[i].id)
        elif len(transcripts.encode(checkpoint.tokenizer, whole).ids) > window:
            logger.warning(
                "%s: with its reply it has more than the model's %d tokens; none is read", rows[i].id, window
            )
        else:
            found[i] = rows[i]._replace(messages=whole)
    return found


def read(checkpoint: Checkpoint, vectors: EmotionVectors, rows: list[Text], truncate: bool = False) -> Situations:
    """Reads all texts.

    Args:
        truncate: cut a text that is longer than the model's context window at its beginning; a warning names it.

    Raises:
        ValueError: a text has more tokens than the model takes, and `truncate` is not set.
    """
    layers = vectors.reading_layers()
    at = vectors.positions(layers)
    sequences, places, cuts = encode(checkpoint, rows, truncate)
    rows = [row._replace(cut=cut) for row, cut in zip(rows, cuts, strict=True)]
    for row, ids in ((row, ids) for row, ids in zip(rows, sequences, strict=True) if row.cut):
        logger.warning("%s: its last %d of %d tokens are read", row.id, len(ids), len(ids) + row.cut)
    directions = vectors.directions[:, at].double()
    scales = {pooling: vectors.scale(pooling) for pooling in ("token", "header", "reply")}
    found = np.full((len(rows), len(PLACES), len(vectors.concepts)), np.nan)
    for row, hidden in activations.states(checkpoint.model, sequences, layers, description="reading situations"):
        for place, (start, stop) in places[row].items():
            mu, sigma = scales["token" if place == "user" else place]
            state = hidden[:, start:stop].double().mean(1).cpu() - mu[at]
            found[row, PLACES.index(place)] = (torch.einsum("lh,clh->cl", state, directions) / sigma[:, at]).mean(1)
    return Situations(rows, found)


def encode(checkpoint: Checkpoint, rows: list[Text], truncate: bool) -> tuple[list[list[int]], list[dict], list[int]]:
    """Token ids of every text, where its places stand in them, and how many are cut off; errors as those of `read`."""
    window = models.window(checkpoint.model)
    sequences, places, cuts = [], [], []
    for row in rows:
        try:
            encoded = transcripts.encode(checkpoint.tokenizer, row.messages)
        except ValueError as error:  # the template refuses it
            raise ValueError(f"{row.id}: {error}") from error
        ids, cut = encoded.ids, 0
        if window and len(ids) > window:
            if not truncate:
                raise ValueError(
                    f"{row.id}: {len(ids)} tokens, and the model takes {window}; shorten it, or read its last "
                    f"{window} with `--truncate`"
                )
            cut = len(ids) - window
        sequences.append(ids[cut:])
        places.append(_places(encoded, cut))
        cuts.append(cut)
    return sequences, places, cuts


def _places(encoded: transcripts.Encoded, cut: int) -> dict[str, tuple[int, int]]:
    """Token ranges by place: the last five tokens of the user's last message, the last header, the last reply."""
    found = {}
    for span in encoded.spans:
        if span.role == "user":
            found["user"] = (max(span.start, span.stop - 5), span.stop)
        elif span.role in ("header", "reply"):
            found[span.role] = (span.start, span.stop)
    shifted = {place: (start - cut, stop - cut) for place, (start, stop) in found.items()}
    return {place: part for place, part in shifted.items() if part[0] >= activations.SINK_TOKENS}


class Summary(NamedTuple):
    """What the readings say about how this model carries emotions; intervals over texts."""

    scenarios: dict[str, dict[str, Interval]]  # kind -> concept -> header reading, sigma
    implicit_top3: Interval | None  # share of hinted concepts among the three highest of those hinted at all
    present_over_other: Interval | None  # assistant's own over the user's emotion, over the reply, sigma
    ladders: Interval | None  # share of quantities whose readings go the expected way
    local: Interval | None  # correlation over texts of the user's last words with the header, mean over concepts
    persistent: Interval | None  # of the header with the reply that follows
    chats: dict[str, dict[str, float]]  # own chat -> concept -> header reading, sigma


def summarise(found: Situations, concepts: list[str]) -> Summary:
    """Figures of the shipped sets; one is None where its set was not read."""
    header = found.readings[:, PLACES.index("header")]
    by_set = {name: [i for i, text in enumerate(found.texts) if text.set == name] for name in
              ("scenarios", "implicit", "speakers", "ladders", "chats")}  # fmt: skip
    index = {name: c for c, name in enumerate(concepts)}
    hinted = sorted({found.texts[i].expected["header"] for i in by_set["implicit"]} & index.keys())
    columns = [index[name] for name in hinted]
    tops = []
    for i in by_set["implicit"]:
        if (wanted := found.texts[i].expected["header"]) in hinted:
            # Against the mean over the hinting texts: some concepts read high whatever is said.
            values = header[i, columns] - header[by_set["implicit"]][:, columns].mean(0)
            tops.append(float((values > values[hinted.index(wanted)]).sum() < 3))
    reply = found.readings[:, PLACES.index("reply")]
    differences = []
    for i in by_set["speakers"]:
        present, other = (found.texts[i].expected[name] for name in ("reply", "other"))
        if {present, other} <= index.keys():
            centred = reply[i] - reply[by_set["speakers"]].mean(0)
            differences.append(centred[index[present]] - centred[index[other]])
    user = found.readings[:, PLACES.index("user")]
    told = [i for name in ("implicit", "speakers") for i in by_set[name]]
    return Summary(
        by_kind(found, concepts, "header"),
        stats.wilson(np.array(tops)) if len(tops) > 1 else None,
        stats.mean(np.array(differences)) if len(differences) > 1 else None,
        _ladders([found.texts[i] for i in by_set["ladders"]], header[by_set["ladders"]], index),
        _correlation(user[told], header[told]),
        _correlation(header[by_set["speakers"]], reply[by_set["speakers"]]),
        {
            str(found.texts[i].id): {name: round(float(header[i, c]), 4) for c, name in enumerate(concepts)}
            for i in by_set["chats"]
            if not np.isnan(header[i]).any()
        },
    )


def by_kind(found: Situations, concepts: list[str], place: str) -> dict[str, dict[str, Interval]]:
    """Mean readings at a place, by kind of scenario (own chats: `own`) and concept; a kind of one text has none."""
    readings, kinds = found.readings[:, PLACES.index(place)], {}
    for i, text in enumerate(found.texts):
        # Nan: a header that was cut off with its text's beginning, or no reply.
        if text.set in ("scenarios", "chats") and not np.isnan(readings[i]).any():
            kinds.setdefault(text.kind, []).append(i)
    return {
        kind: {name: stats.mean(readings[rows, c]) for c, name in enumerate(concepts)}
        for kind, rows in kinds.items()
        if len(rows) > 1
    }


def _ladders(rows: list[Text], header: np.ndarray, index: dict[str, int]) -> Interval | None:
    shares = []
    for kind in dict.fromkeys(text.kind for text in rows):
        at = [i for i, text in enumerate(rows) if text.kind == kind]
        expected = {name: way for name, way in rows[at[0]].expected.items() if name in index}
        right = []
        for name, way in expected.items():
            ranks = header[at, index[name]].argsort().argsort()
            right.append((np.corrcoef(np.arange(len(at)), ranks)[0, 1] > 0) == (way == "up"))
        shares += [float(np.mean(right))] if right else []
    return stats.mean(np.array(shares)) if len(shares) > 1 else None


def _correlation(one: np.ndarray, other: np.ndarray) -> Interval | None:
    """Over texts, of readings from which every concept's mean over texts is taken; mean over concepts."""
    whole = ~np.isnan(one + other).any(1)
    if whole.sum() < 3:
        return None
    return stats.bootstrap(_mean_r, one[whole], other[whole])


def _mean_r(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(0), other - other.mean(0)
    lengths = np.linalg.norm(one, axis=0) * np.linalg.norm(other, axis=0)
    return float(np.mean((one * other).sum(0) / np.maximum(lengths, 1e-12)))
