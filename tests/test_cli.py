import json
import re
import shutil
import sys

import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibrate import cli, corpora, layers, shards
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
def run(texts, tiny_folder, adapter, tmp_path_factory):
    """Vectors of the tiny model, those of its adapter on the same scale, and an audit of the tiny model."""
    folder = tmp_path_factory.mktemp("run")
    train = folder / "vectors" / "train"
    calibrate("extract", tiny_folder, "--out", folder / "vectors", "--splits", "train", "audit", *texts["extract"])
    after = ["extract", adapter, "--out", folder / "after-vectors", "--splits", "audit", "--reference", train]
    calibrate(*after, *texts["extract"])
    calibrate("audit", tiny_folder, "--vectors", train, *texts["audit"], "--out", folder / "before")
    return folder


def test_vectors_of_a_tuned_model_keep_the_references_scale_and_layers(run):
    reference, own = load_vectors(str(run / "vectors/train")), load_vectors(str(run / "after-vectors/audit"))
    for pooling in ("token", "header", "reply", "text"):
        assert own.neutral(pooling).equal(reference.neutral(pooling))  # mu and sigma stay the reference's
    assert (own.band, own.layers) == (reference.band, reference.layers)
    assert not own.directions.equal(load_vectors(str(run / "vectors/audit")).directions)


def test_layers_above_the_searched_ones_are_stored_and_never_chosen(run):
    """Layers 1 to 3 are at 30 to 80 % of depth 5; layer 4 is stored for the audit."""
    vectors = load_vectors(str(run / "vectors/train"))
    assert vectors.layers == [1, 2, 3, 4]
    assert set(vectors.layer_choice.layers) <= {1, 2, 3}
    assert len(vectors.band_search["contrast"]) == 4


def test_layers_are_chosen_and_the_band_searched_where_they_may_be(texts, tiny_folder, tmp_path, monkeypatch):
    """Among layers 1 to 3 of the stored 1 to 4; among those of `--layers` where they are given."""
    among, choose = [], layers.choose_layers
    monkeypatch.setattr(layers, "choose_layers", lambda *given: among.append(given[-1]) or choose(*given))
    monkeypatch.setattr(layers, "choose_band", lambda *given: among.append((given[1].layers, given[-1])))
    calibrate("extract", tiny_folder, *texts["extract"], "--out", tmp_path / "all")
    calibrate("extract", tiny_folder, *texts["extract"], "--layers", 4, 2, "--out", tmp_path / "some")
    assert among == [[1, 2, 3], ([1, 2, 3, 4], [1, 2, 3]), [2, 4], ([2, 4], [2, 4])]


def test_repeating_a_command_does_nothing(run, texts, tiny_folder, capsys):
    train = run / "vectors" / "train"
    kept = contents(run)
    calibrate("extract", tiny_folder, "--out", run / "vectors", "--splits", "audit", "train", *texts["extract"])
    calibrate("audit", tiny_folder, "--vectors", train, "--out", run / "before", *texts["audit"])
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert contents(run) == kept


def test_an_audit_without_a_folder_has_one_of_its_own(run, texts, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibrate("audit", tiny_folder, "--vectors", run / "vectors/train", *texts["audit"])
    out = f"runs/audit-{tiny_folder.name}"
    assert load_record(tmp_path / out).model == str(tiny_folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: desperate at the turn header, sigma (95 % interval over tasks)"
    assert [line.split()[0] for line in lines[1:4]] == ["failing", "passing", "neutral"]


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
    ("extract {tiny} --reference {train} --layers 0", r"layers \[0\] are out of range; these vectors hold"),
    (
        "extract {tiny} --reference {train} --target proud",
        "`--target` is 'proud', the reference's band is of 'desperate'",
    ),
    (
        "extract {tiny} --reference {banded} --layers 2",
        r"`--layers` leaves out \[3\] of the reference's band \[2, 3\]",
    ),
    ("extract {tiny} --concepts calm proud", "'desperate' is not among `--concepts` calm, proud"),
    ("extract {tiny} --concepts desperate furious", "the stories have none about 'furious'"),
    ("extract {tiny} --splits audit --check", "add `train` to `--splits`"),
    ("extract {tiny} --splits train audit --recipes contrastive", "use it with `--splits train`"),
    ("extract {tiny} --sae-rows a=1", "`--sae-rows` needs `--directions FILE.safetensors`"),
    (
        "extract {tiny} --directions {tmp}/x.safetensors --check",
        "makes nothing of `--stories`, `--check`, `--twins`; leave it out",
    ),
    (
        "extract {tiny} --neutral {tmp}/long_train.jsonl",
        r"neutral: a text has \d+ tokens, and the model takes 4096; short",
    ),
    (
        "extract {broken}",
        r"broken: the tensor 'model.layers.1.mlp.up_proj.weight' holds values that are not finite; .*",
    ),
    (
        "audit {tiny} --neutral {tmp}/parts.jsonl",
        "parts.jsonl:1: the value of 'messages' is no list of messages; each",
    ),
    ("extract {tiny} --deflection {tmp}/felt.jsonl", "two felt concepts or more"),
    ("extract {tiny} --stories {tmp}/late.jsonl", "the stories about calm have none of split 'train'"),
    ("audit {tmp}/nowhere", "no folder with config.json"),
    ("audit {tiny} --twins {tmp}/none.jsonl", "none.jsonl: no such file"),
    ("audit {tiny} --vectors {tmp}/nowhere", "nowhere': no model.safetensors"),
    ("audit {tiny} --vectors {narrow}", r"\(width 8, 5 layers\); .* has width 32"),
    ("audit {tiny} --target furious", "no concept 'furious'; they have"),
    ("audit {tiny} --vectors {mild} --target mild", "no stories of the audit split are about 'mild'; they are about"),
    ("audit {tiny} --concepts calm bland", "no stories of the audit split are about 'bland'; they are about"),
    ("audit {tiny} --stories {tmp}/uneven.jsonl", r"are on the topics \['a', 'b'\], the others on \['a'\]; both need"),
    ("audit {tiny} --max-tasks 1", "1 tasks of the audit split; an audit needs at least 2"),
    ("audit {tiny} --pairs {tmp}/lone.jsonl", "1 tasks with pairs of the audit split"),
    ("audit {tiny} --neutral {tmp}/quiet.jsonl", "1 neutral dialogues of the audit split"),
    ("audit {tiny} --neutral {tmp}/untrained.jsonl", '^error: 0 neutral dialogues with `"split": "train"`; the own'),
    ("audit {tiny} --neutral {tmp}/spoken_twice.jsonl", "spoken_twice.jsonl: two rows have the id '.*'; give every"),
    ("audit {tiny} --twins {tmp}/one_id.jsonl", "one_id.jsonl: two rows have the id 'task 0'; give every row an id"),
    ("audit {tiny} --pairs {tmp}/pair_twice.jsonl", "pair_twice.jsonl: two rows have the id '.*'; give every row an"),
    ("audit {tiny} --chats {tmp}/chat_twice.jsonl", "chat_twice.jsonl: two rows have the id '1'; give every row an"),
    ("audit {tiny} --reference {other}", "`--reference .*other` has another architecture than .*; give the model"),
    ("audit {broken}", r"broken: the tensor 'model.layers.1.mlp.up_proj.weight' holds values that are not finite; .*"),
    ("audit {broken_adapter}", "the tensor '.*layers.0.self_attn.q_proj.lora_B.default.weight' holds values that are"),
    ("audit {tiny} --chats {tmp}/long.jsonl", r"endless: \d+ tokens, and the model takes 4096; .* with `--truncate`"),
    ("audit {tiny} --neutral {tmp}/long_talk.jsonl", r"endless: \d+ tokens, and the model takes 4096; .* of `--neut"),
    (
        "audit {tiny} --stories {tmp}/long_story.jsonl",
        r"endless: \d+ tokens, and the model takes 4096; .* `--stories`",
    ),
    ("audit {tiny} --chats {tmp}/none.jsonl", "none.jsonl: no such file"),
    (
        "audit {tiny} --chats {tmp}/empty.jsonl",
        r"empty.jsonl: no chats; give JSONL of \{id, messages\} or \{id, text\}",
    ),
    (
        "audit {tiny} --chats {tmp}/role.jsonl",
        r"role.jsonl:1: .* `role` \(system, user, assistant, tool\) and `content`",
    ),
    (
        "audit {tiny} --full --steer calm=0.1",
        "steers what a quick audit reads; leave out `--full` and `--lm-eval`, or",
    ),
    ("audit {tiny} --full --split selection", "and stay unseen with `--split selection`; leave one of them out"),
    ("audit {tiny} --steer calm=0.05 calm=0.1", "`--steer` names a concept twice; give each concept one dose"),
    ("audit {tiny} --reference {broken}", r"broken: the tensor 'model.layers.1.mlp.up_proj.weight' holds values that"),
    ("audit {tiny} --max-new-tokens 7", "which only `--full` asks; add it or leave it out"),
    ("audit {tiny} --concepts calm --max-concepts 2", "names what `--max-concepts` would choose; give one of them"),
    ("audit {adapter} --reference {tiny}", "is an adapter, whose own base is its reference; leave out `--reference`"),
    ("audit {misfit}", "adapter '.*misfit' does not fit its base .*; give the base it names"),
    ("audit {partial}", r"partial' does not fit its base .* \(1 tensors are in one of them alone, such as .*lora_A"),
    (
        "compare {before} {strange}",
        "adapter of a base with other weights .* than BEFORE .*; give the adapter's own",
    ),
    (
        "compare {before} {before}",
        "`--vectors`.*: all that is compared is audited already; leave it out, or",
    ),
    (
        "compare {before} {other}",
        r"other' has another architecture \(qwen2 of width 32, 2 layers\) than .*before' \(qwen2 of width 32, 5 la",
    ),
    ("compare {tmp}/nowhere {before}", "no folder with config.json"),
    ("compare {before} {before} --arms a={before} b={before} a={before}", r"names an arm twice \(a, b, a\); number"),
    ("compare {before} {before} --arms none={tmp}/nowhere", "no folder with config.json"),
]


UNEVEN = [("desperate", "a"), ("desperate", "b"), ("calm", "a")]


@pytest.fixture(scope="module")
def places(run, adapter, tiny_folder, tmp_path_factory):
    """Wrong files and folders by the names that `ERRORS` uses."""
    folder = tmp_path_factory.mktemp("wrong")
    story = corpora.load_stories()[0]._asdict()
    no_topic = {key: value for key, value in story.items() if key != "topic"}
    dialogue = corpora.load_neutral()[0]._asdict() | {"split": "train"}
    contexts = [context._asdict() for twin in corpora.load_twins()[:4] for context in twin]
    spoken = [row._asdict() for row in corpora.load_neutral() if row.split == "audit"]
    talk = [{"role": "user", "content": "and so on " * 2000}, {"role": "assistant", "content": "Go on."}]
    told = [story | {"id": c, "concept": c, "topic": "a", "split": "audit"} for c in ("desperate", "calm")]
    pairs = [pair._asdict() for pair in corpora.load_pairs() if pair.split == "audit"]
    for name, rows in {
        "text": [story, "{'id': 1}"],
        "key": [story, no_topic],
        "gap": [story, "", story],
        "last": [story | {"split": "audit"}],
        "late": [story, story | {"split": "selection"}, story | {"concept": "calm", "split": "selection"}],
        "felt": [row._asdict() for row in corpora.load_deflection() if row.felt == "sad"],
        "lone": [pair for pair in pairs if pair["task"] == pairs[0]["task"]],
        "untrained": spoken,
        "spoken_twice": [dialogue, *spoken, dialogue],
        "one_id": [row | {"id": f"task {i // 2}"} for i, row in enumerate(contexts)],
        "pair_twice": [pairs[0], *pairs],
        "chat_twice": [{"id": "1", "text": "Hello."}, {"id": 1, "text": "Good evening."}],
        "quiet": [dialogue, spoken[-1]],
        "uneven": [story | {"concept": c, "topic": t, "split": "audit"} for c, t in UNEVEN],
        "long": [{"id": "endless", "text": "and so on " * 2000}],
        "long_train": [dialogue | {"id": "first"}, dialogue | {"id": "endless", "messages": talk}],
        "parts": [dialogue | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
        "long_talk": [dialogue | {"id": "first"}, *spoken, dialogue | {"id": "endless", "messages": talk}],
        "long_story": [*told, told[0] | {"id": "endless", "text": "and so on " * 2000}],
        "empty": [],
        "role": [{"id": 1, "messages": [{"role": "robot", "content": "go"}]}],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "older").mkdir()
    (folder / "older" / "audit.json").write_text('{"schema": 1}', encoding="utf-8")
    shutil.copytree(tiny_folder, folder / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    vectors = load_vectors(str(run / "vectors/train"))
    vectors.set_band([2, 3], "set by the test")
    vectors.save(folder / "banded")
    vectors.weight_hash = "0"
    vectors.save(folder / "foreign")
    mild = load_vectors(str(run / "vectors/train"))
    mild.concepts[1] = "mild"
    mild.save(folder / "mild")
    samples = dict.fromkeys(("token", "header", "reply", "text"), 2)
    EmotionVectors(["desperate"], [1], 8, 5, samples, "narrow", "0", {}).save(folder / "narrow")
    damaged = AutoModelForCausalLM.from_pretrained(tiny_folder)
    shutil.copytree(tiny_folder, folder / "other")
    short = {"num_hidden_layers": 2, "layer_types": None}
    config = type(damaged.config)(**damaged.config.to_dict() | short)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    shutil.copytree(tiny_folder, folder / "broken")
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    damaged.save_pretrained(folder / "broken")
    shutil.copytree(adapter, folder / "broken_adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0] = float("inf")
    save_file(tensors, folder / "broken_adapter" / "adapter_model.safetensors")
    shutil.copytree(adapter, folder / "misfit")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(3, 2)
    save_file(tensors, folder / "misfit" / "adapter_model.safetensors")
    shutil.copytree(adapter, folder / "partial")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, folder / "partial" / "adapter_model.safetensors")
    strange = AutoModelForCausalLM.from_pretrained(tiny_folder)
    strange.model.embed_tokens.weight.data += 1
    shutil.copytree(tiny_folder, folder / "strange_base")
    strange.save_pretrained(folder / "strange_base")
    shutil.copytree(adapter, folder / "strange")
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(folder / "strange_base")
    (folder / "strange" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copytree(tiny_folder, folder / "retold")
    template = folder / "retold" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("im_start", "im_begin"), encoding="utf-8")
    names = (
        "partial",
        "retold",
        "strange",
        "misfit",
        "bare",
        "banded",
        "foreign",
        "narrow",
        "mild",
        "other",
        "broken",
        "broken_adapter",
    )
    run_places = {"train": run / "vectors/train", "before": run / "before", "adapter": adapter}
    return {"tmp": folder, "tiny": tiny_folder} | {name: folder / name for name in names} | run_places


def test_a_result_that_would_stand_on_or_below_a_file_is_refused(run, texts, tiny_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert error("compare", run / "before", run / "before", "--out", file).endswith("file` is a file; name a folder")
    assert "Not a directory" in error("extract", tiny_folder, *texts["extract"], "--out", file / "deep")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("command", "words"), ERRORS)
def test_user_errors_end_in_one_line_and_leave_nothing(command, words, run, texts, places, tmp_path):
    verb, *arguments = command.format(**places).split()
    audit = [*texts["audit"], "--vectors", run / "vectors/train"]
    compare = [*audit, "--audits", tmp_path / "deep" / "audits"]
    usual = {"extract": texts["extract"], "audit": audit, "compare": compare}[verb]
    line = error(verb, *usual, *arguments, "--out", tmp_path / "deep" / "out")
    assert re.search(words, line), line
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("audit {tiny} --stories {tmp}/uneven.jsonl", "both need the same, so that the topic cancels"),
        ("audit {tiny} --chats {tmp}/long.jsonl", "with `--truncate`"),
        ("compare {tiny} {tiny} --arms none={tmp}/nowhere", "no folder with config.json"),
        ("compare {tiny} {tmp}/nowhere", "no folder with config.json"),
        (
            "compare {tiny} {tiny} --arms none=nobody/nothing",
            "model 'nobody/nothing' cannot be loaded .*; give a Hub id",
        ),
        ("compare {tiny} {tmp}/older", "schema 1, this version reads"),
        ("compare {tiny} {other}", "other' has another architecture"),
        ("compare {tiny} {broken}", "'model.layers.1.mlp.up_proj.weight' holds values that are not finite"),
        ("compare {tiny} {tiny} --arms none={broken_adapter}", "lora_B.default.weight' holds values that are not fin"),
        ("compare {tiny} {adapter} --seeds {strange}", "strange' is an adapter of a base with other weights .* than"),
        ("compare {before} {adapter} --max-rows 5", "before' differ in corpora; give the options of the one that is"),
        ("compare {tiny} {before} --target calm", "before' and .* differ in target, own_stories; give the options"),
        ("compare {tiny} {retold}", "differ in chat_template; .*; one template with `--chat-template`"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(command, words, run, texts, places, tmp_path, monkeypatch):
    monkeypatch.setattr("calibrate.audit.contexts.read", pytest.fail)
    verb, *arguments = command.format(**places).split()
    audit = [*texts["audit"], "--vectors", run / "vectors/train"]
    line = error(verb, *audit, *arguments, "--out", tmp_path / "out")
    assert re.search(words, line), line


def test_a_tokenizer_is_looked_for_where_the_model_is(tiny_folder, monkeypatch, tmp_path):
    """The first thing that a comparison loads, and at the revision that is given."""
    asked = []

    def refuse(source, **options):
        asked.append((source, options))
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    words = ["--revision", "v1", "--trust-remote-code", "--out", tmp_path / "out"]
    assert "model 'nobody/nothing' cannot be loaded (no network)" in error(
        "compare", "nobody/nothing", tiny_folder, *words
    )
    assert asked == [("nobody/nothing", {"revision": "v1", "trust_remote_code": True})]


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
    audit = ["audit", tiny_folder, "--vectors", run / "vectors/train", *texts["audit"]]
    assert "holds no result of this command" in error(*audit, "--out", tmp_path / "mine")
    kept = contents(run)
    for option, differing in {
        "--max-rows 5": "corpora",
        "--target calm": "own_stories, target",
        "--concepts calm": "own_stories",
        "--steer calm=0.1": "steer",
        "--full --max-new-tokens 7": "corpora, full, max_new_tokens, own_stories, pairs, played",
    }.items():
        assert f"(differing: {differing})" in error(*audit, *option.split(), "--out", run / "before"), option
    assert contents(run) == kept


def test_wrong_options_end_with_the_status_of_an_error(capsys):
    """1, not argparse's 2: that is a verdict other than calibrated, which a pipeline may take."""
    for arguments, words in (
        (["compare", "a"], "the following arguments are required: after, --out"),
        (["compare", "a", "b", "--out", "c", "--arms", "none"], "'none' is not NAME=MODEL, such as none=runs/none"),
        (["audit", "a", "--steer", "calm"], "'calm' is not CONCEPT=DOSE, such as calm=0.05"),
        (["audit", "a", "--split", "train"], "invalid choice: 'train'"),
        (["audit", "a", "--max-tasks", "0"], "--max-tasks: '0' is not a whole number of 1 or more; leave it out"),
        (["audit", "a", "--max-pairs-per-task", "0"], "--max-pairs-per-task: '0' is not a whole number of 1 or more"),
        (["audit", "a", "--max-concepts", "0"], "--max-concepts: '0' is not a whole number of 1 or more"),
        (["compare", "a", "b", "--max-new-tokens", "0"], "--max-new-tokens: '0' is not a whole number of 1 or more"),
        (["audit", "a", "--max-rows", "1"], "--max-rows: '1' is not a whole number of 2 or more; leave it out"),
        (["audit", "a", "--max-rows=-3"], "--max-rows: '-3' is not a whole number of 2 or more"),
    ):
        with pytest.raises(SystemExit) as stopped:
            calibrate(*arguments)
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err


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
    assert capsys.readouterr().out.startswith(f"{out / 'audit'}: 3 concepts, layers 1 to 4\n")
    assert {path.name for path in out.iterdir()} == {"states", "train", "audit"}
    assert contents(out / "train") == kept
