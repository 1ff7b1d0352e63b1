import json
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
from test_cli import calibrate, error

from calibrate import corpora, generation, writers
from calibrate.concepts import load_concepts
from calibrate.corpora.check import check

WORDS = [a + b for a in ("ba", "ke", "lo", "mi", "nu", "ra", "se", "to") for b in ("nd", "rt", "lk", "ps", "gh", "st")]


def story(number: int, words: int = 100) -> str:
    """A text of its own for every number; eight of 48 words in a row are the same twice once in 10^13 times."""
    return " ".join(random.Random(number).choices(WORDS, k=words)).capitalize() + "."


class Server:
    """A real HTTP server on loopback that answers chat completions as a script says."""

    def __init__(self):
        self.requests, self.statuses, self.stop_after = [], [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, "auth": self.headers["Authorization"], **body})
                status = outer.statuses.pop(0) if outer.statuses else 200
                answer = outer.answer(body) if status == 200 else '{"error": "busy"}'
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, body: dict) -> str:
        """Four stories that follow from the seed: usable, leaking, too short, usable."""
        seed = body["seed"]
        leak = story(seed + 1).replace(".", " desperate calm angry.")
        text = "\n".join(f"###\n{part}" for part in (story(seed), leak, story(seed + 2, 30), story(seed + 3)))
        return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def command(server, out, *options) -> list:
    shared = ["--concepts", "desperate", "calm", "angry", "--max-topics", 3, "--per-cell", 3]
    return ["corpus", "write", "--server", server.url, "--server-model", "some-model", "--out", out, *shared, *options]


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "stories.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_server_fills_every_cell_with_checked_stories(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    out = tmp_path / "out"
    calibrate(*command(server, out))
    found = rows(out)
    cells = {(row["concept"], row["topic"]) for row in found}
    assert (len(found), len(cells)) == (27, 9)
    assert "27 stories; refused in this run: {'leak': 9, 'length': 9}" in capsys.readouterr().out
    assert {row["id"] for row in found if row["concept"] == "calm"} >= {
        f"calm/{topic}" for topic in ("a-village-baker-gets-an-order-that-is-far-too-large-0",)
    }
    assert all(load_concepts()[row["concept"]].leak(row["text"]) is None for row in found)
    first = server.requests[0]
    assert (first["path"], first["auth"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    prompt = first["messages"][0]["content"]
    assert "feels desperate: everything is at stake" in prompt
    assert "a village baker" in prompt
    assert "despair*" in prompt
    # Two usable ones an answer, three a cell: two requests a cell, and the second answer stops at its first story.
    assert (len(server.requests), len({request["seed"] for request in server.requests})) == (18, 18)
    assert len(corpora.load_stories(out / "stories.jsonl")) == 27
    card = (out / "README.md").read_text()
    assert "27 stories of 3 concepts on 3 topics, written by some-model" in card
    assert "| temperature | 1.0 |" in card
    assert f"by calibrate {version('calibrate')} with transformers {version('transformers')} and refused\n" in card
    assert "\n{'leak': 9, 'length': 9}.\n" in card
    for row in ('| server | "127.0.0.1" |', "| max_tokens | 250 |", "| weights | null |"):
        assert f"\n{row}\n" in card
    assert server.url.split("/")[2] not in card  # the port may change between runs
    assert {request["max_tokens"] for request in server.requests} == {4 * 250}
    problems, _ = check("stories", out / "stories.jsonl")
    assert not any("shares" in str(problem) or "names" in str(problem) for problem in problems)


def test_a_process_that_is_killed_outright_loses_and_repeats_nothing(server, tmp_path):
    """SIGKILL while the eighth request waits for its answer: no handler runs, nothing is flushed on the way out."""
    calibrate(*command(server, tmp_path / "whole"))
    answer, asked, release = server.answer, len(server.requests), threading.Event()

    def wait_at_the_eighth(body: dict) -> str:
        if len(server.requests) == asked + 8:
            release.wait(60)
        return answer(body)

    server.answer = wait_at_the_eighth
    arguments = [str(argument) for argument in command(server, tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-m", "calibrate.cli", *arguments], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while len(server.requests) < asked + 8 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert len(server.requests) == asked + 8
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        release.set()
    kept = rows(tmp_path / "killed")
    assert 0 < len(kept) < 27
    assert not (tmp_path / "killed" / "README.md").exists()
    server.answer = answer
    calibrate(*command(server, tmp_path / "killed"))
    found = rows(tmp_path / "killed")
    assert found[: len(kept)] == kept
    assert found == rows(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 4, 11])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_killed_run_loses_and_repeats_nothing(stop, concurrency, server, tmp_path, monkeypatch):
    calibrate(*command(server, tmp_path / "whole", "--concurrency", concurrency))
    add, kept = generation._Corpus.add, []

    def die(corpus, request, text, file):
        if len(kept) == stop:
            file.write('{"id": "half a line')
            file.flush()
            raise KeyboardInterrupt
        kept.append(request)
        return add(corpus, request, text, file)

    monkeypatch.setattr(generation._Corpus, "add", die)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*command(server, tmp_path / "killed", "--concurrency", concurrency))
    assert not (tmp_path / "killed" / "README.md").exists()
    monkeypatch.setattr(generation._Corpus, "add", add)
    calibrate(*command(server, tmp_path / "killed", "--concurrency", concurrency))
    found, expected = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert sorted(row["text"] for row in found) == sorted(row["text"] for row in expected)
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in expected)


def test_a_busy_server_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib3.util.Retry.get_backoff_time", lambda self: 0)
    server.statuses = [503, 429]
    calibrate(*command(server, tmp_path / "out"))
    assert len(rows(tmp_path / "out")) == 27


def test_a_server_that_refuses_or_is_not_there_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib3.util.Retry.get_backoff_time", lambda self: 0)
    server.statuses = [401]
    assert 'gives no chat completion (status 401): \'{"error": "busy"}\'' in error(*command(server, tmp_path / "a"))
    server.http.shutdown()
    server.http.server_close()
    assert "does not answer" in error(*command(server, tmp_path / "b"))


def test_a_writer_that_repeats_itself_leaves_short_cells_and_says_so(server, tmp_path):
    server.answer = lambda body: json.dumps({"choices": [{"message": {"content": story(1)}}]})
    line = error(*command(server, tmp_path / "out"))
    # One story in all: 9 cells, each asked 4 times; every other answer is a repeat.
    assert "9 of 9 cells have fewer than 3 stories after 4 times" in line
    assert "(refused: {'repeat': 35})" in line
    assert (
        "- calm / a village baker gets an order that is far too large: 0" in (tmp_path / "out/README.md").read_text()
    )


def test_other_settings_never_continue_a_corpus(server, tmp_path):
    calibrate(*command(server, tmp_path / "out"))
    kept = rows(tmp_path / "out")
    line = error(*command(server, tmp_path / "out", "--seed", 1, "--temperature", 0.5))
    assert "other settings (differing: seed, temperature)" in line
    assert rows(tmp_path / "out") == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds no corpus of this command" in error(*command(server, tmp_path / "mine"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give either `--model MODEL` or `--server URL`"),
        ("--model default --server http://x", "give either `--model MODEL` or `--server URL`"),
        ("--server http://x", "`--server` needs `--server-model`"),
        ("--model default --concurrency 2", "`--server-model` and `--concurrency` go with `--server` only"),
        ("--server http://x --server-model m --per-cell 0", "`--per-cell` is 0; give 1 or more"),
        ("--server http://x --server-model m --concepts cheery", "concepts cheery are not in concepts.yaml"),
        ("--server http://x --server-model m --topics none.txt", "none.txt: no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path):
    assert message in error("corpus", "write", "--out", tmp_path / "out", *options.split())
    assert not (tmp_path / "out").exists()


def test_the_users_own_model_writes(tiny, tmp_path):
    """A random model writes nothing usable, and the run says so; the same seed asks for the same text."""
    settings = generation.Settings(tiny.name, per_cell=1, per_request=1, temperature=1.0)
    writer = writers.model_writer(tiny, settings)
    request = generation._request(settings, "calm", "a pier", 0)
    text = writer(request._replace(plan=request.plan[:1]))
    assert text == writer(request)
    assert text != writer(request._replace(seed=1))
    tiny.model.generation_config.top_k, tiny.model.generation_config.repetition_penalty = 1, 5.0
    assert text == writer(request)  # the checkpoint's own settings, which no card names, have no say


def test_the_card_names_the_weights_of_an_own_model(tiny, tmp_path, monkeypatch):
    """Written by a real run; the writer gives stories in place of a random model's babble."""
    monkeypatch.setattr(writers, "model_writer", lambda *_: lambda request: f"###\n{story(request.seed)}")
    out = tmp_path / "out"
    options = ["--concepts", "calm", "--max-topics", 1, "--per-cell", 1, "--out", out]
    calibrate("corpus", "write", "--model", tiny.name, *options)
    card = (out / "README.md").read_text()
    assert f'| weights | "{tiny.weight_hash}, torch.float32" |' in card
    assert "| server | null |" in card
    assert writers.weights(tiny._replace(adapter_hash="abc")) == f"{tiny.weight_hash}, adapter abc, torch.float32"
    monkeypatch.setattr(writers, "weights", lambda _: "other")
    assert "other settings (differing: weights)" in error("corpus", "write", "--model", tiny.name, *options)


def test_a_server_is_named_by_its_host_alone():
    assert writers.host("http://user:secret@Example.org:8000/v1?key=1") == "example.org"
    assert "server 'localhost:8000' has no host" in error(
        "corpus", "write", "--server", "localhost:8000", "--server-model", "m", "--out", "nowhere"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("a pier\na quay\n\na pier\n", "3 topics, 2 of them different; give each once"), ("\n", "0 topics, 0 of them")],
)
def test_topics_that_are_given_twice_or_not_at_all_are_refused(text, message, tmp_path):
    (tmp_path / "topics.txt").write_text(text)
    with pytest.raises(ValueError, match=f"topics.txt: {message}"):
        generation.load_topics(tmp_path / "topics.txt")


def test_topics_are_split_by_their_name():
    topics = generation.load_topics()
    assert len(topics) == 100
    splits = [generation.split_of(topic) for topic in topics]
    assert min(splits.count(split) for split in corpora.SPLITS) >= 5
    assert splits.count("train") > 50
