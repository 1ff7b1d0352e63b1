"""
What the decision rule says of every run of a sweep, and how near its control arms come to each inequality.

```bash
python recipes/verdicts.py recipes/smollm2-135m/sweep
```

Writes `verdicts.md` into the folder: a run is judged beside those of the folder that leave the target alone, such a
run beside the others; then, for each inequality, the one of those that comes nearest to it. A threshold that they
reach says nothing about a penalty.
"""

import json
import sys
from pathlib import Path

import figures

from calibrate.audit import readers, verdict
from calibrate.audit.verdict import Inequality
from calibrate.stats import Interval
from calibrate.training.arms import CONTROLS, PLAIN, Arm

Runs = dict[str, tuple[readers.Figures, readers.ByTask]]  # by name
# Trained, and nothing pressed or steered the target, nor did composed replies teach its opposite.
IDLE = {*PLAIN, *CONTROLS, Arm.OUTPUT_KL} - {Arm.INFERENCE_STEERING, Arm.CALM_DPO}


def load(folder: Path) -> tuple[Runs, Runs]:
    """The runs that are to move the target, and those that are not.

    Raises:
        ValueError: no run has all figures of a comparison.
    """
    runs: Runs = {}
    controls: Runs = {}
    for path in sorted(folder.glob("*/row.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if "by_task" in row:
            found = {name: Interval(*row[name]) if row.get(name) else None for name in readers.FIGURES}
            (controls if row["arm"] in IDLE else runs)[row["run"]] = found, row["by_task"]
    if not runs and not controls:
        raise ValueError(f"{folder}: no RUN/row.json with all figures of a comparison; run recipes/sweep.py")
    return runs, controls


def judge(name: str, runs: Runs, controls: Runs) -> verdict.Verdict:
    """The verdict on a run beside the control arms; a control is judged beside the others."""
    found, by_task = (runs | controls)[name]
    beside = {other: control for other, (_, control) in controls.items() if other != name}
    return verdict.judge(found | readers.beside_controls(by_task, beside))


def nearest(one: Inequality, controls: Runs) -> tuple[str, float] | None:
    """The control run that comes nearest to an inequality, or furthest beyond it; None where none has the figure."""
    sign = 1 if one.relation in (">", ">=") else -1
    values = {name: getattr(found[one.figure], one.side) for name, (found, _) in controls.items() if found[one.figure]}
    return max(values.items(), key=lambda item: sign * item[1], default=None)


def table(runs: Runs, controls: Runs) -> str:
    lines = ["| run | verdict | also |", "|---|---|---|"]
    for name in [*runs, *controls]:
        first, *also = (finding.outcome for finding in judge(name, runs, controls).findings)
        lines.append(f"| {name} | {first} | {', '.join(also) or '-'} |")
    lines += ["", f"| outcome | inequality | nearest of {len(controls)} idle runs | value |", "|---|---|---|---|"]
    for outcome in verdict.load_rule():
        for one in dict.fromkeys(one for together in outcome.any for one in together):
            text = f"{one.figure}.{one.side} {one.relation} {one.threshold:g}"
            name, value = nearest(one, controls) or ("-", None)
            lines.append(f"| {outcome.name} | {text} | {name} | {'-' if value is None else f'{value:.3f}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/verdicts.py FOLDER (the `--results` of a sweep)")
    try:
        found = table(*load(Path(sys.argv[1])))
    except ValueError as error:
        sys.exit(f"error: {error}")
    figures.put(Path(sys.argv[1]) / "verdicts.md", found)
    print(found)
