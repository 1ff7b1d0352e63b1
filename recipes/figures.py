"""Tables and figures of a sweep: text and pictures that are whole or not there."""

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any


def put(path: Path, text: str) -> None:
    """Writes a text file aside and renames it; several sweeps may write the same one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)


def check_same(results: Path, found: dict[str, Any]) -> None:
    """Ends the sweep where the folder has rows of other texts, vectors or data: their figures are not comparable."""
    for path in sorted(results.glob("*/row.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        for what in found.keys() & {"texts", "vectors", "data"}:
            if row.get(what, found[what] if what != "texts" else "") != found[what]:  # older rows lack the others
                sys.exit(
                    f"error: {found['run']} has other {what} than {row['run']} in {results} (by another version, or "
                    "they were changed); give another `--results`, what is in `--out` serves it too"
                )


def table(rows: list[dict[str, Any]], columns: dict[str, str], cell: Callable[[str, Any], str]) -> str:
    """Rows as Markdown, the run's name first."""
    lines = ["| run | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row['run']} | " + " | ".join(cell(key, row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def dots(rows: list[dict[str, Any]], columns: dict[str, str], group: str, path: Path) -> None:
    """Every run as a dot with its interval, one panel for each figure, one colour for each value of `group`."""
    from matplotlib.figure import Figure

    wide = min(len(columns), 7)
    high = -(-len(columns) // wide)
    figure = Figure(figsize=(3.2 * wide, (1.2 + 0.28 * len(rows)) * high), dpi=110, layout="constrained")
    panels = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for empty in panels[len(columns) :]:
        empty.set_visible(False)
    groups = list(dict.fromkeys(row[group] for row in rows))
    for panel, (key, title) in zip(panels, columns.items(), strict=False):
        for height, row in enumerate(rows):
            if row[key] is not None:
                middle, low, high = row[key]
                colour = f"C{groups.index(row[group]) % 10}"
                panel.plot([low, high], [height, height], color=colour, linewidth=2, alpha=0.5)
                panel.plot([middle], [height], "o", color=colour, markersize=5)
        panel.axvline(0, color="#999999", linewidth=0.8)
        panel.set_title(title, fontsize=8, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    names = [textwrap.fill(row["run"].replace(",", ", "), 64) for row in rows]
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()
    for panel in panels[::wide]:
        panel.tick_params(axis="y", labelsize=7)
    _save(figure, path)


def pareto(rows: list[dict[str, Any]], path: Path) -> None:
    """Hinge on audit tasks against KL on neutral text, over the penalty's share of the gradient."""
    shown = [r for r in rows if re.fullmatch(r"none-seed0|hinge-refit-(seed0|penalty_share=[\d.]+)", r["run"])]
    if len(shown) < 3:
        return
    figure, panel = _figure("KL on neutral text, nats per token", "hinge on failing audit contexts, sigma²")
    for row in shown:
        x, y = row["kl"], row["hinge"]
        panel.plot([x[0], x[0]], y[1:], color="#888888", linewidth=1)
        panel.plot(x[1:], [y[0], y[0]], color="#888888", linewidth=1)
        panel.plot(x[0], y[0], "o", color="C0")
        name = row["run"].removesuffix("-seed0")
        panel.annotate(name, (x[0], y[0]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    _save(figure, path)


def tasks(rows: list[dict[str, Any]], path: Path) -> None:
    """Falls on audit tasks over the number of training tasks, the arm's own run with all of them last."""
    by_tasks = {r["run"].split("=")[1]: r for r in rows if re.fullmatch(r"hinge-refit-max_tasks=\d+", r["run"])}
    if len(by_tasks) < 2:
        return
    counts = sorted(by_tasks, key=int)
    for row in rows:
        if row["run"] == "hinge-refit-seed0":
            by_tasks["all"] = row
            counts.append("all")
    figure, panel = _figure("training tasks", "fall at the turn header on audit tasks, sigma")
    for key, label, colour in (("fall_failing", "failing", "C3"), ("fall_passing", "passing twins", "C2")):
        middle, low, high = zip(*(by_tasks[count][key] for count in counts), strict=True)
        panel.plot(counts, middle, "o-", color=colour, label=label)
        panel.fill_between(counts, low, high, color=colour, alpha=0.15)
    panel.legend(frameon=False)
    _save(figure, path)


def _figure(x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _save(figure, path: Path) -> None:
    aside = path.with_suffix(f".{os.getpid()}.partial.png")
    figure.savefig(aside)
    os.replace(aside, path)
