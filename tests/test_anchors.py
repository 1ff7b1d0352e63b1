"""The texts on which the model is to stay as it was: what of them counts, in which turn, and what the terms say."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from calibrate import activations, corpora, transcripts
from calibrate.corpora import Context, Dialogue, Story
from calibrate.training import anchors, losses, readings
from calibrate.training.anchors import AnchorText

TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight, all told."},
    {"role": "user", "content": "And an ant?"},
]
DIALOGUES = [Dialogue(f"d{n}", "train", [*TURN, {"role": "assistant", "content": f"Six or {n}."}]) for n in range(3)]
PASSING = [
    Context("p", "p", "train", "passing", [*TURN[:3], {"role": "tool", "content": "1 passed"}], "All is green.")
]


def predicted(tokenizer, text: AnchorText) -> str:
    """What follows the positions: the tokens whose prediction counts."""
    return tokenizer.decode([text.ids[position + 1] for position in text.positions])


# ---- which tokens of which texts


def test_neutral_texts_predict_what_the_assistant_says_and_nothing_else(tokenizer):
    """Earlier turns and the last one; of a passing transcript the reply that it is given. No template, no tool."""
    found = anchors.neutral_texts(tokenizer, DIALOGUES, PASSING, 10, 0)
    assert {predicted(tokenizer, text) for text in found} == {
        "Eight, all told.All is green.", *(f"Eight, all told.Six or {number}." for number in range(3))
    }  # fmt: skip
    green = next(text for text in found if predicted(tokenizer, text).endswith("green."))
    assert tokenizer.decode(green.ids).endswith(
        "<|im_start|>tool\n1 passed<|im_end|>\n<|im_start|>assistant\nAll is green."
    )


def test_neutral_texts_are_shuffled_before_they_are_counted(tokenizer):
    """So that few of them hold dialogues and transcripts in the ratio in which they are given: here 30 to 10."""
    drawn = [
        sum(predicted(tokenizer, text).endswith("green.") for text in found)
        for found in (anchors.neutral_texts(tokenizer, DIALOGUES * 10, PASSING * 10, 20, seed) for seed in range(8))
    ]
    assert all(1 <= count <= 9 for count in drawn)
    assert sum(drawn) / 8 == pytest.approx(5, abs=1.5)
    one, same, other = (anchors.neutral_texts(tokenizer, DIALOGUES * 10, PASSING * 10, 20, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert len(one) == 20


def test_a_text_that_opens_with_the_assistant_has_no_prediction_of_its_first_token(tokenizer, monkeypatch):
    """Nothing stands before it, where a template writes nothing before what the assistant says."""
    span = transcripts.Span("reply", 0, 0, 3)
    opened = transcripts.Encoded([7, 8, 9], [span], [(0, 1), (1, 2), (2, 3)], "abc")
    monkeypatch.setattr(transcripts, "encode", lambda *_: opened)
    assert anchors.neutral_texts(tokenizer, DIALOGUES[:1], [], 1, 0) == [AnchorText([7, 8, 9], [0, 1])]


def stories(**counts: int) -> list[Story]:
    """So many short stories about each concept, each with its own number."""
    rows = [(concept, number) for concept, count in counts.items() for number in range(count)]
    return [Story(f"{c}{n}", c, "sea", "train", f"{c} story number {n}") for c, n in rows]


def told(tokenizer, found: list[AnchorText]) -> tuple[list[str], list[bool]]:
    """The concepts in order, and which are told by a user."""
    texts = [tokenizer.decode(text.ids) for text in found]
    users = [text.startswith("<|im_start|>user\n") for text in texts]
    return [text.removeprefix("<|im_start|>user\n").split()[0] for text in texts], users


def test_every_other_story_is_about_a_pressed_concept_and_two_of_four_are_told_by_a_user(tokenizer):
    """Of two pressed concepts and two others eight of each are needed for sixteen: the few pressed ones come again."""
    rows = stories(desperate=2, calm=9, sad=1, proud=9)
    found = anchors.story_texts(tokenizer, rows, ["desperate", "sad"], 16, 0)
    concepts, users = told(tokenizer, found)
    assert [concept in ("desperate", "sad") for concept in concepts] == [True, False] * 8
    assert users == [False, False, True, True] * 4
    plain = [tokenizer.decode(text.ids).removeprefix("<|im_start|>user\n").split("<|im_end|>")[0] for text in found]
    assert len(set(plain[0::2])) == 3
    assert len(set(plain[1::2])) == 8  # no other one twice
    assert {"calm", "proud"} == set(concepts[1::2])
    assert found == anchors.story_texts(tokenizer, rows, ["desperate", "sad"], 16, 0)
    drawn = [anchors.story_texts(tokenizer, rows, ["desperate", "sad"], 16, seed) for seed in range(4)]
    for side in (0, 1):  # the seed says which come first, on both sides
        assert any(draw[side::2] != drawn[0][side::2] for draw in drawn)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"desperate": 4, "calm": 1}, ["desperate", "calm"]),  # no more than can alternate
        ({"desperate": 3}, ["desperate"] * 3),  # no others: the pressed ones alone
    ],
)
def test_stories_that_run_short(tokenizer, counts, expected):
    assert told(tokenizer, anchors.story_texts(tokenizer, stories(**counts), ["desperate"], 9, 0))[0] == expected


def test_a_story_counts_from_its_second_token_to_its_end(tokenizer):
    """The first token is an attention sink. Told by a user, the header of the assistant's turn counts too."""
    for text in anchors.story_texts(tokenizer, stories(desperate=4, calm=4), ["desperate"], 8, 0):
        assert text.positions == list(range(1, len(text.ids)))
        if text.ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>"):
            assert tokenizer.decode(text.ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_stories_without_a_pressed_concept_are_refused(tokenizer):
    message = (
        "the stories have none about desperate, sad, which the story anchor needs; they have calm, proud; set "
        "`concept_weight` and `concept_kl_weight` to 0"
    )
    with pytest.raises(ValueError, match=message):
        anchors.story_texts(tokenizer, stories(proud=1, calm=2), ["desperate", "sad"], 4, 0)


def test_same_texts_predict_the_reply_of_the_pressed_contexts(tokenizer):
    contexts = [context for context, _ in corpora.load_twins()[:2]]
    probes = readings.prepare(tokenizer, contexts, 6)
    for context, probe, text in zip(contexts, probes, anchors.same_texts(probes), strict=True):
        assert text.ids == probe.ids
        assert len(text.positions) == 6
        assert context.reply.startswith(predicted(tokenizer, text))
        assert text.positions[0] == probe.header.stop - 1


# ---- the terms


TEXTS = {
    "neutral": [AnchorText([5, 6, 7, 8], [1, 2]), AnchorText([9, 10, 11], [1])],
    "story": [AnchorText([20 + row, 30, 31, 32, 33], [1, 2, 3, 4]) for row in range(3)],
    "same": [AnchorText([40, 41, 42], [0, 1])],
}


@pytest.fixture
def make(tiny):
    """Anchors of the tiny model, as it is now, at layers 1 and 3."""

    def make(texts=TEXTS, model=tiny.model, layers=(1, 3), weight_hash="a"):
        return anchors.Anchors(model, texts, activations.Tap(model, layers), weight_hash)

    return make


def change(model, size: float = 0.05) -> None:
    """Moves the weights of one block below both layers."""
    torch.manual_seed(0)
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    with torch.no_grad():
        weight += size * torch.randn_like(weight)


def terms(made, model, turns: int = 9) -> list[dict[str, torch.Tensor]]:
    return [made.terms(model, index, torch.device("cpu")) for index in range(turns)]


def test_kinds_take_turns_and_every_text_is_read_once_before_any_is_repeated(make, tiny):
    """Two neutral texts, three stories, one context, nine turns: neutral 0, 1, 0, stories 0, 1, 2, context 0, 0, 0."""
    made, read = make(), []
    tiny.model.register_forward_pre_hook(
        lambda module, args, named: read.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    found = terms(made, tiny.model)
    rows = [(kind, row) for row in range(3) for kind in ("neutral", "story", "same")]
    assert read == [TEXTS[kind][row % len(TEXTS[kind])].ids for kind, row in rows]
    assert [list(term) for term in found] == [["kl"], ["concept_kl", "concept"], ["same_kl"]] * 3
    alone = make({"story": TEXTS["story"]})
    assert [list(term) for term in terms(alone, tiny.model, 2)] == [["concept_kl", "concept"]] * 2


def test_terms_are_zero_at_the_reference_and_positive_once_weights_have_changed(make, tiny):
    made = make()
    for found in terms(made, tiny.model):
        for name, term in found.items():
            assert abs(term.item()) < (1e-9 if name == "concept" else 1e-6)
    change(tiny.model)
    for found in terms(made, tiny.model):
        for name, term in found.items():
            assert term.item() > (1e-4 if name == "concept" else 1e-6)
            tiny.model.zero_grad()
            term.backward(retain_graph=True)
            assert tiny.model.get_submodule("model.layers.1.mlp.up_proj").weight.grad.abs().max() > 0


def outputs(model, text: AnchorText) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the states of layers 1 and 3 at a text's positions, as transformers gives them."""
    with torch.no_grad():
        out = model(torch.tensor([text.ids]), output_hidden_states=True)
    states = torch.stack([out.hidden_states[layer + 1][0, text.positions] for layer in (1, 3)], dim=1)
    return out.logits[0, text.positions], states


def test_terms_are_those_of_the_text_at_its_positions(make, tiny):
    """Against both models' own outputs: KL of the 64 likeliest tokens and the rest, and |h - h_ref|^2 / |h_ref|^2."""
    made, texts = make(), [TEXTS["neutral"][0], TEXTS["story"][0], TEXTS["same"][0]]
    before = [outputs(tiny.model, text) for text in texts]
    change(tiny.model, 0.5)
    found = terms(made, tiny.model, 3)
    for term, name, text, (logits, states) in zip(found, ("kl", "concept_kl", "same_kl"), texts, before, strict=True):
        now, moved = outputs(tiny.model, text)
        p = logits.double().softmax(-1)
        kept = p.topk(64).indices
        q = now.double().softmax(-1).gather(-1, kept)
        p = p.gather(-1, kept)
        rest, own = 1 - p.sum(-1), 1 - q.sum(-1)
        expected = ((p * (p / q).log()).sum(-1) + rest * (rest / own).log()).mean()
        assert term[name].item() == pytest.approx(expected.item(), rel=1e-3)
        if name == "concept_kl":
            shares = (moved - states).square().sum(-1) / states.square().sum(-1)
            assert term["concept"].item() == pytest.approx(shares.mean().item(), rel=1e-4)


def test_the_reference_is_computed_once_until_something_changes(make, tiny):
    forwards = []
    tiny.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))

    def ran(**options) -> int:
        forwards.clear()
        make(**options)
        return len(forwards)

    assert ran() == 6  # one pass a text
    assert ran() == 0
    moved = TEXTS | {"same": [AnchorText([40, 41, 42], [1])]}
    for options in (
        {"texts": moved},
        {"texts": TEXTS | {"same": TEXTS["neutral"]}},
        {"texts": {"story": TEXTS["story"]}},
        {"layers": (1, 2)},
        {"weight_hash": "b"},
        {"model": tiny.model.bfloat16()},
    ):
        assert ran(**options) > 0, f"the reference of other {list(options)} came from the cache"


def test_a_cached_reference_is_that_of_the_model_which_wrote_it(make, tiny):
    """Made again after a change of weights under the same hash, terms measure from the first weights."""
    make()
    change(tiny.model)
    assert terms(make(), tiny.model, 2)[1]["concept"] > 1e-4


def test_the_reference_is_the_model_without_its_adapter(make, tiny):
    """An adapter that already says something is a change; switched off, it is none."""
    model = get_peft_model(tiny.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    made = make(model=model.eval())
    assert all(term > 1e-6 for found in terms(made, model) for term in found.values())
    with model.disable_adapter():
        assert all(abs(term) < 1e-6 for found in terms(made, model) for term in found.values())


def test_a_small_vocabulary_keeps_one_token_as_the_rest(make, tiny, monkeypatch):
    """With as many kept as there are tokens there would be no rest; the KL is the full one, all the same."""
    monkeypatch.setattr(anchors, "KEPT", 10**6)
    made, text = make(), TEXTS["neutral"][0]
    assert made._file.get_slice("neutral.0.tokens").get_shape() == [2, len(tiny.tokenizer) - 1]
    before, _ = outputs(tiny.model, text)
    change(tiny.model)
    now, _ = outputs(tiny.model, text)
    p, q = before.double().log_softmax(-1), now.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert terms(made, tiny.model, 1)[0]["kl"].item() == pytest.approx(expected, rel=1e-2)
    assert losses.kl_to_reference(now, *before.log_softmax(-1).topk(64)[::-1]).item() < expected
