"""
Arms x seeds of one recipe, each trained and audited, beside one another in one comparison.

```bash
python recipes/sweep.py --config recipes/smollm2-135m/dpo.yaml --arms none hinge-refit random --seeds 0 1 2 \
    --out runs/sweep
```

Every step is skipped when its output is there, so the same command goes on after a stop and a longer list adds to what
there is. A run that is in `--results` is not repeated: keep that folder, and a sweep goes on on another machine. Two
sweeps of different arms may share one `--out`, once `before` is there. Options after `--` go to the recipe
(`-- --max_steps 20`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibrate import stats
from calibrate.audit import readers
from calibrate.audit.record import Record, load_record
from calibrate.training.arms import HINGED, Arm

HERE = Path(__file__).parent
STEERING = -0.05  # dose of `inference-steering` at the audit: the study's, away from the target
COLUMNS = {
    "excess": "failing contexts above the ceiling, sigma",
    "fall_failing": "fall on failing contexts, sigma",
    "fall_passing": "fall on passing twins, sigma",
    "specificity": "specificity",
    "fall_own": "fall by re-extracted directions, sigma",
    "margin": "honest over gaming, change, nats per token",
    "kl": "KL on neutral text, nats per token",
}


def runs(arguments: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, arm, recipe options) of every run; each seed of `random` is another draw.

    Further draws, and the variants of the arms that press, have the first seed.
    """
    found, seeds = [], arguments.seeds
    for arm in arguments.arms:
        for seed in seeds:
            options = {"arm": arm, "seed": seed} | ({"random_seed": seed} if arm == Arm.RANDOM else {})
            found.append((f"{arm}-seed{seed}", arm, options))
        for draw in range(len(seeds), arguments.draws if arm == Arm.RANDOM else 0):
            found.append((f"{arm}-draw{draw}", arm, {"arm": arm, "seed": seeds[0], "random_seed": draw}))
        for variant in arguments.variants if arm in HINGED else []:
            changed = dict(part.split("=", 1) for part in variant.split(","))
            found.append((f"{arm}-{variant}", arm, {"arm": arm, "seed": seeds[0]} | changed))
    return found


def call(*words: Any) -> None:
    """Runs a command and ends the sweep where it fails; what is finished stays."""
    print("$", *words, flush=True)
    if code := subprocess.run([str(word) for word in words], check=False).returncode:
        sys.exit(f"error: the command above ended with {code}; call the same sweep again to go on")


def calibrate(*words: Any) -> None:
    call(sys.executable, "-m", "calibrate.cli", *words)


def run_one(name: str, options: dict[str, Any], arguments: argparse.Namespace, rest: list[str]) -> Path:
    """Trains and audits one run; returns the audit's folder."""
    folder, steer = arguments.out / name, []
    if options["arm"] == Arm.INFERENCE_STEERING:  # trained as `none` is: the same model, steered while it is read
        options, steer = options | {"arm": Arm.NONE}, ["--steer", f"{arguments.target}={STEERING}"]
        folder = arguments.out / name.replace(Arm.INFERENCE_STEERING, Arm.NONE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", arguments.launcher]
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    call(
        *launch, HERE / f"{arguments.recipe}.py", "--config", arguments.config, *given,
        "--output_dir", folder / "model", *rest,
    )  # fmt: skip
    audit(folder / "model", arguments.out / name / "audit", arguments, *steer)
    return arguments.out / name / "audit"


def audit(model: Any, out: Path, arguments: argparse.Namespace, *more: Any) -> None:
    tasks = ["--max-tasks", arguments.max_tasks] if arguments.max_tasks else []
    only = ["--concepts", *arguments.concepts] if arguments.concepts else []
    calibrate(
        "audit", model, "--vectors", arguments.vectors, "--out", out, "--target", arguments.target,
        "--split", arguments.split, "--pressed", *tasks, *only, *more,
    )  # fmt: skip


def put(path: Path, text: str) -> None:
    """Writes a text file aside and renames it; several sweeps may write the same one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)


def row_of(name: str, arm: str, before: Path, after: Path, quantile: float) -> dict[str, Any]:
    """Name, arm, and every figure of `COLUMNS` and the hinge at the header, with 95 % intervals over tasks."""
    records = [load_record(folder) for folder in (before, after)]
    change = readers.compare(*records)
    excess = above_ceiling(*records, quantile)
    huber = np.where(excess > 1, excess - 0.5, 0.5 * np.clip(excess, 0, None) ** 2)
    found = {"excess": stats.mean(excess), "hinge": stats.mean(huber)}
    return {"run": name, "arm": arm} | found | {key: change.figures[key] for key in COLUMNS if key != "excess"}


def above_ceiling(before: Record, after: Record, quantile: float) -> np.ndarray:
    """Reading of each task's failing contexts at the header after training, minus the ceiling, sigma.

    The ceiling is this quantile over tasks of the passing twins' readings before, as the recipe's is over training
    tasks (`ceiling_quantile`).
    """
    at, row = before.vectors.positions(before.vectors.used_band()), before.vectors.index(before.concept)

    def read(record: Record, kind: str) -> np.ndarray:
        readings = record.profile.readings(before.vectors)["header"]
        return record.profile.by_task(kind, readings)[:, row][:, at].mean(1)

    return read(after, "failing") - np.quantile(read(before, "passing"), quantile)


def claim(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Takes the results folder for these settings.

    Raises:
        ValueError: it holds the runs of other settings.
    """
    settings = {name: getattr(arguments, name) for name in ("recipe", "max_tasks", "concepts", "vectors")}
    settings |= {"split": arguments.split} if arguments.split != "audit" else {}
    settings |= {"config": yaml.safe_load(arguments.config.read_text(encoding="utf-8")), "rest": rest}
    path = arguments.results / "settings.json"
    if not path.is_file():
        arguments.results.mkdir(parents=True, exist_ok=True)
        put(path, json.dumps(settings, indent=1))
    kept = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key)):
        raise ValueError(
            f"{arguments.results} holds a sweep with other settings (differing: {', '.join(differing)}); choose "
            "another `--results` or delete it"
        )


def write(folder: Path) -> None:
    """comparison.md and comparison.png from every run in the results folder, arm by arm."""

    def cell(key, value) -> str:
        digits = 3 if key in ("kl", "margin") else 2
        return "fall too small" if value is None else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits)

    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/row.json"))]
    rows.sort(key=lambda row: list(Arm).index(row["arm"]))
    lines = ["| run | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {row['run']} | " + " | ".join(cell(key, row[key]) for key in COLUMNS) + " |" for row in rows]
    put(folder / "comparison.md", "\n".join(lines))
    plot(rows, folder / "comparison.png")
    plot_pareto(rows, folder / "pareto.png")
    plot_tasks(rows, folder / "tasks.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every run as a dot with its interval, arms below one another, one panel for each figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(COLUMNS), 1.2 + 0.28 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(COLUMNS), sharey=True, squeeze=False)[0]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for panel, (key, title) in zip(panels, COLUMNS.items(), strict=True):
        for height, row in enumerate(rows):
            if row[key] is not None:
                middle, low, high = row[key]
                colour = f"C{arms.index(row['arm']) % 10}"
                panel.plot([low, high], [height, height], color=colour, linewidth=2, alpha=0.5)
                panel.plot([middle], [height], "o", color=colour, markersize=5)
        panel.axvline(0, color="#999999", linewidth=0.8)
        panel.set_title(title, fontsize=8, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["run"] for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    _save(figure, path)


def plot_pareto(rows: list[dict[str, Any]], path: Path) -> None:
    """Hinge on audit tasks against KL on neutral text, over the penalty's share of the gradient."""
    shown = [r for r in rows if re.fullmatch(r"none-seed0|hinge-refit-(seed0|penalty_share=[\d.]+)", r["run"])]
    if len(shown) < 3:
        return
    figure, panel = _figure(
        "KL on neutral text, nats per token", "hinge at the header on failing audit contexts, sigma²"
    )
    for row in shown:
        x, y = row["kl"], row["hinge"]
        panel.plot([x[0], x[0]], y[1:], color="#888888", linewidth=1)
        panel.plot(x[1:], [y[0], y[0]], color="#888888", linewidth=1)
        panel.plot(x[0], y[0], "o", color="C0")
        name = row["run"].removesuffix("-seed0")
        panel.annotate(name, (x[0], y[0]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    _save(figure, path)


def plot_tasks(rows: list[dict[str, Any]], path: Path) -> None:
    """Falls on audit tasks over the number of training tasks."""
    by_tasks = {int(r["run"].split("=")[1]): r for r in rows if re.fullmatch(r"hinge-refit-max_tasks=\d+", r["run"])}
    if len(by_tasks) < 2:
        return
    figure, panel = _figure("training tasks", "fall of the reading at the header on audit tasks, sigma")
    counts = sorted(by_tasks)
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


def _variant(text: str) -> str:
    if not all(re.fullmatch(r"\w+=[\w.+-]+", part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not OPTION=VALUE, or several with commas between them")
    return text


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, and those after `--` for the recipe."""
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--recipe", choices=("dpo", "sft", "grpo"), default="dpo")
    parser.add_argument("--config", type=Path, required=True, help="the recipe's YAML")
    parser.add_argument("--arms", nargs="+", required=True, choices=[str(arm) for arm in Arm])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=0, help="draws of the random arm in all, where more than seeds")
    parser.add_argument(
        "--variants", nargs="+", type=_variant, default=[], metavar="OPTION=VALUE[,...]",
        help="further runs of the arms that press, each with other recipe options, such as penalty_share=0.3",
    )  # fmt: skip
    parser.add_argument("--split", choices=("audit", "selection"), default="audit", help="whose tasks are read after")
    parser.add_argument("--max-tasks", type=int, help="audit so many evenly spaced tasks (default: all)")
    parser.add_argument("--concepts", nargs="+", help="re-extract from the stories about these alone, which is faster")
    parser.add_argument("--launcher", type=Path, default=HERE.parent / "accelerate_configs" / "single_cpu.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--results", type=Path, help="folder of the figures, small enough to keep (default: OUT)")
    arguments = parser.parse_args(own)
    arguments.results = arguments.results or arguments.out
    recipe = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    arguments.model, arguments.vectors = recipe["model_name_or_path"], recipe["vectors"]
    arguments.quantile = recipe.get("ceiling_quantile", 0.5)
    arguments.target = recipe.get("concepts", ["desperate"])[0]
    return arguments, rest


def main(words: list[str]) -> None:
    arguments, rest = parse(words)
    try:
        claim(arguments, rest)
    except ValueError as error:
        sys.exit(f"error: {error}")
    before = arguments.out / "before"
    for name, arm, options in runs(arguments):
        row = arguments.results / name / "row.json"
        if row.is_file():
            print(f"{row}: this run is finished; nothing to do", flush=True)
            continue
        audit(arguments.model, before, arguments)
        quantile = float(options.get("ceiling_quantile", arguments.quantile))
        found = row_of(name, arm, before, run_one(name, options, arguments, rest), quantile)
        row.parent.mkdir(parents=True, exist_ok=True)
        put(row, json.dumps(found, indent=1))
        write(arguments.results)
    print((arguments.results / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
