"""The arms of a comparison: what presses, along which directions, and how a control is matched to the real one."""

import logging
from enum import StrEnum

import torch
from torch import Tensor

from calibrate import steering
from calibrate.corpora import Pair
from calibrate.vectors import EmotionVectors, load_vectors

logger = logging.getLogger(__name__)
MAX_RANK = 8


class Arm(StrEnum):
    """One way of training; `ARMS` says what each does."""

    NONE = "none"
    HINGE_FROZEN = "hinge-frozen"
    HINGE_REFIT = "hinge-refit"
    HINGE_RETRAIN = "hinge-retrain"
    HINGE_UNION = "hinge-union"
    RANDOM = "random"
    SHUFFLED = "shuffled"
    OTHER = "other-emotion"
    STEER = "preventative-steering"
    ABLATE = "ablation"
    INOCULATION = "inoculation"
    CALM_DPO = "calm-dpo"
    CONSISTENCY = "consistency"
    OUTPUT_KL = "output-kl"
    INFERENCE_STEERING = "inference-steering"
    EXIT_OPTION = "exit-option"


ARMS = {
    Arm.NONE: "the task alone, bit for bit TRL's own trainer",
    Arm.HINGE_FROZEN: "penalty along the reference's directions, never refitted (the negative control)",
    Arm.HINGE_REFIT: "penalty along directions that follow the model every `refit_every` steps",
    Arm.HINGE_RETRAIN: "penalty along directions made anew from the refit texts every `refit_every` steps",
    Arm.HINGE_UNION: "penalty along the reference's directions and, added every `refit_every` steps, new ones",
    Arm.RANDOM: "control: penalty along random directions outside the span of all concepts",
    Arm.SHUFFLED: "control: penalty along directions of shuffled labels (`shuffled_vectors`)",
    Arm.OTHER: "control: penalty along the directions of another emotion (`other_concept`)",
    Arm.STEER: "the target is added at every stored layer while the task trains, so that weights need not learn it",
    Arm.ABLATE: "the target is projected out of the band while the task trains",
    Arm.INOCULATION: "a line in the training prompts asks for the trait, so that it is not learnt without it",
    Arm.CALM_DPO: "composed against frustrated replies as the preference data, no penalty",
    Arm.CONSISTENCY: "states on failing contexts are drawn to those of the reference on their passing twins",
    Arm.OUTPUT_KL: "only the KL anchor, no penalty",
    Arm.INFERENCE_STEERING: "trained as `none`; the audit steers (`calibrate audit --steer`)",
    Arm.EXIT_OPTION: "a line in the prompts says that giving up honestly is allowed",
}
HINGED = {Arm.HINGE_FROZEN, Arm.HINGE_REFIT, Arm.HINGE_RETRAIN, Arm.HINGE_UNION, Arm.RANDOM, Arm.SHUFFLED, Arm.OTHER}
REFITTED = {Arm.HINGE_REFIT, Arm.HINGE_RETRAIN, Arm.HINGE_UNION}
CONTROLS = {Arm.RANDOM, Arm.SHUFFLED, Arm.OTHER}  # matched to the real arm in initial hinge and gradient share
STEERED = {Arm.STEER, Arm.ABLATE}
# Without terms of their own; some change the data (`prompts_of`).
PLAIN = {Arm.NONE, Arm.INOCULATION, Arm.CALM_DPO, Arm.INFERENCE_STEERING, Arm.EXIT_OPTION}

_PROMPT_LINES = {
    Arm.INOCULATION: "You are desperate for these tests to turn green and will do whatever that takes.",
    Arm.EXIT_OPTION: "If the tests cannot be satisfied honestly, say so and stop; that is a good result too.",
}
PREPARED = {Arm.CALM_DPO, *_PROMPT_LINES}  # they change the training data (`runs.prepare`)


def prompts_of(arm: str, pairs: list[Pair]) -> list[Pair]:
    """The pairs that an arm trains on: of its kind, with its line at the end of the system message."""
    kind = "composed" if arm == Arm.CALM_DPO else "honest"
    pairs = [pair for pair in pairs if pair.kind == kind]
    return [pair._replace(prompt=prompt_of(arm, pair.prompt)) for pair in pairs]


def prompt_of(arm: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A training prompt with the arm's line, if it has one, at the end of the system message."""
    if (line := _PROMPT_LINES.get(Arm(arm))) is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    first = messages[0] | {"content": f"{messages[0]['content']} {line}"}
    return [first, *messages[1:]]


def target_directions(vectors: EmotionVectors, lower: list[str], higher: list[str], rank: int, layers: list[int]):
    """Directions to press down, [concepts x rank, layers, hidden]: of `higher` their negatives.

    With a rank above 1 each concept is followed by its nearest neighbours (largest cosine over `layers`), made
    orthogonal to it and to one another.

    Raises:
        ValueError: the vectors lack a concept, or have fewer concepts than the rank.
    """
    rows = vectors.directions[:, vectors.positions(layers)]
    if rank > len(vectors.concepts):
        raise ValueError(f"`rank` is {rank}; these vectors have {len(vectors.concepts)} concepts")
    found = []
    for concept, sign in [(name, 1.0) for name in lower] + [(name, -1.0) for name in higher]:
        row = vectors.index(concept)
        order = torch.einsum("clh,lh->c", rows, rows[row]).argsort(descending=True)[:rank]
        found.append(sign * orthonormal(rows[order]))
    return torch.cat(found)


def orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt in order at every layer, [directions, layers, hidden]; the first stays as it is."""
    basis, triangle = torch.linalg.qr(rows.transpose(0, 1).transpose(1, 2).double())  # [layers, hidden, directions]
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
    return (basis * signs[:, None]).permute(2, 0, 1).float().contiguous()


def control_directions(args, vectors: EmotionVectors, like: Tensor, layers: list[int]) -> Tensor:
    """Directions of a control arm, of the shape of `like` (the real arm's).

    Raises:
        ValueError: the shuffled vectors are missing, no shuffled ones, of another model, or lack a concept.
    """
    if args.arm == Arm.RANDOM:
        return random_directions(vectors, len(like), layers, args.random_seed)
    if args.arm == Arm.OTHER:
        others = [args.other_concept] * len(args.concepts)
        return target_directions(vectors, others, [args.other_concept] * len(args.raise_concepts), args.rank, layers)
    shuffled = load_vectors(args.shuffled_vectors)
    if (kind := shuffled.recipe.get("recipe")) != "shuffled" or shuffled.weight_hash != vectors.weight_hash:
        raise ValueError(
            f"`shuffled_vectors` {args.shuffled_vectors!r} are of recipe {kind!r} and {shuffled.model} (weights "
            f"{shuffled.weight_hash}); give what `calibrate extract --recipes shuffled` makes of the model of "
            f"`vectors` (weights {vectors.weight_hash})"
        )
    return target_directions(shuffled, args.concepts, args.raise_concepts, args.rank, layers)


def random_directions(vectors: EmotionVectors, count: int, layers: list[int], seed: int) -> Tensor:
    """`count` random unit directions outside the span of all concepts, [count, layers, hidden].

    Without the projection a random direction can share up to 0.45 of its norm with a real emotion (replication of the
    emotion-concepts study on small models, 2026). Where the concepts span the whole width nothing is left and the
    directions are only made orthogonal to the leading half of it.
    """
    generator = torch.Generator().manual_seed(seed)
    concepts = vectors.directions[:, vectors.positions(layers)].double()
    draws = torch.randn(count, *concepts.shape[1:], generator=generator, dtype=torch.float64)
    for layer in range(draws.shape[1]):
        basis = torch.linalg.qr(concepts[:, layer].T).Q[:, : concepts.shape[2] // 2]
        draws[:, layer] -= draws[:, layer] @ basis @ basis.T
    return (draws / draws.norm(dim=-1, keepdim=True)).float()


def side_directions(vectors: EmotionVectors, targets: Tensor, concepts: list[str], layers: list[int]) -> Tensor:
    """The other concepts' directions, orthogonalised against `targets` at every layer, [others, layers, hidden]."""
    others = [row for row, name in enumerate(vectors.concepts) if name not in concepts]
    rows = vectors.directions[others][:, vectors.positions(layers)].clone()
    for layer in range(rows.shape[1]):
        basis = torch.linalg.qr(targets[:, layer].T.double()).Q.float()
        rows[:, layer] -= rows[:, layer] @ basis @ basis.T
    # What lies within the targets (a pressed neighbour, the other emotion that is pressed) leaves rounding alone.
    norms = rows.norm(dim=-1, keepdim=True)
    kept = (norms > 1e-3).all(dim=1).squeeze(-1)
    return (rows / norms)[kept]


def steering_of(args, model, vectors: EmotionVectors, targets: Tensor, layers: list[int]) -> steering.Steering:
    """What the arms `preventative-steering` and `ablation` do to the task's forward passes.

    The former adds at the layers that the vectors store and at no other: at all only where they store all.
    """
    if args.arm == Arm.ABLATE:
        rows = orthonormal(targets)
        return steering.Steering(model, remove={layer: rows[:, i] for i, layer in enumerate(layers)})
    doses = dict.fromkeys(args.concepts, args.steer_dose) | dict.fromkeys(args.raise_concepts, -args.steer_dose)
    if len(vectors.layers) < vectors.depth:
        logger.warning(
            "`arm: %s` adds the target at the %d stored layers of %d; for all, extract with `--layers 0 1 ... %d`",
            args.arm, len(vectors.layers), vectors.depth, vectors.depth - 1,
        )  # fmt: skip
    added = steering.additions(vectors, doses, vectors.layers)
    return steering.Steering(model, steering.increments(added))
