"""Chat templates without a tool role or a system role: from the shipped texts to an audit and to every recipe."""

import json
import runpy
import shutil
import sys

import pytest
from conftest import CHAT_TEMPLATE
from test_cli import calibrate
from test_recipes import arguments, recipe
from transformers import AutoTokenizer

from calibrate import commands, corpora, models, transcripts
from calibrate.corpora import situations

# As Gemma 2 has it: users and the model in turn, nothing else, each trimmed.
ALTERNATING = """
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# As Llama 3.1: a role for tools, whose results are written as JSON.
ENCODING = """
{%- for message in messages %}
{{- '<|start|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|end|>\n\n' }}
{{- (message['content'] | tojson if message['role'] == 'tool' else message['content'] | trim) + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
# As Mistral 7B v0.3: nothing opens an answer.
HEADERLESS = """
{%- for message in messages %}
{{- '[INST] ' + message['content'] + '[/INST]' if message['role'] == 'user' else ' ' + message['content'] + '</s>' }}
{%- endfor %}"""
CHAT = [
    {"role": "system", "content": "You mend code."},
    {"role": "user", "content": "Mend sort."},
    {"role": "assistant", "content": "Done."},
    {"role": "tool", "content": "1 failed"},
    {"role": "user", "content": "Again."},
]


@pytest.fixture
def save(tiny_folder, tmp_path):
    """A function that saves the tiny model with another template."""

    def make(template: str):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


# Opens a past answer otherwise than the next one: nobody's roles are at fault.
THINKING = CHAT_TEMPLATE.replace("assistant\\n{% endif %}", "assistant\\n<think></think>{% endif %}")


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (CHAT_TEMPLATE, ()),
        (ALTERNATING, ("system", "tool")),
        (ENCODING, ("tool",)),
        (HEADERLESS, ()),
        (THINKING, ()),
    ],
)
def test_the_template_says_which_roles_the_user_speaks_for(save, caplog, template, roles):
    folder = save(template)
    for tokenizer in (models.load(str(folder)).tokenizer, models.load_tokenizer(str(folder))):
        assert transcripts.plain_roles(tokenizer) == roles
        text = " ".join(message["content"] for message in transcripts.for_template(tokenizer, CHAT))
        assert ("Tool result:\n1 failed\n\nAgain." in text) is ("tool" in roles)
        assert ("You mend code.\n\nMend sort." in text) is ("system" in roles)
    said = f"the chat template of {folder} does not take the roles {' and '.join(roles)} as they are: the user says it"
    assert caplog.messages.count(said) == (2 if roles else 0)
    tokenizer.chat_template = ALTERNATING  # found anew for another template
    assert transcripts.plain_roles(tokenizer) == ("system", "tool")


def test_plain_roles_speak_in_turn(save):
    tokenizer = models.load_tokenizer(str(save(ALTERNATING)))
    found = transcripts.for_template(tokenizer, CHAT)
    assert [(message["role"], message["content"]) for message in found] == [
        ("user", "You mend code.\n\nMend sort."),
        ("assistant", "Done."),
        ("user", "Tool result:\n1 failed\n\nAgain."),
    ]
    assert transcripts.for_template(tokenizer, found) == found
    tokenizer.plain_roles = ALTERNATING, ("tool",)
    assert [message["role"] for message in transcripts.for_template(tokenizer, CHAT)] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    tokenizer.plain_roles = ALTERNATING, ()
    assert transcripts.for_template(tokenizer, CHAT) is CHAT


def test_what_was_read_says_whose_words_the_user_spoke(save):
    tokenizer = models.load_tokenizer(str(save(ALTERNATING)))
    checkpoint = models.Checkpoint(None, tokenizer, "m", "m", "0")
    assert commands.identity(checkpoint)["plain_roles"] == ["system", "tool"]
    tokenizer.plain_roles = ALTERNATING, ()
    assert "plain_roles" not in commands.identity(checkpoint)


@pytest.mark.parametrize("template", [ALTERNATING, ENCODING])
def test_every_shipped_text_can_be_read_with_such_a_template(save, template):
    tokenizer = models.load_tokenizer(str(save(template)))
    question = {"role": "user", "content": "Did it pass?"}
    chats = [
        [*context.messages, *more] for twin in corpora.load_twins() for context in twin for more in ([], [question])
    ]
    chats += [dialogue.messages for dialogue in corpora.load_neutral()]
    chats += [pair.prompt for pair in corpora.load_pairs()] + [repair.prompt for repair in corpora.load_repairs()]
    chats += [row.messages for kind in (situations.Scenario, situations.Mailbox) for row in situations.load(kind)]
    rendered = tokenizer.apply_chat_template
    for chat in chats[::3]:  # a template is slow
        encoded = transcripts.encode(tokenizer, chat, "Well")
        assert (
            encoded.text
            == rendered(transcripts.for_template(tokenizer, chat), tokenize=False, add_generation_prompt=True) + "Well"
        )
        assert encoded.last("header").stop == encoded.last("reply").start


def test_a_template_without_a_turn_header_is_named_before_anything_is_read(save, tiny_vectors, tmp_path):
    folder = save(HEADERLESS)
    message = r"adds no turn header after the messages; .* give another with `--chat-template FILE.jinja`"
    for words in (f"audit {folder} --vectors {tiny_vectors}", f"extract {folder} --out {tmp_path}/v"):
        with pytest.raises(SystemExit, match=message):
            calibrate(*words.split())
    assert not (tmp_path / "v").exists()


def test_contexts_that_the_template_refuses_are_named_before_stories_are_read(save, tmp_path):
    refused = "'Tool result' in message['content'] and 'tool says' not in message['content']"  # all but the probe
    picky = f"{{%- if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{{{{- message['content']"
    folder = save(ALTERNATING.replace("{{- message['content']", picky))
    with pytest.raises(SystemExit, match=r"context '.*': the chat template refuses the roles user, assistant, user"):
        calibrate("extract", folder, "--out", tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_an_audit_with_such_a_template(save, tiny_vectors, tmp_path):
    calibrate(
        "audit", save(ALTERNATING), "--vectors", tiny_vectors, "--max-tasks", 3, "--max-rows", 6,
        "--concepts", "desperate", "calm", "--out", tmp_path / "out",
    )  # fmt: skip
    found = json.loads((tmp_path / "out/audit.json").read_text())
    assert len(found["texts"]) > 6


@pytest.mark.parametrize("kind", ["dpo", "sft", "grpo"])
def test_every_recipe_with_such_a_template(save, tiny_vectors, tmp_path, monkeypatch, kind):
    words = arguments(kind, save(ALTERNATING), tiny_vectors, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [str(recipe(kind)), *words])
    runpy.run_path(str(recipe(kind)), run_name="__main__")
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
