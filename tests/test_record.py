"""A record on disk, and what is read into it besides contexts: neutral text, and replies one by one."""

import json

import numpy as np
import peft
import pytest
import torch
from records import LEVELS, make_record
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from calibrate import corpora
from calibrate.audit import behaviour, preservation
from calibrate.audit.record import load_record


@pytest.mark.parametrize("kl", [None, 0.25])
def test_a_record_comes_back_from_disk(planted, tmp_path, kl):
    planted.set_band([1, 2], "by hand")
    felt, own = torch.randn(8, 2, 2, 8), {"stories": 5, "logistic": 3}
    more = {"rollouts": [{"task": "north"}]}
    header = {"failing": {0: LEVELS * (1, 3)}}
    record = make_record(planted, header, own=own, kl=kl, felt=felt, options={"tasks": 8}, more=more)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "stale").touch()
    record.save(tmp_path / "audit")
    loaded = load_record(tmp_path / "audit")
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]  # nothing is left aside
    names = ["audit.json", "states.safetensors", "vectors"]
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == names
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "audit").stat().st_mode == (tmp_path / "plain").stat().st_mode  # not for its owner alone
    assert loaded.vectors.directions.equal(planted.directions)
    assert loaded.vectors.band == [1, 2]
    for name in ("model", "concept", "options", "more"):
        assert getattr(loaded, name) == getattr(record, name)
    for part in ("contexts", "neutral", "comprehension", "own", "situations", "profile"):
        for name, value in getattr(record, part)._asdict().items():
            assert_same(getattr(getattr(loaded, part), name), value, f"{part}.{name}")
    # Levels 0 to 7 have the mean 3.5; the band's two layers read 1 and 3 times that: 7.
    summary = loaded.summary()["header"]
    assert summary["failing"]["desperate"][0] == pytest.approx(7, abs=1e-3)
    assert summary["passing"]["desperate"] == pytest.approx([0, 0, 0], abs=1e-3)


def assert_same(loaded, saved, name: str) -> None:
    """Equal in value; arrays and tensors also in type. Tuples may have become lists."""
    if isinstance(saved, np.ndarray | torch.Tensor):
        assert type(loaded) is type(saved), name
        assert loaded.tolist() == saved.tolist(), name
    elif isinstance(saved, dict) and any(isinstance(value, torch.Tensor) for value in saved.values()):
        assert loaded.keys() == saved.keys(), name
        assert all(loaded[key].equal(saved[key]) for key in saved), name
    elif name not in ("contexts.profile",):
        assert json.dumps(loaded) == json.dumps(saved), name


def test_an_audit_of_another_version_is_refused(planted, tmp_path):
    make_record(planted).save(tmp_path / "audit")
    path = tmp_path / "audit" / "audit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    with pytest.raises(ValueError, match=r"schema 1, this version reads 4; audit the checkpoint again"):
        load_record(tmp_path / "audit")


# ---- likelihoods


def tokenize(checkpoint, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, tokens] and the first character of each token."""
    tokens = checkpoint.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    return tokens["input_ids"], tokens["offset_mapping"][0, :, 0]


@torch.no_grad()
def test_reply_likelihoods_equal_full_logits_one_by_one(tiny):
    """Prompts read once for both replies against one plain pass for each text over all its tokens."""
    pairs = corpora.load_pairs()[:20:5]
    alike = [[{"role": "assistant", "content": pairs[0].chosen[0]["content"] + end}] for end in (" So it is.", " No.")]
    pairs.append(pairs[0]._replace(chosen=alike[0], rejected=alike[1]))
    read = behaviour.reply_log_likelihoods(tiny, pairs)
    for pair, row in zip(pairs, read, strict=True):
        prompt = tiny.tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
        for reply, likelihood in zip((pair.chosen, pair.rejected), row, strict=True):
            ids, starts = tokenize(tiny, prompt + reply[0]["content"])
            places = (starts >= len(prompt)).nonzero()[:, 0]
            scores = tiny.model(ids).logits[0].log_softmax(-1)[places - 1, ids[0, places]]
            assert likelihood == pytest.approx(scores.mean().item(), abs=1e-5)


@torch.no_grad()
def test_neutral_loss_and_divergence(tiny):
    """The loss is transformers' own on the assistant's tokens; KL is 0 until the adapter does something."""
    dialogues = [row for row in corpora.load_neutral() if row.split == "audit"][:3]
    assert preservation.read_neutral(tiny, dialogues).kl is None
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    adapted = tiny._replace(model=peft.get_peft_model(tiny.model, lora).eval())
    assert preservation.read_neutral(adapted, dialogues).kl.tolist() == [0, 0, 0]
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 2)
    read = preservation.read_neutral(adapted, dialogues)
    for dialogue, loss, divergence in zip(dialogues, read.loss, read.kl, strict=True):
        text = tiny.tokenizer.apply_chat_template(dialogue.messages, tokenize=False)
        ids, starts = tokenize(tiny, text)
        inside = torch.zeros(ids.shape[1], dtype=torch.bool)
        for reply in [message["content"] for message in dialogue.messages if message["role"] == "assistant"]:
            inside |= (starts >= text.index(reply)) & (starts < text.index(reply) + len(reply))
        output = adapted.model(ids, labels=ids.where(inside, -100))
        with adapted.model.disable_adapter():
            reference = adapted.model(ids).logits
        scores, reference = (logits[0, :-1][inside[1:]].log_softmax(-1) for logits in (output.logits, reference))
        direct = kl_div(scores, reference, log_target=True, reduction="batchmean").item()
        assert loss == pytest.approx(output.loss.item(), abs=1e-5)
        assert divergence == pytest.approx(direct, abs=1e-5)
        assert divergence > 0.001


@torch.no_grad()
def test_divergence_from_another_model_is_that_from_the_adapters_base(tiny, tiny_folder):
    """A merged checkpoint with `reference` has the loss and the KL of the adapter that was merged."""
    dialogues = [row for row in corpora.load_neutral() if row.split == "audit"][:2]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny.model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 2)
    by_adapter = preservation.read_neutral(tiny._replace(model=adapted), dialogues)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    merged = tiny._replace(model=adapted.merge_and_unload())
    read = preservation.read_neutral(merged, dialogues, reference=base)
    assert read.loss == pytest.approx(by_adapter.loss, abs=1e-4)
    assert read.kl == pytest.approx(by_adapter.kl, abs=1e-4)
    assert read.kl.min() > 0.001


@torch.no_grad()
def test_a_model_with_more_tokens_than_the_reference_has_the_divergence_of_those_they_share(tiny, tiny_folder):
    """A padding token that was added in training; its logits are as likely as any at first, and count for nothing."""
    dialogues = [row for row in corpora.load_neutral() if row.split == "audit"][:2]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tiny.model.resize_token_embeddings(len(tiny.tokenizer) + 1)
    assert preservation.read_neutral(tiny, dialogues, reference=base).kl == pytest.approx([0, 0], abs=1e-5)
