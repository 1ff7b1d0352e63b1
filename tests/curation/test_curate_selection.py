"""The arithmetic of weights, by hand and against a plain computation."""

import math

import numpy as np
import pytest

from data_curation.selection import Corpus, divergence, effective, fit_weights, weight_of

NAN = float("nan")


def corpus(regulation, characters, topics=("all",), topic=None, formats=("all",), form=None) -> Corpus:
    number = len(regulation)
    places = [np.zeros(number, dtype=np.int32) if place is None else np.array(place) for place in (topic, form)]
    arrays = np.array(regulation, dtype=np.float32), np.array(characters, dtype=np.int32)
    return Corpus(*arrays, list(topics), places[0], list(formats), places[1])


def drawn(number: int, seed: int = 0) -> Corpus:
    """Three topics whose regulation and length differ, two formats, a third without a score."""
    random = np.random.default_rng(seed)
    topic, form = random.integers(0, 3, number), random.integers(0, 2, number)
    regulation = np.clip(0.3 + 0.2 * topic + 0.15 * random.standard_normal(number), 0, 1)
    regulation[random.random(number) < 1 / 3] = NAN
    characters = (500 * np.exp(random.standard_normal(number)) * (1 + topic)).astype(int) + 1
    return corpus(regulation, characters, ("grief", "code", "sport"), topic, ("forum", "memoir"), form)


def test_two_scores_by_hand():
    """20 documents at 0.2 and 20 at 0.8, 100 characters each, beta 1.

    Mean 0.5, deviation 0.3, z = -1 and 1. One cell (all lengths are equal). With scale c the weights are c/e and c e,
    and must sum to 40 documents: c (1/e + e) = 2, c = 2 / (1/e + e) = 0.648. Weights 0.2384 and 1.7616; the lower is
    below a floor of 0.25, so that 0.25 + c e = 2 and the upper is 1.75.
    """
    both = corpus([0.2] * 20 + [0.8] * 20, [100] * 40)
    fit = fit_weights(both, beta=1, floor=0.1, cap=4)
    c = 2 / (1 / math.e + math.e)
    assert fit.weights[0] == pytest.approx(c / math.e) == pytest.approx(0.2384, abs=1e-4)
    assert fit.weights[-1] == pytest.approx(c * math.e) == pytest.approx(1.7616, abs=1e-4)
    fit = fit_weights(both, beta=1, floor=0.25, cap=4)
    assert (fit.weights[0], fit.weights[-1]) == (pytest.approx(0.25), pytest.approx(1.75))
    assert fit_weights(both, beta=0, floor=0.25, cap=4).weights == pytest.approx(np.ones(40))


def test_effective_documents_and_divergence_by_hand():
    """Weights 1 and 3: 16 / 10. Cells of 100 characters each that weigh 50 and 150: 0.25 ln 0.5 + 0.75 ln 1.5."""
    assert effective(np.array([1.0, 3.0])) == pytest.approx(1.6)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence(np.array([0, 1]), np.array([100.0, 100]), np.array([50.0, 150])) == pytest.approx(expected)
    assert divergence(np.array([0, 1]), np.array([100.0, 300]), np.array([1.0, 3])) == pytest.approx(0)


def test_a_null_score_weighs_one_whatever_stands_beside_it():
    fit = fit_weights(corpus([NAN, 0.1, 0.9] * 30, [5000, 70, 70] * 30), beta=2, floor=0.25, cap=4)
    assert (fit.weights[::3] == 1).all()
    assert (fit.weights[1::3] < 1).all()
    assert (fit.weights[2::3] > 1).all()
    assert weight_of(fit.table, None, "all", "all", 100) == 1.0


def test_the_mix_and_the_total_are_those_of_the_input():
    """Characters of each topic x format, and their sum, before and after; without scales they shift."""
    both = drawn(6000)
    fit = fit_weights(both, beta=1.5, floor=0.25, cap=4)
    for topic in range(3):
        for form in range(2):
            cell = (both.topic == topic) & (both.format == form)
            assert (fit.weights * both.characters)[cell].sum() == pytest.approx(both.characters[cell].sum(), rel=1e-9)
    assert fit.figures["kl_before"] > 1e-3
    assert fit.figures["kl_after"] < 1e-12
    assert fit.figures["characters_after"] == pytest.approx(fit.figures["characters_before"])
    assert fit.figures["cells"] == 24
    assert 0 < fit.figures["effective_share"] < 1
    scored = ~np.isnan(both.regulation)
    assert fit.weights[scored].min() >= 0.25
    assert fit.weights[scored].max() <= 4


def test_regulated_text_gains_within_its_topic_and_not_by_its_topic():
    """z is within the topic: the topic of higher regulation has no higher mean weight."""
    both = drawn(6000)
    weights = fit_weights(both, beta=1, floor=0.25, cap=4).weights
    for topic in range(3):
        inside = (both.topic == topic) & ~np.isnan(both.regulation)
        upper = both.regulation > np.median(both.regulation[inside])
        assert weights[inside & upper].mean() > 1.5 * weights[inside & ~upper].mean()
        mass = (weights * both.characters)[inside].sum() / both.characters[inside].sum()
        assert mass == pytest.approx(1, abs=1e-9)


def test_the_table_gives_each_document_the_weight_of_the_fit():
    both = drawn(3000)
    fit = fit_weights(both, beta=1, floor=0.3, cap=3)
    for i in range(0, 3000, 7):
        score = None if np.isnan(both.regulation[i]) else float(both.regulation[i])
        topic, form = both.topics[both.topic[i]], both.formats[both.format[i]]
        weight = weight_of(fit.table, score, topic, form, int(both.characters[i]))
        assert weight == pytest.approx(fit.weights[i], rel=1e-5)
    assert weight_of(fit.table, 0.9, "unheard of", "new", 100) >= 0.3  # the corpus' own moments and scale 1


def test_small_cells_are_scaled_together():
    """Ten documents of one topic would balance among themselves and keep nearly nothing of their scores."""
    random = np.random.default_rng(1)
    regulation, characters = random.random(1010), random.integers(100, 1000, 1010)
    topic = [0] * 1000 + [1] * 10
    both = corpus(regulation, characters, ("large", "small"), topic)
    fit = fit_weights(both, beta=1, floor=0.25, cap=4)
    assert sorted(key.split("\t")[0] for key in fit.table["scales"]) == ["*", "large", "large", "large", "large"]
    assert fit.table["topics"]["small"] == fit.table["overall"] != fit.table["topics"]["large"]


def test_equal_scores_and_an_empty_corpus_change_nothing():
    assert fit_weights(corpus([0.5] * 30, [10] * 30), 1, 0.25, 4).weights == pytest.approx(np.ones(30))
    assert fit_weights(corpus([NAN] * 3, [10] * 3), 1, 0.25, 4).figures["kl_after"] == 0
    assert fit_weights(corpus([], []), 1, 0.25, 4).figures == {"documents": 0, "scored": 0, "cells": 0}


@pytest.mark.parametrize(("beta", "floor", "cap"), [(1, 0, 4), (1, 1.1, 4), (1, 0.5, 0.9), (-1, 0.5, 4)])
def test_floor_and_cap_must_enclose_one(beta, floor, cap):
    with pytest.raises(ValueError, match=r"0 < floor <= 1 <= cap and 0 <= beta"):
        fit_weights(corpus([0.5], [10]), beta, floor, cap)
