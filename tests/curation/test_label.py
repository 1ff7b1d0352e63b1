import json
import threading
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from calibrate import writers
from data_curation import label
from data_curation.facets import FACETS

LEVELS = dict.fromkeys(FACETS, 0) | {"affect_present": 3, "distress": 4, "acceptance": 2}
TEXT = "She wept over the coat, folded it, and gave it to the man at the door."


def answer(**changes) -> str:
    found = {"evidence": ["She wept", "never said"], "facets": LEVELS, "stance": "modelled", "regulation": 8}
    return json.dumps(found | changes)


class Teacher:
    """A real HTTP server on loopback; answers as `statuses` and `contents` say, then soundly."""

    def __init__(self):
        self.requests, self.statuses, self.contents = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = outer.statuses.pop(0) if outer.statuses else 200
                content = outer.contents.pop(0) if outer.contents and status == 200 else answer()
                self.send_response(status)
                self.end_headers()
                whole = {"choices": [{"message": {"content": content}}]} if status == 200 else {"error": "refused"}
                self.wfile.write(json.dumps(whole).encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def teacher():
    running = Teacher()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"id": name, "text": f"{TEXT} {name}", "writer": "w", "other": 1} for name in ("a", "b", "c")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_gets_the_teachers_labels_and_only_evidence_that_stands_in_it(teacher, source, tmp_path):
    out = tmp_path / "out.jsonl"
    assert label.label(source, out, teacher.url, "some-model") == (3, [])
    first = rows(out)[0]
    assert (first["id"], first["writer"], first["regulation"], first["stance"]) == ("a", "w", 8, "modelled")
    assert first["facets"] == LEVELS
    assert first["evidence"] == ["She wept"]
    assert first["teacher"]["model"] == "some-model"
    assert "other" not in first
    prompt = teacher.requests[0]["messages"][0]["content"]
    assert prompt.index('"evidence"') < prompt.index('"facets"') < prompt.index(f"==========\n{TEXT} a\n==========")
    assert all(f"- {facet}: " in prompt for facet in FACETS)


def test_a_stopped_run_asks_only_for_what_is_missing(teacher, source, tmp_path):
    out = tmp_path / "out.jsonl"
    label.label(source, out, teacher.url, "some-model", concurrency=2)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:40])  # as a kill leaves it
    asked = len(teacher.requests)
    assert label.label(source, out, teacher.url, "some-model") == (2, [])
    assert len(teacher.requests) == asked + 2
    assert out.read_bytes() == whole
    with pytest.raises(ValueError, match=r"holds labels by .*some-model.*, not by .*another.*choose another `--out`"):
        label.label(source, out, teacher.url, "another")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"id": 1, "text": "a", "regulation": 3}\n{"id": 2, "text": "b"}', "holds labels by None, not by"),
        (b'{"id": 2, "text": "b"}', "holds labels by None, not by"),
        (b"chapter one\nchapter two", ":1: not JSON in UTF-8"),
        (b"a thesis of one line", r"ends with b'a thesis of one line', which no call has left there; choose another"),
    ],
)
def test_a_file_of_others_keeps_its_last_line(teacher, source, tmp_path, content, told):
    """It was cut off before anything was looked at."""
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        label.label(source, out, teacher.url, "some-model")
    assert out.read_bytes() == content


def test_the_input_is_no_output_and_a_whole_last_row_is_kept(teacher, source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(ValueError, match=r"in\.jsonl is the input itself; choose another `--out`"):
        label.label(source, tmp_path / "x" / ".." / "in.jsonl", teacher.url, "some-model")
    assert source.read_bytes() == before
    out = tmp_path / "out.jsonl"
    label.label(source, out, teacher.url, "some-model")
    whole, asked = out.read_bytes(), len(teacher.requests)
    out.write_bytes(whole[:-1])
    label.label(source, out, teacher.url, "some-model")
    assert (out.read_bytes(), len(teacher.requests)) == (whole, asked)


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_named(teacher, source, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "RETRIES", 2)
    teacher.statuses = [429, 503]
    assert label.label(source, tmp_path / "busy.jsonl", teacher.url, "m") == (3, [])
    assert len(teacher.requests) == 5
    teacher.statuses = [401]
    with pytest.raises(ValueError, match=r"gives no chat completion \(status 401\): .*refused"):
        label.label(source, tmp_path / "refused.jsonl", teacher.url, "m")
    with pytest.raises(ValueError, match="does not answer"):
        label.label(source, tmp_path / "lost.jsonl", "http://127.0.0.1:1/v1", "m")


def test_an_unusable_answer_is_asked_for_again_then_left_out_and_named(teacher, source, tmp_path):
    teacher.contents = ["I cannot", answer(regulation=11), answer(), *["{}"] * label.ATTEMPTS]
    out = tmp_path / "out.jsonl"
    assert label.label(source, out, teacher.url, "m") == (2, ["b"])
    assert [row["id"] for row in rows(out)] == ["a", "c"]
    assert len({request["seed"] for request in teacher.requests[:3]}) == 3
    assert label.label(source, out, teacher.url, "m") == (1, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"regulation": True},
        {"regulation": 7.5},
        {"regulation": None},  # there is something to regulate
        {"stance": "approved"},
        {"facets": LEVELS | {"panic": 5}},
        {"facets": {"panic": 1}},
        {"facets": LEVELS | {"courage": 1}},
        {"facets": [1]},
    ],
)
def test_labels_that_break_the_rubric_are_refused(changes):
    assert label.parse(answer(), TEXT) is not None
    assert label.parse(answer(**changes), TEXT) is None


def test_talk_around_the_object_is_left_out_and_null_is_taken_where_nothing_is_felt():
    none = answer(facets=dict.fromkeys(FACETS, 0), regulation=None)
    assert label.parse(f"Sure!\n```json\n{none}\n```", TEXT)["regulation"] is None
    assert label.parse(answer(evidence="all of it"), TEXT)["evidence"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r":1: not JSON in UTF-8"),
        ("[1]", r":1: lacks an object; each line needs id, text"),
        ('{"id": 1}', r":1: lacks text; each line needs id, text"),
        ('{"id": 1, "text": " "}', r":1: `text` is not a text with words in it"),
        ('{"id": [1], "text": "a"}', r":1: the id is \[1\], neither text nor whole number"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', r":2: the id 1 stands there twice"),
    ],
)
def test_a_bad_line_is_named(content, message, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(label.read_rows(path))
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file"):
        list(label.read_rows(tmp_path / "nowhere.jsonl"))


def test_the_command_says_what_it_did(teacher, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    parser = ArgumentParser()
    label.add_label(parser)
    teacher.contents = ["no"] * label.ATTEMPTS
    out = tmp_path / "out.jsonl"
    arguments = parser.parse_args([str(source), "--out", str(out), "--base-url", teacher.url, "--model", "m"])
    arguments.run(arguments)
    said = capsys.readouterr().out
    assert f"2 passages labelled by m: {out}" in said
    assert "1 have no usable answer after 3 attempts (a); run the same command again" in said
