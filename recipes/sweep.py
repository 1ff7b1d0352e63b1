"""
Arms x seeds of one recipe, each trained, re-extracted and audited, beside one another in one comparison.

```bash
python recipes/sweep.py --config recipes/smollm2-135m/dpo.yaml --arms none hinge-refit random --seeds 0 1 2 \
    --out runs/sweep
```

Every step is skipped when its output is there, so the same command goes on after a stop and a longer list adds to what
there is. Options after `--` go to the recipe (`-- --max_steps 20`).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from calibrate.training.arms import Arm

HERE = Path(__file__).parent
STEERING = {"desperate": -0.05}  # what `inference-steering` does at the audit: the study's dose, away from it
COLUMNS = {
    "fall_failing": "fall on failing contexts, sigma",
    "fall_passing": "fall on passing twins, sigma",
    "specificity": "specificity",
    "fall_own": "fall by re-extracted directions, sigma",
    "margin": "honest over gaming, change, nats per token",
    "kl": "KL on neutral text, nats per token",
}


def runs(arms: list[str], seeds: list[int], draws: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, arm, recipe options) of every run; each seed of `random` is another draw, further draws have seed 0."""
    found = []
    for arm in arms:
        for seed in seeds:
            options = {"arm": arm, "seed": seed} | ({"random_seed": seed} if arm == Arm.RANDOM else {})
            found.append((f"{arm}-seed{seed}", arm, options))
        for draw in range(len(seeds), draws if arm == Arm.RANDOM else 0):
            found.append((f"{arm}-draw{draw}", arm, {"arm": arm, "seed": seeds[0], "random_seed": draw}))
    return found


def call(*words: Any) -> None:
    """Runs a command and ends the sweep where it fails; what is finished stays."""
    print("$", *words, flush=True)
    if code := subprocess.run([str(word) for word in words], check=False).returncode:
        sys.exit(f"error: the command above ended with {code}; call the same sweep again to go on")


def calibrate(*words: Any) -> None:
    call(sys.executable, "-m", "calibrate.cli", *words)


def run_one(name: str, arm: str, options: dict[str, Any], arguments: argparse.Namespace, rest: list[str]) -> Path:
    """Trains, re-extracts and audits one run; returns the audit's folder."""
    folder = arguments.out / name
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", arguments.launcher]
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    call(
        *launch, HERE / f"{arguments.recipe}.py", "--config", arguments.config, *given,
        "--output_dir", folder / "model", *rest,
    )  # fmt: skip
    vectors = arguments.vectors
    calibrate("extract", folder / "model", "--out", folder / "vectors", "--splits", "audit", "--reference", vectors)
    steer = [f"{concept}={dose}" for concept, dose in STEERING.items()] if arm == Arm.INFERENCE_STEERING else []
    calibrate(
        "audit", folder / "model", "--vectors", vectors, "--own-vectors", folder / "vectors" / "audit",
        "--out", folder / "audit", "--max-pairs-per-task", 1, *_tasks(arguments),
        *(["--steer", *steer] if steer else []),
    )  # fmt: skip
    return folder / "audit"


def _tasks(arguments: argparse.Namespace) -> list[Any]:
    return ["--max-tasks", arguments.max_tasks] if arguments.max_tasks else []


def compare(before: Path, audits: dict[str, tuple[str, Path]]) -> list[dict[str, Any]]:
    """One row for each run: its arm, and every figure of `COLUMNS` with its 95 % interval over tasks."""
    from calibrate.audit import readers
    from calibrate.audit.record import load_record

    reference = load_record(before)
    rows = []
    for name, (arm, folder) in audits.items():
        change = readers.compare(reference, load_record(folder))
        rows.append({"run": name, "arm": arm} | {key: getattr(change, key) for key in COLUMNS})
    return rows


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """comparison.json, comparison.md and comparison.png, each written aside and renamed."""

    def cell(value) -> str:
        return "fall too small" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"

    lines = ["| run | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {row['run']} | " + " | ".join(cell(row[key]) for key in COLUMNS) + " |" for row in rows]
    for name, text in (("comparison.json", json.dumps(rows, indent=1)), ("comparison.md", "\n".join(lines))):
        aside = out / f"{name}.partial"
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, out / name)
    plot(rows, out / "comparison.png")


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
    aside = path.with_suffix(".partial.png")
    figure.savefig(aside)
    os.replace(aside, path)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, and those after `--` for the recipe."""
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--recipe", choices=("dpo", "sft", "grpo"), default="dpo")
    parser.add_argument("--config", type=Path, required=True, help="the recipe's YAML")
    parser.add_argument("--arms", nargs="+", required=True, choices=[str(arm) for arm in Arm])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=0, help="draws of the random arm in all, where more than seeds")
    parser.add_argument("--max-tasks", type=int, help="audit so many evenly spaced tasks (default: all)")
    parser.add_argument("--launcher", type=Path, default=HERE.parent / "accelerate_configs" / "single_cpu.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    arguments = parser.parse_args(own)
    recipe = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    arguments.model, arguments.vectors = recipe["model_name_or_path"], recipe["vectors"]
    return arguments, rest


def main(words: list[str]) -> None:
    arguments, rest = parse(words)
    before = arguments.out / "before"
    # `calibrate extract MODEL --splits train audit --out FOLDER` makes both: FOLDER/train trains, FOLDER/audit audits.
    own = "default/audit" if arguments.vectors == "default" else Path(arguments.vectors).parent / "audit"
    calibrate(
        "audit", arguments.model, "--vectors", arguments.vectors, "--own-vectors", own, "--out", before,
        "--max-pairs-per-task", 1, *_tasks(arguments),
    )  # fmt: skip
    audits = {}
    for name, arm, options in runs(arguments.arms, arguments.seeds, arguments.draws):
        audits[name] = (arm, run_one(name, arm, options, arguments, rest))
        write(compare(before, audits), arguments.out)
    print((arguments.out / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
