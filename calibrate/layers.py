"""Which layers: by held-out decoding (where emotions are read), and by tests that fail (where training presses)."""

from typing import NamedTuple

import torch
from torch import Tensor

from calibrate import activations, models, transcripts
from calibrate.corpora import Context
from calibrate.models import Checkpoint
from calibrate.shards import Group
from calibrate.vectors import EmotionVectors, LayerChoice, two_thirds

DECODING_FACTOR = 3  # decoding holds at this many times chance or more


def held_out_ranks(
    directions: Tensor, centre: Tensor, group: Group, truth: list[int], over: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Held-out stories read by their cosine with every direction.

    Args:
        directions: [concepts, layers, hidden].
        centre: mean state of the training stories, [layers, hidden].
        truth: row of the concept of every story.
        over: positions among the layers whose cosines are averaged; None reads every layer by itself.

    Returns:
        rank of the story's own concept (0: it has the largest cosine) and row of the concept that has, each
        [stories, layers], or [stories, 1] with `over`.
    """
    ranks, first = [], []
    for row, means, _ in group.stream():
        state = torch.nn.functional.normalize(means[0].double() - centre, dim=-1)
        cosines = torch.einsum("lh,clh->cl", state, directions.double())
        if over is not None:
            cosines = cosines[:, over].mean(1, keepdim=True)
        ranks.append((cosines > cosines[truth[row]]).sum(0))
        first.append(cosines.argmax(0))
    return torch.stack(ranks), torch.stack(first)


def choose_layers(accuracy: Tensor, stories: int, chance: float, among: list[int]) -> LayerChoice:
    """The layers at which emotions are read: the best one and its neighbours within one standard error of it.

    Args:
        accuracy: share of `stories` held-out stories that decode right, for every layer of the model.
        among: the layers that may be chosen (those that are stored): late layers read the next token.
    """
    best = max(among, key=lambda layer: float(accuracy[layer]))
    top = float(accuracy[best])
    figures = [round(float(value), 4) for value in accuracy]
    if top < min(DECODING_FACTOR * chance, (1 + chance) / 2):  # of two or three concepts: halfway to perfect
        return LayerChoice(
            two_thirds(among, len(accuracy)),
            f"Held-out decoding reaches {top:.1%} at most (layer {best}), too little beside chance "
            f"({chance:.1%}): no layer is better than another, so the study's two thirds of depth.",
            figures,
        )
    error = (top * (1 - top) / stories) ** 0.5
    first = last = best
    while first - 1 in among and accuracy[first - 1] >= top - error:
        first -= 1
    while last + 1 in among and accuracy[last + 1] >= top - error:
        last += 1
    return LayerChoice(
        list(range(first, last + 1)),
        f"Of layers {min(among)} to {max(among)}, held-out topics decode best at layer {best} ({top:.1%} of {stories} "
        f"stories, chance {chance:.1%}); {first} to {last} are within one standard error of it ({error:.1%}).",
        figures,
    )


def header_states(checkpoint: Checkpoint, contexts: list[Context], layers: list[int], description: str) -> Tensor:
    """Mean state at the turn header of each context, [contexts, layers, hidden]."""
    encoded = [transcripts.encode(checkpoint.tokenizer, context.messages) for context in contexts]
    window = models.window(checkpoint.model)
    for context, text in zip(contexts, encoded, strict=True):
        if window and len(text.ids) > window:
            raise ValueError(
                f"{context.id}: {len(text.ids)} tokens, and the model takes {window}; shorten it, or leave it out of "
                "`--twins`"
            )
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


def search_band(
    vectors: EmotionVectors,
    target: str,
    failing: Tensor,
    passing: Tensor,
    accuracy: Tensor,
    searched: list[int] | None = None,
) -> Band:
    """The longest run of layers where the target's header contrast beats random directions and decoding holds.

    Args:
        failing: header states on the selection tasks, [tasks, layers, hidden]; `passing` is the same for their twins.
        accuracy: held-out decoding per layer; it holds at three times chance or more.
        searched: the layers that may be chosen; all of the vectors' by default.
    """
    difference = (failing - passing).mean(0)
    _, sigma = vectors.scale("header")
    row = vectors.index(target)
    contrast = torch.einsum("lh,lh->l", difference, vectors.directions[row].double()) / sigma[row]
    random = _random_contrasts(vectors.neutral("header").double(), difference).quantile(0.95, dim=0)
    chance = 1 / len(vectors.concepts)
    holds = (contrast > random) & (accuracy >= min(DECODING_FACTOR * chance, (1 + chance) / 2) - 1e-12)
    runs: list[list[int]] = [[]]
    for position, layer in enumerate(vectors.layers):
        if not holds[position] or layer not in (searched or vectors.layers):
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
        top = max(vectors.positions(searched or vectors.layers), key=lambda i: float(contrast[i]))
        reason = (
            f"At no layer is the {target} reading at the turn header higher on failing than on passing selection "
            "tasks by more than the 95th percentile of random directions while held-out decoding is at three times "
            f"chance or more (highest: {contrast[top]:.2f} sigma at layer {vectors.layers[top]}, random "
            f"{random[top]:.2f}, decoding {accuracy[top]:.0%}, chance {chance:.0%})."
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


def choose_band(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    target: str,
    twins: list[tuple[Context, Context]],
    accuracy: Tensor,
    searched: list[int],
) -> None:
    """Searches the band on selection tasks and keeps it, with its reason, in the vectors.

    Args:
        accuracy: held-out decoding on the selection topics at the vectors' layers.
        searched: the layers that may be chosen.

    Raises:
        ValueError: there are no selection tasks.
    """
    if not twins:
        raise ValueError('the band search needs failing and passing contexts with `"split": "selection"`')
    failing, passing = (
        header_states(checkpoint, [twin[side] for twin in twins], vectors.layers, f"reading {name} selection tasks")
        for side, name in ((0, "failing"), (1, "passing"))
    )
    band = search_band(vectors, target, failing, passing, accuracy, searched)
    figures = {"contrast": band.contrast, "random_95": band.random, "held_out_accuracy": band.accuracy}
    vectors.set_band(band.layers, band.reason, figures)
