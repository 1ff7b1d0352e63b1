"""The report's pictures, as SVG that is written into the page."""

import io
import re

from markupsafe import Markup

from calibrate.audit.readers import FIGURES, Change
from calibrate.audit.record import Record

TRAINED, CONTROL, FAILING, PASSING = "#1f5fa8", "#999999", "#b5442e", "#2e8b57"  # told apart by the colour-blind
TALLEST = 60  # concepts in the picture: those that moved most; the table has all


def draw(make, *arguments) -> Markup:
    """Draws with matplotlib and returns inline SVG without addresses, so that the page needs no network."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "calibrate", "font.size": 9})
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
    axes.set_xlabel("after minus before, sigma, turn header, failing audit tasks (95 % interval over tasks)")
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


def trajectory(figure, before: Record, after: Record) -> None:
    """Target reading at each turn header of the failing transcripts, and at the last one of their twins."""
    figure.set_size_inches(8, 3)
    axes = figure.add_subplot()
    for record, colour, label in ((before, CONTROL, "before"), (after, TRAINED, "after")):
        failing = [readings for _, outcome, readings in record.contexts.trajectory if outcome == "failing"]
        passing = [readings[-1] for _, outcome, readings in record.contexts.trajectory if outcome == "passing"]
        longest = max(map(len, failing))
        turns = [[r[turn] for r in failing if len(r) > turn] for turn in range(longest)]
        axes.plot(
            range(1, longest + 1), [sum(t) / len(t) for t in turns], "o-", color=colour, label=f"{label}, failing"
        )
        axes.plot([longest + 0.3], [sum(passing) / len(passing)], "s", color=colour, label=f"{label}, twin passes")
    axes.set_xlabel("assistant's turn of a failing transcript")
    axes.set_ylabel(f"{before.concept} at the header, sigma")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
