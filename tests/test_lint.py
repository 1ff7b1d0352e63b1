"""The task lint on planted states: which prompts and which sentences stand above neutral ones."""

import json
import shutil

import pytest
import torch
from conftest import CHAT_TEMPLATE, write_jsonl
from transformers import AutoModelForCausalLM

from calibrate import cli, models, transcripts
from calibrate.audit import lint
from calibrate.corpora import load_neutral
from calibrate.reading import Record
from calibrate.vectors import load_vectors

CALM = "Please sort the list of towns by name. Any order of equal names is fine."
PRESSED = "Sort the towns. You have one minute left or everybody is fired! Use the module that we sent."


@pytest.fixture
def planted(monkeypatch, tiny_folder, tiny_vectors):
    """Every token of a text with "minute" reads 4 sigma where the sentence has it, and so does that text's header."""
    checkpoint, vectors = models.load(str(tiny_folder)), load_vectors(str(tiny_vectors))
    row = vectors.index("desperate")

    def states(model, sequences, layers, **_):
        for index, ids in enumerate(sequences):
            text = checkpoint.tokenizer.decode(ids)
            hidden = torch.zeros(len(layers), len(ids), vectors.hidden_size, dtype=torch.float64)
            level = torch.zeros(len(ids), dtype=torch.float64)
            level += 0.01 * (index % 7)  # neutral prompts differ a little
            start, stop = text.find("You have"), text.find("fired!") + 6
            if "minute" in text:
                offsets = checkpoint.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
                level += torch.tensor([4.0 * (start <= low < stop) for low, _ in offsets], dtype=torch.float64)
            header = transcripts.encode(checkpoint.tokenizer, [{"role": "user", "content": "x"}]).last("header")
            size = header.stop - header.start
            for pooling, part in (("token", slice(0, len(ids) - size)), ("header", slice(len(ids) - size, len(ids)))):
                mu, sigma = vectors.scale(pooling)
                values = level[part] if pooling == "token" else torch.full((size,), 4.0 if "minute" in text else 0.0)
                along = values.double()[:, None, None] * sigma[row][None, :, None] * vectors.directions[row].double()
                hidden[:, part] = (mu + along).transpose(0, 1)
            yield index, hidden

    monkeypatch.setattr(lint.activations, "states", states)
    return checkpoint, vectors


def test_the_pressed_prompt_is_flagged_at_its_pressing_sentence(planted):
    checkpoint, vectors = planted
    records = [Record("calm", CALM, None), Record("pressed", None, [{"role": "user", "content": PRESSED}])]
    found = lint.lint(checkpoint, vectors, records, load_neutral()[:6], "desperate")
    assert [(flag.id, flag.flagged) for flag in found.flags] == [("calm", False), ("pressed", True)]
    assert found.flags[0].spans == []
    (span,) = found.flags[1].spans
    assert span.text == "You have one minute left or everybody is fired!"
    assert span.reading == pytest.approx(4, abs=0.3)
    assert found.flags[1].header == pytest.approx(4, abs=1e-6)
    assert found.header_level == pytest.approx(0, abs=1e-6)


def test_a_finished_chat_is_refused(planted):
    checkpoint, vectors = planted
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ValueError, match="done: ends with an assistant's message; a prompt ends where it must answer"):
        lint.lint(checkpoint, vectors, [Record("done", None, chat)], load_neutral()[:6], "desperate")


def test_the_command_prints_flags_and_writes_json(planted, tiny_folder, tiny_vectors, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": "calm", "text": CALM}, {"id": "pressed", "text": PRESSED}])
    words = ["--vectors", tiny_vectors, "--tasks", tmp_path / "tasks.jsonl", "--out", tmp_path / "lint.json"]
    monkeypatch.setattr("sys.argv", ["calibrate", "audit", str(tiny_folder), *map(str, words)])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pressed: 4.00 sigma desperate at the header (level ")
    assert lines[1].endswith("You have one minute left or everybody is fired!")
    assert lines[2].startswith("1 of 2 prompts flagged; ")
    found = json.loads((tmp_path / "lint.json").read_text())
    assert (found["schema"], found["unit"]) == (1, "sigma")
    assert [row["flagged"] for row in found["prompts"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--tasks {tmp}/tasks.jsonl --max-tasks 3",
            "`--tasks` reads the prompts of its file alone; leave out `--max-ta",
        ),
        ("--tasks {tmp}/empty.jsonl", "no prompts; give JSONL of"),
        (
            "--tasks {tmp}/tasks.jsonl --neutral {tmp}/quiet.jsonl",
            "1 neutral dialogues .*; the levels need at least 2",
        ),
        ("--tasks {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("--tasks {tmp}/tasks.jsonl --out {tmp}", "is a folder, and `--tasks` writes one file; name that"),
        (
            "--tasks {tmp}/tasks.jsonl --neutral {tmp}/mute.jsonl",
            "a neutral dialogue is read up to its first answer",
        ),
        (
            "--tasks {tmp}/tasks.jsonl --neutral {tmp}/hasty.jsonl",
            "let it begin with a user's message, and an ass",
        ),
        ("--tasks {tmp}/long.jsonl", r"endless: \d+ tokens, and the model takes 4096; shorten it, or leave it out"),
        (
            "--tasks {tmp}/padded.jsonl --chat-template {tmp}/trim.jinja",
            "^error: padded: the chat template changes the messages",
        ),
    ],
)
def test_what_the_command_refuses(tiny_folder, tiny_vectors, tmp_path, monkeypatch, words, message):
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": "calm", "text": CALM}])
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "quiet.jsonl", [row._asdict() for row in load_neutral() if row.split == "audit"][:1])
    mute = [row._asdict() | {"messages": row.messages[:1]} for row in load_neutral() if row.split == "audit"]
    write_jsonl(tmp_path / "mute.jsonl", mute[:3])
    hasty = [row | {"messages": [{"role": "assistant", "content": "Well."}, *row["messages"]]} for row in mute]
    write_jsonl(tmp_path / "hasty.jsonl", hasty[:3])
    write_jsonl(tmp_path / "long.jsonl", [{"id": "endless", "text": "and so on " * 2000}])
    write_jsonl(tmp_path / "padded.jsonl", [{"id": "padded", "text": f"{CALM}  "}])
    (tmp_path / "trim.jinja").write_text(CHAT_TEMPLATE.replace("['content']", "['content'] | trim"))
    given = words.format(tmp=tmp_path).split()
    monkeypatch.setattr("sys.argv", ["calibrate", "audit", str(tiny_folder), "--vectors", str(tiny_vectors), *given])
    with pytest.raises(SystemExit, match=message):
        cli.main()


def test_damaged_weights_are_named_before_a_prompt_passes_as_calm(tiny_folder, tiny_vectors, tmp_path, monkeypatch):
    """A header that is no number is above no level."""
    write_jsonl(tmp_path / "tasks.jsonl", [{"id": "calm", "text": CALM}])
    shutil.copytree(tiny_folder, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    words = ["--vectors", tiny_vectors, "--tasks", tmp_path / "tasks.jsonl"]
    monkeypatch.setattr("sys.argv", ["calibrate", "audit", str(tmp_path / "broken"), *map(str, words)])
    with pytest.raises(SystemExit, match=r"'model.layers.1.mlp.up_proj.weight' holds values that are not finite"):
        cli.main()


@pytest.mark.parametrize(
    "option",
    ["pairs x", "twins x", "stories x", "chats x", "reference x", "concepts calm", "max-concepts 3", "max-tasks 3",
     "max-rows 3", "max-new-tokens 9", "split selection", "max-pairs-per-task 1", "steer calm=0.1", "full", "pressed",
     "truncate"],
)  # fmt: skip
def test_options_of_an_audit_have_no_effect_on_prompts_and_are_refused(tiny_folder, tmp_path, monkeypatch, option):
    given = ["--tasks", tmp_path / "tasks.jsonl", *f"--{option}".split()]
    monkeypatch.setattr("sys.argv", ["calibrate", "audit", str(tiny_folder), *map(str, given)])
    with pytest.raises(SystemExit, match=rf"reads the prompts of its file alone; leave out `--{option.split()[0]}`$"):
        cli.main()
