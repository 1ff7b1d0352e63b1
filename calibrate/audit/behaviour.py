"""How likely honest and gaming replies are: a reading of behaviour that needs no judge and no generation.

It is weaker than executed behaviour: a model may find a gaming reply less likely and game in its own words.
"""

import numpy as np
import torch
from tqdm import tqdm

from calibrate import activations, transcripts
from calibrate.activations import Branch
from calibrate.corpora import Pair
from calibrate.models import Checkpoint
from calibrate.transcripts import Encoded


def reply_log_likelihoods(checkpoint: Checkpoint, pairs: list[Pair]) -> np.ndarray:
    """Mean log-probability of the reply's tokens, nats per token, [pairs, (honest, gaming)]; a prompt is read once."""
    result = np.zeros((len(pairs), 2))
    for row, pair in enumerate(tqdm(pairs, desc="reading replies", unit="pair")):
        # The bare prompt is the third, so that what both replies begin with is not read as part of the prompt.
        replies = [pair.chosen[0]["content"], pair.rejected[0]["content"], ""]
        encoded = [transcripts.encode(checkpoint.tokenizer, pair.prompt, reply) for reply in replies]
        branches = activations.branched(checkpoint.model, [text.ids for text in encoded], [0])
        result[row] = [likelihood(*both) for both in zip(encoded[:2], branches, strict=False)]
    return result


def likelihood(encoded: Encoded, branch: Branch) -> float:
    """Mean log-probability of the reply's tokens, nats per token."""
    span = encoded.last("reply")
    truth = torch.tensor(encoded.ids[span.start : span.stop], device=branch.log_probabilities.device)
    first = span.start - branch.shared
    assert first >= 0, "what is shared ends before the reply"
    scores = branch.log_probabilities[first : first + len(truth)]
    return float(scores.gather(1, truth[:, None]).mean())
