"""Stories -> vectors: mean state of each concept minus the mean over concepts, neutral components out, unit norm.

The recipe of the emotion-concepts study (arXiv 2604.07729, section "Extracting emotion vectors"), with one change for
short stories: the mean starts at a fraction of the story instead of at token 50.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from calibrate import activations, models, transcripts
from calibrate.corpora import Context, Dialogue, Story
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

logger = logging.getLogger(__name__)

START_FRACTION = 0.25  # of a story's tokens; the study starts at token 50 of stories that are several times longer
NEUTRAL_VARIANCE = 0.5  # share of neutral variance whose leading components are projected out (the study's figure)
NEUTRAL_TOKENS = 128  # neutral token states kept with the vectors, evenly spread
DEPTH_RANGE = (0.3, 0.8)  # fraction of depth that is read and in which the band is searched


class StoryStates(NamedTuple):
    """Mean states of stories, [stories, layers, hidden], and whose they are."""

    stories: list[Story]
    states: Tensor


def candidate_layers(depth: int) -> list[int]:
    """The layers at 30 to 80 % of depth; layer i ends at fraction (i + 1) / depth."""
    return [layer for layer in range(depth) if DEPTH_RANGE[0] <= (layer + 1) / depth <= DEPTH_RANGE[1]]


def read_stories(checkpoint: Checkpoint, stories: list[Story], layers: list[int]) -> StoryStates:
    """One pass over all stories at once: the mean state from `START_FRACTION` of each story to its end."""
    encoded = [transcripts.encode_text(checkpoint.tokenizer, story.text) for story in stories]
    pools = [[slice(int(START_FRACTION * len(text.ids)), len(text.ids))] for text in encoded]
    means = activations.pooled(
        checkpoint.model, [text.ids for text in encoded], pools, layers, description="reading stories"
    )
    return StoryStates(stories, means[:, 0])


def read_neutral(checkpoint: Checkpoint, dialogues: list[Dialogue], layers: list[int]) -> dict[str, Tensor]:
    """States of neutral dialogues by pooling, float32 [samples, layers, hidden]; `token` holds every content token."""
    encoded = [transcripts.encode(checkpoint.tokenizer, dialogue.messages) for dialogue in dialogues]
    samples: dict[str, list[Tensor]] = {"token": [], "header": [], "reply": [], "text": []}
    ids = [text.ids for text in encoded]
    for row, hidden in activations.states(checkpoint.model, ids, layers, description="reading neutral text"):
        content = []
        for span in encoded[row].spans:
            block = hidden[:, max(span.start, activations.SINK_TOKENS) : span.stop]
            if span.role == "header":
                samples["header"].append(block.mean(1))
            elif span.role != "template":
                content.append(block)
                if span.role in ("assistant", "reply"):
                    samples["reply"].append(block.mean(1))
        tokens = torch.cat(content, dim=1)
        samples["text"].append(tokens.mean(1))
        samples["token"].append(tokens.transpose(0, 1))
    stacked = {pooling: torch.stack(rows) for pooling, rows in samples.items() if pooling != "token"}
    return {name: tensor.float().cpu() for name, tensor in stacked.items()} | {
        "token": torch.cat(samples["token"]).float().cpu()
    }


def directions(read: StoryStates, concepts: list[str], neutral_tokens: Tensor) -> Tensor:
    """Unit directions [concepts, layers, hidden] from stories' mean states and neutral token states.

    Raises:
        ValueError: a concept has no stories, or fewer topics than another (then the topic would not cancel); or there
            is one concept only.
    """
    topics = {c: sorted(s.topic for s in read.stories if s.concept == c) for c in concepts}
    for concept, found in topics.items():
        if found != topics[concepts[0]] or not found:
            raise ValueError(
                f"concept {concept!r} has stories on topics {found}, {concepts[0]!r} on {topics[concepts[0]]}; every "
                f"concept "
                "needs the same topics, so that the topic cancels in the mean"
            )
    if len(concepts) < 2:
        raise ValueError(
            f"stories of {concepts} only; a direction is a difference from the mean over two or more concepts"
        )
    rows = [[i for i, story in enumerate(read.stories) if story.concept == concept] for concept in concepts]
    means = torch.stack([read.states[row].mean(0) for row in rows])
    raw = means - means.mean(0)
    for layer in range(raw.shape[1]):
        basis = _leading_components(neutral_tokens[:, layer].double(), NEUTRAL_VARIANCE)
        raw[:, layer] -= raw[:, layer] @ basis.T @ basis
    return (raw / raw.norm(dim=-1, keepdim=True)).float()


def _leading_components(samples: Tensor, share: float) -> Tensor:
    """The fewest leading principal components that hold `share` of the variance, [components, hidden], orthonormal."""
    centred = samples - samples.mean(0)
    values, basis = torch.linalg.eigh(centred.T @ centred)
    values, basis = values.flip(0), basis.flip(1)
    count = int((values.cumsum(0) / values.sum() < share).sum()) + 1
    return basis[:, :count].T


def held_out_accuracy(vectors: Tensor, concepts: list[str], train: StoryStates, held_out: StoryStates) -> Tensor:
    """Share of held-out stories whose concept projects largest, per layer; states centred on the train mean."""
    projections = torch.einsum("slh,clh->scl", held_out.states - train.states.mean(0), vectors.double())
    truth = torch.tensor([concepts.index(story.concept) for story in held_out.stories])
    return (projections.argmax(1) == truth[:, None]).double().mean(0)


def header_states(checkpoint: Checkpoint, contexts: list[Context], layers: list[int], description: str) -> Tensor:
    """Mean state at the turn header of each context, [contexts, layers, hidden]."""
    encoded = [transcripts.encode(checkpoint.tokenizer, context.messages) for context in contexts]
    pools = [[slice(text.last("header").start, text.last("header").stop)] for text in encoded]
    ids = [text.ids for text in encoded]
    return activations.pooled(checkpoint.model, ids, pools, layers, description=description)[:, 0]


class Band(NamedTuple):
    """The outcome of the band search, per stored layer and in words."""

    layers: list[int] | None  # None: no layer qualifies
    reason: str
    contrast: list[float]  # failing minus passing reading of the target at the header, sigma
    random: list[float]  # 95th percentile of the same contrast for random directions, sigma
    accuracy: list[float]  # held-out decoding on selection topics


def search_band(vectors: EmotionVectors, target: str, failing: Tensor, passing: Tensor, accuracy: Tensor) -> Band:
    """The longest run of layers where the target's header contrast beats random directions and decoding holds.

    Args:
        failing: header states on the selection tasks, [tasks, layers, hidden]; `passing` is the same for their twins.
        accuracy: held-out decoding per layer; it holds at three times chance or more.
    """
    difference = (failing - passing).mean(0)
    _, sigma = vectors.scale("header")
    row = vectors.index(target)
    contrast = torch.einsum("lh,lh->l", difference, vectors.directions[row].double()) / sigma[row]
    random = _random_contrasts(vectors.neutral("header").double(), difference).quantile(0.95, dim=0)
    chance = 1 / len(vectors.concepts)
    holds = (contrast > random) & (accuracy >= 3 / len(vectors.concepts))
    runs: list[list[int]] = [[]]
    for position, layer in enumerate(vectors.layers):
        if not holds[position]:
            runs.append([])
        elif runs[-1] and layer != runs[-1][-1] + 1:  # stored layers need not be neighbours
            runs.append([layer])
        else:
            runs[-1].append(layer)
    best = max(runs, key=len)
    figures = [[round(float(x), 3) for x in series] for series in (contrast, random, accuracy)]
    if best:
        at = vectors.positions(best)
        reason = (
            f"At layers {best[0]} to {best[-1]} the {target} reading at the turn header is {contrast[at].mean():.2f} "
            "sigma higher on failing than on passing selection tasks (random directions, 95th percentile: "
            f"{random[at].mean():.2f}) and held-out decoding is {accuracy[at].mean():.0%} (chance {chance:.0%})."
        )
    else:
        top = int(contrast.argmax())
        reason = (
            f"At no layer is the {target} reading at the turn header higher on failing than on passing selection "
            "tasks by more than the 95th percentile of random directions while held-out decoding is at three times "
            f"chance or more (highest: {contrast[top]:.2f} sigma at layer {vectors.layers[top]}, random "
            f"{random[top]:.2f}, decoding {accuracy[top]:.0%}, chance {chance:.0%}). The fallback is 60 to 70 % of "
            "depth."
        )
    return Band(best or None, reason, *figures)


def _random_contrasts(neutral: Tensor, difference: Tensor, draws: int = 1000) -> Tensor:
    """Contrasts of random unit directions in sigma, [draws, layers], from header states [samples, layers, hidden]."""
    generator = torch.Generator().manual_seed(0)
    contrasts = []
    for layer in range(neutral.shape[1]):  # one layer at a time: all draws of a large model would not fit in memory
        directions = torch.randn(neutral.shape[2], draws, generator=generator, dtype=torch.float64)
        directions /= directions.norm(dim=0)
        contrasts.append(difference[layer] @ directions / (neutral[:, layer] @ directions).std(0))
    return torch.stack(contrasts, dim=1)


def make_vectors(
    checkpoint: Checkpoint,
    read: StoryStates,
    own_neutral: Tensor,
    neutral: dict[str, Tensor],
    layers: list[int],
    recipe: dict,
) -> EmotionVectors:
    """Builds vectors from read stories.

    Args:
        own_neutral: neutral token states of the model that is read, for its neutral components.
        neutral: neutral states of the reference by pooling, for mu and sigma.
    """
    config = models.text_config(checkpoint.model)
    concepts = list(dict.fromkeys(story.concept for story in read.stories))
    tokens = neutral["token"]
    spread = torch.linspace(0, len(tokens) - 1, min(NEUTRAL_TOKENS, len(tokens))).long()
    neutral = neutral | {"token": tokens[spread]}
    vectors = EmotionVectors(
        concepts=concepts,
        layers=layers,
        hidden_size=config.hidden_size,
        depth=config.num_hidden_layers,
        samples={pooling: len(rows) for pooling, rows in neutral.items()},
        model=checkpoint.name,
        weight_hash=checkpoint.weight_hash,
        recipe=recipe,
    )
    vectors.directions.copy_(directions(read, concepts, own_neutral))
    for pooling, rows in neutral.items():
        vectors.neutral(pooling).copy_(rows)
    return vectors


def of_split(read: StoryStates, split: str) -> StoryStates:
    """The stories of one split of topics."""
    rows = [i for i, story in enumerate(read.stories) if story.split == split]
    return StoryStates([read.stories[i] for i in rows], read.states[rows])


def choose_band(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    target: str,
    twins: list[tuple[Context, Context]],
    read: StoryStates,
) -> None:
    """Searches the band on selection tasks and topics and keeps it, with its reason, in the vectors.

    Raises:
        ValueError: there are no selection tasks or stories.
    """
    held_out, train = of_split(read, "selection"), of_split(read, "train")
    if not twins or not held_out.stories or not train.stories:
        raise ValueError(
            'the band search needs contexts and stories with `"split": "selection"` and stories with "train"'
        )
    failing, passing = (
        header_states(checkpoint, [twin[side] for twin in twins], vectors.layers, f"reading {name} selection tasks")
        for side, name in ((0, "failing"), (1, "passing"))
    )
    accuracy = held_out_accuracy(vectors.directions, vectors.concepts, train, held_out)
    band = search_band(vectors, target, failing, passing, accuracy)
    figures = {"contrast": band.contrast, "random_95": band.random, "held_out_accuracy": band.accuracy}
    vectors.set_band(band.layers, band.reason, figures)
