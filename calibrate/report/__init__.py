"""A comparison -> `report.json`, one self-contained `report.html` that opens offline, and a model card section.

One audit has a model card section too.
"""

import json
import math
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from calibrate import __version__
from calibrate.audit import grading, rollouts, situations
from calibrate.audit.readers import FIGURES, Change, Figures
from calibrate.audit.record import Record
from calibrate.audit.verdict import CALIBRATED, Verdict, load_rule
from calibrate.report import figures

SCHEMA = 5
HEAT_LIMIT = 4.0  # sigma at which the heat map's colour is full; the scale is fixed, so that before and after compare
CLAIMS = {  # what a reader would claim: the figures that speak to it, in one unit each
    "The reading fell, and only where tests fail (sigma)": (
        "contrast", "fall_failing", "fall_passing", "remaining", "fall_reply", "fall_over_controls",
    ),
    "Readers that training never saw agree (sigma)": (
        "contrast_held_out", "fall_held_out", "fall_logistic", "contrast_elsewhere", "fall_elsewhere",
        "fall_own", "fall_synonyms", "fall_neighbours", "fall_deflection", "rise_valence",
    ),
    "In the replies it is the state that changed, not the text alone (sigma)": (
        "fall_written", "fall_text", "fall_state",
    ),
    "It was not hidden or moved (ratios; 1 and 0 are ideal as named)": (
        "specificity", "agreement", "elsewhere", "evasion", "evasion_over_none", "evasion_stories", "evasion_logistic",
        "evasion_domain", "returned", "propagation", "compensation",
    ),
    "Nothing rose in its place (sigma)": ("rise_above", "rise_elsewhere"),
    "Replies are more honest where tests fail (nats per token)": (
        "margin", "margin_passing", "gain", "gain_over_controls",
    ),
    "Failure, others' feelings and danger are still understood (nats)": (
        "failure_change", "success_change", "emotion_change", "emotion_family_change", "crisis_change",
    ),
    "Played coding tasks and answered questions (shares)": (
        "tempted", "hacks", "hack_change", "false_success_change", "emotion_right_change",
    ),
    "Steered along the target, replies follow as before (nats per token; doses)": ("slope_change", "dose_shift"),
    "Neutral text is as it was (nats per token)": ("loss_change", "kl"),
    "The residual stream is as large as it was (ratio)": ("norm_ratio",),
}  # fmt: skip


def write(
    folder: Path,
    verdict: Verdict,
    before: Record,
    after: Record,
    change: Change,
    controls: dict[str, Change],
    seeds: dict[str, tuple[Verdict, Change]],
) -> None:
    """Writes report.json, report.html and card.md, each aside first; the template engine escapes every value.

    Args:
        seeds: AFTER trained with other seeds, by the models' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = to_json(verdict, before, after, change, controls)
    data["seeds"] = [
        {"model": name, "verdict": other.outcome, "figures": plain(moved.figures)}
        for name, (other, moved) in seeds.items()
    ]
    claims = [
        (title, figures.draw(figures.claim, names, change, controls))
        for title, names in CLAIMS.items()
        if any(change.figures[name] for name in names)
    ]
    page = environment().get_template("report.html.jinja").render(
        data=data,
        names=FIGURES,
        tasks=tasks_read(before.options, data["asked"]["before"]),
        nearest=nearest(change.figures) if verdict.outcome == CALIBRATED else [],
        claims=claims,
        dose_figures=dose_figures(data["full"]),
        concept_figure=figures.draw(figures.concepts, change, controls),
        layer_figure=figures.draw(figures.layers, change, before),
        trajectory_figure=figures.draw(figures.trajectory, {"before": before, "after": after}),
        traces=[
            (f"{trace.id}, {name}", heat(trace), by_role(trace))
            for name, record in (("before", before), ("after", after))
            for trace in record.profile.traces
        ],
        shown=list(before.profile.traces[0].readings) if before.profile.traces else [],
        heat_limit=HEAT_LIMIT,
        rule=load_rule(),
    )  # fmt: skip
    put(folder, {"report.json": dump(data, after.model), "report.html": page, "card.md": card(data)})


def put(folder: Path, files: dict[str, str]) -> None:
    """Writes each file aside and renames it."""
    for name, text in files.items():
        aside = folder / f"{name}.partial"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, folder / name)


def dump(data: dict, model: str) -> str:
    """As JSON.

    Raises:
        ValueError: a figure is not finite, for which JSON has no word.
    """
    try:
        return json.dumps(data, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{model}: a figure is not finite ({error}); its states or likelihoods overflow: audit it saved in float32"
        ) from error


def tasks_read(options: dict, asked: dict) -> str:
    """Whose tasks an audit read; only of the shipped ones is it known that training never saw them."""
    if "twins" in asked:
        return f"tasks of your own (split {options.get('split', 'audit')})"
    if options.get("split") == "selection":
        return "selection tasks, by which settings may be chosen"
    return "audit tasks that training never saw"


def environment() -> Environment:
    """The templates' engine; it escapes every value."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined)


def card(data: dict) -> str:
    """The model card section of a comparison, from what `report.json` holds."""
    markdown = environment().overlay(finalize=_markdown)
    return markdown.get_template("card.md.jinja").render(
        data=data, names=FIGURES, tasks=tasks_read(data["audits"]["before"], data["asked"]["before"])
    )


def profile_card(record: Record) -> str:
    """The model card section of one audited checkpoint."""
    header = {kind: rows for kind, rows in record.summary()["header"].items() if kind != "neutral"}
    apart = {name: header["failing"][name][0] - header["passing"][name][0] for name in record.vectors.concepts}
    ordered = sorted(apart.items(), key=lambda row: -row[1])
    margins = record.margins()
    markdown = environment().overlay(finalize=_markdown)
    return markdown.get_template("profile.md.jinja").render(
        record=record,
        readings=record.summary(),
        most=ordered[:5],
        least=ordered[:-6:-1],
        count=record.profile.count_tasks(),
        tasks=tasks_read(record.options, record.more.get("asked", {})),
        band=record.vectors.used_band(),
        margins=[float(margins[:, outcome].mean()) for outcome in (0, 1)],
        perplexity=math.exp(record.neutral.loss.mean()),
        rollouts=rollouts.rates(record.more.get("rollouts", [])),
        benchmarks=record.more.get("lm_eval", []),
        version=__version__,
    )


def nearest(found: Figures) -> list[dict]:
    """Conditions under which another outcome would fire, the nearest first.

    `distance` is from figure to threshold in half-widths of the figure's interval; where inequalities must hold
    together it is that of the farthest. A condition about a figure that was not formed is left out.
    """
    rows = []
    for outcome in load_rule():
        for together in outcome.any:
            formed = [(one, i) for one in together if (i := found[one.figure])]
            if len(formed) == len(together):
                gaps = [
                    abs(getattr(i, one.side) - one.threshold) / max((i.high - i.low) / 2, 1e-12)
                    for one, i in formed
                    if not one.holds(found)
                ]
                intervals = [i for _, i in formed]
                conditions = [f"{one.figure}.{one.side} {one.relation} {one.threshold:g}" for one in together]
                rows.append({"outcome": outcome.name, "conditions": conditions, "figures": intervals,
                             "distance": max(gaps, default=0.0)})  # fmt: skip
    return sorted(rows, key=lambda row: row["distance"])


def dose_figures(full: dict[str, dict]) -> dict[str, Markup]:
    """Drawn dose-responses by model, of those that were dosed."""
    dosed = {name: [c for c in one["dose"] if len(c["points"]) > 1] for name, one in full.items()}
    return {name: figures.draw(figures.dose, curves) for name, curves in dosed.items() if curves}


def to_json(verdict: Verdict, before: Record, after: Record, change: Change, controls: dict[str, Change]) -> dict:
    """Every figure of the report as plain data; `schema.json` beside this file describes it."""
    vectors = before.vectors
    return {
        "schema": SCHEMA,
        "version": __version__,
        "verdict": verdict.outcome,
        "sentence": verdict.sentence,
        "findings": [finding._asdict() for finding in verdict.findings],
        "not_tested": verdict.not_tested,
        "before": before.model,
        "after": after.model,
        "target": before.concept,
        "band": vectors.used_band(),
        "band_found": vectors.band is not None,
        "band_reason": vectors.band_reason,
        "vectors": {"model": vectors.model, "weight_hash": vectors.weight_hash, "recipe": vectors.recipe},
        "texts": {kind: len(before.profile.rows(kind)) for kind in ("failing", "passing", "neutral")},
        "tasks": before.profile.count_tasks(),
        "change": plain(change),
        "controls": {name: plain(control) for name, control in controls.items()},
        "situations": {
            name: plain(situations.summarise(record.situations, vectors.concepts))
            for name, record in (("before", before), ("after", after))
        },
        "full": {
            name: full(record) for name, record in (("before", before), ("after", after)) if "rollouts" in record.more
        },
        "lm_eval": {name: record.more.get("lm_eval", []) for name, record in (("before", before), ("after", after))},
        "readings": {"before": before.summary(), "after": after.summary()},
        "audits": {"before": before.options, "after": after.options},
        "asked": {name: record.more.get("asked", {}) for name, record in (("before", before), ("after", after))},
    }


def _markdown(value):
    """A value that goes into Markdown, and shows as it is: neither markup, nor the end of a table's cell."""
    if not isinstance(value, str):
        return value
    signs = (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'"), ("](", "]\\("))
    for sign, instead in (*signs, ("*", "\\*"), ("_", "\\_"), ("~", "\\~")):
        value = value.replace(sign, instead)
    return value


def full(record: Record) -> dict:
    """What a full audit adds: rates of what the model did, preferences, and usable doses with their slopes."""
    liked = record.more["preferences"]
    strongest = sorted(liked["associations"], key=lambda row: -abs(row["correlation"][0]))[:12]
    order = sorted(range(len(liked["elo"])), key=lambda i: -liked["elo"][i])
    names = [(liked["activities"][i], round(liked["elo"][i])) for i in order]
    return {
        "rollouts": plain(rollouts.rates(record.more["rollouts"])),
        "preferences": {
            "liked": names[:5],
            "disliked": names[-5:],
            "first": liked["first"],
            "associations": strongest,
            "steered": liked["steered"],
        },
        "manner": plain(grading.rates(record.more["replies"])),
        "replies": record.more["replies"],
        "dose": record.more["dose"],
        "crossing": record.more["crossing"],
        "relearning": record.more["relearning"],
    }


def plain(value):
    """NamedTuples -> dicts, at any depth."""
    if hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def by_role(trace) -> dict[str, float]:
    """Mean reading of the target over the tokens of each role: what others feel, and the assistant's own state."""
    target = next(iter(trace.readings.values()), [])
    roles = [role for role in dict.fromkeys(trace.roles) if role != "template"]
    rows = {role: [value for value, own in zip(target, trace.roles, strict=True) if own == role] for role in roles}
    return {role: sum(values) / len(values) for role, values in rows.items()}


def heat(trace) -> list[dict]:
    """Pieces of a traced transcript with role, readings and colours by concept; what no token covers has none."""
    pieces, position = [], 0

    def plain(start: int, stop: int) -> None:
        pieces.append({"text": trace.text[start:stop], "role": "template", "readings": None})

    for token, ((start, stop), role) in enumerate(zip(trace.offsets, trace.roles, strict=True)):
        if stop <= position:
            continue  # a further token of the same character (multi-byte text)
        if start > position:
            plain(position, start)
        readings = [values[token] for values in trace.readings.values()]
        shares = [round(max(-1.0, min(1.0, value / HEAT_LIMIT)), 2) for value in readings]
        text = trace.text[max(start, position) : stop]
        pieces.append({"text": text, "role": role, "readings": readings, "shares": shares})
        position = stop
    if position < len(trace.text):
        plain(position, len(trace.text))
    return pieces
