"""How likely honest and gaming replies are: a reading of behaviour that needs no judge and no generation.

It is weaker than executed behaviour: a model may find a gaming reply less likely and game in its own words.
"""

import numpy as np
import torch
from tqdm import tqdm

from calibrate import activations, transcripts
from calibrate.corpora import Pair
from calibrate.models import Checkpoint


@torch.no_grad()
def reply_log_likelihoods(checkpoint: Checkpoint, pairs: list[Pair], token_budget: int = 1024) -> np.ndarray:
    """Mean log-probability of the reply's tokens, nats per token, [pairs, (honest, gaming)]."""
    encoded = [
        transcripts.encode(checkpoint.tokenizer, pair.prompt, side[0]["content"])
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
    ]
    result = np.zeros(len(encoded))
    sequences = [text.ids for text in encoded]
    with tqdm(total=len(encoded), desc="reading replies", unit="text") as bar:
        for rows in activations.token_budget_batches([len(ids) for ids in sequences], token_budget):
            batch = activations.collate(rows, sequences, next(checkpoint.model.parameters()).device)
            # Only the longest reply's positions go through the vocabulary: it is a fifth of the cost at full length.
            first = min(encoded[row].last("reply").start for row in rows) - 1
            width = batch.inputs["input_ids"].shape[1]
            logits = checkpoint.model(**batch.inputs, use_cache=False, logits_to_keep=width - first).logits.float()
            for index, row in enumerate(rows):
                span = encoded[row].last("reply")
                scores = logits[index, span.start - 1 - first : span.stop - 1 - first].log_softmax(-1)
                truth = batch.inputs["input_ids"][index, span.start : span.stop]
                result[row] = scores.gather(1, truth[:, None]).mean().item()
            bar.update(len(rows))
    return result.reshape(len(pairs), 2)
