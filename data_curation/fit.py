"""`curate fit`: fits both tiers on labelled passages, by cross-validation over writers, and writes their folder."""

# ruff: noqa: T201 -- a command: it prints its evaluation

import argparse
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from data_curation import evaluation, features, kernels, ridge
from data_curation.facets import LOW, STANCES
from data_curation.kernels import Kernels
from data_curation.label import read_rows
from data_curation.scorer import EMOTIONS, FORMAT, GATES, Head

PENALTIES = {1: (0.1, 0.3, 1.0, 3.0), 2: (0.05, 0.15, 0.5, 1.5)}  # tried, by tier; layers are tried with the first
DEPTHS = (0.36, 0.43, 0.5, 0.53, 0.6, 0.67, 0.73, 0.77, 0.86)  # where a layer for tier 2 is looked for
LAYERS_READ = 4
THIRDS = ("first", "middle", "last")
OWN = ("scorer.json", "tier1.safetensors", "tier2.safetensors")  # files of a scorer's folder
FALSE_NULLS = 0.02  # of passages with a score, and of those that do harm, so many are read as having none
GRIEF_KEPT, TOXIC_REJECTED = 0.95, 0.9  # what the threshold aims at
ESCALATED = 0.97  # of the passages with a score, so many reach tier 2 in `auto`


class Fitted(NamedTuple):
    """A tier's cross-validated numbers, its choice, and what its folder holds."""

    wanted: ridge.Targets
    raw: np.ndarray  # [rows, heads], cross-validated
    scores: dict[str, np.ndarray]  # by head, 0 to 1, cross-validated and cross-calibrated
    null: np.ndarray  # bool: nothing to regulate
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    alike: Kernels
    penalty: tuple[float, float]  # of regulation, of the other heads


def fit(
    rows: list[dict[str, Any]],
    out: Path,
    model: str | None = "default",
    vectors: str | None = "default",
    states: Path | None = None,
    background: list[str] | None = None,
) -> dict[int, Fitted]:
    """Fits tier 1, and with `model` tier 2, and writes OUT/scorer.json and safetensors; returns both by number.

    Args:
        rows: labelled passages (`id`, `text`, `regulation`, some or all of the facets; `writer`, `event`, `pair` and
            `stance` where they are known).
        vectors: emotion vectors of `model`, for the emotion columns; None leaves these null.
        states: folder to keep the passages' states in, so that a later call need not read them again.
        background: plain texts that show no facet at all; by default the project's neutral dialogues.

    Raises:
        ValueError: a bad label, too few writers and events, or `out` holds something else.
    """
    if model is None and states is not None:
        raise ValueError(f"`--states` {states}: without a model no states are read; leave it out")
    check_out(out)
    background = neutral_dialogues() if background is None else background
    wanted = ridge.targets(rows, len(background))
    texts = [row["text"] for row in rows] + background
    tiers = {1: first_tier(rows, texts, wanted)}
    if model is not None:
        tiers[2] = second_tier(rows, texts, wanted, model, vectors, states)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    config = {"format": FORMAT, "labels": {"rows": len(rows), "sha256": digest, "background": len(background)}}
    config |= {f"tier{number}": tier.config for number, tier in tiers.items()}
    _write(out, config, tiers)
    return tiers


def check_out(out: Path) -> None:
    """Raises ValueError where a scorer may not be written: it would replace something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; `--out` takes a folder")
    if other := sorted(path.name for path in out.glob("*") if path.name not in OWN):
        raise ValueError(f"{out} holds {other[0]!r}, which is no part of a scorer; choose another `--out`")


def neutral_dialogues() -> list[str]:
    """The shipped neutral dialogues of the training split, as plain text."""
    from calibrate import corpora

    rows = [row for row in corpora.load_neutral() if row.split == "train"]
    return ["\n".join(message["content"] for message in row.messages) for row in rows]


def word_kernels(texts: list[str]) -> Kernels:
    """By words and pairs; the vocabulary is that of the texts fitted on, in every fold anew."""

    def matrix(chosen: np.ndarray) -> np.ndarray:
        vocabulary, idf = features.build([texts[row] for row in chosen])
        return features.matrix(vocabulary, idf, texts)

    return kernels.words(matrix)


def first_tier(rows: list[dict[str, Any]], texts: list[str], wanted: ridge.Targets) -> Fitted:
    """Tier 1: a ridge over words and pairs of words; `texts` are those of the rows and then the background."""
    vocabulary, idf = features.build(texts)
    fitted, dual = _tier(word_kernels(texts), wanted, rows, PENALTIES[1], {"words": " ".join(vocabulary.words)})
    weights = features.matrix(vocabulary, idf, texts).T @ dual
    fitted.tensors.update(pairs=vocabulary.pairs, idf=idf.astype(np.float16), weights=weights.astype(np.float16))
    return fitted


def second_tier(
    rows: list[dict[str, Any]],
    texts: list[str],
    wanted: ridge.Targets,
    model: str,
    vectors: str | None,
    folder: Path | None,
) -> Fitted:
    """Tier 2: the same words, and states of the layers whose cross-validated heads agree best with the labels."""
    from calibrate import models
    from calibrate.vectors import load_vectors
    from data_curation import reader

    checkpoint = models.load(model)
    shape = models.text_config(checkpoint.model)
    layers, emotional, known = candidate_layers(shape.num_hidden_layers), [], []
    tensors: dict[str, np.ndarray] = {}
    if vectors is not None:
        directions = load_vectors(vectors)
        directions.check(shape.hidden_size, shape.num_hidden_layers, checkpoint.weight_hash, model)
        known = [emotion for emotion in EMOTIONS if emotion in directions.concepts]
        emotional, tensors = directions.reading_layers(), reader.emotion_tensors(directions, known)
    count, stored = len(rows), sorted({*layers, *emotional})
    parts = [reader.cached(checkpoint, part, stored, folder) for part in (texts[:count], texts[count:]) if part]
    states = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    tried = {}
    for layer in layers:
        alike = kernels.states(_together(states, [layer]))
        raw = ridge.cross_validate(alike, wanted, [(PENALTIES[2][0], PENALTIES[2][0])])[0]
        tried[layer] = round(sum(_quality(raw, wanted)) / 2, 4)
    read = sorted(sorted(tried, key=lambda layer: -tried[layer])[:LAYERS_READ])
    settings: dict[str, Any] = {"model": model, "weight_hash": checkpoint.weight_hash, "vectors": vectors}
    settings |= {"layers": sorted({*read, *emotional}), "emotion_layers": emotional, "emotions": known}
    settings |= {"shape": [shape.hidden_size, shape.num_hidden_layers], "layers_tried": tried}
    settings["reads"] = [[third, layer] for layer in read for third in THIRDS]
    values = _together(states, read)
    alike = kernels.together(kernels.states(values), word_kernels(texts))
    fitted, dual = _tier(alike, wanted, rows, PENALTIES[2], settings)
    embedding = kernels.embed(values)
    vocabulary, idf = features.build(texts)
    matrix = features.matrix(vocabulary, idf, texts)
    words = matrix.T @ dual / (matrix**2).sum(1).mean()
    tensors |= embedding._asdict() | {"states": dual.astype(np.float32), "weights": words.astype(np.float16)}
    tensors |= {name: tensors[name].astype(np.float16) for name in ("components", "points")}
    fitted.tensors.update(tensors)
    return fitted


def candidate_layers(depth: int) -> list[int]:
    """The layers nearest to `DEPTHS`."""
    return sorted({min(max(round(share * depth) - 1, 0), depth - 1) for share in DEPTHS})


def _together(states: dict, layers: list[int]) -> np.ndarray:
    return np.concatenate([states[third, layer] for layer in layers for third in THIRDS], 1)


def _quality(raw: np.ndarray, wanted: ridge.Targets) -> tuple[float, float]:
    """Spearman with the labels: of regulation, and the mean over the other heads."""
    known, judged = ~np.isnan(wanted.labels[:, 0]), wanted.folds >= 0
    others = [evaluation.spearman(raw[judged, at], wanted.labels[judged, at]) for at in range(1, raw.shape[1])]
    return evaluation.spearman(raw[known, 0], wanted.labels[known, 0]), float(np.nanmean(others))


def _tier(
    alike: Kernels,
    wanted: ridge.Targets,
    rows: list[dict[str, Any]],
    penalties: tuple[float, ...],
    settings: dict[str, Any],
) -> tuple[Fitted, np.ndarray]:
    """Chooses the penalty, calibrates on cross-validated numbers, sets gates and threshold, and fits on all rows.

    Returns:
        the tier, its tensors still without weights, and the dual weights [rows, heads].
    """
    tried = ridge.cross_validate(alike, wanted, [(value, value) for value in penalties])
    quality = np.array([_quality(raw, wanted) for raw in tried])
    first, other = quality.argmax(0)
    count, penalty = len(rows), (penalties[first], penalties[other])
    raw = np.concatenate([tried[first][:count, :1], tried[other][:count, 1:]], 1)
    labels, folds = wanted.labels[:count], wanted.folds[:count]
    known = ~np.isnan(labels[:, 0])
    heads: dict[str, Head] = {}
    scores: dict[str, np.ndarray] = {}
    for at, name in enumerate(wanted.names[: -len(STANCES)]):
        chosen = ~np.isnan(labels[:, at])
        heads[name] = ridge.calibrate(raw[chosen, at], labels[chosen, at])
        scores[name] = ridge.cross_calibrated(raw[:, at], labels[:, at], folds)
    harmful = [labels[:, wanted.names.index(name)] >= 0.5 for name in GATES[1:] if name in scores]
    spared = [known, *(chosen & known for chosen in harmful if (chosen & known).any())]
    gates = choose_gates({name: scores[name] for name in GATES if name in scores}, ~known, spared)
    null = nothing(scores, gates)
    settings = settings | {"penalty": penalty, "gates": gates}
    settings["threshold"] = choose_threshold(scores["regulation"], null, np.array([row.get("cell") for row in rows]))
    settings["escalate"] = choose_escalation(scores, gates, known)
    everything = np.arange(len(wanted.labels))
    dual, constant = ridge.heads(alike(everything)[0], wanted, everything, penalty)
    offsets = ridge.stance_offsets(raw[:, -len(STANCES) :], labels[:, -len(STANCES) :])
    constant[-len(STANCES) :] += offsets
    raw[:, -len(STANCES) :] += offsets
    config = {"names": wanted.names, "heads": {name: head._asdict() for name, head in heads.items()}}
    bias = {"bias": constant.astype(np.float32)}
    return Fitted(wanted, raw, scores, null, config | {"settings": settings}, bias, alike, penalty), dual


def nothing(scores: dict[str, np.ndarray], gates: dict[str, float]) -> np.ndarray:
    """Where all gating facets are low; nowhere, if `affect_present` is not among them."""
    if "affect_present" not in gates:
        return np.zeros(len(scores["regulation"]), bool)
    return np.logical_and.reduce([scores[name] < gate for name, gate in gates.items()])


def choose_gates(scores: dict[str, np.ndarray], null: np.ndarray, spared: list[np.ndarray]) -> dict[str, float]:
    """Gates that find the most null passages while few of the others fall under all of them.

    Args:
        spared: sets of passages that have a score (all of them; those that cheat; those that talk a feeling away), of
            each of which at most `FALSE_NULLS` may: cold cheating is not to pass for nothing.
    """
    if "affect_present" not in scores:
        return {}
    grids = [np.quantile(values, np.linspace(0.05, 0.95, 19)) for values in scores.values()]
    best = (-1.0,) * (2 + len(scores))  # below every score: nothing is null
    for gates in itertools.product(*grids):
        low = np.logical_and.reduce([values < gate for values, gate in zip(scores.values(), gates, strict=True)])
        if all(low[chosen].mean() <= FALSE_NULLS for chosen in spared):
            found = round(float(low[null].mean()), 2) if null.any() else 0.0
            best = max(best, (found, -float(sum(gates)), *map(float, gates)))  # of as many found, the lowest gates
    return dict(zip(scores, best[2:], strict=True))


def choose_threshold(score: np.ndarray, null: np.ndarray, cells: np.ndarray) -> float:
    """The score from which a document is kept: as far above `GRIEF_KEPT` as `TOXIC_REJECTED`; 0.5 without both."""
    grief, toxic = cells == "grief_processed", cells == "toxic_positivity"
    if not grief.any() or not toxic.any():
        return 0.5
    tried = np.linspace(0.2, 0.8, 121)
    stays = [null | (score >= at) for at in tried]
    kept = [min(stay[grief].mean() - GRIEF_KEPT, 1 - stay[toxic].mean() - TOXIC_REJECTED) for stay in stays]
    best = np.flatnonzero(np.isclose(kept, max(kept)))
    return float(round(tried[best[len(best) // 2]], 3))


def choose_escalation(scores: dict[str, np.ndarray], gates: dict[str, float], known: np.ndarray) -> dict[str, float]:
    """Scores of the gating facets from which `auto` asks tier 2; never above the gates: it sees every doubt."""
    if not gates:
        return {}
    low = float(np.quantile(scores["affect_present"][known], 1 - ESCALATED))
    return gates | {"affect_present": min(low, gates["affect_present"])}


def _write(out: Path, config: dict[str, Any], tiers: dict[int, Fitted]) -> None:
    """Writes the folder aside and renames it: whole or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as aside:
        whole = Path(aside) / out.name
        whole.mkdir()
        for number, tier in tiers.items():
            whole_rows = {name: np.ascontiguousarray(value) for name, value in tier.tensors.items()}
            save_file(whole_rows, whole / f"tier{number}.safetensors")
        (whole / "scorer.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        check_out(out)  # again: fitting takes long
        if out.exists():
            shutil.rmtree(out)
        os.rename(whole, out)


def evaluate(rows: list[dict[str, Any]], fitted: Fitted) -> list[evaluation.Figure]:
    """Cross-validated figures of a tier on the rows it was fitted on, and each low cell left out of all fitting."""
    labels = evaluation.labelled(rows, evaluation.valence([row["text"] for row in rows]))
    threshold = fitted.config["settings"]["threshold"]
    score = np.where(fitted.null, 0.5, fitted.scores["regulation"])
    found = evaluation.figures(score, fitted.null, threshold, labels)
    for cell in [cell for cell in LOW if (labels.cells == cell).any() and labels.high.any()]:
        left = labels.cells == cell
        leave = np.pad(left, (0, len(fitted.wanted.labels) - len(rows)))
        raw = ridge.cross_validate(fitted.alike, fitted.wanted, [fitted.penalty], leave)[0, : len(rows), 0]
        side = labels._replace(cells=np.where(labels.high | left, labels.cells, ""))
        interval = evaluation.separation(raw, side)
        found.append(evaluation.Figure(f"AUC without {cell.replace('_', ' ')} in fitting", *interval, labels.note))
    return found


def add_fit(parser: argparse.ArgumentParser) -> None:
    """The options of `curate fit`."""
    parser.add_argument("labels", type=Path, help='JSONL with "id", "text", "facets" (some or all) and "regulation"')
    parser.add_argument("--out", type=Path, required=True, help="folder of the scorer, for `curate score --scorer`")
    parser.add_argument("--model", default="default", help="that tier 2 reads with, or `none` (default: %(default)s)")
    said = "of that model, for the emotion columns, or `none` (default: `default`)"
    parser.add_argument("--vectors", help=said)
    parser.add_argument("--states", type=Path, help="folder to keep the passages' states in, for another call")
    parser.set_defaults(run=fit_command)


def fit_command(arguments: argparse.Namespace) -> None:
    """Runs `curate fit` and prints its cross-validated evaluation as Markdown."""
    rows = list(read_rows(arguments.labels, "facets", "regulation"))
    if arguments.model == "none" and arguments.vectors not in (None, "none"):
        raise ValueError(f"`--vectors` {arguments.vectors}: `--model none` reads no emotions; leave it out")
    model, vectors = (None if name == "none" else name for name in (arguments.model, arguments.vectors or "default"))
    for number, fitted in fit(rows, arguments.out, model, vectors, arguments.states).items():
        print(f"\nTier {number}, cross-validated on {len(rows)} passages\n\n{evaluation.HEADER}")
        print("\n".join(figure.line() for figure in evaluate(rows, fitted)))
    print(f"\nScorer: {arguments.out}")
