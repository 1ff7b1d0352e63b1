import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from calibrate import activations, extraction, shards
from calibrate.corpora import Story
from calibrate.shards import Item


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TEXTS", 4)


def items(count: int = 10) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    return [Item(row, [[slice(2, 4), slice(5, None)], [slice(0, 3)]], [1, 4]) for row in ids]


def contents(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_pools_and_tokens_are_those_of_one_text_at_a_time(tiny, tmp_path, side):
    """Pool 0 is tokens 2, 3 and 5 to the end; pool 1 is 0 to 2 without the sink token, so tokens 1 and 2."""
    group = shards.read(tiny, {"a": items()}, [1, 3], tmp_path, side)["a"]
    rows = list(group.stream())
    assert [row for row, *_ in rows] == list(range(10))
    for (_, means, tokens), item in zip(rows, items(), strict=True):
        [(_, hidden)] = activations.states(tiny.model, [item.ids], [1, 3])
        pools = [[2, 3, *range(5, len(item.ids))], [1, 2]]
        torch.testing.assert_close(means, torch.stack([hidden[:, pool].mean(1) for pool in pools]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens, hidden[:, [1, 4]].transpose(0, 1), atol=1e-5, rtol=0)
    some = list(group.only([3]).stream())
    assert torch.equal(some[7][1], rows[7][1][:, 1:])


def test_sums_are_float64_by_group(tiny, tmp_path):
    group = shards.read(tiny, {"a": items()}, [1], tmp_path)["a"]
    labels = [0, 1, -1, 0, 1, 1, 0, -1, 2, 2]
    sums, texts = group.sums(labels, 4)
    assert (sums.dtype, texts.tolist()) == (torch.float64, [3, 3, 2, 0])
    means = torch.stack([means[0] for _, means, _ in group.stream()]).double()
    torch.testing.assert_close(sums[1], means[[1, 4, 5]].sum(0))
    assert sums[3].abs().max() == 0


def test_a_stopped_pass_goes_on_without_reading_again_and_ends_the_same(tiny, tmp_path, monkeypatch):
    whole = shards.read(tiny, {"a": items(), "b": items(5)}, [1, 3], tmp_path / "whole")
    read, turns = shards._read_shard, []

    def stop_at_the_third(*given):
        turns.append(given)
        if len(turns) == 3:
            raise KeyboardInterrupt
        read(*given)

    monkeypatch.setattr(shards, "_read_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        shards.read(tiny, {"a": items(), "b": items(5)}, [1, 3], tmp_path / "stopped")
    kept = contents(tmp_path / "stopped")
    assert len(kept) == 2
    again = shards.read(tiny, {"a": items(), "b": items(5)}, [1, 3], tmp_path / "stopped")
    assert len(turns) == 3 + 3  # of five shards two were there
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    groups = [0, 1] * 5
    assert torch.equal(again["a"].sums(groups, 2)[0], whole["a"].sums(groups, 2)[0])


def test_other_texts_layers_or_weights_are_never_mixed_up(tiny, tmp_path):
    folders = [shards.read(tiny, {"a": items()}, [1], tmp_path)["a"].folder]
    folders.append(shards.read(tiny, {"a": items()}, [2], tmp_path)["a"].folder)
    folders.append(shards.read(tiny, {"a": items(9)}, [1], tmp_path)["a"].folder)
    moved = items()
    moved[3] = moved[3]._replace(pools=[[slice(1, 4)], [slice(0, 3)]])
    folders.append(shards.read(tiny, {"a": moved}, [1], tmp_path)["a"].folder)
    folders.append(shards.read(tiny._replace(weight_hash="other"), {"a": items()}, [1], tmp_path)["a"].folder)
    assert len(set(folders)) == 5


def test_a_text_without_tokens_in_its_pool_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"a text of 1 tokens has none left in the part .* it is too short"):
        shards.read(tiny, {"a": [Item([5], [[slice(0, 1)]])]}, [1], tmp_path)


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from calibrate import extraction, models, shards
    from calibrate.corpora import Story
    shards.SHARD_TEXTS = 4
    checkpoint = models.load(sys.argv[1])
    stories = [Story("", c, str(t), "train", f"{c} walked {t} miles along the river in the rain, " * 3)
               for t in range(6) for c in ("Ann", "Bob", "Cid")]
    items = {"stories": extraction.story_items(checkpoint.tokenizer, stories)}
    shards.read(checkpoint, items, [1, 2], Path(sys.argv[2]))
"""


def test_processes_share_the_work_and_give_the_same_states(tiny_folder, tiny, tmp_path):
    """Two processes under `accelerate launch` against this one: every shard has the same bytes."""
    script = tmp_path / "read.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    run = subprocess.run(
        [*launch, *options, str(script), str(tiny_folder), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    stories = [
        Story("", c, str(t), "train", f"{c} walked {t} miles along the river in the rain, " * 3)
        for t in range(6)
        for c in ("Ann", "Bob", "Cid")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {"stories": extraction.story_items(tiny.tokenizer, stories)}
    shards.read(tiny, one, [1, 2], tmp_path / "one")
    torch.set_num_threads(threads)
    found, expected = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert len(expected) == 5  # 18 stories in shards of 4
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            load_file(tmp_path / "two" / name), load_file(tmp_path / "one" / name), atol=0, rtol=0
        )


def test_a_shard_of_another_machine_that_is_not_here_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_read_shard", lambda *given: None)
    with pytest.raises(ValueError, match=r"another process has read it and it is not here; .*on a shared file system"):
        shards.read(tiny, {"a": items()}, [1], tmp_path)
