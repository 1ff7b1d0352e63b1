"""A comparison -> `report.json` and one self-contained `report.html` that opens offline."""

import io
import json
import os
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from calibrate import __version__
from calibrate.audit.readers import Change
from calibrate.audit.record import Record
from calibrate.audit.verdict import Verdict

HEAT_LIMIT = 4.0  # sigma at which the heat map's colour is full; the scale is fixed, so that before and after compare


def write(
    folder: Path, verdict: Verdict, before: Record, after: Record, change: Change, control: Change | None
) -> None:
    """Writes both files, each aside first; every value is escaped by the template engine."""
    folder.mkdir(parents=True, exist_ok=True)
    data = to_json(verdict, before, after, change, control)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        data=data,
        concept_figure=_figure(_draw_concepts, change, control),
        layer_figure=_figure(_draw_layers, change, before),
        traces=[("before", _heat(before)), ("after", _heat(after))],
        heat_limit=HEAT_LIMIT,
    )
    for name, text in (("report.json", json.dumps(data, indent=1)), ("report.html", page)):
        aside = folder / f"{name}.partial"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, folder / name)


def to_json(verdict: Verdict, before: Record, after: Record, change: Change, control: Change | None) -> dict:
    """Every figure of the report as plain data."""
    vectors = before.vectors
    return {
        "version": __version__,
        "outcome": verdict.outcome,
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
        "change": _plain(change),
        "control": _plain(control) if control else None,
        "readings": {"before": before.summary(), "after": after.summary()},
        "audits": {"before": before.options, "after": after.options},
    }


def _plain(value):
    """NamedTuples -> dicts, at any depth."""
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _figure(draw, *arguments) -> Markup:
    """Draws with matplotlib and returns inline SVG without addresses, so that the page needs no network."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "calibrate", "font.size": 9})
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, *arguments)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg))  # texts in it are escaped by matplotlib


def _draw_concepts(figure, change: Change, control: Change | None) -> None:
    """Change of every concept's reading on failing contexts, the control arm in grey."""
    figure.set_size_inches(8, 0.28 * len(change.concepts) + 1.2)
    axes = figure.add_subplot()
    ordered = sorted(change.concepts, key=lambda c: c.change.estimate)
    series = [("trained", {c.concept: c.change for c in ordered}, "#1f5fa8", 0.0)]
    if control:
        series.append(("random direction (one draw)", {c.concept: c.change for c in control.concepts}, "#999999", 0.3))
    for label, values, colour, shift in series:
        intervals = [values[c.concept] for c in ordered]
        errors = [[i.estimate - i.low for i in intervals], [i.high - i.estimate for i in intervals]]
        places = [position - shift for position in range(len(ordered))]
        axes.errorbar(
            [i.estimate for i in intervals], places, xerr=errors, fmt="o", color=colour, markersize=4, label=label
        )
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(ordered)), [c.concept for c in ordered])
    axes.set_xlabel("after minus before, sigma, turn header, failing audit tasks (95 % interval over tasks)")
    axes.legend(loc="lower right", frameon=False)


def _draw_layers(figure, change: Change, before: Record) -> None:
    """Fall of the target's reading at every stored layer, on failing contexts and on their passing twins."""
    figure.set_size_inches(8, 3)
    axes = figure.add_subplot()
    layers = [layer for layer, _, _ in change.layers]
    for position, label, colour in ((1, "failing", "#b5442e"), (2, "passing twins", "#2e8b57")):
        intervals = [row[position] for row in change.layers]
        axes.plot(layers, [i.estimate for i in intervals], color=colour, marker="o", markersize=3, label=label)
        axes.fill_between(layers, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.15)
    band = before.vectors.used_band()
    axes.axvspan(band[0] - 0.5, band[-1] + 0.5, color="#cccccc", alpha=0.4, label="band")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("layer (output of block i, from 0)")
    axes.set_ylabel(f"fall of {before.concept}, sigma")
    axes.legend(frameon=False)


def _heat(record: Record) -> list[dict]:
    """Pieces of the traced transcript with role, reading and colour; what no token covers stays uncoloured."""
    trace, pieces, position = record.profile.trace, [], 0
    for (start, stop), role, reading in zip(trace.offsets, trace.roles, trace.readings, strict=True):
        if stop <= position:
            continue  # a further token of the same character (multi-byte text)
        if start > position:
            pieces.append(
                {"text": trace.text[position:start], "role": "template", "reading": None, "colour": "transparent"}
            )
        share = max(-1.0, min(1.0, reading / HEAT_LIMIT))
        colour = f"rgba({'181,68,46' if share > 0 else '31,95,168'},{abs(share):.2f})"
        text = trace.text[max(start, position) : stop]
        pieces.append({"text": text, "role": role, "reading": reading, "colour": colour})
        position = stop
    if position < len(trace.text):
        pieces.append({"text": trace.text[position:], "role": "template", "reading": None, "colour": "transparent"})
    return pieces
