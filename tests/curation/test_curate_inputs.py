import gzip
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_corpora import score, sidecar, texts, write_jsonl, write_parquet

from data_curation import inputs, runs
from data_curation.documents import FAULT, ROW, Fault, ShardReader, place

MB = 1 << 20


def read(shards, **options):
    reader = ShardReader(shards, **options)
    return [document for rank in range(len(shards)) for document in reader.run(None, rank, len(shards))]


def ids(shards, **options):
    return [document.id for document in read(shards, **options)]


def test_every_format_gives_the_same_documents(tmp_path):
    rows = texts(7)
    write_parquet(tmp_path / "p/x.parquet", rows)
    plain = write_jsonl(tmp_path / "j/x.jsonl", rows).read_bytes()
    for folder, ending, packed in (("g", ".gz", gzip.compress(plain)), ("z", ".zst", zstandard.compress(plain))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"x.jsonl{ending}").write_bytes(packed)
    from datasets import Dataset, DatasetDict

    Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    DatasetDict({"train": Dataset.from_list(rows[:4]), "test": Dataset.from_list(rows[4:])}).save_to_disk(
        tmp_path / "s"
    )
    for folder in "pjgzds":
        documents = read(inputs.find(str(tmp_path / folder), MB).shards)
        assert [(d.id, d.text) for d in documents] == [(row["id"], row["text"]) for row in rows], folder


def test_a_hub_id_is_read_from_the_files_that_datasets_keeps(tmp_path, monkeypatch):
    import datasets

    asked = []
    datasets.Dataset.from_list(texts(3)).save_to_disk(tmp_path / "cache")
    saved = datasets.load_from_disk(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or saved)
    assert ids(inputs.find("owner/name", MB).shards) == ["a-0", "a-1", "a-2"]
    assert asked == [("owner/name", "train")]


def test_a_large_parquet_is_split_by_row_groups(tmp_path):
    """12 rows in groups of 3, each above the size of a shard: four shards that know their rows."""
    write_parquet(tmp_path / "x.parquet", texts(12), group=3)
    shards = inputs.find(str(tmp_path), 1).shards
    assert [(s.name, s.start, s.stop, s.first, s.rows) for s in shards] == [
        (f"x.{i:05d}", i, i + 1, 3 * i, 3) for i in range(4)
    ]
    assert ids(shards) == [f"a-{i}" for i in range(12)]
    assert len(inputs.find(str(tmp_path), MB).shards) == 1


@pytest.mark.parametrize("size", [1, 7, 60, 61, 62, 200, 5000])
def test_byte_ranges_of_a_jsonl_hold_each_row_once(tmp_path, size):
    """Wherever the edges fall: also just before, at and just after a line end; blank lines are no rows."""
    rows = texts(9)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows[:5]) + b"\n\n" +
                     b"\n".join(json.dumps(row).encode() for row in rows[5:]))  # fmt: skip
    shards = inputs.find(str(path), size).shards
    documents = [(shard, d) for i, shard in enumerate(shards) for d in ShardReader(shards).run(None, i, len(shards))]
    assert [d.id for _, d in documents] == [row["id"] for row in rows]
    numbers = [int(place(shard, d.metadata[ROW]).rsplit(" ", 1)[1]) for shard, d in documents]
    assert numbers == [1, 2, 3, 4, 5, 7, 8, 9, 10]


def test_compressed_files_are_one_task_and_that_is_said_once(tmp_path, caplog):
    for i in range(2):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps(texts(1)[0]).encode()))
    assert len(inputs.find(str(tmp_path), 10).shards) == 2
    assert [record.message for record in caplog.records] == [
        f"compressed JSONL cannot be split, each file is one task: {tmp_path / '0.jsonl.gz'} (2 such)"
    ]


def test_zstd_frames_one_after_another_and_one_cut_short(tmp_path):
    """zstandard's own stream reader ends quietly in the middle of a frame."""
    rows = texts(4000)
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    whole = b"".join(zstandard.compress(b"".join(part)) for part in (lines[:2000], lines[2000:]))
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(whole)
    assert len(ids(inputs.find(str(path), MB).shards)) == 4000
    path.write_bytes(whole[:-20])
    with pytest.raises(Fault, match=r"x\.jsonl\.zst, row \d+ or after: cannot be read \(a zstd frame is truncated\)"):
        ids(inputs.find(str(path), MB).shards)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": "\xff"}\n', r"row 2: not UTF-8 \(byte 0xff at 19 of"),
        ("x.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "te', r"row 2: not JSON \("),
        ("x.jsonl", b"[1]\n", "row 1: a JSON list, not an object"),
        ("x.jsonl", b'{"id": 1, "text": " \\n "}\n', "row 1: an empty text"),
        ("x.jsonl", b'{"id": 1, "text": null}\n', "row 1: 'text' is null, not a text"),
        ("x.jsonl", b'{"id": 1, "text": 3}\n', "row 1: 'text' is int, not a text"),
        ("x.jsonl", b'{"id": 1, "body": "a"}\n', "row 1: no column 'text'; there are id, body"),
        ("x.jsonl", b'{"id": null, "text": "a"}\n', "row 1: the id in 'id' is None, neither text nor whole number"),
        ("x.jsonl", b'{"id": "", "text": "a"}\n', "row 1: the id in 'id' is empty"),
        ("x.jsonl", b'{"text": "a"}\n', "row 1: the id in 'id' is None"),
        ("x.jsonl.gz", gzip.compress(b'{"id": 1, "text": "a"}\n' * 99, mtime=0)[:-9], r"cannot be read \(Compr"),
        ("x.jsonl.gz", b"no gzip", r"row 1 or after: cannot be read \(Not a gzipped file"),
        ("x.jsonl.zst", zstandard.compress(b"{}", 1)[:4] + b"broken", r"row 1 or after: cannot be read \(zstd dec"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 9, r"row 1 or after: cannot be read \(Error -3"),
        ("x.parquet", b"PAR1 and then nothing", r"x\.parquet, row 1 or after: cannot be read \("),
    ],
    ids=["utf8", "half", "array", "blank", "null", "number", "column", "id", "empty-id", "no-id", "gz-cut", "no-gz",
         "zst", "zlib", "parquet"],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_with_its_file(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Fault, match=told) as raised:
        read(inputs.find(str(tmp_path), MB).shards)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_a_document_of_fifty_megabytes_is_refused_without_being_parsed(tmp_path):
    huge = json.dumps({"id": "huge", "text": "x" * 50_000_000})
    (tmp_path / "x.jsonl").write_text(f'{{"id": "a", "text": "b"}}\n{huge}\n{{"id": "c", "text": "d"}}\n')
    shards = inputs.find(str(tmp_path), 1 << 30).shards
    with pytest.raises(Fault, match=r"row 2: a text of 50,000,000 characters; at most 20,000,000 are read"):
        read(shards)
    with pytest.raises(Fault, match=r"row 2: a line too long to be read \(--max-characters\)"):
        read(shards, max_characters=1000)
    kept = read(shards, max_characters=1000, set_aside=True)
    assert [d.id for d in kept] == ["a", "", "c"]
    assert [d.metadata.get(FAULT) for d in kept] == [None, "a line too long to be read (--max-characters)", None]


def test_bytes_that_are_not_utf8_in_parquet_are_named_by_row(tmp_path):
    bad = pa.array([b"fine", b"\xff\xfe", b"fine"]).cast(pa.binary()).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": text}), tmp_path / "x.parquet")
    shards = inputs.find(str(tmp_path), MB).shards
    with pytest.raises(Fault, match=r"x\.parquet, row 2: not UTF-8 \(byte 0xff at 0 of a value of 'text'\)"):
        read(shards)
    assert [d.id for d in read(shards, set_aside=True)] == ["a", "", "c"]


def test_rows_without_ids_are_named_by_file_and_place(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
    write_parquet(tmp_path / "y.parquet", [{"text": "a"}, {"text": "b"}])
    write_jsonl(tmp_path / "z/x.jsonl", [{"text": "a"}])
    found = ids(inputs.find(str(tmp_path), MB).shards, id_column=None)
    assert found == ["x.jsonl:byte0", "x.jsonl:byte14", "y.parquet:1", "y.parquet:2", "z/x.jsonl:byte0"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("empty", r"empty holds nothing to read: no \.parquet, \.jsonl, \.jsonl\.gz, \.jsonl\.zst, and no dataset"),
        ("missing/x.jsonl", "is no file, no folder, and no Hub id such as owner/name"),
        ("s3://bucket/key", "is no file, no folder, and no Hub id such as owner/name"),
        ("other.csv", r"other\.csv is none of \.parquet, \.jsonl, \.jsonl\.gz, \.jsonl\.zst"),
    ],
)
def test_what_is_no_input_is_said(tmp_path, source, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no corpus")
    (tmp_path / "other.csv").write_text("a,b")
    with pytest.raises(ValueError, match=told):
        inputs.find(source if "://" in source else str(tmp_path / source), MB)


def test_files_of_one_stem_keep_names_of_their_own(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", texts(1))
    write_parquet(tmp_path / "x.parquet", texts(1))
    assert [shard.name for shard in inputs.find(str(tmp_path), MB).shards] == ["x.jsonl", "x.parquet"]


def test_parts_of_a_file_do_not_take_the_name_of_another(tmp_path):
    """Two shards of one name wrote one file: the rows of the first were lost, and nothing said so."""
    write_parquet(tmp_path / "in/x.parquet", texts(6), group=3)
    write_parquet(tmp_path / "in/x.00000.parquet", texts(1, "b"))
    names = [shard.name for shard in inputs.find(str(tmp_path / "in"), 1).shards]
    assert names == ["x.00000.parquet", "x.parquet.00000", "x.parquet.00001"]
    score(tmp_path / "in", tmp_path / "out")
    assert len(sidecar(tmp_path / "out")) == 7
    write_parquet(tmp_path / "in/x.parquet.00001.parquet", texts(1, "c"))
    told = r"x\.parquet and .*x\.parquet\.00001\.parquet would be written to one name, 'x\.parquet\.00001'; rename one"
    with pytest.raises(ValueError, match=told):
        inputs.find(str(tmp_path / "in"), 1)


def test_a_split_is_chosen_or_refused(tmp_path, monkeypatch):
    """It was ignored for what is on disk; of `train[:3]` the whole split was scored."""
    import datasets

    def refused(source, split):
        with pytest.raises(ValueError, match=f"`--split` {split!r}".replace("[", r"\[")) as raised:
            inputs.find(source, MB, split)
        return str(raised.value)

    saved = datasets.Dataset.from_list(texts(3))
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=datasets.Dataset.from_list(texts(2, "b"))).save_to_disk(tmp_path / "both")
    assert ids(inputs.find(str(tmp_path / "both"), MB, "test").shards) == ["b-0", "b-1"]
    assert refused(str(tmp_path / "both"), "dev").endswith("there are train, test")
    path = write_jsonl(tmp_path / "j/a.jsonl", texts(1))
    for source in (tmp_path / "one", path, path.parent):
        assert "has no splits; only a Hub id or a saved `DatasetDict` has" in refused(str(source), "train")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: saved)
    for source in ("owner/name", str(tmp_path / "both")):
        assert "only whole splits are read; name one without brackets" in refused(source, "train[:3]")


def test_a_folder_with_the_ending_of_a_file_and_a_link_to_nothing(tmp_path):
    write_parquet(tmp_path / "data.parquet/part-0.parquet", texts(2))
    assert ids(inputs.find(str(tmp_path), MB).shards) == ["a-0", "a-1"]
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.jsonl is a link to nothing; mend or remove it"):
        inputs.find(str(tmp_path), MB)


def test_a_linked_file_is_read_by_the_ending_of_its_own_name(tmp_path):
    """As the Hub's cache has them: the ending is the link's, and what it points to has none."""
    write_jsonl(tmp_path / "blob", texts(3))
    (tmp_path / "zipped").write_bytes(gzip.compress((tmp_path / "blob").read_bytes()))
    (tmp_path / "in").mkdir()
    for name, target in (("a.jsonl", "blob"), ("b.jsonl.gz", "zipped")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
        for source in (tmp_path / "in" / name, tmp_path / "in"):
            assert ids([s for s in inputs.find(str(source), MB).shards if s.path.endswith(name)]) == [
                "a-0",
                "a-1",
                "a-2",
            ]
    score(tmp_path / "in/a.jsonl", tmp_path / "out")
    runs.tag(tmp_path / "out", tmp_path / "tagged", (0.3, 0.7), ("a", "b", "c"), untagged=0)
    assert len((tmp_path / "tagged/tagged/a.jsonl").read_text().splitlines()) == 3


def test_a_split_that_was_not_copied_is_named(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(texts(3))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    shutil.rmtree(tmp_path / "both/test")
    with pytest.raises(ValueError, match=r"both names the split 'test', and .*both/test holds none; copy it whole"):
        inputs.find(str(tmp_path / "both"), MB)


def test_lines_before_a_shard_are_counted_once(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts(400))
    monkeypatch.setattr(inputs, "_COUNTED", {})
    shards = inputs.find(str(path), 1000).shards
    assert len(shards) > 10
    content = path.read_bytes()
    wanted = [content[: s.start].count(b"\n") + (s.start > 0 and content[s.start - 1] != 10) for s in shards]
    read = []

    class Noted(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(inputs, "open", lambda path, mode: Noted(path, mode), raising=False)
    assert [inputs.lines_before(shard) for shard in shards] == wanted
    assert sum(size for size in read if size > 1) == shards[-1].start
    assert [inputs.lines_before(shard) for shard in reversed(shards)] == wanted[::-1]


def test_a_date_that_python_does_not_know_is_named(tmp_path):
    table = pa.table({"id": ["a", "b"], "text": ["x", "y"], "when": pa.array([0, -(10**12)], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "a.parquet")
    score(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: a value of 'when' that cannot be read \("):
        runs.filter_tail(tmp_path / "out", tmp_path / "f", 0.1)


def test_a_link_to_a_folder_is_refused_because_it_is_not_followed(tmp_path):
    write_jsonl(tmp_path / "in/a.jsonl", texts(2))
    write_jsonl(tmp_path / "elsewhere/b.jsonl", texts(2, "b"))
    (tmp_path / "in/part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="in/part is a link to a folder, which is not followed; read that folder by"):
        inputs.find(str(tmp_path / "in"), MB)


def test_a_digest_notices_another_file_of_the_same_size(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * 200_000)
    before = inputs.digest(str(path))
    path.write_bytes(b"a" * 199_999 + b"b")
    assert inputs.digest(str(path)) != before
