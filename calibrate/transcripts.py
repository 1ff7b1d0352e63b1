"""Chat transcript -> token ids and the role of every token, from character offsets.

Roles: `system`, `user`, `assistant` (earlier turns), `tool`, `header` (the template tokens that open an assistant's
turn), `reply` (the last assistant turn), `template` (every other token that the template adds).
"""

import bisect
import logging
from typing import NamedTuple

import jinja2

logger = logging.getLogger(__name__)
Message = dict[str, str]


class Span(NamedTuple):
    """Consecutive tokens of one role; `message` is the index of the message they belong to."""

    role: str
    message: int
    start: int  # first token
    stop: int  # one past the last token


class Encoded(NamedTuple):
    """A tokenised text with its spans, in order and without gaps."""

    ids: list[int]
    spans: list[Span]
    offsets: list[tuple[int, int]]  # characters of each token
    text: str

    def last(self, role: str) -> Span:
        """The last span of `role`.

        Raises:
            ValueError: there is none.
        """
        for span in reversed(self.spans):
            if span.role == role:
                return span
        raise ValueError(f"the transcript has no {role!r} tokens; it has {sorted({span.role for span in self.spans})}")


def encode_text(tokenizer, text: str) -> Encoded:
    """Tokenises running text without a template; every token has the role `text`."""
    tokens = tokenizer(text, return_offsets_mapping=True)
    ids = tokens["input_ids"]
    return Encoded(ids, [Span("text", 0, 0, len(ids))], [tuple(pair) for pair in tokens["offset_mapping"]], text)


def plain_roles(tokenizer) -> tuple[str, ...]:
    """The roles that the template refuses or rewrites, and whose text it takes from the user: `tool`, `system` too.

    None where it takes all as they are, and where it would not take them from the user either. Found once for each
    template, and kept with the tokenizer.
    """
    known, found = getattr(tokenizer, "plain_roles", (None, ()))
    if known is None or known != tokenizer.chat_template:
        found = _find_plain_roles(tokenizer)
        tokenizer.plain_roles = tokenizer.chat_template, found
        if found:
            said = "the chat template of %s does not take the roles %s as they are: the user says it"
            logger.warning(said, tokenizer.name_or_path, " and ".join(found))
    return found


def _find_plain_roles(tokenizer) -> tuple[str, ...]:
    roles = ("system", "user", "assistant", "tool", "user")
    chat = [{"role": role, "content": f'{role} says\n{{"a": 1}}'} for role in roles]  # some write tools' text as JSON
    for found in ((), ("tool",), ("system", "tool")):
        tokenizer.plain_roles = tokenizer.chat_template, found
        try:
            encode(tokenizer, chat[:-1])
            encode(tokenizer, chat)
        except ValueError:
            continue
        return found
    return ()


def for_template(tokenizer, messages: list[Message]) -> list[Message]:
    """The messages as the template takes them: the user says what `plain_roles` cannot, in turn with the assistant."""
    if not (roles := plain_roles(tokenizer)):
        return messages
    found: list[Message] = []
    for message in messages:
        content = f"Tool result:\n{message['content']}" if message["role"] == "tool" else message["content"]
        role = "user" if message["role"] in roles else message["role"]
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{content}"}
        else:
            found.append({"role": role, "content": content})
    return found


def encode(tokenizer, messages: list[Message], reply: str | None = None) -> Encoded:
    """Tokenises a transcript through the tokenizer's chat template.

    Without `reply`, a transcript whose last message is the assistant's ends with that reply; any other ends with the
    turn header. With `reply`, the header is added and the reply follows it, as far as it is given (no closing tokens).

    Raises:
        ValueError: the template refuses or changes the messages, or opens an assistant's turn in more than one way.
    """
    messages = for_template(tokenizer, messages)
    complete = reply is None and messages[-1]["role"] == "assistant"
    rendered = render(tokenizer, messages, not complete)
    pieces = _template_pieces(tokenizer, messages, not complete)
    opening = _opening(tokenizer, messages)
    marks: list[tuple[str, int, int]] = []  # role, message, end character
    text = ""
    for index, message in enumerate(messages):
        text += pieces[index]
        _mark_template(marks, text, opening if message["role"] == "assistant" else None, index)
        text += message["content"]
        last = complete and index == len(messages) - 1
        marks.append(("reply" if last else message["role"], index, len(text)))
    text += pieces[-1]
    if text != rendered:
        raise ValueError(
            "the chat template changes the messages (it trims or rewrites them); give them as it renders them"
        )
    _mark_template(marks, text, None if complete else opening, len(messages))
    if reply is not None:
        text += reply
        marks.append(("reply", len(messages), len(text)))
    tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = [tuple(pair) for pair in tokens["offset_mapping"]]
    return Encoded(tokens["input_ids"], _spans(marks, offsets), offsets, text)


def render(tokenizer, messages: list[Message], header: bool) -> str:
    """The chat as text, with `header` up to where the model must answer."""
    template = tokenizer.get_chat_template()  # where there are several, the one without tools
    if "strftime_now" in template:  # what is read must not depend on the day
        template = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
    try:
        return tokenizer.apply_chat_template(
            for_template(tokenizer, messages), chat_template=template, tokenize=False, add_generation_prompt=header
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses the roles {roles} ({error}); give one that takes them with "
            "`--chat-template FILE.jinja`, or set `tokenizer.chat_template` and save it"
        ) from error


def _template_pieces(tokenizer, messages: list[Message], header: bool) -> list[str]:
    """What the template writes before, between and after the contents: one piece more than messages."""
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]  # private use area: in no real text
    marked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest = render(tokenizer, marked, header)
    pieces = []
    for mark in marks:
        if rest.count(mark) != 1:
            raise ValueError(
                "the chat template leaves out or repeats a message; this transcript cannot be read with it"
            )
        before, rest = rest.split(mark)
        pieces.append(before)
    return [*pieces, rest]


def _opening(tokenizer, messages: list[Message]) -> str:
    """The text that opens an assistant's turn: what the generation prompt adds."""
    bare = render(tokenizer, messages, False)
    prompted = render(tokenizer, messages, True)
    if not prompted.startswith(bare) or prompted == bare:
        raise ValueError(
            "the chat template adds no turn header after the messages; readings at the header need one: "
            "give another with `--chat-template FILE.jinja`, or save it with the model"
        )
    return prompted[len(bare) :]


def _mark_template(marks: list[tuple[str, int, int]], text: str, opening: str | None, message: int) -> None:
    """Marks the text since the last mark as template, and as header where it ends with the opening of a turn."""
    if opening is not None:
        if not text.endswith(opening):
            raise ValueError(
                f"the chat template opens an assistant's turn without its generation prompt {opening!r}; give another "
                "with `--chat-template FILE.jinja`, or save it with the model"
            )
        marks.append(("template", message, len(text) - len(opening)))
        marks.append(("header", message, len(text)))
    else:
        marks.append(("template", message, len(text)))


def _spans(marks: list[tuple[str, int, int]], offsets: list[tuple[int, int]]) -> list[Span]:
    """Groups the tokens by the mark in which each starts."""
    starts = [start for start, _ in offsets]
    spans, token = [], 0
    for role, message, end in marks:
        stop = bisect.bisect_left(starts, end, lo=token)
        if end == marks[-1][2]:  # a tokenizer that trims offsets starts a final blank at its end
            stop = len(offsets)
        if stop > token:
            spans.append(Span(role, message, token, stop))
        token = stop
    return spans
