"""The layers for reading and the band: by hand, on planted states, and on noise."""

import re

import pytest
import torch
from conftest import DEPTH
from test_extraction import group
from torch import Tensor

from calibrate import extraction
from calibrate.extraction import candidate_layers
from calibrate.layers import choose_layers, held_out_ranks, search_band
from calibrate.vectors import POOLINGS, EmotionVectors


def test_held_out_ranks_by_hand(tmp_path):
    """Directions A (1, 0) and B (0, 1); centre (10, 0).

    Held out, centred: A (2, 0) right; B (1, 0.5) wrong; B (0, 1) right; A (-1, -2) right: 3 of 4. Layer 2 has A and B
    exchanged: wrong, right, wrong, wrong. The mean of both layers' cosines is the same for A and B: nobody is above.
    """
    held = torch.tensor([[12.0, 0], [11, 0.5], [10, 1], [9, -2]])[:, None].expand(-1, 2, 2)
    vectors = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
    read = group(tmp_path, held)
    ranks, first = held_out_ranks(vectors, torch.tensor([10.0, 0]).double(), read, [0, 1, 1, 0])
    assert ranks.tolist() == [[0, 1], [1, 0], [0, 1], [0, 1]]
    assert first.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]
    ranks, _ = held_out_ranks(vectors, torch.tensor([10.0, 0]).double(), read, [0, 1, 1, 0], [0, 1])
    assert ranks.tolist() == [[0], [0], [0], [0]]


def test_the_best_layer_and_its_neighbours_within_one_standard_error():
    """100 stories at 0.5: standard error 0.05. Layer 7 is as good but not a neighbour, layer 9 may not be chosen."""
    accuracy = torch.tensor([0.1, 0.2, 0.44, 0.46, 0.5, 0.45, 0.3, 0.5, 0.1, 0.9])
    choice = choose_layers(accuracy, 100, 0.05, list(range(1, 9)))
    assert choice.layers == [3, 4, 5]
    assert "decode best at layer 4 (50.0% of 100 stories, chance 5.0%); 3 to 5" in choice.reason
    assert choice.accuracy == pytest.approx(accuracy.tolist())


def test_without_decoding_the_layers_are_two_thirds_of_depth():
    choice = choose_layers(torch.full((30,), 0.14), 100, 0.05, list(range(8, 24)))
    assert choice.layers == [17, 18, 19, 20]
    assert "too little beside chance (5.0%): no layer is better than another" in choice.reason


@pytest.mark.parametrize(("depth", "expected"), [(30, range(8, 24)), (DEPTH, [1, 2, 3])])
def test_candidate_layers(depth, expected):
    """Depth 30: 9/30 = 0.3 is layer 8, 24/30 = 0.8 is layer 23. Depth 5: 0.4, 0.6, 0.8."""
    assert candidate_layers(depth) == list(expected)


@pytest.mark.parametrize(("depth", "expected"), [(30, [25, 28]), (DEPTH, [4]), (24, [20, 22])])
def test_later_layers(depth, expected):
    """At 87 and 97 % of depth 30: layers 26 - 1 and 29 - 1. Of depth 5 the first would be 3, which is searched."""
    later = extraction.later_layers(depth)
    assert later == expected
    assert not {*later} & {*candidate_layers(depth)}


def header_vectors() -> EmotionVectors:
    """Ten concepts on axes 0 to 9 at layers 3 to 10; neutral headers of deviation 1 along every axis."""
    concepts, samples = [f"concept {i}" for i in range(10)], dict.fromkeys(POOLINGS, 100)
    vectors = EmotionVectors(concepts, list(range(3, 11)), 64, 12, samples, "planted", "0", {})
    vectors.directions.copy_(torch.eye(64)[:10, None].expand(10, 8, 64))
    for pooling in POOLINGS:
        vectors.neutral(pooling).normal_(generator=torch.Generator().manual_seed(1))
    return vectors


def headers(seed: int) -> Tensor:
    return torch.randn(2, 30, 8, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_planted_band_is_found():
    """Three sigma of concept 0 at layers 3, 5, 6, 7 and 10, of another elsewhere: the longest run is 5 to 7."""
    vectors, (failing, passing) = header_vectors(), headers(0)
    failing[:, [1, 5, 6], 1] += 3
    failing[:, [0, 2, 3, 4, 7], 0] += 3
    band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.3, dtype=torch.float64))
    assert band.layers == [5, 6, 7]
    assert all(abs(band.contrast[i] - 3) < 1 for i in (0, 2, 3, 4, 7))  # 30 tasks: standard error 0.26
    assert all(abs(band.contrast[i]) < 1 for i in (1, 5, 6))
    # A random direction has a share of sqrt(1 / 64) along the effect; its 95th percentile is 3 x 1.645 / 8 = 0.62.
    assert all(0.4 < limit < 0.9 for limit in band.random)
    assert band.accuracy == [0.3] * 8
    assert "At layers 5 to 7 the concept 0 reading at the turn header is" in band.reason
    assert "held-out decoding is 30% (chance 10%)" in band.reason
    other = search_band(vectors, "concept 1", failing, passing, torch.full((8,), 0.9))
    assert other.layers == [8, 9]
    assert search_band(vectors, "concept 0", passing, failing, torch.full((8,), 0.9)).layers is None  # one-sided


def test_layers_that_are_stored_but_not_searched_are_never_chosen():
    """Contrast at all of 3 to 10, the most at 10: of 4, 5, 6, 8 and 9 the longest run is 4 to 6.

    Where none does, the reason names the highest of those that were searched.
    """
    vectors, (failing, passing) = header_vectors(), headers(0)
    failing[..., 0] += 3
    failing[:, 7, 0] += 9
    accuracy = torch.full((8,), 0.3, dtype=torch.float64)
    band = search_band(vectors, "concept 0", failing, passing, accuracy, [4, 5, 6, 8, 9])
    assert band.layers == [4, 5, 6]
    assert len(band.contrast) == 8  # the figures are those of every stored layer
    none = search_band(vectors, "concept 0", failing, passing, accuracy / 9, [4, 5, 6, 8, 9])
    assert none.layers is None
    assert re.search(r"sigma at layer [45689],", none.reason)
    assert "at layer 10," in search_band(vectors, "concept 0", failing, passing, accuracy / 9).reason


def test_decoding_below_three_times_chance_breaks_or_ends_the_band():
    vectors, (failing, passing) = header_vectors(), headers(0)
    failing[..., 0] += 3
    accuracy = torch.full((8,), 0.5)
    accuracy[3] = 0.29
    assert search_band(vectors, "concept 0", failing, passing, accuracy).layers == [7, 8, 9, 10]
    band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.1))
    assert band.layers is None
    assert band.reason.startswith("At no layer is the concept 0 reading")
    assert "decoding 10%, chance 10%" in band.reason  # the contrast alone would have sufficed


def test_noise_passes_the_random_control_as_often_as_it_says():
    """30 draws x 8 layers of noise against the 95th percentile: 5 % pass, standard error 1.4 %."""
    vectors, passed = header_vectors(), []
    for seed in range(30):
        failing, passing = headers(100 + seed)
        band = search_band(vectors, "concept 0", failing, passing, torch.full((8,), 0.9))
        passed += [contrast > limit for contrast, limit in zip(band.contrast, band.random, strict=True)]
        assert (band.layers is None) is not any(passed[-8:])
    assert 0.01 < sum(passed) / len(passed) < 0.1
