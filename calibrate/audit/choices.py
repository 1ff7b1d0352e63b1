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
    """A chat, the beginning of the reply, and the answers that may follow it, which differ in one token."""

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
        ValueError: options do not differ in one last token, or a question has another number of options.
    """
    if len({len(question.options) for question in questions}) > 1:
        raise ValueError("the questions have different numbers of options; ask them apart")
    asked = [answers(checkpoint.tokenizer, question) for question in questions]
    sequences = [ids for ids, _ in asked]
    device = next(checkpoint.model.parameters()).device
    found = torch.zeros(len(questions), len(questions[0].options))
    with torch.no_grad(), tqdm(total=len(questions), desc=description, unit="question") as bar:
        for rows in activations.token_budget_batches([len(ids) for ids in sequences], TOKEN_BUDGET):
            batch = activations.collate(rows, sequences, device, side="left")
            with steer(batch) if steer else nullcontext():
                logits = checkpoint.model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            options = torch.tensor([asked[row][1] for row in rows], device=device)
            found[rows] = logits.log_softmax(-1).gather(1, options).cpu()
            bar.update(len(rows))
    return found.double().numpy()


def answers(tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """(ids of the question up to the answer, the token of each option that may follow).

    Where a tokenizer joins prefill and option ("(A" is one token of Qwen's) the answer begins with the prefill.

    Raises:
        ValueError: the options do not differ in one last token.
    """
    texts = [question.prefill + option for option in question.options]
    encoded = [transcripts.encode(tokenizer, question.messages, text).ids for text in texts]
    if len({(*ids[:-1],) for ids in encoded}) > 1 or len({ids[-1] for ids in encoded}) < len(encoded):
        raise ValueError(
            f"the answers {', '.join(map(repr, texts))} do not differ in one last token for this tokenizer; use other "
            "letters or another beginning of the reply"
        )
    return encoded[0][:-1], [ids[-1] for ids in encoded]
