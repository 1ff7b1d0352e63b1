"""Continued pretraining on selections of a scored pool: books, selections, blocks, and two steps on the tiny model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from records import BASELINE, LEVELS, make_record, make_vectors
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
READ = {"corpora": "digest", "vectors": "digest"}  # what an audit says that it read
sys.path.insert(0, str(ROOT / "recipes"))
import books  # noqa: E402
import pretrain  # noqa: E402
import pretrain_sweep  # noqa: E402

from data_curation import inputs  # noqa: E402


def paragraph(words: int, word: str) -> str:
    return " ".join([word] * words)


def test_a_passage_is_whole_paragraphs_of_150_to_300_words():
    text = "\n\n".join(
        paragraph(n, w) for n, w in ((100, "a"), (60, "b"), (301, "long"), (149, "c"), (152, "d"), (9, "e"))
    )
    # a and b make one; the long one is left out, and with it nothing; c with d would be 301, so d stands alone.
    found = books.passages(text)
    assert [len(passage.split()) for passage in found] == [160, 152]
    assert found[0] == f"{paragraph(100, 'a')}\n\n{paragraph(60, 'b')}"
    assert set(found[1].split()) == {"d"}


def test_only_what_stands_between_the_marks_is_the_book(tmp_path, monkeypatch, capsys):
    text = "licence *** START OF THIS PROJECT GUTENBERG EBOOK X *** body café *** END OF THIS licence"
    assert books.body(text, "x").strip() == "body café"
    for cut in (text.replace("START OF", ""), text.replace("END OF", "")):
        with pytest.raises(ValueError, match=r"x: no `\*\*\* START OF` and `\*\*\* END OF` marks"):
            books.body(cut, "x")
    (tmp_path / "7.txt").write_bytes(text.replace("body", paragraph(160, "wort")).encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["books.py", str(tmp_path / "7.txt"), "--out", str(tmp_path / "pool.parquet")])
    books.main()
    assert "7: 1 passages" in capsys.readouterr().out
    row = pq.read_table(tmp_path / "pool.parquet").to_pylist()[0]
    assert (row["id"], row["book"], row["text"].split()[-1]) == ("7/00000", "7", "café")
    monkeypatch.setattr(sys, "argv", ["books.py", str(tmp_path / "8.txt"), "--out", str(tmp_path / "pool.parquet")])
    with pytest.raises(SystemExit, match=r"error: .*8\.txt"):
        books.main()


def test_selections_by_hand():
    """Six passages of two books; b has no score in one of them, which no selection may draw."""
    texts = ["a hate", "b love", "c so so", "d hate", "e love", "f so so"]
    regulation = np.array([0.9, 0.5, 0.1, 0.2, np.nan, 0.8])
    groups = ["x", "x", "x", "y", "y", "y"]

    def drawn(selection, seed=0):
        return pretrain.choose(selection, texts, regulation, groups, seed)

    assert sorted(drawn("curated")) == ["a hate", "f so so"]
    assert sorted(drawn("inverted")) == ["c so so", "d hate"]
    assert sorted(drawn("valence")) == ["b love", "f so so"]
    assert sorted(drawn("random")) == sorted(set(texts) - {"e love"})
    assert drawn("random") == drawn("random")
    assert len({tuple(drawn("random", seed)) for seed in range(5)}) > 1


def test_blocks_are_full_and_joined_by_the_end_token(tokenizer):
    end = tokenizer.eos_token_id
    found = pretrain.blocks(tokenizer, ["one two", "three", "four five six"], 4, 2)
    joined = [*tokenizer("one two")["input_ids"], end, *tokenizer("three")["input_ids"], end]
    joined += tokenizer("four five six")["input_ids"]
    assert found == [joined[:4], joined[4:8]]
    with pytest.raises(ValueError, match=r"`tokens` asks for 4,000, the selection has \d+; lower it or add texts"):
        pretrain.blocks(tokenizer, ["one two"], 4, 1000)


@pytest.fixture
def scored(tmp_path):
    """A pool of 12 passages, and scores of it in two shards and another order."""
    ids = [f"p{i:02}" for i in range(12)]
    texts = [f"passage {i} " + "she breathed and looked again " * 10 for i in range(12)]
    pq.write_table(pa.table({"id": ids, "text": texts, "book": ["x", "y"] * 6}), tmp_path / "pool.parquet")
    (tmp_path / "scored" / "scores").mkdir(parents=True)
    for part, rows in enumerate((range(11, 5, -1), range(6))):
        values = [None if i == 3 else i / 12 for i in rows]
        table = pa.table({"id": [ids[i] for i in rows], "regulation": pa.array(values, pa.float32())})
        pq.write_table(table, tmp_path / "scored" / "scores" / f"{part}.parquet")
    made_from = {"kind": "score", "input": {"pool": inputs.digest(str(tmp_path / "pool.parquet"))}}
    made_from |= {"text_column": "text", "id_column": "id"}
    run = {"made_from": made_from, "complete": True, "figures": {"set_aside": 0}}
    (tmp_path / "scored" / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_scores_go_with_their_passages(scored):
    args = pretrain.SelectionConfig(str(scored / "pool.parquet"), str(scored / "scored"), "curated")
    texts, regulation, groups = pretrain.load(args)
    assert [text.split()[1] for text in texts] == [str(i) for i in range(12)]
    assert np.isnan(regulation[3])
    assert regulation[11] == pytest.approx(11 / 12)
    assert groups == ["x", "y"] * 6
    pool = pq.read_table(scored / "pool.parquet")
    pq.write_table(pool.set_column(1, "text", [pool["text"].to_pylist()[::-1]]), scored / "pool.parquet")
    with pytest.raises(ValueError, match=r"scored was not made from .*pool\.parquet as it is now; score it again"):
        pretrain.load(args)
    pq.write_table(pool, scored / "pool.parquet")
    args.group_column = "author"
    with pytest.raises(ValueError, match=r"no column author; there are \['id', 'text', 'book'\]"):
        pretrain.load(args)
    args.group_column = "book"
    path = scored / "scored" / "run.json"
    run = json.loads(path.read_text())
    for change, message in (
        ({"complete": False}, "scored is not complete; run its `curate score` again"),
        (
            {"made_from": run["made_from"] | {"id_column": None}},
            "scored numbers the rows of .*; score it with a column",
        ),
    ):
        path.write_text(json.dumps(run | change))
        with pytest.raises(ValueError, match=message):
            pretrain.load(args)
    path.write_text(json.dumps(run | {"made_from": run["made_from"] | {"text_column": "book"}}))
    assert pretrain.load(args)[0] == ["x", "y"] * 6  # what was scored is what is trained on
    path.write_text(json.dumps(run))
    (scored / "scored" / "scores" / "0.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks 6 ids of .*pool.parquet, such as 'p06'; score it"):
        pretrain.load(args)
    path.write_text(json.dumps(run | {"figures": {"set_aside": 6}}))
    assert np.isnan(pretrain.load(args)[1]).sum() == 7  # never drawn


@pytest.mark.parametrize("name", ["pretrain", "pretrain-gpu"])
def test_two_steps_then_nothing_to_do(scored, tiny_folder, monkeypatch, capsys, name):
    import runpy

    out = scored / "run"
    options = {"config": ROOT / "recipes" / "smollm2-135m" / f"{name}.yaml", "model_name_or_path": tiny_folder}
    options |= {"pool": scored / "pool.parquet", "scores": scored / "scored", "selection": "curated", "tokens": 128}
    options |= {"max_length": 32, "per_device_train_batch_size": 2, "output_dir": out}
    options |= {"use_cpu": "true", "bf16": "false"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    for said in ("curated: 4 blocks of 32 tokens, of 4 passages", "already holds this run, finished; nothing to do"):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
        assert said in capsys.readouterr().out
    held = r"error: .*/run was begun with other settings \(differing: {}\); choose another `output_dir` or delete it"
    for option, value, told in (("selection", "random", "selection"), ("tokens", 64, "tokens"), ("seed", 9, "seed")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words, f"--{option}", str(value)])
        with pytest.raises(SystemExit, match=held.format(told)):
            runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(part.abs().max() > 0 for name, part in adapter.items() if "lora_B" in name)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words, "--selection", "best"])
    with pytest.raises(SystemExit, match="error: `selection` is 'best'; allowed: curated, random, valence, inverted"):
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    assert torch.isfinite(torch.cat([part.flatten() for part in adapter.values()])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_4bit": "true"}, "error: `load_in_4bit` is True, which this recipe does not use; remove it"),
        ({"use_peft": "false"}, "error: `lora_dropout` is 0.0, which is of LoRA; set `use_peft: true`, or remove it"),
        ({"save_only_model": "true"}, "error: `save_only_model` is True, but this recipe resumes by itself"),
        ({"resume_from_checkpoint": "x"}, "error: `resume_from_checkpoint` is 'x', which this recipe does not use"),
        ({"tokens": 10}, "error: `tokens` is 10, less than one block of `max_length` 512; raise it"),
        ({"max_length": "null"}, "error: `max_length` is None; give the tokens of a block, 1 or more"),
        ({"config": "smollm2"}, "error: .*Is a directory: 'smollm2'"),
        ({"config": "broken.yaml"}, "error: while parsing a flow sequence"),
    ],
)
def test_a_mistake_is_one_line(scored, tiny_folder, monkeypatch, change, message):
    import runpy

    monkeypatch.chdir(scored)
    Path("broken.yaml").write_text("seed: [0")
    Path("smollm2").mkdir()
    options = {"config": ROOT / "recipes" / "smollm2-135m" / "pretrain.yaml", "model_name_or_path": tiny_folder}
    options |= {"pool": "pool.parquet", "scores": "scored", "selection": "curated", "output_dir": "run"} | change
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(SystemExit, match=message) as caught:
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    assert "\n" not in caught.value.code
    assert not Path("run").exists()


def test_a_run_goes_on_from_the_last_checkpoint_that_is_whole(scored, tiny_folder, monkeypatch):
    """In full, from a checkpoint of two steps beside one that a kill left half written: the same weights."""
    import runpy

    options = {"model_name_or_path": tiny_folder, "pool": "pool.parquet", "scores": "scored", "selection": "curated"}
    options |= {"tokens": 128, "max_length": 32, "per_device_train_batch_size": 1, "save_steps": 1, "seed": 3}
    options |= {"use_cpu": "true", "bf16": "false", "report_to": "none", "num_train_epochs": 1}
    monkeypatch.chdir(scored)
    for out in ("whole", "again"):
        if out == "again":
            shutil.copytree("whole", out)
            for name in ("finished", "model.safetensors", "checkpoint-4/trainer_state.json"):
                (Path(out) / name).unlink()
        words = [str(word) for name, value in (options | {"output_dir": out}).items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    one, other = (load_file(f"{out}/model.safetensors") for out in ("whole", "again"))
    assert all(torch.equal(part, other[name]) for name, part in one.items())


def test_a_folder_is_of_one_run(scored):
    """The checkpoints of another run were gone on from; other scores of the pool were taken for the same."""
    out = scored / "run"
    (out / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run holds a run without its settings\.json; choose another `output_dir`"):
        pretrain.claim(out, {"seed": 0}, "output_dir")
    (out / "checkpoint-5").rmdir()
    from trl import ModelConfig, SFTConfig

    def settings(**changes):
        args = pretrain.SelectionConfig(str(scored / "pool.parquet"), str(scored / "scored"), "curated")
        return pretrain.settings_of(
            args, SFTConfig(**{"output_dir": str(out), "bf16": False} | changes), ModelConfig()
        )

    pretrain.claim(out, {"seed": 0}, "output_dir")
    pretrain.claim(out, settings(), "output_dir")  # nothing was done of the other
    (out / "finished").touch()
    pretrain.claim(out, settings(logging_steps=3, save_steps=2, output_dir="elsewhere"), "output_dir")
    with pytest.raises(ValueError, match="differing: learning_rate, max_length"):
        pretrain.claim(out, settings(learning_rate=1.0, max_length=8), "output_dir")
    (scored / "scored" / "scores" / "1.parquet").unlink()
    with pytest.raises(ValueError, match="differing: data"):
        pretrain.claim(out, settings(), "output_dir")


def test_a_row_by_hand():
    """Calm (axis 1) rises by 1.5 on failing contexts, all else stays; a loss of 2.01 for 2: perplexity + 1.005 %."""
    vectors = make_vectors(list(pretrain_sweep.CONCEPTS), [2], [2])
    before = make_record(vectors, {"failing": {0: LEVELS, 1: 0.5}}, loss=2.0, options=dict(READ))
    after = make_record(vectors, {"failing": {0: LEVELS, 1: 2.0}}, loss=2.01, options=dict(READ))
    row = pretrain_sweep.row_of("curated-seed0", "curated", before, after)
    assert (row["run"], row["selection"]) == ("curated-seed0", "curated")
    assert row["calm_failing"][0] == pytest.approx(1.5, abs=1e-4)
    for name in ("desperate_failing", "calm_neutral", "afraid_failing", "margin"):
        assert row[name][0] == pytest.approx(0.0, abs=1e-4)
    assert row["perplexity"][0] == pytest.approx(1.005, abs=1e-3)
    assert row["profile"]["failing"] == pytest.approx({"desperate": 0, "calm": 1.5, "afraid": 0, "angry": 0}, abs=1e-3)


def test_how_alike_selections_move_all_concepts():
    """Two curated seeds move three concepts in one pattern, a random one in its opposite; those two have one seed."""
    changes = {"curated": [(1, 2, 3), (2, 4, 6)], "random": [(3, 2, 1)], "inverted": [(1, 3, 2)]}
    rows = [
        {"run": f"{name}{i}", "selection": name, "profile": {"neutral": dict(zip("abc", change, strict=True))}}
        for name, runs in changes.items()
        for i, change in enumerate(runs)
    ]
    assert pretrain_sweep.alike(rows, "neutral").splitlines()[2:] == [
        "| curated | 1.00 | -1.00 | 0.50 |",
        "| random | -1.00 | - | -0.50 |",
        "| inverted | 0.50 | -0.50 | - |",
    ]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "No such file"),
        ("seed: [0", [], "while parsing a flow sequence"),
        ("seed: 0\n", [], "has no `model_name_or_path`; put it there"),
        *(
            (
                "model_name_or_path: tiny\n",
                ["--", f"--{name}", "x"],
                f"the sweep gives each run its `{name}`; leave it",
            )
            for name in ("selection", "seed", "output_dir", "config", "model_name_or_path", "model_revision")
        ),
    ],
)
def test_a_sweep_refuses_what_it_would_not_do(tmp_path, capsys, content, words, message):
    config = tmp_path / "pretrain.yaml"
    if content:
        config.write_text(content)
    with pytest.raises(SystemExit):
        pretrain_sweep.main(["--config", str(config), "--out", str(tmp_path / "out"), *words])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_sweep_trains_audits_and_goes_on(tmp_path, monkeypatch, capsys):
    vectors, commands, trained = make_vectors(list(pretrain_sweep.CONCEPTS), [2], [2]), [], {"data": ["digest"]}

    def train(*words):
        commands.append(("train", *map(str, words)))
        folder = Path(words[words.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(trained))

    monkeypatch.setattr(pretrain_sweep, "call", train)
    monkeypatch.setattr(pretrain_sweep, "calibrate", lambda *words: commands.append(tuple(map(str, words))))
    records = {
        "before": make_record(vectors, BASELINE, options=dict(READ)),
        "audit": make_record(vectors, {"failing": {1: 0.5}, "neutral": {1: 0.5}}, options=dict(READ)),
    }
    monkeypatch.setattr(pretrain_sweep, "load_record", lambda folder: records[folder.name])
    config = tmp_path / "pretrain.yaml"
    config.write_text("model_name_or_path: tiny\nmodel_revision: v1\n")
    words = ["--config", str(config), "--out", str(tmp_path / "out"), "--seeds", "3", "--selections", "curated"]
    pretrain_sweep.main([*words, "--", "--tokens", "512"])
    assert [command[:2] for command in commands[::2]] == [
        ("audit", "tiny"),
        ("audit", str(tmp_path / "out/curated-seed3/model")),
    ]
    given = commands[1]
    assert given[given.index("--selection") :][:4] == ("--selection", "curated", "--seed", "3")
    assert given[-2:] == ("--tokens", "512")
    assert json.loads((tmp_path / "out/curated-seed3/row.json").read_text())["selection"] == "curated"
    assert [command[-2:] for command in commands[::2]] == [("--revision", "v1")] * 2
    commands.clear()
    pretrain_sweep.main([*words, "random", "--", "--tokens", "512"])
    assert len(commands) == 3  # curated is finished
    (tmp_path / "out" / "comparison.md").unlink()  # a kill came between the last row and it
    pretrain_sweep.main([*words, "random", "--", "--tokens", "512"])
    assert "random-seed3" in (tmp_path / "out" / "comparison.md").read_text()
    for more in (["--max-tasks", "3", "--", "--tokens", "512"], ["--", "--tokens", "9"]):
        told = r"out was begun with other settings \(differing: \w+\); choose another `--results` or delete it"
        with pytest.raises(SystemExit, match=told):
            pretrain_sweep.main([*words, *more])
    for what in ("corpora", "vectors"):
        commands.clear()
        for record in records.values():
            record.options.update(READ | {what: "of another version"})
        told = f"valence-seed3 has other {'texts' if what == 'corpora' else what} than curated-seed3 in .*out "
        with pytest.raises(SystemExit, match=f"^error: {told}"):
            pretrain_sweep.main([*words, "random", "valence", "--", "--tokens", "512"])
        assert [command[:2] for command in commands] == [("audit", "tiny")]  # before anything is trained
    for record in records.values():
        record.options.update(READ)
    trained["data"] = ["scored again"]
    with pytest.raises(SystemExit, match=r"^error: valence-seed3 has other data than curated-seed3 in .*out "):
        pretrain_sweep.main([*words, "random", "valence", "--", "--tokens", "512"])
    table = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in table[2:4]] == ["| curated-seed3", "| random-seed3"]
    assert sum("correlation of changes" in line for line in table) == 2
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    assert "this run is finished" in capsys.readouterr().out
