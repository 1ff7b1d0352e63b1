"""The same contexts in another chat template and another tool format, where training never was.

A reading that falls under the template of the training alone is hidden there and not calibrated: the model has learnt
when it is looked at. Roles are written out as words, and what a tool returned comes from the user, in a fence.
"""

import copy

import torch

from calibrate import activations, models, transcripts
from calibrate.audit.profile import ROLES, Profile
from calibrate.corpora import Context
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

TEMPLATE = (
    "{% for message in messages %}{{ {'system': 'Instructions', 'user': 'User', 'assistant': 'Assistant'}"
    "[message['role']] }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
TOOL = "The command printed:\n```\n{content}\n```"


def read(checkpoint: Checkpoint, vectors: EmotionVectors, twins: list[tuple[Context, Context]]) -> Profile:
    """States at the header and over the neutral opening, as in the profile, of contexts in other clothes.

    Raises:
        ValueError: a context does not fit the model's window.
    """
    contexts = [context for twin in twins for context in twin]
    tokenizer = copy.copy(checkpoint.tokenizer)
    tokenizer.chat_template, tokenizer.plain_roles = TEMPLATE, (TEMPLATE, ())  # `dressed` speaks for tools
    encoded = [transcripts.encode(tokenizer, dressed(c.messages), c.reply) for c in contexts]
    window = models.window(checkpoint.model)
    for context, text in zip(contexts, encoded, strict=True):
        if window and len(text.ids) > window:
            raise ValueError(
                f"context {context.id!r} has {len(text.ids)} tokens in the other template, and the model takes "
                f"{window}; give contexts that it takes with `--twins`"
            )
    states = torch.zeros(len(contexts), len(ROLES), len(vectors.layers), vectors.hidden_size)
    for row, hidden in activations.states(
        checkpoint.model, [text.ids for text in encoded], vectors.layers, description="reading another template"
    ):
        for position, role in enumerate(ROLES):
            span = encoded[row].last(role)
            states[row, position] = hidden[:, span.start : span.stop].mean(1, dtype=torch.float64).float().cpu()
    return Profile([c.id for c in contexts], [c.outcome for c in contexts], [c.task for c in contexts], states, [])


def dressed(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with what a tool returned told by the user."""
    return [
        {"role": "user", "content": TOOL.format(content=m["content"])} if m["role"] == "tool" else m for m in messages
    ]
