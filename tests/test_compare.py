"""`calibrate compare` and what `calibrate audit` keeps: audits on the way, found again, stopped and gone on with."""

import json
import shutil
from pathlib import Path

import jsonschema
import peft
import pytest
import torch
from test_cli import calibrate, contents, interrupt
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate import corpora, report, shards, stats
from calibrate.audit import agents, contexts, dose, own, probes, relearning, verdict
from calibrate.audit.record import load_record
from calibrate.audit.verdict import Finding, Verdict
from calibrate.commands import compare, full
from calibrate.vectors import load_vectors


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "STEPS", 2)
        patch.setattr(stats, "RESAMPLES", 200)
        yield


def status(*arguments) -> int:
    """The exit status of a command that comes to its end."""
    code: object = 0
    try:
        calibrate(*arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert isinstance(code, int), code
    return code


@pytest.fixture(scope="module")
def compared(texts, tiny_vectors, tiny_folder, adapter, tmp_path_factory) -> Path:
    """The tiny model against its adapter, with the same adapter as a control arm; the report's folder is `report`."""
    folder = tmp_path_factory.mktemp("compared")
    words = ["--vectors", tiny_vectors, *texts["audit"], "--audits", folder / "audits", "--arms", f"random={adapter}"]
    assert status("compare", tiny_folder, adapter, *words, "--out", folder / "report") == 2
    return folder


def test_few_tasks_give_no_verdict(compared, again, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "MIN_TASKS", 8)
    with pytest.raises(
        SystemExit, match=r"error: \d tasks with pairs; a verdict needs at least 8, as intervals over fewer"
    ):
        calibrate("compare", *audits(compared), "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.fixture
def again(texts, tiny_vectors, tiny_folder, adapter, compared):
    """The same once more, into another folder; returns the exit status."""

    def run(out: Path, before=tiny_folder, after=adapter, arm=adapter) -> int:
        words = ["--vectors", tiny_vectors, *texts["audit"], "--audits", compared / "audits"]
        words = [] if before != tiny_folder else words  # folders of audits take no options of an audit
        return status("compare", before, after, *words, "--arms", f"random={arm}", "--out", out)

    return run


def audits(folder: Path) -> list[Path]:
    """The folders of the two audits, of the tiny model and of its adapter."""
    before, after = sorted((folder / "audits").iterdir(), key=lambda path: not path.name.startswith("tiny"))
    return [before, after]


def test_models_are_audited_on_the_way_each_once(compared, tiny_folder, adapter):
    """The control arm is the trained model again: its audit is found, and nothing is beyond it."""
    before, after = (load_record(folder) for folder in audits(compared))
    assert (before.model, after.model) == (str(tiny_folder), str(adapter))
    assert (before.neutral.kl, (after.neutral.kl > 0).all()) == (None, True)
    assert before.options["adapter"] is None
    assert not {"base", "reference", "reference_revision"} & {*before.more["asked"], *after.more["asked"]}
    assert {before.profile.tasks[row] for row in before.profile.rows("failing")} == set(before.contexts.pair_tasks)
    assert {*before.own.directions} == {*after.own.directions} == {"stories", "logistic", "domain"}
    assert not before.own.directions["stories"].equal(after.own.directions["stories"])
    assert {*before.own.concepts} == {"desperate", "calm", "proud"}
    data = json.loads((compared / "report/report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    control, figures = data["controls"]["random"]["figures"], data["change"]["figures"]
    assert figures["fall_over_controls"]["estimate"] == pytest.approx(min(figures["fall_failing"]["estimate"], 0))
    alike = {name: figure for name, figure in figures.items() if not name.endswith("over_controls")}
    assert {name: control[name] for name in alike} == alike


def test_the_report_says_what_the_command_prints(compared, again, tmp_path, capsys):
    again(tmp_path / "report")
    lines = capsys.readouterr().out.splitlines()
    data = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert lines[0] == f"Verdict: {data['verdict']}. {data['sentence']}"
    assert [line.split(". ")[0] for line in lines[1:-1]] == [f"Also: {row['outcome']}" for row in data["findings"][1:]]
    assert lines[-1] == f"Report: {tmp_path / 'report' / 'report.html'}"
    assert f'<h1 id="verdict">Verdict: {data["verdict"]}</h1>' in page
    schema = json.loads((Path(report.__file__).parent / "schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    assert data["situations"]["before"]["scenarios"].keys() == data["situations"]["after"]["scenarios"].keys()


def test_audits_are_found_again_by_model_or_by_folder(compared, again, tmp_path, monkeypatch):
    """Nothing is read, the audits stay as they are, and the report is the same to the byte."""
    for module, name in ((contexts, "read"), (own, "read"), (shards, "read")):
        monkeypatch.setattr(module, name, pytest.fail)
    kept = contents(compared)
    before, after = audits(compared)
    assert again(tmp_path / "models") == again(tmp_path / "folders", before, after, after) == 2
    assert contents(compared) == kept
    for name in ("report.html", "report.json", "card.md"):
        first = (compared / "report" / name).read_bytes()
        assert (tmp_path / "models" / name).read_bytes() == (tmp_path / "folders" / name).read_bytes() == first


@pytest.mark.parametrize(("outcome", "expected"), [("calibrated", 0), ("no effect", 2), ("premise not met", 2)])
def test_the_exit_status_is_that_of_the_verdict(again, tmp_path, monkeypatch, outcome, expected):
    judged = Verdict(outcome, [Finding(outcome, "so it is", ["gain: 1"], [])], {})
    monkeypatch.setattr(verdict, "judge", lambda change, reason: judged)
    assert again(tmp_path) == expected
    assert (tmp_path / "report.html").is_file()


def test_of_several_seeds_the_first_outcome_of_the_rule_is_named(compared, tmp_path, monkeypatch, capsys):
    """AFTER is calibrated, a seed that equals BEFORE has no effect: so has the change, and that seed is reported."""

    def judge(figures, reason):
        outcome = "no effect" if figures["fall_failing"] == (0, 0, 0) else "calibrated"
        return Verdict(outcome, [Finding(outcome, "so it is", ["gain: 1"], [])], {})

    monkeypatch.setattr(verdict, "judge", judge)
    before, after = audits(compared)
    same = shutil.copytree(before, tmp_path / "same")
    words = ["compare", before, after, "--out", tmp_path / "report"]
    assert status(*words, "--seeds", same) == 2
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{same}: no effect", f"{after}: calibrated", "Verdict: no effect. so it is (gain: 1)"
    ]  # fmt: skip
    data = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert (data["verdict"], data["after"]) == ("no effect", data["before"])
    assert [(seed["model"], seed["verdict"]) for seed in data["seeds"]] == [(str(after), "calibrated")]
    assert status(*words) == 0
    with pytest.raises(SystemExit, match="AFTER and `--seeds` name a model twice"):
        calibrate(*words, "--seeds", same, same)


def test_without_a_band_the_verdict_is_that_of_the_search(texts, tiny_vectors, tiny_folder, adapter, tmp_path, capsys):
    vectors = load_vectors(str(tiny_vectors))
    vectors.set_band(None, "no layer qualifies")
    vectors.save(tmp_path / "vectors")
    words = ["--vectors", tmp_path / "vectors", *texts["audit"], "--audits", tmp_path / "audits"]
    assert status("compare", tiny_folder, adapter, *words, "--out", tmp_path / "report") == 2
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("Verdict: premise not met. ")
    assert line.endswith(" (no layer qualifies)")


@pytest.mark.parametrize(("target", "reason"), [("desperate", ""), ("angry", "no layer qualifies")])
def test_without_a_search_for_the_target_the_contrast_judges(compared, tmp_path, monkeypatch, caplog, target, reason):
    """Adopted directions have an empty reason, which is no finding, and the page says so; nor has another target's."""
    folders = []
    for folder in audits(compared):
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        vectors = load_vectors(str(folder / "vectors"))
        vectors.recipe["target"] = target
        vectors.set_band(None, reason)
        shutil.rmtree(folders[-1] / "vectors")
        vectors.save(folders[-1] / "vectors")
    judge, reasons = verdict.judge, []
    monkeypatch.setattr(verdict, "judge", lambda *given: reasons.append(given[1]) or judge(*given))
    status("compare", *folders, "--out", tmp_path / "report")
    assert reasons == [None]
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert ("(fallback; no search was made)" in page) is (target == "desperate")
    said = "the layers that are read were searched for 'angry', not for 'desperate'"
    assert (said in caplog.messages) is (target == "angry")


def test_a_merged_checkpoint_is_compared_with_the_model_before(texts, tiny_vectors, tiny_folder, tmp_path):
    """Without an adapter to switch off the divergence is from the first model, and the audit remembers which.

    Neither tokenizer has a template of its own: the one that is given serves the reference too.
    """
    for name in ("base", "merged"):
        shutil.copytree(tiny_folder, tmp_path / name, ignore=shutil.ignore_patterns("chat_template.jinja"))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[0].mlp.down_proj.weight.data *= 1.5
    model.save_pretrained(tmp_path / "merged")
    words = ["--chat-template", tiny_folder / "chat_template.jinja", "--vectors", tiny_vectors, *texts["audit"]]
    words += ["--audits", tmp_path / "audits", "--out", tmp_path / "report"]
    assert status("compare", tmp_path / "base", tmp_path / "merged", *words) == 2
    before, after = (load_record(folder) for folder in sorted((tmp_path / "audits").iterdir()))
    assert after.options["reference"] == [before.options["weight_hash"], None]
    assert before.options["weight_hash"] != after.options["weight_hash"]
    assert (after.neutral.kl > 0).all()
    assert before.neutral.kl is None


def test_a_divergence_from_an_adapter_is_not_taken_for_that_from_its_base(
    texts, tiny_vectors, tiny_folder, adapter, tmp_path
):
    """What was merged after a first adapter, against that adapter and then against the base, among the same audits."""
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "merged")
    words = ["--vectors", tiny_vectors, *texts["audit"], "--max-concepts", 2, "--audits", tmp_path / "audits"]
    found = []
    for before in (adapter, tiny_folder):
        out = tmp_path / before.name
        assert status("compare", before, tmp_path / "merged", *words, "--out", out) == 2
        data = json.loads((out / "report.json").read_text(encoding="utf-8"))
        found.append(data["change"]["figures"]["kl"]["estimate"])
    assert found[0] == pytest.approx(0, abs=1e-4)
    assert found[1] > 0.001


def test_a_full_comparison_crosses_the_models_and_trains_them_on(
    texts, tiny_vectors, tiny_folder, adapter, tmp_path, monkeypatch
):
    """Of two tasks each; the adapter's replies are read with it on and off, and the page and the JSON hold it all."""
    monkeypatch.setattr(full, "DOSED", ())
    monkeypatch.setattr(relearning, "STEPS", (0, 1, 2))
    monkeypatch.setattr(corpora, "load_deflection", lambda: [])  # what has tests of its own and takes long
    monkeypatch.setattr(agents, "play", lambda *given: [])
    monkeypatch.setattr(dose, "_write", lambda *given: ["a"])
    # Whatever the tiny model writes, it is something.
    monkeypatch.setattr(agents, "answer", lambda checkpoint, batch, settings: ["I see."] * len(batch))
    words = ["--vectors", tiny_vectors, *texts["audit"], "--audits", tmp_path / "audits", "--full", "--max-rows", 2]
    words += ["--max-new-tokens", 2, "--max-tasks", 2, "--out", tmp_path / "report"]
    assert status("compare", tiny_folder, adapter, *words) == 2
    data = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    schema = json.loads((Path(report.__file__).parent / "schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    before, after = data["full"]["before"], data["full"]["after"]
    assert (before["crossing"], after["crossing"]["replies"]) == (None, [["I see."] * 2] * 2)
    figures = data["change"]["figures"]
    assert figures["fall_text"]["estimate"] == 0  # the same text of both
    assert figures["fall_state"]["estimate"] == pytest.approx(figures["fall_written"]["estimate"])
    assert figures["fall_state"]["estimate"] != 0
    assert before["relearning"]["steps"] == after["relearning"]["steps"] == [0, 1, 2]
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    for title in ("Trained on with harmless text", "Replies of both models", "Mailboxes, flattery, provocation"):
        assert title in page


# ---- stopped and gone on with


def test_a_stopped_audit_goes_on_with_the_stories_it_has_read(
    texts, tiny_vectors, tiny_folder, compared, tmp_path, monkeypatch
):
    """Stopped before the own directions, then after the first of two groups of texts; what was read serves."""
    command = ["audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--out", tmp_path / "new" / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(own, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(*command)
    assert not (tmp_path / "new" / "out").exists()
    read = shards._read_shard
    turns = iter([read, interrupt])
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read_shard", lambda *given: next(turns)(*given))
        with pytest.raises(KeyboardInterrupt):
            calibrate(*command)
    (partial,) = (tmp_path / "new").iterdir()
    assert partial.name.startswith("out.partial-")
    (shard,) = contents(partial)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            shards,
            "_read_shard",
            lambda checkpoint, group, *rest: seen.append(group.folder) or read(checkpoint, group, *rest),
        )
        calibrate(*command)
    assert len(seen) == 1
    assert seen[0] != shard.parent
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    resumed, whole = load_record(tmp_path / "new" / "out"), load_record(audits(compared)[0])
    for name, rows in whole.own.directions.items():
        torch.testing.assert_close(resumed.own.directions[name], rows)


def test_what_a_stopped_audit_read_serves_no_other(texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch):
    """Another target has a folder of its own beside it, which goes when that audit is done; the first one's stays."""
    command = ["audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--out", tmp_path / "out"]
    read, turns = shards._read_shard, iter([shards._read_shard, interrupt])
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read_shard", lambda *given: next(turns)(*given))
        with pytest.raises(KeyboardInterrupt):
            calibrate(*command)
    (partial,) = tmp_path.iterdir()
    kept = contents(partial)
    assert shards._read_shard is read
    calibrate(*command, "--target", "calm")
    assert {path.name for path in tmp_path.iterdir()} == {"out", partial.name}
    assert contents(partial) == kept
    assert load_record(tmp_path / "out").concept == "calm"


def test_an_audit_that_is_stopped_while_it_is_saved_leaves_no_half(
    texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("calibrate.audit.record.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate("audit", tiny_folder, "--vectors", tiny_vectors, *texts["audit"], "--out", tmp_path / "new" / "out")
    assert [path.name.split("-")[0] for path in (tmp_path / "new").iterdir()] == ["out.partial"]
