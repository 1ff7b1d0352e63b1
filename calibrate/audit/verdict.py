"""Names the outcome of a change by the written rule of `rule.yaml`, with the figures that decided it."""

import operator
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from calibrate.audit.readers import FIGURES, Figures
from calibrate.stats import Interval

CALIBRATED = "calibrated"
_RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}


class Inequality(NamedTuple):
    """`figure.side relation threshold`, such as `contrast.low <= 0`."""

    figure: str
    side: str
    relation: str
    threshold: float

    def holds(self, figures: Figures) -> bool | None:
        """None where the figure could not be formed."""
        interval = figures[self.figure]
        if interval is None:
            return None
        return _RELATIONS[self.relation](getattr(interval, self.side), self.threshold)


class Outcome(NamedTuple):
    """One named outcome: what it means, when it fires and where its thresholds come from."""

    name: str
    means: str
    any: list[list[Inequality]]
    source: str
    shown: list[str]  # figures that stand beside, where they were formed; they decide nothing


class Finding(NamedTuple):
    """One outcome that fired, and the figures by which it did."""

    outcome: str
    means: str
    figures: list[str]  # sentences: figure, value, threshold
    otherwise: list[str]  # what would have to hold for it not to fire


class Verdict(NamedTuple):
    """The named outcome, all findings in order of precedence, and what was not tested."""

    outcome: str
    findings: list[Finding]
    not_tested: dict[str, str]  # by outcome: the figures that some of its inequalities lack

    @property
    def sentence(self) -> str:
        """What it means and why, in one sentence."""
        first = self.findings[0]
        return f"{first.means} ({'; '.join(first.figures)})"


RULE = Path(__file__).with_name("rule.yaml")


@cache
def load_rule(path: Path = RULE) -> list[Outcome]:
    """The rule, in order of precedence.

    Raises:
        ValueError: an inequality is not of the form `figure.side relation number`.
    """
    rule = []
    for name, row in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        every = [[_parse(text, path) for text in together] for together in row["any"]]
        rule.append(Outcome(name, row["means"], every, row["source"], row.get("shown", [])))
    return rule


def _parse(text: str, path: Path) -> Inequality:
    match = re.fullmatch(r"(\w+)\.(estimate|low|high) (<=|>=|<|>) (-?\d+(?:\.\d+)?)", text)
    if not match or match[1] not in FIGURES:
        raise ValueError(f"{path}: {text!r} is not `FIGURE.low|high|estimate < NUMBER`; figures: {', '.join(FIGURES)}")
    return Inequality(match[1], match[2], match[3], float(match[4]))


def judge(figures: Figures, band_reason: str | None = None) -> Verdict:
    """Applies the rule.

    Args:
        band_reason: why the search found no band, where it found none: then the premise does not hold.

    Raises:
        ValueError: a figure is not a finite number, so that no inequality about it could hold.
    """
    if broken := [name for name, interval in figures.items() if interval and not np.isfinite(interval).all()]:
        raise ValueError(
            f"not finite: {', '.join(broken)}; a checkpoint gives states or likelihoods that are no numbers (perhaps "
            "too large for its precision); audit it saved in float32, or train it again"
        )
    findings, not_tested = [], {}
    for outcome in load_rule():
        met = [[one.holds(figures) for one in together] for together in outcome.any]
        if outcome.name == "premise not met" and band_reason is not None:
            findings.append(Finding(outcome.name, outcome.means, [band_reason], ["the search finds a band"]))
            continue
        fired = [together for together, holds in zip(outcome.any, met, strict=True) if all(h is True for h in holds)]
        missing = dict.fromkeys(one.figure for together in outcome.any for one in together if not figures[one.figure])
        if missing and not fired:
            not_tested[outcome.name] = f"needs {', '.join(missing)}"
        if fired:
            said: dict[str, list[str]] = {}  # by figure: two inequalities of one are said once
            for one in dict.fromkeys(one for together in fired for one in together):
                said.setdefault(one.figure, []).append(f"{one.side} {one.relation} {one.threshold:g}")
            why = [f"{FIGURES[name]}: {_show(figures[name])}, {' and '.join(bounds)}" for name, bounds in said.items()]
            beside = [f"{FIGURES[name]}: {_show(figures[name])}" for name in outcome.shown if figures[name]]
            otherwise = [" or ".join(_say_opposite(one) for one in together) for together in fired]
            findings.append(Finding(outcome.name, outcome.means, [*why, *beside], otherwise))
    if not findings:
        names = ("fall_failing", "specificity", "fall_own", "fall_held_out", "fall_logistic", "gain", "margin")
        shown = [f"{FIGURES[name]}: {_show(figures[name])}" for name in names if figures[name]]
        means = "the reading fell on failing contexts, specifically and by the model's own directions too, and "
        means += "replies are more honest"
        means += f"; not tested: {'; '.join(f'{n} ({why})' for n, why in not_tested.items())}" if not_tested else ""
        findings = [Finding(CALIBRATED, means, shown, [])]
    return Verdict(findings[0].outcome, findings, not_tested)


def _say_opposite(one: Inequality) -> str:
    return f"{one.figure}.{one.side} {_OPPOSITE[one.relation]} {one.threshold:g}"


def _show(interval: Interval | None) -> str:
    return "not formed" if interval is None else "{:.3g} [{:.3g}, {:.3g}]".format(*interval)
