"""Probes on planted states, and a checkpoint's own directions from states that are made by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from records import make_vectors
from test_extraction import group
from torch import Tensor

from calibrate.audit import own, probes
from calibrate.corpora import Deflection, Story
from calibrate.models import Checkpoint

TASKS, WIDTH = 48, 8


def noise(seed: int, rows: int = TASKS, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_kind(*states) -> dict[str, probes.Probe]:
    found = probes.held_out("planted", *states)
    assert [(probe.label, probe.kind) for probe in found] == [("planted", kind) for kind in probes.KINDS]
    return {probe.kind: probe for probe in found}


def test_a_separable_label_is_found_and_exchanged_labels_are_not():
    """Six deviations apart on one axis; exchanged within tasks the label is a coin toss (standard error 0.06)."""
    axis = torch.eye(WIDTH)[0]
    for probe in by_kind(noise(1) + 3 * axis, noise(2) - 3 * axis).values():
        assert probe.held_out > 0.97, probe.kind
        assert abs(probe.shuffled - 0.5) < 0.2, probe.kind
        assert probe.transfer is None


def test_a_label_that_no_line_tells_apart_needs_a_network():
    """Equal signs of two axes against unequal ones; which of the two a task has is drawn."""
    signs = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]) * 2
    rows = (noise(0)[:, 0] > 0).long()
    positive, negative = 0.3 * noise(3), 0.3 * noise(4)
    positive[:, :2] += signs[rows]
    negative[:, :2] += signs[2 + rows]
    found = by_kind(positive, negative)
    assert abs(found["linear"].held_out - 0.5) < 0.2
    assert found["network"].held_out > found["linear"].held_out + 0.3
    assert found["neighbours"].held_out > 0.85


def test_without_a_signal_nothing_is_found_though_it_could_be_learnt_by_heart():
    """48 rows of noise in 64 dimensions: any labels are separable in sample, none out of it."""
    for probe in by_kind(noise(5, 24, 64), noise(6, 24, 64)).values():
        assert abs(probe.held_out - 0.5) < 0.2, probe.kind


def test_a_task_is_never_read_by_a_probe_that_has_seen_it():
    """Both rows of a task are one far point, told apart by a label of the task's own: only its twin could say it."""
    place, side = 100 * noise(7), 3 * torch.sign(noise(8, TASKS, 1))
    positive, negative = place.clone(), place.clone()
    positive[:, :1] += side
    negative[:, :1] -= side
    for probe in by_kind(positive, negative).values():
        assert abs(probe.held_out - 0.5) < 0.2, probe.kind


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0)])
def test_what_carries_over_to_other_texts(sign, expected):
    """Other texts lie 50 deviations away as a whole, which does not count; the label is there, or turned round."""
    axis = torch.eye(WIDTH)[0]
    other = [0.3 * noise(seed, 20) + 50 + sign * side * 3 * axis for seed, side in ((9, 1), (10, -1))]
    for probe in by_kind(noise(1) + 3 * axis, noise(2) - 3 * axis, tuple(other)).values():
        assert probe.transfer == pytest.approx(expected, abs=0.05), probe.kind


def test_probes_are_the_same_every_time_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = (by_kind(noise(1) + 0.2, noise(2), (noise(3), noise(4))) for _ in range(2))
    assert first == second
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_fewer_tasks_than_folds_are_read_too(tasks):
    for probe in by_kind(noise(1, tasks) + 9, noise(2, tasks) - 9).values():
        assert 0 <= probe.held_out <= 1


def test_the_area_under_the_curve_by_hand():
    assert probes.auroc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == pytest.approx((2 + 0.5) / 4)


# ---- own directions

TOPICS = ("a", "b", "c", "d")
OTHERS = ("calm", "angry", "sad")


def tell(concepts, topics=TOPICS) -> list[Story]:
    return [Story(f"{c}/{t}", c, t, "audit", "text") for t in topics for c in concepts]


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Own directions where each concept's stories lie along an axis of their own, topics shift all of them alike.

    Neutral tokens and last headers vary along axis 7, which is therefore projected out; desperate stories share it.
    """
    vectors = make_vectors(["desperate", *OTHERS], [1, 2, 3], [1, 2, 3])
    axes = {name: axis for axis, name in enumerate(("desperate", *OTHERS))}

    def run(stories: list[Story], deflection: Sequence[Deflection] = (), felt: Tensor | None = None):
        noisy = torch.randn(len(stories), 3, 8, generator=torch.Generator().manual_seed(0)) * 0.02
        noisy[:, :, 5:7] = 0
        states = {"stories": noisy, "neutral": torch.zeros(6, 3, 8)}
        for row, story in enumerate(stories):
            states["stories"][row, :, axes[story.concept]] += torch.tensor([1.0, 2.0, 3.0])
            states["stories"][row, :, 4] += 10 * TOPICS.index(story.topic)
            states["stories"][row, :, 7] += 5 * (story.concept == "desperate")
        states["deflection"] = torch.eye(8)[[axes[row.felt] for row in deflection]][:, None].expand(-1, 3, -1)
        groups = {name: group(tmp_path / name, rows) for name, rows in states.items() if len(rows)}
        monkeypatch.setattr(own.shards, "read", lambda checkpoint, items, layers, folder: groups)
        tokens = torch.zeros(6, 3, 8)
        tokens[:, :, 7] = torch.arange(6.0)[:, None] - 2.5
        monkeypatch.setattr(own.extraction, "neutral_states", lambda found: {"token": tokens})
        for name in ("story_items", "neutral_items", "deflection_items"):
            monkeypatch.setattr(own.extraction, name, lambda tokenizer, rows: rows)
        felt = torch.zeros(0, 2, 3, 8) if felt is None else felt
        checkpoint = Checkpoint(None, None, "planted", "planted", "0")
        return own.read(checkpoint, vectors, stories, deflection, [], felt, "desperate", tmp_path)

    return run


def cosines(found: Tensor, expected: list[float]) -> Tensor:
    return torch.nn.functional.cosine_similarity(found.double(), torch.tensor(expected).double(), dim=-1)


def test_own_directions_are_those_that_are_planted(read):
    """The target minus the mean of three others, each on its axis: (1, -1/3, -1/3, -1/3); topic and axis 7 are out.

    The deflection has two felt concepts: half their difference. Openings differ by 3 on axis 5 and 4 on axis 6.
    """
    felt = torch.randn(5, 1, 3, 8).expand(5, 2, 3, 8).clone()
    felt[:, 0, :, 5:7] += torch.tensor([3.0, 4.0])
    spoken = [Deflection(f"d{i}", name, "happy", "a", "audit", "text", [[0, 1]]) for i, name in enumerate(OTHERS[:1])]
    spoken.append(spoken[0]._replace(felt="desperate"))
    found = read(stories := tell(("desperate", *OTHERS)), spoken, felt)
    assert [*found.directions] == ["stories", "logistic", "deflection", "domain"]
    for name, rows in found.directions.items():
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3), atol=1e-5, rtol=0, msg=name)
    assert cosines(found.directions["stories"], [3, -1, -1, -1, 0, 0, 0, 0]).min() > 0.999
    assert cosines(found.directions["deflection"], [1, -1, 0, 0, 0, 0, 0, 0]).min() > 0.999
    assert cosines(found.directions["domain"], [0, 0, 0, 0, 0, 3, 4, 0]).min() > 0.999
    logistic = found.directions["logistic"]  # fitted on plain states: it may use axis 7, and ignores the topic
    assert cosines(logistic, [3, -1, -1, -1, 0, 0, 0, 5]).min() > 0.5
    assert logistic[:, 4].abs().max() < 0.2
    # The states are those of the stories in the middle of the band, layer 2: twice the concept's axis.
    assert found.concepts == [story.concept for story in stories]
    assert found.states.shape == (16, 8)
    assert found.states[:4].argmax(1).tolist() == [7, 1, 2, 3]
    assert found.states[1, 1] == pytest.approx(2, abs=0.1)


def test_without_openings_or_masked_speech_there_are_two_directions(read):
    assert [*read(tell(("desperate", *OTHERS))).directions] == ["stories", "logistic"]


def test_masked_speech_that_never_feels_the_target_gives_no_direction(read):
    spoken = [Deflection(f"d{i}", name, "happy", "a", "audit", "text", [[0, 1]]) for i, name in enumerate(OTHERS)]
    assert "deflection" not in read(tell(("desperate", *OTHERS)), spoken).directions


def test_topics_that_do_not_cancel_are_refused(read):
    stories = [*tell(("desperate",)), *tell(OTHERS, "ab")]
    with pytest.raises(ValueError, match=r"about 'desperate' are on the topics \['a', 'b', 'c', 'd'\], the others on"):
        read(stories)


def test_one_story_of_every_other_concept_with_topics_in_turn():
    """Three others take the first three topics; of the target all four stays; with names all of theirs."""
    stories = tell(("calm", "desperate", "angry", "sad"))
    chosen = own.choose(stories, "desperate", None)
    assert [s.id for s in chosen] == [
        *(f"desperate/{topic}" for topic in TOPICS), "calm/a", "angry/b", "sad/c",
    ]  # fmt: skip
    named = own.choose(stories, "desperate", ["sad"])
    assert [s.id for s in named] == [f"{name}/{topic}" for topic in TOPICS for name in ("desperate", "sad")]
