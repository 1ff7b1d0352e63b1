"""The sweep's own work: which runs, what is kept, what is repeated; every command is a double that writes nothing."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from records import BASELINE, LEVELS, make_record

from calibrate import cli
from calibrate.audit.readers import FIGURES
from calibrate.audit.verdict import load_rule
from calibrate.stats import Interval

ROOT = Path(__file__).parents[1]


class Sweep:
    """recipes/sweep.py with its commands written down instead of run, and figures that tell runs apart."""

    def __init__(self, monkeypatch, tmp_path):
        self.commands: list[list[str]] = []
        monkeypatch.syspath_prepend(str(ROOT / "recipes"))
        sys.modules.pop("sweep", None)
        import sweep  # ty: ignore[unresolved-import]

        self.module, self.out = sweep, tmp_path / "sweep"
        self.config = tmp_path / "dpo.yaml"
        self.config.write_text(yaml.safe_dump({"model_name_or_path": "tiny", "vectors": "vectors/train", "seed": 0}))
        monkeypatch.setattr(sweep, "call", lambda *words: self.commands.append([str(word) for word in words]))
        self.options = {"corpora": "digest", "vectors": "digest"}
        monkeypatch.setattr(sweep, "load_record", lambda folder: SimpleNamespace(folder=folder, options=self.options))
        monkeypatch.setattr(sweep.readers, "compare", self.compare)
        monkeypatch.setattr(sweep, "above_ceiling", lambda *_: np.array([-1.0, 0.4, 3.0]))

    def compare(self, before, after):
        assert before.folder == self.out / "before"
        fall = float(len(after.folder.parent.name))
        found = dict.fromkeys(("fall_failing", "fall_passing", "kl"), Interval(fall, fall - 1, fall + 1))
        return SimpleNamespace(figures=dict.fromkeys(FIGURES) | found, by_task={})

    def __call__(self, *words):
        self.commands.clear()
        self.module.main(["--config", str(self.config), "--out", str(self.out), *words])

    def of(self, verb: str) -> list[list[str]]:
        return [command for command in self.commands if verb in command]


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    return Sweep(monkeypatch, tmp_path)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_runs_are_arms_by_seeds_and_the_random_arm_has_more_draws(sweep):
    arguments = SimpleNamespace(
        arms=["none", "random", "hinge-refit"],
        seeds=[0, 1],
        draws=4,
        variants=["penalty_share=3", "max_tasks=6,beta=0.2"],
    )
    found = [(name, options) for name, _, options in sweep.module.runs(arguments)]
    assert [name for name, _ in found[6:]] == [
        "random-penalty_share=3", "random-max_tasks=6,beta=0.2", "hinge-refit-seed0", "hinge-refit-seed1",
        "hinge-refit-penalty_share=3", "hinge-refit-max_tasks=6,beta=0.2",
    ]  # fmt: skip
    assert found[-1][1] == {"arm": "hinge-refit", "seed": 0, "max_tasks": "6", "beta": "0.2"}
    assert found[:6] == [
        ("none-seed0", {"arm": "none", "seed": 0}),
        ("none-seed1", {"arm": "none", "seed": 1}),
        ("random-seed0", {"arm": "random", "seed": 0, "random_seed": 0}),
        ("random-seed1", {"arm": "random", "seed": 1, "random_seed": 1}),
        ("random-draw2", {"arm": "random", "seed": 0, "random_seed": 2}),
        ("random-draw3", {"arm": "random", "seed": 0, "random_seed": 3}),
    ]


def test_further_draws_are_none_of_the_seeds(sweep):
    arguments = SimpleNamespace(arms=["random"], seeds=[1, 2, 3], draws=5, variants=[])
    found = [(name, options["random_seed"]) for name, _, options in sweep.module.runs(arguments)]
    seeds = [(f"random-seed{seed}", seed) for seed in (1, 2, 3)]
    assert found == [*seeds, ("random-draw0", 0), ("random-draw4", 4)]
    arguments.draws = 2
    assert len(list(sweep.module.runs(arguments))) == 3


def test_a_run_is_trained_and_audited_with_the_options_after_the_dashes(sweep):
    sweep("--arms", "hinge-refit", "--seeds", "3", "--max-tasks", "5", "--", "--max_steps", "2")
    before, train, audit = sweep.commands
    folder = sweep.out / "hinge-refit-seed3"
    given = ["--arm", "hinge-refit", "--seed", "3", "--output_dir"]
    assert train[-8:] == [*given, str(folder / "model"), "--max_steps", "2"]
    assert option(before, "audit") == "tiny"
    assert option(audit, "audit") == str(folder / "model")
    for command, out in ((before, sweep.out / "before"), (audit, folder / "audit")):
        assert option(command, "--vectors") == "vectors/train"
        assert option(command, "--max-tasks") == "5"
        assert option(command, "--split") == "audit"
        assert option(command, "--out") == str(out)
        arguments = cli._parser().parse_args(command[command.index("audit") :])
        assert arguments.pressed  # the longer conversations too


def test_a_finished_run_is_not_repeated_and_a_longer_list_adds_to_the_comparison(sweep, tmp_path, capsys):
    kept = ("--results", str(tmp_path / "kept"))
    sweep("--arms", "random", *kept)
    sweep("--arms", "random", "none", *kept)
    assert {option(command, "--arm") for command in sweep.of("--arm")} == {"none"}
    (tmp_path / "kept" / "comparison.md").unlink()  # a kill came between the last row and it
    sweep("--arms", "random", "none", *kept)
    table = (tmp_path / "kept" / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["none-seed0", "random-seed0"]  # in the arms' order
    assert "12.00 [11.00, 13.00]" in table[3]
    assert "fall too small" in table[3]
    row = json.loads((tmp_path / "kept" / "random-seed0" / "row.json").read_text())
    assert row["arm"] == "random"
    assert row["hinge"][0] == pytest.approx((0 + 0.08 + 2.5) / 3)
    assert row["excess"][0] == pytest.approx(0.8)
    assert (tmp_path / "kept" / "comparison.png").stat().st_size > 1000
    assert "random-seed0/row.json: this run is finished; nothing to do" in capsys.readouterr().out


def test_variants_draw_the_pareto_figure_and_the_curve_over_tasks(sweep):
    variants = ["penalty_share=0.3", "max_tasks=6", "max_tasks=12"]
    sweep("--arms", "none", "hinge-refit", "--variants", *variants)
    assert [option(command, "--penalty_share") for command in sweep.of("--penalty_share")] == ["0.3"]
    assert {"pareto.png", "tasks.png", "comparison.png"} <= {path.name for path in sweep.out.iterdir()}
    with pytest.raises(SystemExit):
        sweep("--arms", "none", "--variants", "penalty_share")
    words = ["--recipe", "grpo", "--arms", "hinge-frozen", "--variants", "beta=1e-4", "beta=1e-1", "--results"]
    sweep(*words, f"{sweep.out}-kl")
    assert [option(command, "--beta") for command in sweep.of("--beta")] == ["1e-4", "1e-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none", "--variants", "penalty_share=3"), "--variants are of the arms that press, and --arms has none"),
        (("none", "--draws", "3"), "--draws is of the arm random, which --arms does not name"),
        (("none", "--launcher", "none.yaml"), "No such file or directory: 'none.yaml'"),
        (("none", "--workers", "2", "--launcher", "ddp.yaml"), "--launcher is not used with --workers above 1"),
        *(
            (("none", "--", *given), f"the audit reads `{name}` from the YAML; put it there")
            for name in ("vectors", "concepts", "blocks", "model_name_or_path", "ceiling_quantile")
            for given in ((f"--{name}", "x"), (f"--{name.replace('_', '-')}=x",))
        ),
        *(
            (
                ("none", "--", f"--{name.replace('_', '-')}", "7"),
                f"the sweep gives each run its `{name}`; leave it out",
            )
            for name in ("arm", "seed", "random_seed", "output_dir", "config")
        ),
        *(
            (
                ("hinge-refit", "--variants", f"beta=1,{name}=x"),
                f"the audit reads `{name}` from the YAML; put it there",
            )
            for name in ("vectors", "concepts", "blocks", "model_name_or_path", "model_revision")
        ),
        *(
            (
                ("hinge-refit", "--variants", f"beta=1,{name}=x"),
                f"change options of one arm, and `{name}` is none",
            )
            for name in ("arm", "output_dir", "config")
        ),
        (
            ("hinge-refit", "--variants", "beta=1", "beta=2", "--", "--beta", "3"),
            "the sweep gives each run its `beta`; leave it out",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(sweep, capsys, words, message):
    with pytest.raises(SystemExit):
        sweep("--arms", *words)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sweep.commands == []


@pytest.mark.parametrize("name", ["vectors", "model_name_or_path"])
def test_a_yaml_without_what_the_audit_needs_is_refused(sweep, capsys, name):
    recipe = yaml.safe_load(sweep.config.read_text())
    for content in ({key: value for key, value in recipe.items() if key != name}, None):
        sweep.config.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit):
            sweep("--arms", "none")
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"{sweep.config} has no `{name if content else 'model_name_or_path'}`; put it there" in message


def test_a_yaml_that_cannot_be_read_is_one_line(sweep, capsys):
    sweep.config.write_text("seed: [0")
    for words, told in (((), "while parsing a flow sequence"), (("--config", "missing.yaml"), "No such file")):
        with pytest.raises(SystemExit):
            sweep("--arms", "none", *words)
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_variant_of_another_seed_is_not_taken_for_the_finished_one(sweep):
    words = ("--arms", "hinge-refit", "--variants", "penalty_share=3")
    sweep(*words, "--seeds", "1")
    assert json.loads((sweep.out / "hinge-refit-penalty_share=3" / "row.json").read_text())["seed"] == 1
    with pytest.raises(
        SystemExit, match=r"share=3/row\.json is of seed 1, this sweep's is 2; give a variant its `seed=2`"
    ):
        sweep(*words, "--seeds", "2")
    sweep(*words[:3], "penalty_share=3,seed=2", "--seeds", "2")
    assert option(sweep.of("--arm")[-1], "--seed") == "2"


def test_the_launcher_is_the_shipped_one_for_a_cpu_unless_it_is_named(sweep):
    sweep("--arms", "none")
    assert option(sweep.of("--arm")[0], "--config_file") == str(ROOT / "accelerate_configs" / "single_cpu.yaml")
    own = sweep.out.with_name("own.yaml")
    own.write_text("num_processes: 1\n")
    sweep("--arms", "none", "--seeds", "1", "--launcher", str(own))
    assert option(sweep.of("--arm")[0], "--config_file") == str(own)


def test_steering_at_the_audit_takes_the_model_that_was_trained_without_an_arm(sweep):
    sweep("--arms", "inference-steering")
    (train,) = sweep.of("--arm")
    assert (option(train, "--arm"), option(train, "--output_dir")) == ("none", str(sweep.out / "none-seed0" / "model"))
    audit = sweep.commands[-1]
    assert option(audit, "--steer") == "desperate=-0.05"
    assert option(audit, "--out") == str(sweep.out / "inference-steering-seed0" / "audit")


def test_fewer_concepts_serve_the_reference_and_every_run_alike(sweep):
    sweep("--arms", "none", "--concepts", "desperate", "calm")
    audits = sweep.of("audit")
    assert [option(command, "audit") for command in audits] == ["tiny", str(sweep.out / "none-seed0" / "model")]
    for command in audits:
        assert cli._parser().parse_args(command[command.index("audit") :]).concepts == ["desperate", "calm"]


def test_what_the_model_needs_to_be_loaded_is_in_every_audit(sweep):
    sweep.config.write_text(sweep.config.read_text() + "model_revision: v1\ntrust_remote_code: true\n")
    sweep("--arms", "none")
    for command in sweep.of("audit"):
        arguments = cli._parser().parse_args(command[command.index("audit") :])
        assert (arguments.revision, arguments.trust_remote_code) == ("v1", True)


def test_runs_of_more_processes_are_other_settings(sweep):
    sweep("--arms", "none")
    with pytest.raises(SystemExit, match=r"holds a sweep with other settings \(differing: processes\); choose"):
        sweep("--arms", "hinge-refit", "--launcher", str(ROOT / "accelerate_configs" / "ddp.yaml"))


def test_results_of_other_settings_are_refused(sweep):
    sweep("--arms", "none")
    with pytest.raises(SystemExit, match=r"holds a sweep with other settings \(differing: max_tasks, rest\); choose"):
        sweep("--arms", "none", "--max-tasks", "3", "--", "--max_steps", "1")
    assert sweep.commands == []


@pytest.mark.parametrize(("what", "key"), [("texts", "corpora"), ("vectors", "vectors")])
def test_audits_of_other_texts_or_vectors_are_not_put_beside_one_another(sweep, what, key):
    sweep("--arms", "none")
    sweep.options |= {key: "another"}
    with pytest.raises(SystemExit, match=rf"error: none-seed1 has other {what} than none-seed0 in .*sweep \("):
        sweep("--arms", "none", "--seeds", "0", "1")
    assert [path.parent.name for path in sweep.out.glob("*/row.json")] == ["none-seed0"]
    sweep("--arms", "none", "--seeds", "1", "--results", str(sweep.out.with_name("others")))


def test_a_command_that_fails_ends_the_sweep_and_says_how_to_go_on():
    module = runpy.run_path(str(ROOT / "recipes" / "sweep.py"))
    with pytest.raises(SystemExit, match="ended with 3; call the same sweep again to go on"):
        module["call"](sys.executable, "-c", "raise SystemExit(3)")


def test_the_ceiling_is_a_quantile_of_the_twins_before(planted):
    module = runpy.run_path(str(ROOT / "recipes" / "sweep.py"))
    before = make_record(planted, BASELINE)
    after = make_record(planted, {"failing": {0: LEVELS + 1}, "passing": {0: 9.0}})
    for quantile, ceiling in ((0.5, 3.5), (1.0, 7.0)):
        found = module["above_ceiling"](before, after, quantile)
        assert sorted(found) == pytest.approx([level + 1 - ceiling for level in range(8)], abs=1e-4)


def test_the_ceiling_is_the_recipes_or_the_variants_own(sweep, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep.module, "above_ceiling", lambda *given: asked.append(given[2]) or np.zeros(3))
    sweep("--arms", "hinge-refit", "--variants", "ceiling_quantile=0.9")
    assert asked == [0.5, 0.9]
    sweep.config.write_text(sweep.config.read_text() + "ceiling_quantile: 0.3\n")
    sweep("--arms", "none", "--results", str(sweep.out / "other"))
    assert asked[2:] == [0.3]


@pytest.fixture
def verdicts(monkeypatch):
    """recipes/verdicts.py."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    sys.modules.pop("verdicts", None)
    import verdicts  # ty: ignore[unresolved-import]

    return verdicts


def put_row(folder, run, arm, fall: float, own: float = 0.0, gain: float = 0.0, **figures) -> None:
    """A row of four tasks that are alike."""
    by_task = {"fall_failing": [fall] * 4, "fall_own": [own] * 4, "gain": [gain] * 4}
    moved = {"fall_failing": [fall] * 3, "fall_own": [own] * 3, "gain": [gain] * 3}
    (folder / run).mkdir(parents=True)
    row = {"run": run, "arm": arm, "by_task": by_task} | dict.fromkeys(FIGURES) | moved | figures
    (folder / run / "row.json").write_text(json.dumps(row))


def test_a_run_is_judged_beside_the_controls_of_its_folder(verdicts, tmp_path):
    """Evasion beside `none`, whose two runs have a mean of -0.2, is 1 - (0.6 + 0.2) / 1 = 0.2 of 0.25 that may be, or
    0.3; a control is judged beside the others."""
    put_row(tmp_path, "hinge-refit-seed1", "hinge-refit", fall=1.0, own=0.6, gain=0.5)
    put_row(tmp_path, "hinge-refit-beta=2", "hinge-refit", fall=1.0, own=0.5, gain=0.5)
    for seed, own in ((0, -0.1), (1, -0.3)):
        put_row(tmp_path, f"none-seed{seed}", "none", fall=0.0, own=own, kl=[0.1, 0.04 + seed / 100, 0.2])
    (tmp_path / "none-seed2").mkdir()
    (tmp_path / "none-seed2" / "row.json").write_text('{"run": "none-seed2", "arm": "none", "kl": null}')  # an old one
    runs, controls = verdicts.load(tmp_path)
    assert (list(runs), list(controls)) == (["hinge-refit-beta=2", "hinge-refit-seed1"], ["none-seed0", "none-seed1"])
    (one,) = (one for outcome in load_rule() for together in outcome.any for one in together if one.figure == "kl")
    assert verdicts.nearest(one, controls) == ("none-seed1", pytest.approx(0.05))
    assert verdicts.nearest(one._replace(relation="<"), controls) == ("none-seed0", pytest.approx(0.04))
    lines = verdicts.table(runs, controls).splitlines()
    assert lines[2:6] == [
        "| hinge-refit-beta=2 | evasion | - |", "| hinge-refit-seed1 | calibrated | - |",
        "| none-seed0 | no effect | - |", "| none-seed1 | no effect | - |",
    ]  # fmt: skip
    assert "| damage | kl.low > 0.1 | none-seed1 | 0.050 |" in lines
    assert "| complacency | failure_change.high < -0.3 | - | - |" in lines
    # Composed replies lower the target without a penalty: no run that leaves it alone, and judged as what presses it.
    put_row(tmp_path, "calm-dpo-seed0", "calm-dpo", fall=0.0, own=0.6)
    assert list(verdicts.load(tmp_path)[0]) == ["calm-dpo-seed0", "hinge-refit-beta=2", "hinge-refit-seed1"]
    put_row(tmp_path, "random-seed0", "random", fall=0.0, gain=0.6)
    judged = verdicts.judge("hinge-refit-seed1", *verdicts.load(tmp_path))
    assert judged.findings[0].otherwise == ["gain_over_controls.low > 0"]


def test_a_folder_without_full_rows_is_refused(verdicts, tmp_path):
    with pytest.raises(ValueError, match=r"no RUN/row\.json with all figures of a comparison; run recipes/sweep\.py"):
        verdicts.load(tmp_path)


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_a_sweep_and_one_that_fails_is_named(tiny_folder, tiny_vectors, tmp_path):
    """Two real runs in forked processes; the arm `shuffled` has no vectors to press."""
    config = yaml.safe_load((ROOT / "recipes" / "smollm2-135m" / "dpo.yaml").read_text())
    config |= {"model_name_or_path": str(tiny_folder), "vectors": str(tiny_vectors), "shuffled_vectors": ""}
    config |= {"max_pairs": 2, "max_length": 2048, "max_context_tokens": 4096, "anchor_texts": 4, "max_tasks": 2,
               "contexts_per_step": 1, "gradient_accumulation_steps": 1}  # fmt: skip
    path, out = tmp_path / "dpo.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config | {"max_steps": 1}))
    command = [sys.executable, ROOT / "recipes" / "sweep.py", "--config", path, "--arms", "none", "shuffled"]
    command += ["--workers", 2, "--out", out, "--max-tasks", 2, "--concepts", "desperate", "calm"]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500)
    assert run.returncode == 1
    assert "error: 1 of 2 runs failed (shuffled-seed0); call the same sweep again" in run.stderr
    assert f"(see {out / 'shuffled-seed0.log'})" in run.stdout
    for told in (run.stdout, (out / "shuffled-seed0.log").read_text()):
        assert "`arm: shuffled` needs `shuffled_vectors`" in told
    row = json.loads((out / "none-seed0" / "row.json").read_text())
    assert (row["run"], row["kl"] is not None) == ("none-seed0", True)
    assert "train_runtime" in (out / "none-seed0.log").read_text()
    assert (out / "comparison.md").read_text().count("seed0") == 1
