"""The holes that datatrove leaves open, each closed; and every row accounted for."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_scorer
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpora import contents, four_files, score, sidecar, texts, write_jsonl, write_parquet

from data_curation import manifest, runs
from data_curation.blocks import RegulationScorer
from data_curation.documents import ShardReader
from data_curation.inputs import find
from data_curation.pipeline import failure
from data_curation.writing import ShardWriter, write_json

RUN = """
import sys
sys.path.insert(0, {tests!r})
import fake_scorer
from pathlib import Path
from data_curation import runs
from data_curation.pipeline import Config
fake = dict(load=fake_scorer.load, types=fake_scorer.TYPES)
runs.score({source!r}, Path({out!r}), config=Config(workers=2), **fake)
"""


@pytest.fixture
def corpus(tmp_path):
    return four_files(tmp_path / "in")


def markers(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state/score/completions").glob("*"))


def scores(out: Path) -> dict[str, bytes]:
    return contents(out / "scores")


def test_scores_are_the_same_bytes_for_any_number_of_workers(corpus, tmp_path):
    """And they are those of the scorer called on one text at a time: batches and shards change nothing."""
    done = score(corpus, tmp_path / "one")
    score(corpus, tmp_path / "three", workers=3)
    assert scores(tmp_path / "one") == scores(tmp_path / "three")
    assert (done["figures"]["rows"], done["figures"]["set_aside"]) == (46, 0)
    rows = sidecar(tmp_path / "one")
    assert list(rows["a-1"]) == ["id", *fake_scorer.TYPES, "characters"]
    for row in texts(12):
        expected = fake_scorer.FakeScorer("default").score([row["text"]])[0]
        assert rows[row["id"]]["regulation"] == pytest.approx(expected["regulation"], abs=1e-7)
        assert rows[row["id"]]["characters"] == len(row["text"])


def test_a_first_none_and_a_late_number_keep_the_type(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "text": "NEUTRAL"}, {"id": 2, "text": "SCORE 0.5"}])
    score(tmp_path / "x.jsonl", tmp_path / "out")
    table = pq.read_table(tmp_path / "out/scores/x.parquet")
    assert table.schema.field("regulation").type == pa.float32()
    assert table["regulation"].to_pylist() == [None, 0.5]
    assert table["id"].to_pylist() == ["1", "2"]


def test_the_same_command_again_does_nothing(corpus, tmp_path):
    score(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scores").glob("*")}
    score(corpus, tmp_path / "out", workers=2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scores").glob("*")}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shard_mb": 1}, r"shards was 5 \(digest \w+\) and is 7 \(digest \w+\)"),
        ({"scorer": "other"}, "scorer was 37a8eec1ce19687d and is "),
        ({"number_rows": True}, "id_column was id and is None"),
        ({"max_characters": 99}, "max_characters was 20000000 and is 99"),
    ],
)
def test_another_way_of_scoring_is_not_mixed_in(corpus, tmp_path, change, told, monkeypatch):
    """datatrove skips what is complete whatever made it: it lost a fifth of the rows, and mixed two scorers."""
    write_jsonl(corpus / "large.jsonl", [{"id": i, "text": "much " * 60_000} for i in range(9)])
    score(corpus, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"out was begun otherwise: .*{told}.*; take another --out, or --fresh"):
        score(corpus, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_another_list_of_files_is_not_mixed_in(corpus, tmp_path):
    score(corpus, tmp_path / "out")
    write_parquet(corpus / "b.parquet", texts(12, "e"))
    with pytest.raises(ValueError, match=rf"input: 1 changed, such as {corpus / 'b.parquet'}; take another"):
        score(corpus, tmp_path / "out")
    score(corpus, tmp_path / "out", fresh=True)
    assert "e-0" in sidecar(tmp_path / "out")
    assert "b-0" not in sidecar(tmp_path / "out")


def test_fresh_starts_over_though_nothing_that_is_recorded_changed(tmp_path):
    """An edit in the middle that keeps the size is not seen; and what a run set aside is not left beside the next."""
    rows = [{"id": i, "text": f"SCORE 0.5 {'x' * 300}"} for i in range(1000)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "bad", "text": ""}, *rows])
    score(path, tmp_path / "out", set_aside=True)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[500] = lines[500].replace(b"0.5", b"0.9")
    path.write_bytes(b"".join(lines))
    score(path, tmp_path / "out", set_aside=True)
    assert sidecar(tmp_path / "out")["499"]["regulation"] == 0.5
    score(path, tmp_path / "out", set_aside=True, fresh=True)
    assert sidecar(tmp_path / "out")["499"]["regulation"] == pytest.approx(0.9)
    write_jsonl(path, rows)
    score(path, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out/set_aside.jsonl").exists()


def test_as_many_shards_cut_elsewhere_are_not_mixed_in(tmp_path):
    """Four groups of 1.1 MB: three megabytes hold two of them, four hold three; two shards either way."""
    rows = [{"id": i, "text": random.Random(i).randbytes(550).hex()} for i in range(4000)]
    write_parquet(tmp_path / "a.parquet", rows)
    cut = {mb: [(s.start, s.stop) for s in find(str(tmp_path / "a.parquet"), mb << 20).shards] for mb in (3, 4)}
    assert len(cut[3]) == len(cut[4])
    assert cut[3] != cut[4]
    score(tmp_path / "a.parquet", tmp_path / "out", shard_mb=3)
    with pytest.raises(ValueError, match=r"shards was 2 \(digest \w+\) and is 2 \(digest"):
        score(tmp_path / "a.parquet", tmp_path / "out", shard_mb=4)


def test_a_scorer_that_changes_under_its_name_is_refused_by_the_worker(corpus):
    """datatrove's own model filters go by path: they kept an old model after a new one was put in its place."""
    shards = find(str(corpus), 1 << 20).shards
    data = ShardReader(shards).run(None, 0, 4)
    block = RegulationScorer("other", expected_hash="37a8eec1ce19687d", load=fake_scorer.load)
    with pytest.raises(ValueError, match=r"the scorer 'other' is \w+ now and was 37a8eec1ce19687d when the run began"):
        list(block.run(data))


def test_an_error_leaves_neither_a_file_nor_a_marker_and_the_rest_goes_on(corpus, tmp_path):
    """datatrove left a readable, truncated parquet, and never started what came after."""
    write_jsonl(corpus / "b2.jsonl", [*texts(5, "f"), {"id": "bad", "text": ""}, *texts(3, "g")])
    bad = rf"{corpus / 'b2.jsonl'}, row 6: an empty text"
    with pytest.raises(ValueError, match=bad) as raised:
        score(corpus, tmp_path / "out")
    assert str(raised.value).split("\n") == [
        bad, "1 of 5 shards are not complete; the others are, and the same command goes on there"
    ]  # fmt: skip
    assert sorted(scores(tmp_path / "out")) == ["a.parquet", "b.parquet", "c.parquet", "d.parquet"]
    assert not list((tmp_path / "out").rglob("*.partial"))
    with pytest.raises(ValueError, match="is not complete; run its `curate score` again"):
        runs.open_scores(tmp_path / "out")
    done = score(corpus, tmp_path / "out", set_aside=True)
    assert done["figures"]["rows"] == 46 + 8
    assert done["figures"]["set_aside"] == 1
    noted = json.loads((tmp_path / "out/set_aside.jsonl").read_text())
    assert noted == {"file": str(corpus / "b2.jsonl"), "row": 6, "reason": "an empty text"}
    kept = runs.tag(tmp_path / "out", tmp_path / "tagged", (0.3, 0.7), ("a", "b", "c"))  # the row is passed over
    assert kept["figures"]["rows"] == 46 + 8


def test_equal_lines_of_many_shards_are_told_once(tmp_path):
    """A text column that only later files lack; of the first it would have been said at once."""
    write_jsonl(tmp_path / "in/a.jsonl", texts(2))
    for name in "bc":
        write_parquet(tmp_path / f"in/{name}.parquet", [{"id": name, "body": "a"}])
    with pytest.raises(ValueError, match="2 of 3 shards are not complete") as raised:
        score(tmp_path / "in", tmp_path / "out")
    assert str(raised.value).split("\n")[0].endswith("b.parquet, row 1: no column 'text'; there are id, body")
    with pytest.raises(ValueError, match="`--text-column` 'words': no such column; there are id, text, topic, body"):
        score(tmp_path / "in", tmp_path / "other", text_column="words")
    with pytest.raises(ValueError, match="`--id-column` 'key': no such column; there are id, text, topic, body"):
        score(tmp_path / "in", tmp_path / "other", id_column="key")
    assert not (tmp_path / "other").exists()


def test_a_column_of_ids_is_found_wherever_the_first_sound_row_stands(tmp_path):
    """Blank, broken and empty beginnings, and a first row without `id`, had the ids of all other rows ignored."""
    row = json.dumps({"id": "mine", "text": "a"})
    for name, content in {
        "blank": f"\n{row}\n",
        "broken": f"{{\n{row}\n",
        "lacking": f'{{"text": "b"}}\n{row}\n',
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
        score(tmp_path / f"{name}.jsonl", tmp_path / name, set_aside=True)
        assert list(sidecar(tmp_path / name)) == ["mine"], name
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").touch()
    (tmp_path / "in/b.jsonl").write_text(row)
    score(tmp_path / "in", tmp_path / "empty")
    assert list(sidecar(tmp_path / "empty")) == ["mine"]


def test_an_id_that_some_have_is_not_ignored(tmp_path):
    rows = [{"text": "a"}] * 100
    late = write_jsonl(tmp_path / "late.jsonl", [*rows, {"id": 1, "text": "a"}])
    with pytest.raises(
        ValueError, match=r"row 101: has an `id`, and the first rows have none; give --id-column id, or"
    ):
        score(late, tmp_path / "out")
    score(late, tmp_path / "numbered", number_rows=True)
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    write_parquet(tmp_path / "in/b.parquet", texts(2))
    told = r"b\.parquet has a column 'id' and .*a\.jsonl has none; give --number-rows, or --id-column"
    with pytest.raises(ValueError, match=told):
        score(tmp_path / "in", tmp_path / "some")
    score(tmp_path / "in", tmp_path / "some", number_rows=True)
    with pytest.raises(ValueError, match="`--number-rows` and `--id-column` 'id': ids are one or the other; give one"):
        score(tmp_path / "in", tmp_path / "both", number_rows=True, id_column="id")


def test_a_first_row_without_a_text_is_set_aside_as_any_other(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1}, {"id": 2, "text": "a"}])
    assert score(tmp_path / "a.jsonl", tmp_path / "out", set_aside=True)["figures"]["set_aside"] == 1


def test_a_bug_of_the_scorer_is_told_too(tmp_path):
    write_jsonl(tmp_path / "in/a.jsonl", [{"id": 1, "text": "UNFORESEEN"}])
    write_jsonl(tmp_path / "in/b.jsonl", texts(2))
    with pytest.raises(ValueError, match=r"a\.jsonl \(a\): RuntimeError: a bug of the scorer"):
        score(tmp_path / "in", tmp_path / "out")
    assert list(scores(tmp_path / "out")) == ["b.parquet"]


@pytest.mark.timeout(60)
def test_a_killed_worker_is_noticed_and_its_shard_redone(corpus, tmp_path):
    """datatrove's pool waits for ever for the result of a worker that the OOM killer took."""
    mark = tmp_path / "mark"
    mark.touch()
    write_jsonl(corpus / "b2.jsonl", [{"id": "killer", "text": f"DIE ONCE {mark}"}])
    score(corpus, tmp_path / "out", workers=2)
    assert not mark.exists()
    score(corpus, tmp_path / "calm", workers=1)
    assert scores(tmp_path / "out") == scores(tmp_path / "calm")


@pytest.mark.timeout(60)
def test_a_shard_that_always_kills_its_worker_does_not_take_the_others_along(corpus, tmp_path):
    write_jsonl(corpus / "b2.jsonl", [{"id": "killer", "text": "DIE ALWAYS"}])
    with pytest.raises(ValueError, match=r"b2\.jsonl \(b2\): its worker was killed 3 times; out of memory, perhaps"):
        score(corpus, tmp_path / "out", workers=2)
    assert len(scores(tmp_path / "out")) == 4


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children}.union(*(descendants(int(child)) for child in children))


@pytest.mark.timeout(120)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL of the whole run in the midst of two shards; the workers end with it, nothing half-written counts."""
    for name in "abcdef":
        write_jsonl(
            tmp_path / f"in/{name}.jsonl", [{**row, "text": row["text"] + " WAIT 0.02"} for row in texts(20, name)]
        )
    code = RUN.format(tests=str(Path(__file__).parent), source=str(tmp_path / "in"), out=str(tmp_path / "out"))
    run = subprocess.Popen([sys.executable, "-c", code])
    while len(markers(tmp_path / "out")) < 2:
        assert run.poll() is None
        time.sleep(0.02)
    workers = descendants(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    complete = markers(tmp_path / "out")
    assert 2 <= len(complete) < 6
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)
    before = {rank: (tmp_path / f"out/state/score/records/{rank}.json").stat().st_mtime_ns for rank in complete}
    (tmp_path / "out/scores/.z.parquet.host-1.partial").write_bytes(b"PAR1")
    score(tmp_path / "in", tmp_path / "out")
    assert {
        rank: (tmp_path / f"out/state/score/records/{rank}.json").stat().st_mtime_ns for rank in complete
    } == before
    score(tmp_path / "in", tmp_path / "clean", workers=2)
    assert scores(tmp_path / "out") == scores(tmp_path / "clean")


def test_a_lost_record_is_named(corpus, tmp_path):
    score(corpus, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/state")
    with pytest.raises(ValueError, match=r"records/00000\.json is gone; run its `curate score` again, it writes what"):
        runs.open_scores(tmp_path / "out")
    score(corpus, tmp_path / "out")
    runs.open_scores(tmp_path / "out")


def test_results_are_not_put_among_the_input(corpus):
    with pytest.raises(ValueError, match=f"`--out` {corpus}/scores lies in the input {corpus}, and would be read as"):
        score(corpus, corpus / "scores")
    assert not (corpus / "scores").exists()


def test_a_lost_file_is_written_again(corpus, tmp_path):
    """datatrove's marker says complete whatever became of the output."""
    score(corpus, tmp_path / "out")
    before = scores(tmp_path / "out")
    (tmp_path / "out/scores/b.parquet").unlink()
    (tmp_path / "out/state/score/records/00003.json").unlink()
    with pytest.raises(
        ValueError, match=r"scores/b\.parquet is gone; run its `curate score` again, it writes what is"
    ):
        runs.open_scores(tmp_path / "out")
    score(corpus, tmp_path / "out")
    assert scores(tmp_path / "out") == before


def test_rows_that_went_missing_are_noticed(corpus, tmp_path):
    """A whole sidecar with fewer rows than its record, and records with other counts than were written or read."""
    score(corpus, tmp_path / "out")
    path = tmp_path / "out/scores/b.parquet"
    whole = path.read_bytes()
    pq.write_table(pq.read_table(path).slice(0, 11), path)
    with pytest.raises(ValueError, match=r"b\.parquet does not hold the 12 rows that were written; remove it and run"):
        score(corpus, tmp_path / "out")
    path.write_bytes(whole)
    record = tmp_path / "out/state/score/records/00001.json"
    kept = record.read_text()
    content = json.loads(kept)
    content["files"]["scores/b.parquet"][1] = 13
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"b\.parquet does not hold the 13 rows that were written"):
        score(corpus, tmp_path / "out")
    record.write_text(kept)
    record = tmp_path / "out/state/score/records/00003.json"
    content = json.loads(record.read_text())
    content["counts"]["rows"] -= 1
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"d\.jsonl \(d\): None rows in the file, 10 read, 9 written, 0 set aside"):
        score(corpus, tmp_path / "out")


@pytest.mark.parametrize("same", ["in", "between"])
def test_ids_that_repeat_are_named_with_both_rows(tmp_path, same):
    rows = texts(6)
    write_jsonl(tmp_path / "in/a.jsonl", [*rows, rows[2]] if same == "in" else rows)
    write_jsonl(tmp_path / "in/b.jsonl", [*texts(3, "b"), *([rows[2]] if same == "between" else [])])
    second, row = ("a", 7) if same == "in" else ("b", 4)
    told = rf"{second}\.jsonl, row {row}: the id 'a-2' is that of .*a\.jsonl, row 3 too; name a column of unique ids"
    with pytest.raises(ValueError, match=told):
        score(tmp_path / "in", tmp_path / "out")
    score(tmp_path / "in", tmp_path / "numbered", number_rows=True)
    assert len(sidecar(tmp_path / "numbered")) == 10


def test_hashes_of_ids_are_compared_range_by_range(tmp_path, monkeypatch):
    """With room for ten hashes at once, 60 ids take seven ranges; a repeated one is found in any."""
    monkeypatch.setattr(manifest, "AT_ONCE", 10)
    rows = [{"id": str(i), "text": "a"} for i in range(60)]
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    score(tmp_path / "in", tmp_path / "clean")
    for twice in (0, 17, 33, 59):
        write_jsonl(tmp_path / "in/a.jsonl", [*rows, rows[twice]])
        with pytest.raises(ValueError, match=rf"row 61: the id '{twice}' is that of .*row {twice + 1} too"):
            score(tmp_path / "in", tmp_path / f"out{twice}")


def test_ids_of_more_shards_than_files_may_be_open(tmp_path):
    for name in range(60):
        write_jsonl(tmp_path / f"in/{name:02}.jsonl", texts(2, f"n{name}"))
    score(tmp_path / "in", tmp_path / "out")
    before, reader = (
        resource.getrlimit(resource.RLIMIT_NOFILE),
        ShardReader(find(str(tmp_path / "in"), 1 << 20).shards),
    )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, before[1]))
        assert manifest.repeated_id(tmp_path / "out/state/score", reader) is None
        (tmp_path / "out/state/score/ids/00059.bin").write_bytes(
            (tmp_path / "out/state/score/ids/00003.bin").read_bytes()
        )
        write_jsonl(tmp_path / "in/59.jsonl", texts(2, "n3"))
        reader = ShardReader(find(str(tmp_path / "in"), 1 << 20).shards)
        assert "the id 'n3-0' is that of" in (manifest.repeated_id(tmp_path / "out/state/score", reader) or "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_line_of_a_failure_may_hold_any_character(tmp_path):
    write_json(tmp_path / "failures/00000.json", {"line": "a😀.jsonl (a😀): broken"})
    assert failure(tmp_path, [], 0) == "a😀.jsonl (a😀): broken"


def test_a_folder_that_is_no_run_is_left_alone(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine holds other files and is no run of `curate`; name a new folder"):
        score(corpus, tmp_path / "mine", fresh=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    for foreign in ("[]", '{"seed": 3}', "no json"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs/run.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"theirs.* is (not that|no folder of results) of "):
            score(corpus, tmp_path / "theirs", fresh=True)
        assert (tmp_path / "theirs/run.json").read_text() == foreign
    score(corpus, tmp_path / "scores")
    before = contents(tmp_path / "scores")
    with pytest.raises(ValueError, match="scores holds the result of `curate score`; name another folder"):
        runs.filter_tail(tmp_path / "scores", tmp_path / "scores", 0.1, max_share=1, fresh=True)
    assert contents(tmp_path / "scores") == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; --out takes a folder"):
        score(corpus, tmp_path / "file")


def test_no_space_left_is_one_line_and_the_rest_stays(tmp_path):
    """A limit on the size of a file stands in for a full disk: the small shard is complete, the large one absent."""
    write_jsonl(tmp_path / "in/a.jsonl", texts(5))
    write_jsonl(tmp_path / "in/b.jsonl", texts(3000, "b"))
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, {resource.RLIM_INFINITY}))\n"
    code = limited + RUN.format(
        tests=str(Path(__file__).parent), source=str(tmp_path / "in"), out=str(tmp_path / "out")
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    told = [line for line in run.stderr.splitlines() if line.startswith("data_curation.pipeline.Incomplete:")]
    assert told == [
        f"data_curation.pipeline.Incomplete: cannot write to {tmp_path / 'out'} (File too large); "
        "what is complete stays: make room and run again"
    ]
    assert list(scores(tmp_path / "out")) == ["a.parquet"]
    score(tmp_path / "in", tmp_path / "out")
    assert len(sidecar(tmp_path / "out")) == 3005


def test_a_full_disk_is_one_line(tmp_path):
    """The same on a real one, mounted in a namespace of its own, as the sandbox needs too."""
    disk, source = tmp_path / "disk", write_jsonl(tmp_path / "a.jsonl", texts(3000))
    disk.mkdir()
    code = RUN.format(tests=str(Path(__file__).parent), source=str(source), out=str(disk / "out"))
    inside = 'mount -t tmpfs -o size=100k tmpfs "$1" && "$2" -c "$3"; ended=$?; find "$1" -type f; exit $ended'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh", disk, sys.executable, code]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"Incomplete: cannot write to {disk / 'out'} (No space left on device)" in run.stderr
    left = run.stdout.splitlines()
    assert str(disk / "out/run.json") in left  # the listing is that of the full disk
    assert not [path for path in left if path.endswith((".partial", ".parquet"))]


def test_the_writer_alone_keeps_nothing_of_a_shard_that_fails(tmp_path):
    shards = find(str(write_jsonl(tmp_path / "a.jsonl", texts(3))), 1 << 20).shards
    writer = ShardWriter(shards, str(tmp_path), str(tmp_path / "s"), ("scores", fake_scorer.TYPES))

    def failing():
        yield from RegulationScorer(load=fake_scorer.load).run(ShardReader(shards).run(None, 0, 1))
        raise ValueError("late")

    with pytest.raises(ValueError, match=r"a\.jsonl: late"):
        list(writer.run(failing()))
    assert memoryview(writer.hashes).nbytes == 3 * 8  # an id costs eight bytes of memory until its shard is complete
    assert contents(tmp_path / "scores") == {}
    assert json.loads((tmp_path / "s/failures/00000.json").read_text())["line"]
