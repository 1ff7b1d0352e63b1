import json
import re
import shutil
import sys

import peft
import pytest
import torch
from conftest import write_jsonl
from transformers import AutoModelForCausalLM

from calibrate import cli, corpora, shards
from calibrate.audit import record
from calibrate.audit.record import load_record
from calibrate.vectors import EmotionVectors, load_vectors


def calibrate(*arguments) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["calibrate", *(str(argument) for argument in arguments)])
        cli.main()


def error(*arguments) -> str:
    """The one line with which the command ends; a text as exit code goes to standard error with status 1."""
    with pytest.raises(SystemExit) as stopped:
        calibrate(*arguments)
    assert isinstance(stopped.value.code, str)
    assert stopped.value.code.startswith("error: ")
    assert "\n" not in stopped.value.code
    return stopped.value.code


def contents(folder) -> dict:
    """All files below a folder, with their bytes and the time of their last change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Options that restrict the shipped corpora: 3 concepts on 5 topics, 9 dialogues, 5 tasks with their pairs."""
    folder = tmp_path_factory.mktemp("texts")
    rows = {"stories": [], "neutral": [], "twins": [], "pairs": []}
    for split, topics, dialogues, tasks in (("train", 2, 3, 0), ("selection", 1, 3, 2), ("audit", 2, 3, 3)):
        stories = [story for story in corpora.load_stories() if story.split == split]
        kept = list(dict.fromkeys(story.topic for story in stories))[:topics]
        rows["stories"] += [s for s in stories if s.topic in kept and s.concept in ("desperate", "calm", "proud")]
        rows["neutral"] += [row for row in corpora.load_neutral() if row.split == split][:dialogues]
        twins = [twin for twin in corpora.load_twins() if twin[0].split == split][:tasks]
        rows["twins"] += [context for twin in twins for context in twin]
        rows["pairs"] += [pair for pair in corpora.load_pairs() if pair.task in [failing.task for failing, _ in twins]]
    files = {name: write_jsonl(folder / f"{name}.jsonl", [row._asdict() for row in rows[name]]) for name in rows}
    shared = ["--neutral", files["neutral"], "--twins", files["twins"]]
    return {"extract": [*shared, "--stories", files["stories"]], "audit": [*shared, "--pairs", files["pairs"]]}


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """A LoRA adapter of the tiny model that changes what it computes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    tuned.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


@pytest.fixture(scope="module")
def run(texts, tiny_folder, adapter, tmp_path_factory):
    """The main job without its training: vectors, audits before and after."""
    folder = tmp_path_factory.mktemp("run")
    train = folder / "vectors" / "train"
    calibrate("extract", tiny_folder, "--out", folder / "vectors", "--splits", "train", "audit", *texts["extract"])
    after = ["extract", adapter, "--out", folder / "after-vectors", "--splits", "audit", "--reference", train]
    calibrate(*after, *texts["extract"])
    for name, model, own in (("before", tiny_folder, "vectors"), ("after", adapter, "after-vectors")):
        vectors = ["--vectors", train, "--own-vectors", folder / own / "audit"]
        calibrate("audit", model, "--out", folder / name, *vectors, *texts["audit"])
    return folder


def test_from_stories_to_the_report(run, tmp_path, capsys):
    reference, own = load_vectors(str(run / "vectors/train")), load_vectors(str(run / "after-vectors/audit"))
    for pooling in ("token", "header", "reply", "text"):
        assert own.neutral(pooling).equal(reference.neutral(pooling))  # mu and sigma stay the reference's
    assert (own.band, own.layers) == (reference.band, reference.layers)
    assert not own.directions.equal(load_vectors(str(run / "vectors/audit")).directions)
    before, after = load_record(run / "before"), load_record(run / "after")
    audited = {before.profile.tasks[row] for row in before.profile.rows("failing")}
    assert audited == set(before.pair_tasks)
    assert len(audited) > 1
    assert before.neutral.kl is None
    assert (after.neutral.kl > 0).all()
    calibrate("compare", run / "before", run / "after", "--control", run / "after", "--out", tmp_path / "report")
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert printed.startswith(f"Outcome: {data['outcome']}. {data['findings'][0]['reason']}\n")
    assert f"<h1>Outcome: {data['outcome']}</h1>" in page
    assert all(f"Also: {finding['outcome']}." in printed for finding in data["findings"][1:])
    assert data["control"] == data["change"]  # the same audit was given as its own control


def test_repeating_a_command_does_nothing(run, texts, tiny_folder, tmp_path, capsys):
    train = run / "vectors" / "train"
    kept = contents(run)
    calibrate("extract", tiny_folder, "--out", run / "vectors", "--splits", "audit", "train", *texts["extract"])
    own = ["--own-vectors", run / "vectors" / "audit", "--out", run / "before"]
    calibrate("audit", tiny_folder, "--vectors", train, *own, *texts["audit"])
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert contents(run) == kept
    pages = []
    for _ in range(2):
        calibrate("compare", run / "before", run / "after", "--out", tmp_path)
        pages.append([content for content, _ in contents(tmp_path).values()])
    assert pages[0] == pages[1]


ERRORS = [
    ("extract {tmp}/nowhere", "no folder with config.json"),
    ("extract {bare}", "has no chat template; give one with `--chat-template"),
    ("extract {tiny} --chat-template {tmp}/none.jinja", "none.jinja: no such file"),
    ("extract {tiny} --stories {tmp}/none.jsonl", "none.jsonl: no such file"),
    ("extract {tiny} --stories {tmp}/text.jsonl", "text.jsonl:2: not JSON"),
    ("extract {tiny} --stories {tmp}/key.jsonl", "key.jsonl:2: lacks the key 'topic'"),
    ("extract {tiny} --stories {tmp}/gap.jsonl", "gap.jsonl:2: the line is empty"),
    ("extract {tiny} --stories {tmp}/last.jsonl --splits audit", "'train'; the file has audit; the choice of layers"),
    ("extract {tiny} --neutral {tmp}/quiet.jsonl", "1 neutral dialogues .* at least 2"),
    ("extract {tiny} --target furious", "'furious'; they have calm, desperate, proud; set `--target` or"),
    ("extract {tiny} --splits train final", "split 'final'; the file has audit, selection, train"),
    ("extract {tiny} --layers 2 5", "layer 5 is out of range; this model has layers 0 to 4"),
    ("extract {tiny} --reference {tmp}/nowhere", "nowhere': no model.safetensors"),
    ("extract {tiny} --reference {narrow}", r"\(width 8, 5 layers\); .* has width 32 and 5 layers"),
    ("extract {tiny} --reference {train} --layers 4", r"layers \[4\] are out of range; these vectors hold"),
    (
        "extract {tiny} --reference {banded} --layers 2",
        r"`--layers` leaves out \[3\] of the reference's band \[2, 3\]",
    ),
    ("extract {tiny} --concepts calm proud", "'desperate' is not among `--concepts` calm, proud"),
    ("extract {tiny} --concepts desperate furious", "the stories have none about 'furious'"),
    ("extract {tiny} --splits audit --check", "add `train` to `--splits`"),
    ("extract {tiny} --splits train audit --recipes contrastive", "use it with `--splits train`"),
    ("extract {tiny} --sae-rows a=1", "`--sae-rows` needs `--directions FILE.safetensors`"),
    ("extract {tiny} --directions {tmp}/x.safetensors --check", "leave out `--stories`, `--check`"),
    ("extract {tiny} --deflection {tmp}/felt.jsonl", "two felt concepts or more"),
    ("extract {tiny} --stories {tmp}/late.jsonl", "the stories about calm have none of split 'train'"),
    ("audit {tmp}/nowhere", "no folder with config.json"),
    ("audit {tiny} --twins {tmp}/none.jsonl", "none.jsonl: no such file"),
    ("audit {tiny} --vectors {tmp}/nowhere", "nowhere': no model.safetensors"),
    ("audit {tiny} --vectors {narrow} --own-vectors {narrow}", r"\(width 8, 5 layers\); .* has width 32"),
    ("audit {tiny} --own-vectors {foreign}", "come from weights 0 with adapter None, .* extract them from it with"),
    ("audit {tiny} --own-vectors {narrow}", "hold other layers"),
    ("audit {tiny} --own-vectors {tuned}", "come from weights .* with adapter .*, .* with None; extract"),
    ("audit {tiny} --target furious", "no concept 'furious'; they have"),
    ("audit {tiny} --max-tasks 1", "1 tasks of the audit split; an audit needs at least 2"),
    ("audit {tiny} --pairs {tmp}/lone.jsonl", "1 tasks with pairs of the audit split"),
    ("compare {tmp}/nowhere {before}", "nowhere': no audit.json"),
    ("compare {before} {before} --control {tmp}", "no audit.json"),
]


@pytest.fixture(scope="module")
def places(run, texts, tiny_folder, tmp_path_factory):
    """Wrong files and folders by the names that `ERRORS` uses."""
    folder = tmp_path_factory.mktemp("wrong")
    story = corpora.load_stories()[0]._asdict()
    no_topic = {key: value for key, value in story.items() if key != "topic"}
    dialogue = corpora.load_neutral()[0]._asdict() | {"split": "train"}
    pairs = [pair._asdict() for pair in corpora.load_pairs() if pair.split == "audit"]
    for name, rows in {
        "text": [story, "{'id': 1}"],
        "key": [story, no_topic],
        "gap": [story, "", story],
        "last": [story | {"split": "audit"}],
        "late": [story, story | {"split": "selection"}, story | {"concept": "calm", "split": "selection"}],
        "felt": [row._asdict() for row in corpora.load_deflection() if row.felt == "sad"],
        "lone": [pair for pair in pairs if pair["task"] == pairs[0]["task"]],
        "quiet": [dialogue, dialogue | {"split": "audit"}],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    shutil.copytree(tiny_folder, folder / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    vectors = load_vectors(str(run / "vectors/train"))
    vectors.set_band([2, 3], "set by the test")
    vectors.save(folder / "banded")
    vectors.weight_hash = "0"
    vectors.save(folder / "foreign")
    samples = dict.fromkeys(("token", "header", "reply", "text"), 2)
    EmotionVectors(["desperate"], [1], 8, 5, samples, "narrow", "0", {}).save(folder / "narrow")
    own = {name: folder / name for name in ("bare", "banded", "foreign", "narrow")}
    run_places = {"train": run / "vectors/train", "tuned": run / "after-vectors/audit", "before": run / "before"}
    return {"tmp": folder, "tiny": tiny_folder} | own | run_places


@pytest.mark.parametrize(("command", "words"), ERRORS)
def test_user_errors_end_in_one_line_and_leave_nothing(command, words, run, texts, places, tmp_path):
    verb, *arguments = command.format(**places).split()
    vectors = ["--vectors", run / "vectors/train", "--own-vectors", run / "vectors/audit"]
    usual = {"extract": texts["extract"], "audit": [*texts["audit"], *vectors], "compare": []}[verb]
    line = error(verb, *usual, *arguments, "--out", tmp_path / "deep" / "out")
    assert re.search(words, line), line
    assert not (tmp_path / "deep").exists()


def test_another_configuration_never_overwrites(run, texts, tiny_folder, tmp_path):
    """Other options, another folder's content, and a checkpoint whose weights were replaced under the same name."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_folder, model)
    command = ["extract", model, *texts["extract"], "--out", out]
    calibrate(*command)
    kept = contents(out)
    assert "another configuration (differing: layers)" in error(*command, "--layers", 2)
    assert "another configuration (differing: target)" in error(*command, "--target", "calm")
    replaced = AutoModelForCausalLM.from_pretrained(model)
    replaced.model.norm.weight.data.mul_(2)
    replaced.save_pretrained(model)
    assert "(differing: weight_hash)" in error(*command)
    assert contents(out) == kept
    (tmp_path / "mine").mkdir()
    vectors = ["--vectors", run / "vectors/train", "--own-vectors", run / "vectors/audit", "--out", tmp_path / "mine"]
    assert "holds no result of this command" in error("audit", tiny_folder, *vectors, *texts["audit"])


def test_an_audit_of_another_model_needs_vectors_of_its_own(run, texts, tiny_folder, tmp_path):
    train = run / "vectors/train"
    line = error("audit", tiny_folder, "--vectors", train, *texts["audit"], "--out", tmp_path / "out")
    assert line == (
        f"error: `--own-vectors` is missing; make them with `calibrate extract {tiny_folder} --splits audit "
        f"--reference {train} --out FOLDER`"
    )
    assert not (tmp_path / "out").exists()


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_an_interrupted_extraction_leaves_whole_folders_only(texts, tiny_folder, tmp_path, monkeypatch, capsys):
    """Interrupted while reading, then while the second of two folders is written; the same command then goes on."""
    out, read, save = tmp_path / "out", shards._read_shard, EmotionVectors.save_pretrained
    command = ["extract", tiny_folder, *texts["extract"], "--splits", "train", "audit", "--out", out]
    reads = iter([read, read, interrupt])
    monkeypatch.setattr(shards, "_read_shard", lambda *given: next(reads)(*given))
    with pytest.raises(KeyboardInterrupt):
        calibrate(*command)
    assert [path.name for path in out.iterdir()] == ["states"]
    first = contents(out / "states")
    assert len(first) == 2
    monkeypatch.setattr(shards, "_read_shard", read)
    turns = iter([save, interrupt, save])
    monkeypatch.setattr(EmotionVectors, "save_pretrained", lambda *given, **options: next(turns)(*given, **options))
    with pytest.raises(KeyboardInterrupt):
        calibrate(*command)
    assert {path.name for path in out.iterdir()} == {"states", "train"}
    assert contents(out / "states").items() > first.items()
    kept = contents(out / "train")
    capsys.readouterr()
    calibrate(*command)
    assert capsys.readouterr().out.startswith(f"{out / 'audit'}: 3 concepts, layers 1 to 3\n")
    assert {path.name for path in out.iterdir()} == {"states", "train", "audit"}
    assert contents(out / "train") == kept


def test_an_interrupted_audit_leaves_nothing(run, texts, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "save_file", interrupt)
    vectors = ["--vectors", run / "vectors/train", "--own-vectors", run / "vectors/audit"]
    with pytest.raises(KeyboardInterrupt):
        calibrate("audit", tiny_folder, *vectors, *texts["audit"], "--out", tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
