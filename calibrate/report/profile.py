"""One audited checkpoint -> `profile.json` and one self-contained `profile.html` that opens offline."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate import __version__, geometry, report, stats
from calibrate.audit import situations, wording
from calibrate.audit.record import Record
from calibrate.audit.situations import PLACES
from calibrate.concepts import load_concepts
from calibrate.report import figures

SCHEMA = 2
COLUMNS = 12  # concepts beside the kinds of scenarios: the target, and those that tell the kinds apart most
SIDES = ("neutral", "challenging")
ENOUGH = 100  # concepts whose stories give the checkpoint an emotion space of its own


def write(folder: Path, record: Record) -> dict[str, Any]:
    """Writes profile.json and profile.html into the folder, each aside first, and returns what the JSON holds."""
    data = to_json(record)
    parts = {"audited": data["full"]} if data["full"] else {}
    page = report.environment().get_template("profile.html.jinja").render(
        data=data,
        tasks=report.tasks_read(record.options, record.more.get("asked", {})),
        full=parts,
        dose_figures=report.dose_figures(parts),
        columns=_columns(data),
        ranked_figure=figures.draw(figures.ranked, data["concepts"]),
        trajectory_figure=figures.draw(figures.trajectory, {"": record}),
        traces=[(trace.id, report.heat(trace), report.by_role(trace)) for trace in record.profile.traces],
        shown=list(record.profile.traces[0].readings) if record.profile.traces else [],
        heat_limit=report.HEAT_LIMIT,
    )  # fmt: skip
    report.put(folder, {"profile.json": report.dump(data, record.model), "profile.html": page})
    return data


def to_json(record: Record) -> dict[str, Any]:
    """Every figure of the profile as plain data; `profile.schema.json` beside this file describes it."""
    vectors, found = record.vectors, record.situations
    said = situations.summarise(found, vectors.concepts)
    margins = record.margins()
    data = {
        "schema": SCHEMA,
        "version": __version__,
        "model": record.model,
        "target": record.concept,
        "band": vectors.used_band(),
        "band_found": vectors.band is not None,
        "band_reason": vectors.band_reason,
        "layers": vectors.reading_layers(),
        "vectors": {"model": vectors.model, "weight_hash": vectors.weight_hash, "recipe": vectors.recipe},
        "texts": {kind: len(record.profile.rows(kind)) for kind in ("failing", "passing", "neutral")},
        "tasks": record.profile.count_tasks(),
        "scenarios": sum(text.set == "scenarios" for text in found.texts),
        "concepts": _concepts(record, "scenarios"),
        "families": _families(record, "scenarios"),
        "kinds": {
            "header": said.scenarios,
            "reply": situations.by_kind(found, vectors.concepts, "reply"),
        },
        "readings": record.summary(),
        "implicit": {"top3": said.implicit_top3, "texts": _implicit(record)},
        "speakers": {"present_over_other": said.present_over_other, "texts": _speakers(record)},
        "ladders": {"share": said.ladders, "quantities": _ladders(record)},
        "local": said.local,
        "persistent": said.persistent,
        "chats": _chats(record),
        "own": {key: make(record, "chats") for key, make in (("concepts", _concepts), ("families", _families))}
        if len(_rows(record, "chats")) > 1
        else None,
        "wording": wording.compare(record),
        "geometry": _geometry(record),
        "margins": {
            outcome: stats.mean(margins[:, side]) if len(margins) > 1 else None
            for side, outcome in enumerate(("failing", "passing"))
        },
        "perplexity": math.exp(record.neutral.loss.mean()),
        "full": report.full(record) if "rollouts" in record.more else None,
        "lm_eval": record.more.get("lm_eval", []),
        "options": record.options,
        "asked": record.more.get("asked", {}),
    }
    return report.plain(data)


def _rows(record: Record, set_: str) -> list[int]:
    return [i for i, text in enumerate(record.situations.texts) if text.set == set_]


def _mean(values: np.ndarray) -> stats.Interval | None:
    """Over texts; those without such a place (nan) are left out, and of fewer than two there is none."""
    there = values[~np.isnan(values)]
    return stats.mean(there) if len(there) > 1 else None


def _concepts(record: Record, set_: str) -> list[dict[str, Any]]:
    """All concepts over the shipped scenarios or the user's chats, the highest at the turn header first."""
    rated, rows = load_concepts(), _rows(record, set_)
    kinds = np.array([record.situations.texts[i].kind for i in rows])
    header, reply = (record.situations.readings[rows, PLACES.index(place)] for place in ("header", "reply"))
    found = [
        {
            "concept": name,
            "family": rated[name].family if name in rated else None,
            "header": _mean(header[:, c]),
            "reply": _mean(reply[:, c]),
        }
        | (
            {k: _mean(header[(kinds == "neutral") == (k == "neutral"), c]) for k in SIDES}
            if set_ == "scenarios"
            else {}
        )
        for c, name in enumerate(record.vectors.concepts)
    ]
    return sorted(found, key=lambda row: -row["header"].estimate if row["header"] else 0.0)


def _families(record: Record, set_: str) -> list[dict[str, Any]]:
    """Mean over a family's concepts over the shipped scenarios or the user's chats, the highest first."""
    rated, rows, members = load_concepts(), _rows(record, set_), {}
    for c, name in enumerate(record.vectors.concepts):
        if name in rated:
            members.setdefault(rated[name].family, []).append(c)
    readings = record.situations.readings[rows]
    found = [
        {"family": family, "concepts": len(own)}
        | {place: _mean(readings[:, PLACES.index(place), own].mean(1)) for place in ("header", "reply")}
        for family, own in members.items()
    ]
    return sorted(found, key=lambda row: -row["header"].estimate if row["header"] else 0.0)


def _highest(names: list[str], values: np.ndarray, count: int = 3) -> list[list[Any]]:
    return [[names[c], round(float(values[c]), 4)] for c in np.argsort(-values)[:count]]


def _implicit(record: Record) -> list[dict[str, Any]]:
    """What every hint reads highest among the concepts that are hinted at, against the mean over the hints."""
    index = {name: c for c, name in enumerate(record.vectors.concepts)}
    rows, header = _rows(record, "implicit"), record.situations.readings[:, PLACES.index("header")]
    wanted = [record.situations.texts[i].expected["header"] for i in rows]
    names = sorted({*wanted} & index.keys())
    values = header[np.ix_(rows, [index[name] for name in names])]
    values = values - (values.mean(0) if rows else 0)
    return [
        {"id": str(record.situations.texts[i].id), "hinted": hinted, "highest": _highest(names, row)}
        for i, hinted, row in zip(rows, wanted, values, strict=True)
        if hinted in names
    ]


def _speakers(record: Record) -> list[dict[str, Any]]:
    """The assistant's own emotion and the user's, over the reply, against the mean over these texts."""
    index = {name: c for c, name in enumerate(record.vectors.concepts)}
    rows, found = _rows(record, "speakers"), []
    reply = record.situations.readings[rows, PLACES.index("reply")]
    for i, row in zip(rows, reply - (reply.mean(0) if rows else 0), strict=True):
        text = record.situations.texts[i]
        present, other = text.expected["reply"], text.expected["other"]
        if {present, other} <= index.keys() and not np.isnan(row).any():
            values = {"present_reading": float(row[index[present]]), "other_reading": float(row[index[other]])}
            found.append({"id": str(text.id), "present": present, "other": other, **values})
    return found


def _ladders(record: Record) -> list[dict[str, Any]]:
    """Header readings of every concept about which a rising quantity expects something, from rung to rung."""
    index, found = {name: c for c, name in enumerate(record.vectors.concepts)}, {}
    for i in _rows(record, "ladders"):
        text, readings = record.situations.texts[i], record.situations.readings[i, PLACES.index("header")]
        for name, way in text.expected.items():
            if name in index and not np.isnan(readings).any():
                row = {"id": str(text.kind), "concept": name, "expected": way, "readings": []}
                row = found.setdefault((text.kind, name), row)
                row["readings"].append(round(float(readings[index[name]]), 4))
    return list(found.values())


def _chats(record: Record) -> list[dict[str, Any]]:
    """Own chats one by one, all concepts; null where a chat has no such place."""
    found = []
    for i in _rows(record, "chats"):
        row: dict[str, Any] = {"id": str(record.situations.texts[i].id)}
        for place in ("header", "reply"):
            values = record.situations.readings[i, PLACES.index(place)]
            named = zip(record.vectors.concepts, values.tolist(), strict=True)
            row[place] = None if np.isnan(values).any() else {name: round(value, 4) for name, value in named}
        found.append(row)
    return found


def _geometry(record: Record) -> list[dict[str, Any]]:
    """The shape of the emotion space: of the checkpoint's own directions where it has enough, and the reference's."""
    vectors, own = record.vectors, record.own
    at = vectors.positions(vectors.reading_layers())
    whose = f"the reference's vectors (layers {', '.join(map(str, vectors.reading_layers()))})"
    sets = [(whose, vectors.concepts, None, vectors.directions[:, at].double().mean(1))]
    names = list(dict.fromkeys(own.concepts))
    if len(names) >= ENOUGH:
        told = np.array(own.concepts)
        means = torch.stack([own.states[torch.from_numpy(told == name)].double().mean(0) for name in names])
        directions = means - means.mean(0)
        directions /= directions.norm(dim=-1, keepdim=True)
        band = vectors.used_band()
        sets.insert(0, (f"the checkpoint's own (layer {band[len(band) // 2]})", names, len(told), directions))
    return [_shape(*one) for one in sets if sum(name in load_concepts() for name in one[1]) > 2]


def _shape(whose: str, names: list[str], stories: int | None, directions: torch.Tensor) -> dict[str, Any]:
    """Correlations over concepts, with intervals over them; family separation is a difference of mean cosines."""
    found, rated = geometry.axes(directions, names), load_concepts()
    rows = [i for i, name in enumerate(names) if name in rated]
    row: dict[str, Any] = {"whose": whose, "concepts": len(names), "stories": stories}
    for column, name in enumerate(("valence", "arousal")):
        ratings = np.array([getattr(rated[names[i]], name) for i in rows])
        row[name] = stats.bootstrap(_r, found.scores[rows, column].numpy(), ratings)
        row[f"read_{name}"] = stats.bootstrap(_r, found.read[:, column].numpy(), ratings)
    row["explained"] = found.explained
    return row | {"families": None if math.isnan(found.families) else found.families}


def _r(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's r; 0 where a series is constant, as a small resample may be."""
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / max(1e-12, np.linalg.norm(one) * np.linalg.norm(other)))


def _columns(data: dict[str, Any]) -> list[str]:
    """The target, and the concepts whose header readings differ most between the kinds of scenarios."""
    kinds = list(data["kinds"]["header"].values())
    names = [row["concept"] for row in data["concepts"] if row["concept"] != data["target"]]
    if kinds:
        values = {name: [kind[name]["estimate"] for kind in kinds] for name in names}
        names.sort(key=lambda name: min(values[name]) - max(values[name]))
    return [data["target"], *names[: COLUMNS - 1]]
