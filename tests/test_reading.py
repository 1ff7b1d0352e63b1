import json
import re

import pytest
import torch
from conftest import CHAT_TEMPLATE, CONCEPTS, write_jsonl
from test_cli import calibrate, error

from calibrate import activations, models, reading, transcripts
from calibrate.vectors import load_vectors

ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "When does it open?"}]
RECORDS = [
    {"id": "story", "text": "She ran across the yard and hammered on the shutter until a light came on."},
    {"id": "open", "messages": ASKED},
    {"id": "answered", "messages": [*ASKED, {"role": "assistant", "content": "At nine."}]},
    {"id": 4, "text": "Rain."},
    {"id": "longer", "text": "The ferry was late again, and nobody on the pier seemed to mind. " * 4},
]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(vectors, source, out, *options) -> list[dict]:
    calibrate("read", vectors, source, "--out", out, *options)
    return lines(out)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", RECORDS)


def by_hand(checkpoint, vectors, ids: list[int], part: slice, pooling: str, layers: list[int]) -> dict[str, float]:
    [(_, hidden)] = activations.states(checkpoint.model, [ids], vectors.layers)
    found = vectors.readings(hidden[:, part].double().mean(1), pooling)[:, vectors.positions(layers)].mean(1)
    return dict(zip(vectors.concepts, found.tolist(), strict=True))


def test_readings_are_those_of_one_text_at_a_time(tiny, tiny_vectors, source, tmp_path):
    vectors = load_vectors(str(tiny_vectors))
    found = read(tiny_vectors, source, tmp_path / "out.jsonl", "--layers", 3, 1)
    assert [row["id"] for row in found] == [record["id"] for record in RECORDS]
    assert set(found[0]) == {"id", "readings"}
    assert set(found[0]["readings"]) == set(CONCEPTS)
    ids = transcripts.encode_text(tiny.tokenizer, RECORDS[0]["text"]).ids
    expected = by_hand(tiny, vectors, ids, slice(1, None), "text", [1, 3])
    assert found[0]["readings"] == pytest.approx(expected, abs=2e-3)
    encoded = transcripts.encode(tiny.tokenizer, RECORDS[2]["messages"])
    assert set(found[2]) == {"id", "header", "reply"}
    for role in ("header", "reply"):
        span = encoded.last(role)
        expected = by_hand(tiny, vectors, encoded.ids, slice(span.start, span.stop), role, [1, 3])
        assert found[2][role] == pytest.approx(expected, abs=2e-3)


def test_an_open_transcript_is_read_at_the_header_that_follows(tiny, tiny_vectors, source, tmp_path):
    """The generation header is added; its reading equals that of the answered twin, whose reply comes after it."""
    found = read(tiny_vectors, source, tmp_path / "out.jsonl")
    assert found[1]["reply"] is None
    assert found[1]["header"] == pytest.approx(found[2]["header"], abs=2e-3)


def test_per_token_readings(tiny, tiny_vectors, source, tmp_path):
    vectors = load_vectors(str(tiny_vectors))
    found = read(tiny_vectors, source, tmp_path / "out.jsonl", "--tokens", "--layers", 2)
    tokens = found[0]["tokens"]
    assert "".join(tokens["text"]) == RECORDS[0]["text"]
    assert set(tokens["role"]) == {"text"}
    assert "header" in found[1]["tokens"]["role"]
    ids = transcripts.encode_text(tiny.tokenizer, RECORDS[0]["text"]).ids
    [(_, hidden)] = activations.states(tiny.model, [ids], vectors.layers)
    expected = vectors.readings(hidden.transpose(0, 1), "token")[:, vectors.index("calm"), vectors.positions([2])[0]]
    assert tokens["readings"]["calm"][0] is None
    assert tokens["readings"]["calm"][1:] == pytest.approx(expected[1:].tolist(), abs=2e-3)


def test_meta_says_what_the_figures_are(tiny, tiny_vectors, source, tmp_path):
    read(tiny_vectors, source, tmp_path / "out.jsonl")
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert (meta["layers"], meta["band"], meta["weight_hash"]) == ([2], [2], tiny.weight_hash)
    assert meta["sigma_source"].startswith("neutral text in ")
    assert set(meta["versions"]) == {"calibrate", "torch", "transformers"}


def test_the_model_is_read_in_the_revision_of_its_vectors(tiny_vectors, source, tmp_path, monkeypatch):
    vectors = load_vectors(str(tiny_vectors))
    vectors.model_revision = "abc"
    vectors.save(tmp_path / "vectors")
    asked, load = [], models.load
    monkeypatch.setattr(models, "load", lambda name, **given: asked.append(given["revision"]) or load(name))
    read(tmp_path / "vectors", source, tmp_path / "out.jsonl")
    read(tmp_path / "vectors", source, tmp_path / "other.jsonl", "--revision", "def")
    read(tmp_path / "vectors", source, tmp_path / "named.jsonl", "--model", vectors.model)
    assert asked == ["abc", "def", None]


def test_a_stopped_run_goes_on_where_it_was(tiny_vectors, source, tmp_path, monkeypatch):
    """Stopped after the first window of two, with a line and a half of the next, which is read again as a whole.

    So the texts of every batch, and with them the last digits, are those of an unbroken run.
    """
    monkeypatch.setattr(reading, "WINDOW", 2)
    whole = read(tiny_vectors, source, tmp_path / "whole.jsonl")
    compute, windows = reading._readings, []

    def stop_at_the_second(*given):
        windows.append([record.id for record in given[3]])
        if len(windows) == 2:
            raise KeyboardInterrupt
        return compute(*given)

    monkeypatch.setattr(reading, "_readings", stop_at_the_second)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        read(tiny_vectors, source, out)
    assert not out.exists()
    with part.open("a") as file:
        file.write('{"id": "answered"}\n{"id": 4')
    assert read(tiny_vectors, source, out) == whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    first, *others = ["story", "open"], ["answered", 4], ["longer"]
    assert windows == [first, others[0], *others]
    assert not part.exists()


def test_a_finished_file_is_left_alone_and_another_configuration_refused(tiny_vectors, source, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    read(tiny_vectors, source, out)
    kept = out.read_bytes()
    capsys.readouterr()
    calibrate("read", tiny_vectors, source, "--out", out)
    assert "nothing to do" in capsys.readouterr().out
    assert "(differing: layers)" in error("read", tiny_vectors, source, "--out", out, "--layers", 1)
    turned = load_vectors(str(tiny_vectors))
    turned.directions = -turned.directions
    turned.save(tmp_path / "turned")
    assert "(differing: vectors)" in error("read", tmp_path / "turned", source, "--out", out)
    write_jsonl(source, RECORDS[:2])
    assert "(differing: input)" in error("read", tiny_vectors, source, "--out", out)
    assert out.read_bytes() == kept


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{'id': 1}", r"texts.jsonl:2: not JSON"),
        ({"text": "x"}, r"texts.jsonl:2: lacks an `id`"),
        ({"id": "x"}, r"texts.jsonl:2: needs either `text` or `messages`; it has \['id'\]"),
        ({"id": "x", "text": "a", "messages": ASKED}, r"needs either `text` or `messages`"),
        ({"id": "x", "text": "  "}, r"texts.jsonl:2: `text` is not a text with words in it"),
        ({"id": "x", "messages": []}, r"texts.jsonl:2: `messages` is not a list of objects"),
        ({"id": "x", "messages": [{"role": "user"}]}, r"texts.jsonl:2: `messages` is not a list of objects"),
        ({"id": "x", "messages": ASKED[:1]}, r"the last of them not a system message"),
        ({"id": "x", "text": "word " * 5000}, r"record 'x' has \d+ tokens; the model takes 4096: cut it into parts"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(record, message, tiny_vectors, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", [RECORDS[0], record])
    with pytest.raises(ValueError, match=message):
        raise ValueError(error("read", tiny_vectors, source, "--out", tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_utf8_is_named_with_its_line(tiny_vectors, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" + '{"id": "é"}\n'.encode("latin-1"))
    line = error("read", tiny_vectors, source, "--out", tmp_path / "out.jsonl")
    assert re.match(rf"error: {source}:2: not UTF-8 text \(.* at byte 8 of the line\); save it as UTF-8$", line)


def test_a_record_that_the_template_refuses_is_named(tiny_vectors, source, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages | length == 2 %}{{ raise_exception('not two') }}{% endif %}" + CHAT_TEMPLATE)
    line = error("read", tiny_vectors, source, "--out", tmp_path / "out.jsonl", "--chat-template", template)
    assert line.startswith("error: record 'open': the chat template refuses the roles system, user (not two); give")
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_and_empty_files_and_layers_are_refused(tiny_vectors, source, tmp_path):
    assert "none.jsonl: no such file" in error("read", tiny_vectors, tmp_path / "none.jsonl", "--out", tmp_path / "o")
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert "the file holds no records" in error("read", tiny_vectors, empty, "--out", tmp_path / "o")
    assert "layers [0] are out of range" in error("read", tiny_vectors, source, "--out", tmp_path / "o", "--layers", 0)


def test_a_text_of_one_token_has_no_reading(tiny, tiny_vectors, tmp_path):
    assert len(tiny.tokenizer("a")["input_ids"]) == 1
    source = write_jsonl(tmp_path / "texts.jsonl", [{"id": "a", "text": "a"}])
    assert read(tiny_vectors, source, tmp_path / "out.jsonl") == [{"id": "a", "readings": None}]


def test_memory_holds_a_window_only(tmp_path):
    """The reader of records yields line by line: a bad last line is met only when it is reached."""
    source = write_jsonl(tmp_path / "texts.jsonl", [RECORDS[0], "oops"])
    records = reading.read_records(source)
    assert next(records).id == "story"
    with pytest.raises(ValueError, match=r":2: not JSON"):
        next(records)
    assert torch.is_grad_enabled()
