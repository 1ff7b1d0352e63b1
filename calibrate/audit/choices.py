"""Closed questions: how likely each of a few one-token answers is, without generation and without a judge."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from calibrate import activations, transcripts
from calibrate.models import Checkpoint

TOKEN_BUDGET = 2048  # padded tokens of one pass


class Question(NamedTuple):
    """A chat, the beginning of the reply, and the answers that may follow it, each one token more."""

    messages: list[dict[str, str]]
    options: Sequence[str]
    prefill: str = "("


def log_probabilities(
    checkpoint: Checkpoint,
    questions: list[Question],
    description: str,
    steer: Callable[[activations.Batch], AbstractContextManager] | None = None,
) -> np.ndarray:
    """Log-probability of every option, nats, [questions, options]; all questions have as many.

    Args:
        steer: gives for a batch of questions (`rows` are their places) a context in which it is read.

    Raises:
        ValueError: an option is more than one token, or a question has another number of options.
    """
    if len({len(question.options) for question in questions}) > 1:
        raise ValueError("the questions have different numbers of options; ask them apart")
    sequences, answers = [], []
    for question in questions:
        ids = transcripts.encode(checkpoint.tokenizer, question.messages, question.prefill).ids
        sequences.append(ids)
        answers.append([option_token(checkpoint.tokenizer, ids, question, option) for option in question.options])
    device = next(checkpoint.model.parameters()).device
    found = torch.zeros(len(questions), len(questions[0].options))
    with torch.no_grad(), tqdm(total=len(questions), desc=description, unit="question") as bar:
        for rows in activations.token_budget_batches([len(ids) for ids in sequences], TOKEN_BUDGET):
            batch = activations.collate(rows, sequences, device, side="left")
            with steer(batch) if steer else nullcontext():
                logits = checkpoint.model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            options = torch.tensor([answers[row] for row in rows], device=device)
            found[rows] = logits.log_softmax(-1).gather(1, options).cpu()
            bar.update(len(rows))
    return found.double().numpy()


def option_token(tokenizer, ids: list[int], question: Question, option: str) -> int:
    """The token that `option` adds to the `ids` of a question.

    Raises:
        ValueError: it adds another number of tokens than one.
    """
    longer = transcripts.encode(tokenizer, question.messages, question.prefill + option).ids
    if len(longer) != len(ids) + 1 or longer[:-1] != ids:
        raise ValueError(
            f"the option {option!r} after {question.prefill!r} is not one token more for this tokenizer; use another "
            "letter or another beginning of the reply"
        )
    return longer[-1]
