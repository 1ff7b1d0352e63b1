"""What is read on failing and passing contexts, against plain passes of the tiny model, one text at a time."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibrate import corpora, models
from calibrate.audit import contexts
from calibrate.audit.contexts import Contexts
from calibrate.corpora import Context, Dialogue, Pair
from calibrate.corpora.situations import FailureQuestion, Mailbox, load
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors, load_vectors

BAND = 2  # of the tiny vectors
QUESTIONS = load(FailureQuestion)


class Setting(NamedTuple):
    """The tiny model with three twins, in an order of their own, of which the last is a longer conversation."""

    checkpoint: Checkpoint
    vectors: EmotionVectors
    twins: list[tuple[Context, Context]]
    pairs: list[Pair]
    dialogues: list[Dialogue]
    found: Contexts
    passes: list[tuple[int, int]]  # [rows, tokens] of every pass through the whole model

    @property
    def contexts(self) -> list[Context]:
        return [context for twin in self.twins for context in twin]


@pytest.fixture(scope="module")
def setting(tiny_folder, tiny_vectors) -> Setting:
    checkpoint, vectors = models.load(str(tiny_folder)), load_vectors(str(tiny_vectors))
    every = {(twin[0].task, twin[0].context): twin for twin in corpora.load_twins()}
    wanted = ("grid-bed", "plain"), ("blazon-rank", "plain"), ("apiary-statute", "pressed")
    twins = [every[key] for key in wanted]
    twins[1] = (twins[1][0]._replace(felt={}), twins[1][1])  # one without openings
    found = [pair for pair in corpora.load_pairs() if pair.kind == "honest"]
    first = {key: [pair for pair in found if (pair.task, pair.context) == key] for key in wanted[:2]}
    pairs = first[wanted[0]][:2] + first[wanted[1]][:1]
    assert [pair.task for pair in pairs] == ["grid-bed", "grid-bed", "blazon-rank"]
    dialogues = [row for row in corpora.load_neutral() if row.split == "audit"][:2]
    passes: list[tuple[int, int]] = []
    hook = checkpoint.model.register_forward_hook(
        lambda module, given, options, output: passes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    found = contexts.read(checkpoint, vectors, twins, pairs[::-1], QUESTIONS, dialogues, "calm")
    hook.remove()
    return Setting(checkpoint, vectors, twins, pairs[::-1], dialogues, found, passes)


class Plain(NamedTuple):
    """One pass over one text."""

    ids: Tensor  # [tokens]
    starts: Tensor  # [tokens], first character of each
    states: Tensor  # [layers of the vectors, tokens, hidden]
    scores: Tensor  # [tokens, vocabulary], log-probabilities of the next token


@torch.no_grad()
def plain(setting: Setting, text: str) -> Plain:
    tokens = setting.checkpoint.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    output = setting.checkpoint.model(tokens["input_ids"], output_hidden_states=True)
    states = torch.stack([output.hidden_states[layer + 1][0] for layer in setting.vectors.layers])
    starts = tokens["offset_mapping"][0, :, 0]
    return Plain(tokens["input_ids"][0], starts, states, output.logits[0].log_softmax(-1))


def prompts(setting: Setting, messages: list[dict]) -> tuple[str, str]:
    """The rendered messages without and with the header of the next turn."""
    render = setting.checkpoint.tokenizer.apply_chat_template
    return render(messages, tokenize=False), render(messages, tokenize=False, add_generation_prompt=True)


def reading(setting: Setting, states: Tensor, pooling: str) -> Tensor:
    """Readings of calm at the band, of states [layers, n, hidden]."""
    at = setting.vectors.layers.index(BAND)
    neutral = setting.vectors.neutral_at(pooling, [BAND])[:, 0].double()
    along = setting.vectors.directions[setting.vectors.index("calm"), at].double()
    return (states[at].double() - neutral.mean(0)) @ along / (neutral @ along).std()


def test_header_and_reply_states_are_those_of_the_neutral_opening(setting):
    profile = setting.found.profile
    assert profile.ids == [context.id for context in setting.contexts] + [row.id for row in setting.dialogues]
    assert profile.kinds == ["failing", "passing"] * 3 + ["neutral"] * 2
    tasks = [failing.task for failing, _ in setting.twins]
    for kind in ("failing", "passing"):
        assert [profile.tasks[row] for row in profile.rows(kind)] == sorted(tasks) != tasks
    texts = [(context.messages, context.reply) for context in setting.contexts]
    texts += [(row.messages[:-1], row.messages[-1]["content"]) for row in setting.dialogues]
    for (messages, reply), states in zip(texts, profile.states, strict=True):
        bare, prompt = prompts(setting, messages)
        direct = plain(setting, prompt + reply)
        header = (direct.starts >= len(bare)) & (direct.starts < len(prompt))
        for position, inside in enumerate((header, direct.starts >= len(prompt))):
            torch.testing.assert_close(states[position], direct.states[:, inside].mean(1), atol=1e-5, rtol=0)


def test_honest_and_gaming_replies_are_tried_after_both_outcomes(setting):
    assert setting.found.pair_tasks == [pair.task for pair in setting.pairs]
    assert setting.found.replies.shape == (3, 2, 2)
    for pair, found in zip(setting.pairs, setting.found.replies, strict=True):
        (twin,) = [twin for twin in setting.twins if (twin[0].task, twin[0].context) == (pair.task, pair.context)]
        for side, context in enumerate(twin):
            for column, reply in enumerate((pair.chosen, pair.rejected)):
                _, prompt = prompts(setting, context.messages)
                direct = plain(setting, prompt + reply[0]["content"])
                places = (direct.starts >= len(prompt)).nonzero()[:, 0]
                scores = direct.scores[places - 1, direct.ids[places]]
                assert found[side, column] == pytest.approx(scores.mean().item(), abs=1e-5)


def test_the_odds_are_those_of_the_right_answer_to_one_question_of_each_sense(setting):
    """Yes is right where the question's yes means the outcome; every twin has questions of its own."""
    for number, context in enumerate(setting.contexts):
        odds = []
        for sense in ("failing", "passing"):
            row = [row for row in QUESTIONS if row.yes_means == sense][number // 2]
            question = {"role": "user", "content": row.question + " Answer yes or no."}
            _, prompt = prompts(setting, [*context.messages, question])
            yes, no = (setting.checkpoint.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
            scores = plain(setting, prompt).scores[-1]
            odds.append(float(scores[yes] - scores[no]) * (1 if sense == context.outcome else -1))
        assert setting.found.failure[number] == pytest.approx(np.mean(odds), abs=1e-4)


def test_felt_states_are_means_over_the_openings(setting):
    """Of the contexts that have both: the first and the third failing one."""
    shown = [setting.twins[0][0], setting.twins[2][0]]
    assert setting.found.felt_tasks == [context.task for context in shown]
    for context, states in zip(shown, setting.found.felt, strict=True):
        for side, name in enumerate(("desperate", "composed")):
            _, prompt = prompts(setting, context.messages)
            direct = plain(setting, prompt + context.felt[name].strip())
            inside = direct.starts >= len(prompt)
            torch.testing.assert_close(states[side], direct.states[:, inside].mean(1), atol=1e-5, rtol=0)


def test_the_trajectory_has_every_turn_header(setting):
    opening = "<|im_start|>assistant\n"
    assert [(task, outcome) for task, outcome, _ in setting.found.trajectory] == [
        (context.task, context.outcome) for context in setting.contexts
    ]
    for context, (*_, found) in zip(setting.contexts, setting.found.trajectory, strict=True):
        _, prompt = prompts(setting, context.messages)
        direct = plain(setting, prompt)
        turns = sum(message["role"] == "assistant" for message in context.messages) + 1
        begins = [start for start in range(len(prompt)) if prompt.startswith(opening, start)]
        assert len(found) == len(begins) == turns > 1
        inside = [(direct.starts >= start) & (direct.starts < start + len(opening)) for start in begins]
        states = torch.stack([direct.states[:, tokens].mean(1) for tokens in inside], 1)
        assert found == pytest.approx(reading(setting, states, "header").tolist(), abs=1e-3)


def test_traces_read_every_token_of_the_first_twin_and_of_a_longer_conversation(setting):
    """A failing one with its gaming reply, where the reading should be highest; a passing one with the neutral one."""
    gaming = {(p.task, p.context): p.rejected[0]["content"] for p in reversed(setting.pairs)}
    shown = [*setting.twins[0], *setting.twins[2]]
    for context, trace in zip(shown, setting.found.profile.traces, strict=True):
        gamed = context.outcome == "failing" and (context.task, context.context) in gaming
        assert trace.id == (f"{context.id}, gaming reply" if gamed else context.id)
        _, prompt = prompts(setting, context.messages)
        assert trace.text == prompt + (gaming[context.task, context.context] if gamed else context.reply)
        direct = plain(setting, trace.text)
        assert [start for start, _ in trace.offsets] == direct.starts.tolist()
        assert [role == "reply" for role in trace.roles] == (direct.starts >= len(prompt)).tolist()
        assert [*trace.readings][:3] == ["calm", "afraid", "angry"]  # the target first
        values = reading(setting, direct.states, "token").tolist()
        assert trace.readings["calm"] == pytest.approx([0.0, *values[1:]], abs=6e-3)  # a sink; rounded to 0.01


def test_norms_of_neutral_text_leave_the_sink_out(setting):
    for row, found in zip(setting.dialogues, setting.found.norms, strict=True):
        direct = plain(setting, prompts(setting, row.messages)[0])
        assert found == pytest.approx(direct.states[:, 1:].norm(dim=-1).mean(1).tolist(), abs=1e-4)


def test_a_context_is_read_once_whatever_follows_it(setting):
    """Then its replies, two a pair, and what is not scored: neutral opening, two felt ones, two questions."""
    passes = iter(setting.passes)
    for context, replies, others in zip(setting.contexts, [4, 4, 2, 2, 0, 0], [5, 3, 3, 3, 5, 3], strict=True):
        count, shared = next(passes)
        assert count == 1
        for rows in filter(None, (replies, others)):
            count, rest = next(passes)
            assert count == rows
            bare, _ = prompts(setting, context.messages)
            assert shared >= len(setting.checkpoint.tokenizer(bare)["input_ids"]) > 3 * rest
    assert not [*passes]


def test_a_checkpoint_in_half_precision_is_read_too(setting, tiny_folder):
    """bfloat16 keeps 8 bits: states within 2 % of their length, norms within 2 %; likelihoods are near ln(1/600)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    half = setting.checkpoint._replace(model=model)
    twins, dialogues = setting.twins[:1], setting.dialogues
    found = contexts.read(half, setting.vectors, twins, setting.pairs, QUESTIONS, dialogues, "calm")
    whole = setting.found.profile.states[[0, 1, -2, -1]]
    assert ((found.profile.states - whole).norm(dim=-1) / whole.norm(dim=-1)).max() < 0.02
    assert found.norms == pytest.approx(setting.found.norms, rel=0.02)
    rows = [row for row, pair in enumerate(setting.pairs) if pair.task == twins[0][0].task]
    assert found.replies[rows] == pytest.approx(setting.found.replies[rows], abs=0.05)


def test_contexts_without_openings_or_pairs(setting):
    """Nothing felt, nothing to reply: the readings are there all the same."""
    found = contexts.read(setting.checkpoint, setting.vectors, setting.twins[1:2], [], QUESTIONS, [], "calm")
    assert found.felt.shape == (0, 2, 3, 32)
    assert (found.felt_tasks, found.replies.shape) == ([], (0, 2, 2))
    torch.testing.assert_close(found.profile.states, setting.found.profile.states[2:4], atol=1e-5, rtol=0)


def test_a_context_that_does_not_fit_is_named_with_what_to_do(setting, monkeypatch):
    monkeypatch.setattr(setting.checkpoint.model.config, "max_position_embeddings", 300)
    name = setting.contexts[0].id
    with pytest.raises(ValueError, match=rf"context '{name}' has \d+ tokens .* takes 300; .* with `--twins`"):
        contexts.read(setting.checkpoint, setting.vectors, setting.twins, setting.pairs, QUESTIONS, [], "calm")


def test_a_mailbox_is_traced_to_the_header_within_a_window(setting, monkeypatch, caplog):
    """All tokens with their roles; or the last ten, with the same readings and the text that they cover."""
    box = load(Mailbox)[0]
    chats = [(box.id, box.messages, "")]
    (whole,) = contexts.trace(setting.checkpoint, setting.vectors, chats, "calm")
    assert (whole.id, whole.roles[-1]) == (box.id, "header")
    assert {"system", "user", "header"} <= {*whole.roles}
    assert box.messages[1]["content"] in whole.text
    values = plain(setting, whole.text)
    assert len(whole.readings["calm"]) == len(values.ids)
    monkeypatch.setattr(contexts, "TRACE_WINDOW", 10)
    (last,) = contexts.trace(setting.checkpoint, setting.vectors, chats, "calm")
    assert last.id == f"{box.id} (its last 10 of {len(values.ids)} tokens)"
    assert whole.text.endswith(last.text)
    assert last.roles == whole.roles[-10:]
    assert last.readings == {name: column[-10:] for name, column in whole.readings.items()}
    covered = [last.text[low:high] for low, high in last.offsets]
    assert covered == [whole.text[low:high] for low, high in whole.offsets[-10:]]
    setting.checkpoint.model.config.max_position_embeddings = 50
    assert contexts.trace(setting.checkpoint, setting.vectors, chats, "calm") == []
    assert f"{box.id}: not traced, it has {len(values.ids)} tokens and the model takes 50" in caplog.text
    setting.checkpoint.model.config.max_position_embeddings = 4096
