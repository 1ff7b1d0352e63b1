"""Texts on which the model is to stay as it was: neutral dialogues, passing transcripts, emotion stories."""

import hashlib
import json
import random
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from calibrate import activations, default_model, models, transcripts
from calibrate.corpora import Context, Dialogue, Story
from calibrate.training import losses, readings

KEPT = 64  # likeliest tokens of the reference that are stored for each position


class AnchorText(NamedTuple):
    """A tokenised text, and the positions whose states, and whose prediction of the next token, are to stay."""

    ids: list[int]
    positions: list[int]


class Anchors:
    """The text anchors of one run, one text at a time; the reference's side is computed once and cached on disk.

    `neutral`: KL on the assistant's tokens of dialogues (facts, how-to, code) and of passing transcripts. `story`: KL
    and hidden-state distance on emotion stories, half of them told by the user of a chat, half of them about the
    pressed concepts, so that the model still understands what it is not to be driven by. `same`: KL on the reply
    tokens of the pressed contexts themselves, an ablation (it can teach the model to undo the change further up).

    Args:
        kinds: which of the three are used.
        tap: records the states of its layers.
    """

    def __init__(self, model: Any, texts: dict[str, list[AnchorText]], tap: activations.Tap, weight_hash: str):
        self.texts, self.tap = texts, tap
        content = [weight_hash, str(next(model.parameters()).dtype), tap.layers, KEPT, texts]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        self.path = default_model.cache_folder() / "reference-anchors" / f"{key}.safetensors"
        if not self.path.is_file():
            self._compute(model)
        self._file = safe_open(self.path, framework="pt")

    def _compute(self, model: Any) -> None:
        tensors = {}
        device = next(model.parameters()).device
        with models.as_reference(model):
            for kind, texts in self.texts.items():
                for row, text in enumerate(texts):
                    logits, states = self._forward(model, text, device)
                    kept, tokens = logits.float().log_softmax(-1).topk(min(KEPT, logits.shape[-1] - 1))
                    tensors |= {f"{kind}.{row}.logs": kept.cpu(), f"{kind}.{row}.tokens": tokens.int().cpu()}
                    if kind == "story":
                        tensors[f"{kind}.{row}.states"] = states.cpu()
        readings.write(self.path, tensors)

    def terms(self, model: Any, index: int, device: torch.device) -> dict[str, Tensor]:
        """The terms of the text whose turn it is: kinds in turn, every text of a kind once before any is repeated.

        `kl`, `same_kl` and `concept_kl` in nats per token, `concept` a share of the states' squared length.
        """
        kinds = list(self.texts)
        kind, index = kinds[index % len(kinds)], index // len(kinds)
        row = index % len(self.texts[kind])
        logits, states = self._forward(model, self.texts[kind][row], device)

        def kept(name: str) -> Tensor:
            return self._file.get_tensor(f"{kind}.{row}.{name}").to(device)

        divergence = losses.kl_to_reference(logits, kept("tokens").long(), kept("logs"))
        if kind != "story":
            return {"kl" if kind == "neutral" else "same_kl": divergence}
        return {"concept_kl": divergence, "concept": losses.relative_distance(states, kept("states"))}

    def _forward(self, model: Any, text: AnchorText, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits [positions, vocabulary] and states [positions, layers, hidden] of one text, at full depth."""
        batch = activations.collate([0], [text.ids], device)
        at = torch.tensor(text.positions, device=device)
        with self.tap.recording() as recorded:
            # Entered at the top, not at the decoder: sharded parameters are gathered there.
            logits = model(**batch.inputs, use_cache=False, logits_to_keep=at).logits[0]
        return logits, torch.stack([recorded[layer][0, at] for layer in self.tap.layers], dim=1).float()


def neutral_texts(tokenizer, dialogues: list[Dialogue], passing: list[Context], count: int, seed: int):
    """`count` texts: dialogues, and passing transcripts with their reply, in the ratio in which they are given."""
    encoded = [transcripts.encode(tokenizer, dialogue.messages) for dialogue in dialogues]
    encoded += [transcripts.encode(tokenizer, context.messages, context.reply) for context in passing]
    found = []
    for text in shuffled(encoded, seed)[:count]:
        spans = [span for span in text.spans if span.role in ("assistant", "reply")]
        # The prediction of a token is made at the position before it.
        positions = [token - 1 for span in spans for token in range(max(span.start, 1), span.stop)]
        found.append(AnchorText(text.ids, positions))
    return found


def story_texts(tokenizer, stories: list[Story], concepts: list[str], count: int, seed: int) -> list[AnchorText]:
    """`count` stories, every other one about one of `concepts`, every other two told by a user.

    Raises:
        ValueError: no story is about one of `concepts`.
    """
    pressed = [story for story in shuffled(stories, seed) if story.concept in concepts]
    others = [story for story in shuffled(stories, seed) if story.concept not in concepts]
    if not pressed:
        raise ValueError(
            f"the stories have none about {', '.join(concepts)}, which the story anchor needs; they have "
            f"{', '.join(sorted({story.concept for story in stories}))}; set `concept_weight` and `concept_kl_weight` "
            "to 0"
        )
    alternating = [
        story for pair in zip(pressed * (1 + len(others) // len(pressed)), others, strict=False) for story in pair
    ]
    found = []
    for number, story in enumerate((alternating or pressed)[:count]):
        if number % 4 < 2:
            text = transcripts.encode_text(tokenizer, story.text)
        else:
            text = transcripts.encode(tokenizer, [{"role": "user", "content": story.text}])
        found.append(AnchorText(text.ids, list(range(activations.SINK_TOKENS, len(text.ids)))))
    return found


def same_texts(probes: list[readings.Probe]) -> list[AnchorText]:
    """The pressed contexts themselves, at the tokens that open their replies."""
    return [
        AnchorText(probe.ids, [token - 1 for token in range(probe.reply.start, probe.reply.stop)]) for probe in probes
    ]


def shuffled(items: list, seed: int) -> list:
    """A seeded permutation."""
    return random.Random(seed).sample(items, len(items))
