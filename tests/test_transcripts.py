import copy
import re

import pytest
from conftest import CHAT_TEMPLATE
from tokenizers import processors

from calibrate import transcripts

OPENING = "<|im_start|>assistant\n"
OPEN = [
    {"role": "system", "content": "You maintain scripts."},
    {"role": "user", "content": "Grüße aus 東京 🎉! Mend `été()`."},
    {"role": "assistant", "content": "Done.\n```python\nprint('é')\n```"},
    {"role": "tool", "content": "=== FAILURES ===\nassert 'a' == 'ä'\n1 failed in 0.02s"},
]
LAST = {"role": "assistant", "content": "Ça échoue 🙁: it wants 'ä'."}
SPACED = (  # a turn header that ends with a blank
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def with_template(tokenizer):
    """A function that gives the tokenizer another chat template."""

    def make(template, trims_offsets=False):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        if trims_offsets:  # as GPT-2's tokenizer does: the offsets of a token leave out its blanks
            other.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return other

    return make


def contents(tokenizer, encoded, role):
    """The text of every span of `role`, from the token ids."""
    return [tokenizer.decode(encoded.ids[span.start : span.stop]) for span in encoded.spans if span.role == role]


@pytest.mark.parametrize(
    ("messages", "reply", "assistant", "replies"),
    [
        pytest.param(OPEN, None, [OPEN[2]["content"]], [], id="ends at the turn header"),
        pytest.param([*OPEN, LAST], None, [OPEN[2]["content"]], [LAST["content"]], id="last message is the reply"),
        pytest.param(OPEN, "Ça va 🎉", [OPEN[2]["content"]], ["Ça va 🎉"], id="reply given"),
        pytest.param([*OPEN, LAST], "Et", [OPEN[2]["content"], LAST["content"]], ["Et"], id="reply after a reply"),
    ],
)
def test_every_role_covers_its_text(messages, reply, assistant, replies, tokenizer):
    """Decoded spans are the contents, character for character; each assistant's turn is opened by a header."""
    encoded = transcripts.encode(tokenizer, messages, reply)
    for message in (OPEN[0], OPEN[1], OPEN[3]):
        assert contents(tokenizer, encoded, message["role"]) == [message["content"]]
    assert contents(tokenizer, encoded, "assistant") == assistant
    assert contents(tokenizer, encoded, "reply") == replies
    header = tokenizer(OPENING)["input_ids"]
    headers = [span for span in encoded.spans if span.role == "header"]
    assert [encoded.ids[span.start : span.stop] for span in headers] == [header] * len(headers)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert [span.message for span in headers] == turns + [len(messages)] * (messages is OPEN or reply is not None)


def test_ids_are_those_of_the_rendered_template(tokenizer):
    """The reply follows the generation prompt; nothing closes it. A transcript that is complete keeps its end."""
    rendered = tokenizer.apply_chat_template(OPEN, tokenize=False, add_generation_prompt=True)
    assert transcripts.encode(tokenizer, OPEN, "Ça va").ids == tokenizer(rendered + "Ça va")["input_ids"]
    complete = transcripts.encode(tokenizer, [*OPEN, LAST])
    assert complete.text == tokenizer.apply_chat_template([*OPEN, LAST], tokenize=False)
    assert complete.text.endswith(f"{LAST['content']}<|im_end|>\n")


def test_what_a_template_makes_of_the_day_is_the_same_on_any(with_template, monkeypatch):
    dated = with_template("{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE)
    assert transcripts.encode(dated, OPEN).text.startswith("Today Date: 26 Jul 2024\n")


def test_of_several_templates_the_one_without_tools_is_read(with_template):
    several = with_template({"default": "{{ strftime_now('%Y') + '\n' }}" + CHAT_TEMPLATE, "tool_use": "{{ 1 / 0 }}"})
    assert transcripts.encode(several, OPEN).text.startswith("26 Jul 2024\n")


@pytest.mark.parametrize("messages", [OPEN, [*OPEN, LAST]])
@pytest.mark.parametrize("reply", [None, "", "Fine.", "  spaced  \n"])
@pytest.mark.parametrize(("template", "trims_offsets"), [(CHAT_TEMPLATE, False), (SPACED, False), (SPACED, True)])
def test_every_token_has_exactly_one_span(messages, reply, template, trims_offsets, with_template):
    encoded = transcripts.encode(with_template(template, trims_offsets), messages, reply)
    assert [token for span in encoded.spans for token in range(span.start, span.stop)] == list(range(len(encoded.ids)))
    assert all(span.start < span.stop for span in encoded.spans)
    assert len(encoded.offsets) == len(encoded.ids)


def test_last_span_of_a_role(tokenizer):
    encoded = transcripts.encode(tokenizer, OPEN)
    assert encoded.last("header") == encoded.spans[-1]
    assert encoded.last("header").message == 4
    with pytest.raises(ValueError, match=r"no 'reply' tokens; it has \['assistant', 'header', 'system', 'template'"):
        encoded.last("reply")


def test_running_text_has_one_span(tokenizer):
    text = "Elle attend, 東京."
    encoded = transcripts.encode_text(tokenizer, text)
    assert encoded.spans == [("text", 0, 0, len(encoded.ids))]
    assert tokenizer.decode(encoded.ids) == text
    assert encoded.offsets[-1][1] == len(text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(
            CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
            r"the chat template changes the messages \(it trims or rewrites them\)",
            id="trims",
        ),
        pytest.param(
            CHAT_TEMPLATE.replace("in messages", "in messages if message['role'] != 'assistant'"),
            "the chat template leaves out or repeats a message",
            id="drops",
        ),
        pytest.param(
            CHAT_TEMPLATE + "{{ messages[1]['content'] }}",
            "the chat template leaves out or repeats a message",
            id="repeats",
        ),
        pytest.param(
            CHAT_TEMPLATE.split("{% if")[0],
            "the chat template adds no turn header after the messages",
            id="no header",
        ),
        pytest.param(
            CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"),
            re.escape("opens an assistant's turn without its generation prompt '<|im_start|>assistant\\n<think>\\n'"),
            id="another header",
        ),
        pytest.param(
            "{{ raise_exception('System role not supported') }}",
            r"refuses the roles system, user, assistant, tool \(System role not supported\); give one that takes them",
            id="refuses a role",
        ),
    ],
)
def test_unreadable_templates_are_refused(template, message, with_template):
    padded = [OPEN[0] | {"content": "  Blanks around. "}, *OPEN[1:]]
    with pytest.raises(ValueError, match=message):
        transcripts.encode(with_template(template), padded)
