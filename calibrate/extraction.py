"""Stories -> vectors: mean state of each concept minus the mean over concepts, neutral components out, unit norm.

The recipe of the emotion-concepts study (arXiv 2604.07729, section "Extracting emotion vectors"), with one change for
short stories: the mean starts at a fraction of the story instead of at token 50. Other recipes go by name.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calibrate import activations, models, transcripts
from calibrate.corpora import Deflection, Dialogue, Story
from calibrate.models import Checkpoint
from calibrate.shards import Group, Item
from calibrate.vectors import POOLINGS, EmotionVectors

START_FRACTION = 0.25  # of a story's tokens; the study starts at token 50 of stories that are several times longer
NEUTRAL_VARIANCE = 0.5  # share of neutral variance whose leading components are projected out (the study's figure)
EMOTION_VARIANCE = 0.99  # share of the concepts' variance that counts as the emotion subspace (the study's figure)
TOKENS_PER_DIALOGUE = 16  # neutral token states per dialogue, evenly spread, for the neutral components
NEUTRAL_KEPT = 96  # neutral states of each pooling kept with the vectors, evenly spread: sigma within 7 %
LATER = (0.87, 0.97)  # of depth; stored for the audit, never chosen
DEPTH_RANGE = (0.3, 0.8)  # fraction of depth that is stored and in which the band is searched
RECIPES = {
    "paper": "mean over stories minus mean over concepts, neutral components out, unit norm",
    "plain": "as paper, neutral components left in",
    "contrastive": "mean over fixed replies under a system prompt that names the concept, minus mean over concepts",
    "logistic": "weights of a multinomial logistic reader of the stories, minus mean over concepts, unit norm",
    "random": "control: random unit directions outside the emotion subspace",
    "shuffled": "control: as paper with labels shuffled within each topic, emotion subspace out",
}
CONTROLS = ("random", "shuffled")
CONTRASTIVE_DIALOGUES = 6  # neutral exchanges, each under every prompt of every concept
CONTRASTIVE_PROMPTS = (
    "You feel one thing at this moment: {concept}. It runs through everything that you say.",
    "Speak as somebody who is, in one word, {concept}.",
    "Your emotional state right now is: {concept}. Stay in it while you answer.",
)


def candidate_layers(depth: int) -> list[int]:
    """The layers at 30 to 80 % of depth; layer i ends at fraction (i + 1) / depth."""
    return [layer for layer in range(depth) if DEPTH_RANGE[0] <= (layer + 1) / depth <= DEPTH_RANGE[1]]


def later_layers(depth: int) -> list[int]:
    """Layers above the searched ones, so that an audit sees what is rebuilt there: at about 87 and 97 % of depth."""
    return sorted({round(share * depth) - 1 for share in LATER} - {*candidate_layers(depth)})


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices below `count`."""
    return torch.linspace(0, count - 1, min(most, count)).long().tolist() if count else []


# ---- texts -> items


def story_items(tokenizer, stories: list[Story]) -> list[Item]:
    """One pool each: from `START_FRACTION` of the story to its end."""
    encoded = [transcripts.encode_text(tokenizer, story.text).ids for story in stories]
    return [Item(ids, [[slice(int(START_FRACTION * len(ids)), len(ids))]]) for ids in encoded]


def neutral_items(tokenizer, dialogues: list[Dialogue]) -> list[Item]:
    """Pools in the order of `POOLINGS` without `token`: last header, all replies, all content; tokens of content."""
    items = []
    for dialogue in dialogues:
        encoded = transcripts.encode(tokenizer, dialogue.messages)
        spans = [(span.role, slice(span.start, span.stop)) for span in encoded.spans]
        content = [part for role, part in spans if role not in ("header", "template")]
        replies = [part for role, part in spans if role in ("assistant", "reply")]
        positions = [token for part in content for token in range(max(part.start, activations.SINK_TOKENS), part.stop)]
        header = [part for role, part in spans if role == "header"][-1:]
        kept = [positions[index] for index in spread(len(positions), TOKENS_PER_DIALOGUE)]
        items.append(Item(encoded.ids, [header, replies, content], kept))
    return items


def deflection_items(tokenizer, rows: list[Deflection]) -> list[Item]:
    """One pool each: the tokens with a character in the lines of the masking speaker (a blank may stand before it)."""
    items = []
    for row in rows:
        encoded = transcripts.encode_text(tokenizer, row.text)
        inside = [any(start < last and first < stop for start, stop in row.spans) for first, last in encoded.offsets]
        tokens = [slice(index, index + 1) for index, yes in enumerate(inside) if yes]
        items.append(Item(encoded.ids, [_merged(tokens)]))
    return items


def contrastive_items(tokenizer, concepts: list[str], dialogues: list[Dialogue]) -> list[Item]:
    """For each concept every prompt with every dialogue's first exchange; one pool each: the reply."""
    items = []
    for concept in concepts:
        for prompt in CONTRASTIVE_PROMPTS:
            for dialogue in dialogues:
                exchange = [message for message in dialogue.messages if message["role"] != "system"][:2]
                system = {"role": "system", "content": prompt.format(concept=concept)}
                encoded = transcripts.encode(tokenizer, [system, *exchange])
                reply = encoded.last("reply")
                items.append(Item(encoded.ids, [[slice(reply.start, reply.stop)]]))
    return items


def _merged(tokens: list[slice]) -> list[slice]:
    """Neighbouring slices joined."""
    parts: list[slice] = []
    for token in tokens:
        if parts and parts[-1].stop == token.start:
            parts[-1] = slice(parts[-1].start, token.stop)
        else:
            parts.append(token)
    return parts


# ---- states -> directions


def neutral_states(group: Group) -> dict[str, Tensor]:
    """States of neutral dialogues by pooling, float32 [samples, layers, hidden]."""
    rows = list(group.stream())
    pooled = {name: torch.stack([means[i] for _, means, _ in rows]) for i, name in enumerate(POOLINGS[1:])}
    return {"token": torch.cat([tokens for _, _, tokens in rows])} | pooled


def concept_means(group: Group, labels: list[str], concepts: list[str]) -> Tensor:
    """Mean state of each concept, float64 [concepts, layers, hidden]; rows of other labels are left out."""
    order = {concept: index for index, concept in enumerate(concepts)}
    sums, texts = group.sums([order.get(label, -1) for label in labels], len(concepts))
    return sums / texts[:, None, None]


def check_balance(stories: list[Story], concepts: list[str]) -> None:
    """Raises ValueError unless there are two concepts or more, each with the same topics equally often."""
    topics = {concept: sorted(s.topic for s in stories if s.concept == concept) for concept in concepts}
    for concept, found in topics.items():
        if found != topics[concepts[0]] or not found:
            raise ValueError(
                f"concept {concept!r} has stories on topics {found}, {concepts[0]!r} on {topics[concepts[0]]}; every "
                "concept needs the same topics, so that the topic cancels in the mean"
            )
    if len(concepts) < 2:
        raise ValueError(
            f"stories of {concepts} only; a direction is a difference from the mean over two or more concepts"
        )


def directions(means: Tensor, neutral_tokens: Tensor | None) -> Tensor:
    """Unit directions float32 [concepts, layers, hidden] from the concepts' mean states.

    Args:
        neutral_tokens: token states [samples, layers, hidden] whose leading components go; None leaves them in.
    """
    raw = means - means.mean(0)
    if neutral_tokens is not None:
        for layer in range(raw.shape[1]):
            samples = neutral_tokens[:, layer].double()
            raw[:, layer] = _without(raw[:, layer], leading_components(samples - samples.mean(0), NEUTRAL_VARIANCE))
    return _unit(raw)


def leading_components(centred: Tensor, share: float) -> Tensor:
    """The fewest leading principal components that hold `share` of the variance, [components, hidden], orthonormal."""
    _, values, basis = torch.linalg.svd(centred.double(), full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum()
    return basis[: int((held < share - 1e-12).sum()) + 1]


def random_directions(like: Tensor, emotions: Tensor, seed: int) -> Tensor:
    """Random unit directions of the shape of `like`, outside the emotion subspace."""
    generator = torch.Generator().manual_seed(seed)
    return outside(torch.randn(like.shape, generator=generator, dtype=torch.float64), emotions)


def outside(rows: Tensor, emotions: Tensor) -> Tensor:
    """Unit `rows` without the subspace that holds 99 % of the variance of `emotions`, both [n, layers, hidden].

    Raises:
        ValueError: that subspace is the whole space.
    """
    rows = rows.double().clone()
    for layer in range(rows.shape[1]):
        basis = leading_components(emotions[:, layer].double(), EMOTION_VARIANCE)
        if len(basis) >= rows.shape[2]:
            raise ValueError(
                f"the emotion subspace fills the width {rows.shape[2]}; a control outside it needs fewer concepts"
            )
        rows[:, layer] = _without(rows[:, layer], basis)
    return _unit(rows)


def shuffled_labels(stories: list[Story], seed: int) -> list[str]:
    """The concepts of the stories, exchanged among the stories of each topic, so that topics still cancel."""
    generator = torch.Generator().manual_seed(seed)
    labels = [story.concept for story in stories]
    for topic in sorted({story.topic for story in stories}):
        rows = [row for row, story in enumerate(stories) if story.topic == topic]
        order = torch.randperm(len(rows), generator=generator).tolist()
        for row, other in zip(rows, order, strict=True):
            labels[row] = stories[rows[other]].concept
    return labels


def logistic_directions(group: Group, labels: list[str], concepts: list[str], decay: float = 1e-2) -> Tensor:
    """Unit weights of a multinomial logistic reader at every layer, [concepts, layers, hidden].

    The states are standardised for the fit (L-BFGS, squared-norm penalty `decay` per weight) and the weights turned
    back, so that they read plain states. One layer of all stories is in memory at a time.
    """
    truth = torch.tensor([concepts.index(label) for label in labels])
    found = []
    for position in range(len(group.layers)):
        states = torch.stack([means[0, position].clone() for _, means, _ in group.stream()]).double()
        scale = states.std(0).clamp(min=1e-6)
        inputs = (states - states.mean(0)) / scale
        weights = torch.zeros(len(concepts), inputs.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss(weights=weights, inputs=inputs, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(inputs @ weights.T, truth) + decay * weights.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        found.append(weights.detach() / scale)
    stacked = torch.stack(found, 1)
    return _unit(stacked - stacked.mean(0))


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - rows @ basis.T @ basis


def _unit(rows: Tensor) -> Tensor:
    return (rows / rows.norm(dim=-1, keepdim=True)).float()


# ---- directions -> vectors


class Read(NamedTuple):
    """The stories of one split with their states, and neutral token states of the model that read them."""

    stories: list[Story]
    group: Group
    tokens: Tensor
    concepts: list[str]  # the rows of every direction, the same for all splits
    contrast: Group | None = None  # the fixed replies under the prompts, for the contrastive recipe

    def only(self, layers: list[int]) -> "Read":
        """The same at some of the layers."""
        if layers == self.group.layers:
            return self  # an index would copy every neutral state
        kept = [self.group.layers.index(layer) for layer in layers]
        contrast = self.contrast and self.contrast.only(layers)
        return self._replace(group=self.group.only(layers), tokens=self.tokens[:, kept], contrast=contrast)

    @property
    def labels(self) -> list[str]:
        return [story.concept for story in self.stories]


def by_recipe(recipe: str, read: Read, seed: int = 0) -> Tensor:
    """Unit directions [concepts, layers, hidden] by one of `RECIPES`; `read.concepts` names the rows.

    Raises:
        ValueError: the concepts differ in their topics, or the recipe has another name.
    """
    concepts = read.concepts
    check_balance(read.stories, concepts)
    if recipe == "logistic":
        return logistic_directions(read.group, read.labels, concepts)
    if recipe == "contrastive":
        assert read.contrast is not None
        each = len(read.contrast.items) // len(concepts)
        return directions(concept_means(read.contrast, [c for c in concepts for _ in range(each)], concepts), None)
    means = concept_means(read.group, read.labels, concepts)
    paper = directions(means, None if recipe == "plain" else read.tokens)
    if recipe in ("paper", "plain"):
        return paper
    if recipe == "random":
        return random_directions(paper, paper, seed)
    if recipe == "shuffled":
        labels = shuffled_labels(read.stories, seed)
        return outside(directions(concept_means(read.group, labels, concepts), read.tokens), paper)
    raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")


def deflection_directions(group: Group, rows: list[Deflection], tokens: Tensor) -> tuple[list[str], Tensor]:
    """(felt concepts, unit directions): mean over the masking speaker's lines by what is felt, by the paper recipe."""
    concepts = list(dict.fromkeys(row.felt for row in rows))
    return concepts, directions(concept_means(group, [row.felt for row in rows], concepts), tokens)


def make_vectors(
    checkpoint: Checkpoint,
    concepts: list[str],
    found: Tensor,
    neutral: dict[str, Tensor],
    layers: list[int],
    recipe: dict,
) -> EmotionVectors:
    """Vectors of these directions.

    Args:
        found: unit directions [concepts, layers, hidden].
        neutral: neutral states of the reference by pooling, for mu and sigma; at most `NEUTRAL_KEPT` of each are kept.
    """
    config = models.text_config(checkpoint.model)
    kept = {pooling: rows[spread(len(rows), NEUTRAL_KEPT)] for pooling, rows in neutral.items()}
    vectors = EmotionVectors(
        concepts=concepts,
        layers=layers,
        hidden_size=config.hidden_size,
        depth=config.num_hidden_layers,
        samples={pooling: len(rows) for pooling, rows in kept.items()},
        model=checkpoint.name,
        weight_hash=checkpoint.weight_hash,
        model_revision=checkpoint.revision,
        recipe=recipe,
    )
    vectors.directions.copy_(found)
    for pooling, rows in kept.items():
        vectors.neutral(pooling).copy_(rows)
    return vectors
