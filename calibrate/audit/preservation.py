"""What must stay: likelihood of neutral text, and nearness to the reference on it."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from calibrate import activations, transcripts
from calibrate.corpora import Dialogue
from calibrate.models import Checkpoint


class Neutral(NamedTuple):
    """Per dialogue, over the assistant's tokens, in nats per token."""

    loss: np.ndarray  # negative log-likelihood; perplexity is exp of the mean
    kl: np.ndarray | None  # KL(reference || model); None where there is no adapter to switch off and no reference


@torch.no_grad()
def read_neutral(
    checkpoint: Checkpoint, dialogues: list[Dialogue], divergence: bool = True, reference: nn.Module | None = None
) -> Neutral:
    """Loss of the assistant's turns, and with `divergence` the KL to the reference.

    Args:
        reference: the model before training; by default the same model with its adapter disabled, if it carries one.
    """
    adapter = divergence and reference is None and hasattr(checkpoint.model, "disable_adapter")
    losses, divergences = [], []
    for dialogue in tqdm(dialogues, desc="reading neutral text", unit="text"):
        encoded = transcripts.encode(checkpoint.tokenizer, dialogue.messages)
        spans = [span for span in encoded.spans if span.role in ("assistant", "reply")]
        targets = torch.tensor([token for span in spans for token in range(span.start, span.stop)])
        scores = _log_probabilities(checkpoint.model, encoded.ids, targets - 1)
        truth = torch.tensor(encoded.ids)[targets].to(scores.device)
        losses.append(-scores.gather(1, truth[:, None]).mean().item())
        if adapter or reference is not None:
            with checkpoint.model.disable_adapter() if adapter else nullcontext():
                wanted = _log_probabilities(reference or checkpoint.model, encoded.ids, targets - 1)
            both = min(scores.shape[-1], wanted.shape[-1])  # one may have tokens more; what both have is compared
            scores, wanted = (x[:, :both].log_softmax(-1) for x in (scores, wanted))
            divergences.append((wanted.exp() * (wanted - scores)).sum(-1).mean().item())
    return Neutral(np.array(losses), np.array(divergences) if divergences else None)


def _log_probabilities(model, ids: list[int], positions: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = activations.collate([0], [ids], device)
    return (
        model(**batch.inputs, use_cache=False, logits_to_keep=positions.to(device)).logits[0].float().log_softmax(-1)
    )
