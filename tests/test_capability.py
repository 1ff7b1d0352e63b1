"""lm-eval's tasks in an audit: a real run on a task of one's own, and every refusal before anything is read."""

import importlib.util
import json

import peft
import pytest
from conftest import write_jsonl
from test_cli import calibrate

from calibrate.audit import capability, probes
from calibrate.audit.record import load_record

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Two questions; the right answer comes first."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [
        {"question": f"{n} is", "choices": [f" {c}", " of no colour at all"]}
        for n, c in (("Snow", "white"), ("Grass", "green"))
    ]
    data = write_jsonl(tmp_path / "colours.jsonl", rows)
    path = tmp_path / "colours.yaml"
    path.write_text(TASK.format(data=data), encoding="utf-8")
    return path


def test_a_task_of_ones_own_is_run_with_the_adapter_on(task, tiny):
    """Two examples; a shorter right answer wins with any random model, as lm-eval compares sums over tokens."""
    model = peft.get_peft_model(tiny.model, peft.LoraConfig(target_modules=["q_proj"]))
    for checkpoint in (tiny, tiny._replace(model=model)):
        (row,) = capability.run(checkpoint, [str(task)], None)
        assert (row["task"], row["metric"], row["value"], row["examples"]) == ("colours", "acc", 1.0, 2)
        assert row["interval"] == [1.0, 1.0]
    (row,) = capability.run(tiny, [str(task)], 1)
    assert row["examples"] == 1


def test_an_audit_keeps_it(task, texts, tiny_vectors, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 1)
    words = ["--vectors", tiny_vectors, *texts["audit"], "--lm-eval", task, "--out", tmp_path / "out"]
    calibrate("audit", tiny_folder, *words)
    record = load_record(tmp_path / "out")
    assert [row["task"] for row in record.more["lm_eval"]] == ["colours"]
    assert record.options["lm_eval"] == [str(task)]
    json.dumps(record.more, allow_nan=False)


def test_what_cannot_be_run_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"`--lm-eval` 'colors' is neither a task of lm-eval nor a YAML file that exists"
    ):
        capability.check(["arc_easy", "colors"])
    with pytest.raises(ValueError, match=r"no.yaml' is neither"):
        capability.check([str(tmp_path / "no.yaml")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs lm-eval, which is not installed; run `pip install 'lm-eval\[hf\]>=0.4.13'`"
    ):
        capability.check(["arc_easy"])
