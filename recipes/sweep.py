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

`--workers 12` has twelve runs side by side, on one GPU where they fit: each in a process of its own, forked from one
that has done the imports, without the launcher, its output in `OUT/NAME.log`.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import figures
import numpy as np
import parsing
import yaml

from calibrate import stats
from calibrate.audit import readers
from calibrate.audit.record import Record, load_record
from calibrate.training.arms import HINGED, Arm

HERE = Path(__file__).parent
# The audit reads them there, for all runs alike.
FROM_YAML = ("model_name_or_path", "model_revision", "trust_remote_code", "vectors", "concepts", "blocks")
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
        others = [draw for draw in range(arguments.draws) if draw not in seeds] if arm == Arm.RANDOM else []
        for draw in others[: max(0, arguments.draws - len(seeds))]:
            found.append((f"{arm}-draw{draw}", arm, {"arm": arm, "seed": seeds[0], "random_seed": draw}))
        for variant in arguments.variants if arm in HINGED else []:
            changed = dict(part.split("=", 1) for part in variant.split(","))
            found.append((f"{arm}-{variant}", arm, {"arm": arm, "seed": seeds[0]} | changed))
    return found


def call(*words: Any) -> None:
    """Runs a command and ends the sweep where it fails; what is finished stays."""
    print("$", *words, flush=True)
    if multiprocessing.parent_process():  # a worker of `side_by_side`
        return here([str(word) for word in words])
    if code := subprocess.run([str(word) for word in words], check=False).returncode:
        sys.exit(f"error: the command above ended with {code}; call the same sweep again to go on")


def here(words: list[str]) -> None:
    """Runs `python SCRIPT ...` or `python -m MODULE ...` in this process."""
    _, first, *rest = words
    sys.argv = rest if first == "-m" else [first, *rest]
    run = runpy.run_module if first == "-m" else runpy.run_path
    run(sys.argv[0], run_name="__main__")


def calibrate(*words: Any) -> None:
    call(sys.executable, "-m", "calibrate.cli", *words)


def run_one(name: str, options: dict[str, Any], arguments: argparse.Namespace, rest: list[str]) -> None:
    """Trains and audits one run."""
    folder, steer = arguments.out / name, []
    if options["arm"] == Arm.INFERENCE_STEERING:  # trained as `none` is: the same model, steered while it is read
        options, steer = options | {"arm": Arm.NONE}, ["--steer", f"{arguments.target}={STEERING}"]
        if arguments.workers == 1:  # side by side the two would write one folder at once
            folder = arguments.out / name.replace(Arm.INFERENCE_STEERING, Arm.NONE)
    launch = [sys.executable]
    if arguments.workers == 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", arguments.launcher]
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    call(
        *launch, HERE / f"{arguments.recipe}.py", "--config", arguments.config, *given,
        "--output_dir", folder / "model", *rest,
    )  # fmt: skip
    audit(folder / "model", arguments.out / name / "audit", arguments, *steer)


def audit(model: Any, out: Path, arguments: argparse.Namespace, *more: Any) -> None:
    tasks = ["--max-tasks", arguments.max_tasks] if arguments.max_tasks else []
    only = ["--concepts", *arguments.concepts] if arguments.concepts else []
    only += ["--blocks", arguments.blocks] if arguments.blocks else []
    only += ["--revision", arguments.revision] if arguments.revision else []
    only += ["--trust-remote-code"] if arguments.trust_remote_code else []
    calibrate(
        "audit", model, "--vectors", arguments.vectors, "--out", out, "--target", arguments.target,
        "--split", arguments.split, "--pressed", *tasks, *only, *more,
    )  # fmt: skip


def quietly(log: Path, work: Callable, *given: Any) -> None:
    """In a worker: does the work with everything that it prints in a file.

    Raises:
        RuntimeError: the work ended the process, with an error.
    """
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work(*given)
    except SystemExit as error:
        if error.code:
            raise RuntimeError(error.code) from None


def side_by_side(todo: list[tuple[str, str, dict[str, Any]]], arguments: argparse.Namespace, rest: list[str]) -> None:
    """Trains and audits the runs, `--workers` at a time; one that fails is named at the end, the others go on."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU while importing would spoil it for the forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["calibrate.training.runs", "calibrate.training.trainers", "calibrate.commands.full"]
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with ProcessPoolExecutor(arguments.workers, mp_context=context, max_tasks_per_child=1) as pool:
        log = arguments.out / "before.log"
        before = pool.submit(quietly, log, audit, arguments.model, arguments.out / "before", arguments)
        jobs: dict[Future, tuple[str, str, dict[str, Any]]] = {}
        for run in todo:
            jobs[pool.submit(quietly, arguments.out / f"{run[0]}.log", run_one, run[0], run[2], arguments, rest)] = run
        for job in as_completed(jobs):
            name, arm, options = jobs[job]
            if error := before.exception() or job.exception():  # a worker that was killed among them
                failed.append(name)
                with (arguments.out / f"{name}.log").open("a", encoding="utf-8") as log:
                    log.writelines(traceback.format_exception(error))
                print(f"{name}: {error} (see {log.name})", flush=True)
            else:
                finish(name, arm, options, arguments)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(todo)} runs failed ({', '.join(failed)}); call the same sweep again")


def finish(name: str, arm: str, options: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Writes the row of a run that is trained and audited, and the comparison anew."""
    quantile = float(options.get("ceiling_quantile", arguments.quantile))
    found = row_of(name, arm, arguments.out / "before", arguments.out / name / "audit", quantile)
    found["seed"] = options["seed"]
    figures.check_same(arguments.results, found)
    row = arguments.results / name / "row.json"
    row.parent.mkdir(parents=True, exist_ok=True)
    figures.put(row, json.dumps(found, indent=1))
    write(arguments.results)
    print(f"{row}: written", flush=True)


def row_of(name: str, arm: str, before: Path, after: Path, quantile: float) -> dict[str, Any]:
    """Name, arm, distance to the ceiling, hinge, and all of a comparison: figures with 95 % intervals, and by task.

    The hinge is that of the band's mean reading at the header, with its knee at one sigma, whatever the recipe pressed
    with. `texts` and `vectors` are digests of what both audits read, and with which vectors.
    """
    records = [load_record(folder) for folder in (before, after)]
    change = readers.compare(*records)
    excess = above_ceiling(*records, quantile)
    huber = np.where(excess > 1, excess - 0.5, 0.5 * np.clip(excess, 0, None) ** 2)
    found = {"excess": stats.mean(excess), "hinge": stats.mean(huber), "texts": records[0].options["corpora"]}
    found["vectors"] = records[0].options["vectors"]
    return {"run": name, "arm": arm} | found | change.figures | {"by_task": change.by_task}


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
    settings |= {"processes": arguments.processes} if arguments.processes != 1 else {}  # each adds a batch to a step
    settings |= {"config": yaml.safe_load(arguments.config.read_text(encoding="utf-8")), "rest": rest}
    path = arguments.results / "settings.json"
    if not path.is_file():
        arguments.results.mkdir(parents=True, exist_ok=True)
        figures.put(path, json.dumps(settings, indent=1))
    kept = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key)):
        raise ValueError(
            f"{arguments.results} holds a sweep with other settings (differing: {', '.join(differing)}); choose "
            "another `--results` or delete it"
        )


def write(folder: Path) -> None:
    """comparison.md and comparison.png from every run in the results folder, arm by arm."""

    def cell(key: str, value: Any) -> str:
        digits = 3 if key in ("kl", "margin") else 2
        return "fall too small" if value is None else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits)

    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/row.json"))]
    rows.sort(key=lambda row: list(Arm).index(row["arm"]))
    figures.put(folder / "comparison.md", figures.table(rows, COLUMNS, cell))
    figures.dots(rows, COLUMNS, "arm", folder / "comparison.png")
    figures.pareto(rows, folder / "pareto.png")
    figures.tasks(rows, folder / "tasks.png")


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, and those after `--` for the recipe."""
    own, rest = parsing.split(words)
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--recipe", choices=("dpo", "sft", "grpo"), default="dpo")
    parser.add_argument("--config", type=Path, required=True, help="the recipe's YAML")
    parser.add_argument("--arms", nargs="+", required=True, choices=[str(arm) for arm in Arm])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=0, help="draws of the random arm in all, where more than seeds")
    parser.add_argument(
        "--variants", nargs="+", type=parsing.variant, default=[], metavar="OPTION=VALUE[,...]",
        help="further runs of the arms that press, each with other recipe options, such as penalty_share=0.3",
    )  # fmt: skip
    parser.add_argument("--split", choices=("audit", "selection"), default="audit", help="whose tasks are read after")
    parser.add_argument("--max-tasks", type=int, help="audit so many evenly spaced tasks (default: all)")
    parser.add_argument("--concepts", nargs="+", help="re-extract from the stories about these alone, which is faster")
    parser.add_argument("--launcher", type=Path, help="accelerate's file (default: single_cpu.yaml)")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1, with the launcher)")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--results", type=Path, help="folder of the figures, small enough to keep (default: OUT)")
    arguments = parser.parse_args(own)
    if arguments.variants and not HINGED.intersection(arguments.arms):
        parser.error(f"--variants are of the arms that press, and --arms has none: {', '.join(sorted(HINGED))}")
    if arguments.draws and Arm.RANDOM not in arguments.arms:
        parser.error("--draws is of the arm random, which --arms does not name; add it, or leave --draws out")
    if arguments.launcher and arguments.workers > 1:
        parser.error("--launcher is not used with --workers above 1, which start runs by themselves; leave one out")
    recipe = parsing.recipe(parser, arguments.config, ("model_name_or_path", "vectors"))
    changed = {part.split("=")[0] for variant in arguments.variants for part in variant.split(",")}
    if wrong := sorted((changed & {*FROM_YAML}) | (parsing.names(rest) & {*FROM_YAML, "ceiling_quantile"})):
        parser.error(f"the audit reads `{'`, `'.join(wrong)}` from the YAML; put it there, where every run has it")
    if wrong := sorted(changed & {"arm", "output_dir", "config"}):
        parser.error(f"--variants change options of one arm, and `{'`, `'.join(wrong)}` is none; use --arms")
    parsing.refuse(parser, rest, {"arm", "seed", "random_seed", "output_dir", "config"} | changed)
    arguments.launcher = arguments.launcher or HERE.parent / "accelerate_configs" / "single_cpu.yaml"
    arguments.processes = parsing.recipe(parser, arguments.launcher, ()).get("num_processes", 1)
    arguments.results = arguments.results or arguments.out
    arguments.model, arguments.vectors = recipe["model_name_or_path"], recipe["vectors"]
    arguments.quantile, arguments.blocks = recipe.get("ceiling_quantile", 0.5), recipe.get("blocks")
    arguments.revision, arguments.trust_remote_code = recipe.get("model_revision"), recipe.get("trust_remote_code")
    arguments.target = recipe.get("concepts", ["desperate"])[0]
    return arguments, rest


def main(words: list[str]) -> None:
    arguments, rest = parse(words)
    try:
        claim(arguments, rest)
    except ValueError as error:
        sys.exit(f"error: {error}")
    todo = []
    for name, arm, options in runs(arguments):
        row = arguments.results / name / "row.json"
        if row.is_file():
            # Names of draws and variants do not say it, and rows of older versions do not have it.
            if (seed := json.loads(row.read_text(encoding="utf-8")).get("seed", options["seed"])) != options["seed"]:
                sys.exit(
                    f"error: {row} is of seed {seed}, this sweep's is {options['seed']}; give a variant its "
                    f"`seed={options['seed']}`, or another `--results`"
                )
            print(f"{row}: this run is finished; nothing to do", flush=True)
        else:
            todo.append((name, arm, options))
    if arguments.workers > 1:
        side_by_side(todo, arguments, rest)
    else:
        for name, arm, options in todo:
            audit(arguments.model, arguments.out / "before", arguments)
            run_one(name, options, arguments, rest)
            finish(name, arm, options, arguments)
    write(arguments.results)  # a kill may have left it behind its rows
    print((arguments.results / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
