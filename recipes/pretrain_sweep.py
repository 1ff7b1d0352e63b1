"""
Selections x seeds of continued pretraining, each audited, beside one another in one comparison.

```bash
python recipes/pretrain_sweep.py --config recipes/smollm2-135m/pretrain.yaml --seeds 0 1 2 \
    --out runs/pretrain --results recipes/smollm2-135m/pretrain
```

Every step is skipped when its output is there, so the same command goes on after a stop; a run that has its row in
`--results` is not repeated. A results folder of another recipe, audit or options is refused. Options after `--` go to
the recipe.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import figures
import numpy as np
import parsing
from pretrain import SELECTIONS, claim  # the scripts beside this one
from sweep import calibrate, call

from calibrate import stats
from calibrate.audit import readers
from calibrate.audit.record import Record, load_record

FROM_YAML = ("model_name_or_path", "model_revision", "trust_remote_code")  # the audit reads them there
HERE = Path(__file__).parent
READ = {"texts": "corpora", "vectors": "vectors"}  # in a row; in an audit's options
CONCEPTS = ("desperate", "calm", "afraid", "angry")
COLUMNS = {
    **{f"{name}_neutral": f"{name} on neutral text, change, sigma" for name in CONCEPTS},
    **{f"{name}_failing": f"{name} on failing contexts, change, sigma" for name in CONCEPTS},
    "margin": "honest over gaming, change, nats per token",
    "emotion_change": "what others feel, log-odds, change, nats",
    "perplexity": "perplexity on neutral text, change, %",
}


def row_of(name: str, selection: str, before: Record, after: Record) -> dict[str, Any]:
    """Name, selection, figures of `COLUMNS` with 95 % intervals over tasks or texts, and every concept's change."""
    moved = {kind: header(after, kind) - header(before, kind) for kind in ("neutral", "failing")}
    found: dict[str, Any] = {
        f"{concept}_{kind}": stats.mean(change[:, before.vectors.index(concept)])
        for concept in CONCEPTS
        for kind, change in moved.items()
    }
    found["profile"] = {
        kind: dict(zip(before.vectors.concepts, change.mean(0).round(4).tolist(), strict=True))
        for kind, change in moved.items()
    }
    change = readers.compare(before, after).figures
    loss = change["loss_change"]
    found["perplexity"] = [100 * float(np.expm1(value)) for value in loss] if loss else None
    found |= {"run": name, "selection": selection} | {what: before.options[key] for what, key in READ.items()}
    return found | {key: change[key] for key in ("margin", "emotion_change")}


def header(record: Record, kind: str) -> np.ndarray:
    """Readings at the turn header, mean over the band, sigma, [tasks, concepts]."""
    at = record.vectors.positions(record.vectors.used_band())
    readings = record.profile.readings(record.vectors)["header"]
    return record.profile.by_task(kind, readings)[:, :, at].mean(2)


def alike(rows: list[dict[str, Any]], kind: str) -> str:
    """How far selections move all readings alike: the correlation over concepts of two runs' changes, as Markdown.

    Mean over pairs of runs; on the diagonal they are two seeds of one selection.
    """
    names = [name for name in SELECTIONS if any(row["selection"] == name for row in rows)]
    lines = [
        f"| all concepts, {kind}: correlation of changes | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for one in names:
        cells = []
        for other in names:
            pairs = [(a, b) for a in rows for b in rows if (a["selection"], b["selection"]) == (one, other) and a != b]
            changes = [[list(row["profile"][kind].values()) for row in pair] for pair in pairs]
            cells.append(f"{np.mean([np.corrcoef(pair)[0, 1] for pair in changes]):.2f}" if pairs else "-")
        lines.append(f"| {one} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """comparison.md and comparison.png from every row in the folder, selection by selection."""

    def cell(_: str, value: Any) -> str:
        return "-" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value)

    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/row.json"))]
    rows.sort(key=lambda row: SELECTIONS.index(row["selection"]))
    tables = [figures.table(rows, COLUMNS, cell), alike(rows, "neutral"), alike(rows, "failing")]
    figures.put(folder / "comparison.md", "\n\n".join(tables))
    figures.dots(rows, COLUMNS, "selection", folder / "comparison.png")


def main(words: list[str]) -> None:
    own, rest = parsing.split(words)
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the recipe's YAML")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--vectors", default="default")
    parser.add_argument("--max-tasks", type=int, default=14, help="audit so many tasks (default: %(default)s)")
    parser.add_argument("--max-concepts", type=int, default=43, help="own directions of so many concepts")
    parser.add_argument("--launcher", type=Path, default=HERE.parent / "accelerate_configs" / "single_cpu.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--results", type=Path, help="folder of the figures, small enough to keep (default: OUT)")
    arguments = parser.parse_args(own)
    results = arguments.results or arguments.out
    recipe = parsing.recipe(parser, arguments.config, ("model_name_or_path",))
    parsing.refuse(parser, rest, {"selection", "seed", "output_dir", "config", *FROM_YAML})
    settings = {name: getattr(arguments, name) for name in ("vectors", "max_tasks", "max_concepts")}
    processes = parsing.recipe(parser, arguments.launcher, ()).get("num_processes", 1)
    settings |= {"processes": processes} if processes != 1 else {}  # each adds a batch to a step
    try:
        claim(results, settings | {"config": recipe, "rest": rest}, "--results")
    except ValueError as error:
        sys.exit(f"error: {error}")
    model = recipe["model_name_or_path"]
    where = ["--revision", recipe["model_revision"]] if recipe.get("model_revision") else []
    where += ["--trust-remote-code"] if recipe.get("trust_remote_code") else []

    def audit(which, out: Path) -> Record:
        calibrate(
            "audit", which, "--vectors", arguments.vectors, "--out", out, "--max-tasks", arguments.max_tasks,
            "--max-concepts", arguments.max_concepts, *where,
        )  # fmt: skip
        return load_record(out)

    for seed in arguments.seeds:
        for selection in arguments.selections:
            name = f"{selection}-seed{seed}"
            row = results / name / "row.json"
            if row.is_file():
                print(f"{row}: this run is finished; nothing to do", flush=True)
                continue
            before, folder = audit(model, arguments.out / "before"), arguments.out / name
            figures.check_same(results, {"run": name} | {what: before.options[key] for what, key in READ.items()})
            call(
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", arguments.launcher,
                HERE / "pretrain.py", "--config", arguments.config, "--selection", selection, "--seed", seed,
                "--output_dir", folder / "model", *rest,
            )  # fmt: skip
            found = row_of(name, selection, before, audit(folder / "model", folder / "audit"))
            found["data"] = json.loads((folder / "model" / "settings.json").read_text(encoding="utf-8"))["data"]
            figures.check_same(results, found)
            row.parent.mkdir(parents=True, exist_ok=True)
            figures.put(row, json.dumps(found, indent=1))
            write(results)
    write(results)  # a kill may have left it behind its rows
    print((results / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
