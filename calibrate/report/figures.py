"""The report's pictures, as SVG that is written into the page."""

import io
import re

import numpy as np
from markupsafe import Markup

from calibrate import stats
from calibrate.audit.readers import FIGURES, Change
from calibrate.audit.record import Record
from calibrate.stats import Interval

TRAINED, CONTROL, FAILING, PASSING = "#1f5fa8", "#999999", "#b5442e", "#2e8b57"  # told apart by the colour-blind
TALLEST = 60  # concepts in the picture: those that moved most; the table has all


def draw(make, *arguments) -> Markup:
    """Draws with matplotlib and returns inline SVG without addresses, so that the page needs no network."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "calibrate", "font.size": 9})
    matplotlib.rcParams["text.parse_math"] = False  # an arm may be called `no$\pen$alty`
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    make(figure, *arguments)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg))  # texts in it are escaped by matplotlib


def claim(figure, names: tuple[str, ...], change: Change, controls: dict[str, Change]) -> None:
    """The figures of one claim with their intervals, the control arms in grey below each."""
    names = tuple(name for name in names if change.figures[name] is not None)
    step = 1 / (len(controls) + 2)
    figure.set_size_inches(8, 0.5 + len(names) * (0.34 + 0.16 * len(controls)))
    axes = figure.add_subplot()
    arms = [("trained", change, TRAINED), *((name, control, CONTROL) for name, control in controls.items())]
    for place, name in enumerate(names):
        for index, (arm, one, colour) in enumerate(arms):
            interval = one.figures[name]
            if interval is not None:
                height = place + index * step
                axes.plot(interval[1:], [height, height], color=colour, linewidth=2, alpha=0.6)
                axes.plot([interval.estimate], [height], "o", color=colour, markersize=5 if index == 0 else 3)
                if index:
                    axes.annotate(arm, (interval.high, height), xytext=(4, -2), textcoords="offset points",
                                  fontsize=6, color=CONTROL)  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(names)), [re.sub(r" \([^()]*\)$", "", FIGURES[name]) for name in names])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def concepts(figure, change: Change, controls: dict[str, Change]) -> None:
    """Change of the concepts that moved most on failing contexts, the control arms in grey."""
    most = sorted(change.concepts, key=lambda c: -abs(c.change.estimate))[:TALLEST]
    ordered = sorted(most, key=lambda c: c.change.estimate)
    figure.set_size_inches(8, 0.2 * len(ordered) + 1.2)
    axes = figure.add_subplot()
    for control in controls.values():
        values = {c.concept: c.change.estimate for c in control.concepts}
        axes.plot([values[c.concept] for c in ordered], range(len(ordered)), "|", color=CONTROL, markersize=6)
    for place, c in enumerate(ordered):
        axes.plot(c.change[1:], [place, place], color=TRAINED, linewidth=1.5, alpha=0.6)
        axes.plot([c.change.estimate], [place], "o", color=TRAINED, markersize=3)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(ordered)), [c.concept for c in ordered], fontsize=7)
    axes.set_xlabel("after minus before, sigma, turn header, failing contexts (95 % interval over tasks)")
    axes.spines[["top", "right"]].set_visible(False)


def layers(figure, change: Change, before: Record) -> None:
    """Fall of the target's reading at every stored layer, on failing contexts and on their passing twins."""
    figure.set_size_inches(8, 3)
    axes = figure.add_subplot()
    found = [layer for layer, _, _ in change.layers]
    for position, label, colour, marker in ((1, "failing", FAILING, "o"), (2, "passing twins", PASSING, "s")):
        intervals = [row[position] for row in change.layers]
        axes.plot(found, [i.estimate for i in intervals], color=colour, marker=marker, markersize=4, label=label)
        axes.fill_between(found, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.15)
    band = before.vectors.used_band()
    axes.axvspan(band[0] - 0.5, band[-1] + 0.5, color="#cccccc", alpha=0.4, label="band")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("layer (output of block i, from 0)")
    axes.set_ylabel(f"fall of {before.concept}, sigma")
    axes.legend(frameon=False)


def trajectory(figure, records: dict[str, Record]) -> None:
    """Target reading at each turn header of failing transcripts, and at the last one of their twins; 95 % intervals.

    Of transcripts of one length alone, the commonest with three turns or more: others would join or leave on the way.
    """
    figure.set_size_inches(8, 3)
    axes = figure.add_subplot()
    colours = (CONTROL, TRAINED)[-len(records) :]
    every = next(iter(records.values())).contexts.trajectory
    lengths = [len(readings) for _, outcome, readings in every if outcome == "failing"]
    longer = [length for length in lengths if length > 2] or lengths
    turns = max(longer, key=lambda length: (longer.count(length), length))
    for shift, ((name, record), colour) in enumerate(zip(records.items(), colours, strict=True)):
        for outcome, shown, mark in (("failing", slice(None), "o-"), ("passing", slice(-1, None), "s")):
            rows = [(task, r) for task, kind, r in record.contexts.trajectory if kind == outcome and len(r) == turns]
            found = [np.mean([r for name, r in rows if name == task], 0) for task in dict.fromkeys(t for t, _ in rows)]
            columns = list(zip(*found, strict=True))[shown]
            intervals = [stats.mean(np.array(c)) if len(c) > 1 else Interval(*c * 3) for c in columns]
            places = [turn + 0.06 * shift + (0.3 if mark == "s" else 0) for turn in range(1, turns + 1)][shown]
            places = places[: len(intervals)]
            said = "failing" if outcome == "failing" else "twin passes"
            label = f"{name}, {said}" if name else said
            axes.plot(places, [i.estimate for i in intervals], mark, color=colour, label=f"{label} ({len(found)})")
            for place, i in zip(places, intervals, strict=True):
                axes.plot([place, place], i[1:], color=colour, alpha=0.5)
    axes.set_xticks(range(1, turns + 1))
    axes.set_xlabel(f"assistant's turn, transcripts of {turns}")
    axes.set_ylabel(f"{record.concept} at the header, sigma")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def ranked(figure, rows: list[dict]) -> None:
    """The highest and the lowest concepts of a profile over the scenarios, at the turn header and over the reply."""
    shown = rows if len(rows) <= TALLEST else rows[: TALLEST // 2] + rows[-TALLEST // 2 :]
    figure.set_size_inches(8, 0.2 * len(shown) + 1.2)
    axes = figure.add_subplot()
    for place, shift, colour, marker in (("header", 0, TRAINED, "o"), ("reply", 0.35, FAILING, "s")):
        label = {"header": "turn header", "reply": "over the reply"}[place]
        for height, row in enumerate(shown):
            if interval := row[place]:
                ends, at = [interval["low"], interval["high"]], height + shift
                axes.plot(ends, [at, at], color=colour, linewidth=1.5, alpha=0.6)
                axes.plot([interval["estimate"]], [at], marker, color=colour, markersize=3, label=label)
                label = None
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(shown)), [row["concept"] for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("reading over the shipped scenarios, sigma (95 % interval over scenarios)")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def dose(figure, curves: list[dict]) -> None:
    """A row for each direction: honest over gaming replies by dose, and beside it what the dose damages."""
    kinds = [("margin", "honest over gaming (nats)"), ("loss", "loss of neutral text (nats)"),
             ("repetition", "repeated 4-grams (share)"), ("runnable", "runnable answers (share)")]  # fmt: skip
    kinds = [
        (key, title)
        for key, title in kinds
        if any(point.get(key) is not None for c in curves for point in c["points"])
    ]
    figure.set_size_inches(8, 1.5 * len(curves) + 0.6)
    grid = figure.subplots(len(curves), len(kinds), squeeze=False, sharex=True, sharey="col")
    for row, curve in zip(grid, curves, strict=True):
        for axes, (key, title) in zip(row, kinds, strict=True):
            points = [point for point in curve["points"] if point.get(key) is not None]
            doses, values = [point["dose"] for point in points], [point[key] for point in points]
            whole = [value if isinstance(value, list | tuple) else (value,) * 3 for value in values]
            axes.axvspan(*curve["usable"], color="#cccccc", alpha=0.4)
            colour = TRAINED if key == "margin" else FAILING
            axes.plot(doses, [v[0] for v in whole], "o-", color=colour, markersize=3)
            axes.fill_between(doses, [v[1] for v in whole], [v[2] for v in whole], color=colour, alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7)
            if curve is curves[0]:
                axes.set_title(title, fontsize=8)
        row[0].set_ylabel(curve["name"], fontsize=8)
    grid[-1][0].set_xlabel("dose (share of the residual norm)", fontsize=8)
