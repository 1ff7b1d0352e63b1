"""Whether a fall lasts: a few steps of benign fine-tuning, with the readings before, on the way and after.

What was only covered up comes back within steps of harmless training: a probe's score went from 0.09 to 0.83 after
benign samples (research on training against probes), so a fall is shown with what is left of it. The same steps on the
model before training say what they do by themselves.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftType, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from calibrate import activations, models, transcripts
from calibrate.corpora import Context, Dialogue
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

STEPS = (0, 10, 20)  # where the contexts are read; one dialogue a step
RATE, RANK, SEED = 2.0e-4, 8, 0
NAME = "relearning"  # of the adapter, which goes again


def read(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    contexts: list[Context],
    dialogues: list[Dialogue],
    concept: str,
) -> dict[str, Any] | None:
    """Trains a LoRA on neutral dialogues on top of the checkpoint, reads the turn headers, and takes it off again.

    Returns:
        plain data; None where the checkpoint is an adapter of another kind than LoRA, beside which none can be put.
    """
    model = checkpoint.model
    own = list(model.active_adapters) if hasattr(model, "active_adapters") and hasattr(model, "peft_config") else []
    if own and model.peft_config[own[0]].peft_type != PeftType.LORA:
        return None
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_linear(model), task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        tuned = model if own else get_peft_model(model, config, adapter_name=NAME)
        if own:
            model.add_adapter(NAME, config)
            model.base_model.set_adapter([*own, NAME])
    try:
        readings, losses = _train(checkpoint._replace(model=tuned), vectors, contexts, dialogues, concept)
    finally:
        if own:
            model.delete_adapter(NAME)
            model.base_model.set_adapter(own)
        else:
            tuned.unload()
    return {
        "unit": "sigma, turn header of failing contexts, mean over the band, at each number of steps",
        "tasks": [context.task for context in contexts],
        "steps": list(STEPS),
        "readings": [list(row) for row in zip(*readings, strict=True)],
        "losses": losses,
    }


def _linear(model) -> list[str]:
    """The names of the matrices in a block, which every block has."""
    block = models.blocks(model)[0]
    found = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return sorted({name.removesuffix(".base_layer").split(".")[-1] for name in found if "lora_" not in name})


def _train(
    checkpoint: Checkpoint, vectors, contexts, dialogues, concept: str
) -> tuple[list[list[float]], list[float]]:
    """(readings at each of `STEPS` of every context, loss of every step in nats per token)."""
    weights = [p for name, p in checkpoint.model.named_parameters() if f".{NAME}." in name]
    assert weights, "the adapter has weights"
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    device = next(checkpoint.model.parameters()).device
    readings, losses = [_headers(checkpoint, vectors, contexts, concept)], []
    for step in tqdm(range(1, max(STEPS) + 1), desc="benign fine-tuning", unit="step"):
        dialogue = dialogues[(step - 1) * len(dialogues) // max(STEPS)]  # evenly spaced, so that every kind is there
        ids = torch.tensor([transcripts.encode(checkpoint.tokenizer, dialogue.messages).ids], device=device)
        loss = checkpoint.model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 4))
        if step in STEPS:
            readings.append(_headers(checkpoint, vectors, contexts, concept))
    return readings, losses


def _headers(checkpoint: Checkpoint, vectors: EmotionVectors, contexts: list[Context], concept: str) -> list[float]:
    """The target's reading at the turn header of every context, mean over the band."""
    at, direction = vectors.positions(vectors.used_band()), vectors.directions[[vectors.index(concept)]]
    encoded = [transcripts.encode(checkpoint.tokenizer, context.messages, "") for context in contexts]
    found = [0.0] * len(contexts)
    for row, hidden in activations.states(checkpoint.model, [text.ids for text in encoded], vectors.layers):
        span = encoded[row].last("header")
        state = hidden[:, span.start : span.stop].double().mean(1).cpu()
        found[row] = round(float(vectors.readings(state, "header", direction)[0, at].mean()), 4)
    return found
