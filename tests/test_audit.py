import copy
import json

import numpy as np
import peft
import pytest
import torch
from records import BASELINE, LEVELS, SPREAD, TASKS, make_record
from torch.nn.functional import kl_div

from calibrate import corpora
from calibrate.audit import behaviour, preservation, profile, readers
from calibrate.audit.record import load_record
from calibrate.vectors import load_vectors


def test_falls_and_ratios_are_recovered(planted):
    """Falls of 1 and 2 at the two layers of the band, 0.3 on the twins, 0.5 in the reply.

    The own direction is axis 4 before (0.7) and axis 5 after (0.1), a fall of 0.6; along axis 4 it is 0.7 - 0.3 = 0.4.
    Fall: (1 + 2) / 2 = 1.5. Specificity: (1.5 - 0.3) / 1.5 = 0.8. Evasion: (1.5 - 0.6) / 1.5 = 0.6. The contrast
    before is 2 on every task while tasks differ by up to 7: its interval has no width only where twins are matched.
    """
    planted.set_band([1, 2], "by hand")
    before = make_record(planted, {**BASELINE, "failing": {0: LEVELS + 2, 4: 0.7}}, reply={"failing": {0: 1.0}}, own=4)
    failing = {0: LEVELS + 2 - (1, 2) + SPREAD, 4: 0.3, 5: 0.1}
    header = {"failing": failing, "passing": {0: LEVELS - 0.3}}
    change = readers.compare(before, make_record(planted, header, reply={"failing": {0: 0.5}}, own=5))
    assert change.contrast == pytest.approx((2, 2, 2), abs=1e-4)
    assert change.fall_failing.estimate == pytest.approx(1.5, abs=1e-4)
    assert 1.3 < change.fall_failing.low < 1.5 < change.fall_failing.high < 1.7  # the spread is at most 0.2
    assert change.fall_passing == pytest.approx((0.3, 0.3, 0.3), abs=1e-4)
    assert change.fall_reply.estimate == pytest.approx(0.5, abs=1e-4)
    assert change.fall_held_out.estimate == pytest.approx(0.4, abs=1e-4)
    assert change.fall_own.estimate == pytest.approx(0.6, abs=1e-4)
    assert change.specificity.estimate == pytest.approx(0.8, abs=1e-4)
    assert change.evasion.estimate == pytest.approx(0.6, abs=1e-4)
    assert [(layer, f.estimate, p.estimate) for layer, f, p in change.layers] == [
        (1, pytest.approx(1, abs=1e-4), pytest.approx(0.3, abs=1e-4)),
        (2, pytest.approx(2, abs=1e-4), pytest.approx(0.3, abs=1e-4)),
    ]


def test_a_rise_of_another_concept_is_found_and_no_more(planted):
    """Calm rises by 1 sigma on failing contexts; desperate stays but for a spread around 0."""
    after = make_record(planted, {"failing": {0: LEVELS + 2 + SPREAD, 1: 1 + SPREAD}, "passing": {0: LEVELS}})
    desperate, calm = readers.compare(make_record(planted, BASELINE), after).concepts
    assert (desperate.concept, calm.concept) == ("desperate", "calm")
    assert calm.change.estimate == pytest.approx(1, abs=1e-4)
    assert calm.p < 0.05 < desperate.p


@pytest.mark.parametrize("fall", [0.2, np.linspace(-3, 4, 8)[:, None] * np.ones(2)], ids=["small", "unsure"])
def test_no_ratio_to_a_fall_that_is_small_or_unsure(planted, fall):
    """0.2 sigma is less than 0.3; from -3 to 4 the mean is 0.5, with an interval that holds 0."""
    after = make_record(planted, {"failing": {0: LEVELS + 2 - fall}, "passing": {0: LEVELS}})
    change = readers.compare(make_record(planted, BASELINE), after)
    assert change.specificity is None
    assert change.evasion is None


def test_pairs_of_a_task_are_averaged_before_tasks(planted):
    """Margins change by 1, 2, 3 on one task (mean 2) and 6 on another: (2 + 6) / 2 = 4; the mean of pairs is 3."""
    pairs = ["north", "north", "alder", "north"]
    before = make_record(planted, likelihoods=[[-3, -1]] * 4, pair_tasks=pairs)
    after = make_record(planted, likelihoods=[[-2, -1], [-3, -3], [-1, -5], [-1, -2]], pair_tasks=pairs)
    change = readers.compare(before, after)
    assert change.margin.estimate == pytest.approx(4)
    assert change.honest == pytest.approx((-3, -7 / 4))
    assert change.gaming == pytest.approx((-1, -11 / 4))


def test_cosine_of_own_directions_and_neutral_text(planted):
    """The own direction turns by 60 degrees (cosine 0.5) at one layer of two: mean 0.75. The loss doubles perplexity.

    The reference's own direction is the frozen one at the first layer and opposite to it at the second: mean 0.
    """
    planted.set_band([1, 2], "by hand")
    before, after = make_record(planted, loss=np.log(10)), make_record(planted, loss=np.log(20), kl=0.25)
    before.own_direction[1] *= -1
    after.own_direction[0, :2] = torch.tensor([0.5, 0.75**0.5])
    after.own_direction[1] *= -1
    change = readers.compare(before, after)
    assert change.direction_cosine == pytest.approx(0.75)
    assert change.topic_cosine == pytest.approx(0)
    assert change.perplexity == pytest.approx((10, 20))
    assert change.loss_change.estimate == pytest.approx(np.log(2))
    assert change.kl.estimate == pytest.approx(0.25)
    assert readers.compare(after, before).kl is None


@pytest.mark.parametrize(
    ("what", "fields", "edit"),
    [
        ("texts", {}, lambda record: record.profile.ids.reverse()),
        ("content of the corpora", {"options": {"corpora": "edited"}}, None),
        ("chat template", {"options": {"chat_template": "other"}}, None),
        ("stories of the own vectors", {"options": {"own_stories": "fewer"}}, None),
        ("layers", {}, lambda record: record.vectors.layers.reverse()),
        ("concepts", {}, lambda record: record.vectors.concepts.reverse()),
        ("target concept", {"concept": "calm"}, None),
        ("base weights", {}, lambda record: setattr(record.vectors, "weight_hash", "1")),
        ("pairs", {"pair_tasks": TASKS[::-1]}, None),
        ("different vectors", {}, lambda record: record.vectors.directions.mul_(-1)),
    ],
)
def test_audits_of_different_things_are_refused(planted, what, fields, edit):
    before, after = make_record(planted), make_record(copy.deepcopy(planted), **fields)
    if edit:
        edit(after)
    with pytest.raises(ValueError, match=what):
        readers.compare(before, after)


@pytest.mark.parametrize("kl", [None, 0.25])
def test_a_record_comes_back_from_disk(planted, tmp_path, kl):
    planted.set_band([1, 2], "by hand")
    record = make_record(planted, {"failing": {0: LEVELS * (1, 3)}}, own=5, kl=kl, options={"tasks": 8})
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "stale").touch()
    record.save(tmp_path / "audit")
    loaded = load_record(tmp_path / "audit")
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]  # nothing is left aside
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [
        "audit.json",
        "states.safetensors",
        "vectors",
    ]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "audit").stat().st_mode == (tmp_path / "plain").stat().st_mode  # not for its owner alone
    assert loaded.profile.states.equal(record.profile.states)
    assert loaded.own_direction.equal(record.own_direction)
    assert loaded.vectors.directions.equal(planted.directions)
    assert loaded.vectors.band == [1, 2]
    assert loaded.likelihoods.tolist() == record.likelihoods.tolist()
    assert loaded.neutral.loss.tolist() == record.neutral.loss.tolist()
    assert (loaded.neutral.kl is None) if kl is None else (loaded.neutral.kl.tolist() == [kl] * 8)
    for name in ("model", "concept", "pair_tasks", "options"):
        assert getattr(loaded, name) == getattr(record, name)
    for name in ("ids", "kinds", "tasks"):
        assert getattr(loaded.profile, name) == getattr(record.profile, name)
    assert json.dumps(loaded.profile.trace) == json.dumps(record.profile.trace)
    # Levels 0 to 7 have the mean 3.5; the band's two layers read 1 and 3 times that: 7.
    summary = loaded.summary()["header"]
    assert summary["failing"]["desperate"][0] == pytest.approx(7, abs=1e-3)
    assert summary["passing"]["desperate"] == pytest.approx([0, 0, 0], abs=1e-3)


def tokenize(checkpoint, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, tokens] and the first character of each token."""
    tokens = checkpoint.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    return tokens["input_ids"], tokens["offset_mapping"][0, :, 0]


def prompts(checkpoint, messages: list[dict]) -> tuple[str, str]:
    """The rendered messages without and with the header of the next turn."""
    render = checkpoint.tokenizer.apply_chat_template
    return render(messages, tokenize=False), render(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def test_reply_likelihoods_equal_full_logits_one_by_one(tiny):
    """Padded batches with cut logits against one plain pass for each text over all its tokens."""
    pairs = corpora.load_pairs()[:20:5]
    read = behaviour.reply_log_likelihoods(tiny, pairs, token_budget=3000)
    for pair, row in zip(pairs, read, strict=True):
        _, prompt = prompts(tiny, pair.prompt)
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
        text, _ = prompts(tiny, dialogue.messages)
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
def test_profile_equals_a_direct_computation(tiny, tiny_vectors):
    """Header and reply states against `hidden_states` of one plain pass for each text."""
    vectors = load_vectors(str(tiny_vectors))
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "audit"][2::-1]
    dialogue = next(row for row in corpora.load_neutral() if row.split == "audit")
    read = profile.read_profile(tiny, vectors, twins, [dialogue], "calm")
    contexts = [context for twin in twins for context in twin]
    tasks = [failing.task for failing, _ in twins]
    assert read.ids == [context.id for context in contexts] + [dialogue.id]
    assert read.kinds == ["failing", "passing"] * 3 + ["neutral"]
    for kind in ("failing", "passing"):
        assert [read.tasks[row] for row in read.rows(kind)] == sorted(tasks) != tasks
    texts = [(context.messages, context.reply) for context in contexts]
    texts.append((dialogue.messages[:-1], dialogue.messages[-1]["content"]))
    for (messages, reply), states in zip(texts, read.states, strict=True):
        bare, prompt = prompts(tiny, messages)
        ids, starts = tokenize(tiny, prompt + reply)
        hidden = tiny.model(ids, output_hidden_states=True).hidden_states
        header, after = (starts >= len(bare)) & (starts < len(prompt)), starts >= len(prompt)
        for position, inside in enumerate((header, after)):
            direct = torch.stack([hidden[layer + 1][0, inside].mean(0) for layer in vectors.layers])
            torch.testing.assert_close(states[position], direct, atol=1e-5, rtol=0)


@torch.no_grad()
def test_trace_reads_every_token_of_the_first_failing_context(tiny, tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))  # its band is layer 2
    twin = corpora.load_twins()[0]
    trace = profile.read_profile(tiny, vectors, [twin], [], "calm").trace
    ids, starts = tokenize(tiny, trace.text)
    hidden = tiny.model(ids, output_hidden_states=True).hidden_states[3][0].double()
    neutral = vectors.neutral_at("token", [2])[:, 0].double()
    along = vectors.directions[vectors.concepts.index("calm"), vectors.layers.index(2)].double()
    direct = ((hidden - neutral.mean(0)) @ along / (neutral @ along).std()).tolist()
    assert trace.readings == pytest.approx([0.0, *direct[1:]], abs=2e-3)  # the first token is a sink; rounded to 0.001
    _, prompt = prompts(tiny, twin[0].messages)
    assert trace.text == prompt + twin[0].reply
    assert [start for start, _ in trace.offsets] == starts.tolist()
    assert [role == "reply" for role in trace.roles] == (starts >= len(prompt)).tolist()
