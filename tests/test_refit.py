"""Directions that follow the model: on planted states without a language model, and in a run that is broken off."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import Killed, assert_same_weights, make, train  # noqa: F401  (`make` is a fixture)
from transformers import TrainerCallback

from calibrate.training import arms, refit
from calibrate.training.arms import Arm
from calibrate.training.refit import Refit, Source, Text
from calibrate.vectors import EmotionVectors

WIDTH = 16
NEUTRAL = WIDTH - 1  # the axis along which neutral text differs


def axis(*parts: tuple[int, float], layers: int = 1) -> torch.Tensor:
    """A state [layers, hidden] with these values along these axes."""
    state = torch.zeros(layers, WIDTH)
    for place, value in parts:
        state[:, place] = value
    return state


def unit(*parts: tuple[int, float]) -> torch.Tensor:
    row = axis(*parts)
    return row / row.norm()


@pytest.fixture
def vectors() -> EmotionVectors:
    """Vectors whose neutral tokens differ along one axis alone, far out along another; directions play no part."""
    vectors = EmotionVectors(
        concepts=["desperate", "calm"], layers=[1, 2], hidden_size=WIDTH, depth=5,
        samples=dict.fromkeys(("token", "header", "reply", "text"), 4), model="planted", weight_hash="0", recipe={},
    )  # fmt: skip
    vectors.neutral("token")[:, :, NEUTRAL - 1] = 20
    vectors.neutral("token")[:, :, NEUTRAL] = torch.tensor([-3.0, 1.0, 1.0, 1.0])[:, None]
    return vectors


class Planted:
    """Texts whose mean states are planted: the id of a text is its place in `table`."""

    def __init__(self):
        self.table: list[torch.Tensor] = []

    def source(self, above: torch.Tensor, below: torch.Tensor | None = None) -> Source:
        """Two texts above whose mean is `above`, and two below whose mean is `below` (0 where it is not given)."""
        below = torch.zeros_like(above) if below is None else below
        noise = torch.linspace(-1, 1, above.numel()).view_as(above)  # of opposite sign in the two, so it cancels
        return Source(*([self.text(mean + noise), self.text(mean - noise)] for mean in (above, below)))

    def text(self, state: torch.Tensor) -> Text:
        self.table.append(state)
        return Text([len(self.table) - 1], slice(0, 1))

    def move(self, source: Source, change: torch.Tensor) -> None:
        """What training did: the states of the texts above move by `change`."""
        for text in source.above:
            self.table[text.ids[0]] = self.table[text.ids[0]] + change

    def __call__(self, texts: list[Text]) -> torch.Tensor:
        return torch.stack([self.table[text.ids[0]] for text in texts])


@pytest.fixture
def texts() -> Planted:
    return Planted()


def started(vectors, texts, start, sources, rank=1, layers=(2,), raised=0) -> Refit:
    """A refit that has measured its sources in the reference."""
    found = Refit(vectors, list(layers), start, sources, rank, raised)
    found.at_start = found.measure(texts)
    return found


def directions(follow: Refit, texts: Planted, arm: str = Arm.HINGE_REFIT, current=None) -> torch.Tensor:
    return follow.directions(follow.measure(texts), arm, follow.start if current is None else current)


# ---- the directions


@pytest.mark.parametrize("arm", [Arm.HINGE_REFIT, Arm.HINGE_UNION])
def test_while_the_model_has_not_moved_nor_have_the_directions(vectors, texts, arm):
    """Whatever the sources point to; two targets that share half of their norm, the second one raised; rank 2."""
    torch.manual_seed(0)
    start = torch.randn(4, 2, WIDTH)
    start[2:] += start[:2]
    start = torch.cat([arms.orthonormal(start[:2]), -arms.orthonormal(start[2:])])
    sources = [[texts.source(torch.randn(2, WIDTH)), texts.source(torch.randn(2, WIDTH))] for _ in range(2)]
    follow = started(vectors, texts, start, sources, rank=2, layers=[1, 2])
    assert (start[0] * start[2]).sum(-1).abs().min() > 0.1
    torch.testing.assert_close(directions(follow, texts, arm), start, rtol=0, atol=1e-6)


def test_refit_turns_towards_a_new_direction_by_the_change_over_the_sources_length(vectors, texts):
    """The source is (3, 4) long 5 in the reference; what it moves by, 2.5 along a new axis, is half of that.

    So the start, of length 1, gets 0.5 of the new axis: tan of the angle is 0.5, whatever the source points to. A
    change of 100 along the axis in which neutral text differs plays no part; one along its mean would.
    """
    source = texts.source(axis((3, 3.0), (4, 4.0)))
    follow = started(vectors, texts, axis((0, 1.0))[None], [[source]])
    texts.move(source, axis((7, 2.5), (NEUTRAL, 100.0)))
    found = directions(follow, texts)
    torch.testing.assert_close(found, unit((0, 1.0), (7, 0.5))[None], rtol=0, atol=1e-6)
    # It is what has changed that counts, at every refit anew: back again, the direction is the start's.
    texts.move(source, axis((7, -2.5), (NEUTRAL - 1, 5.0)))
    torch.testing.assert_close(directions(follow, texts)[0], unit((0, 1.0), (NEUTRAL - 1, 1.0)), rtol=0, atol=1e-6)
    texts.move(source, axis((NEUTRAL - 1, -5.0)))
    torch.testing.assert_close(directions(follow, texts), axis((0, 1.0))[None], rtol=0, atol=1e-6)


def test_several_sources_count_alike_each_relative_to_its_own_length(vectors, texts):
    """10 long moved by 5, and 1 long moved by 0.1: (0.5 + 0.1) / 2 = 0.3 of the new axis.

    The other side of a source counts with its sign: what is subtracted moves by -5, which is a change of +5.
    """
    long, short = texts.source(axis((3, 10.0))), texts.source(axis((4, 2.0)), axis((4, 1.0)))
    follow = started(vectors, texts, axis((0, 1.0))[None], [[long, short]])
    texts.move(Source(long.below, []), axis((7, -5.0)))
    texts.move(short, axis((7, 0.1)))
    torch.testing.assert_close(directions(follow, texts), unit((0, 1.0), (7, 0.3))[None], rtol=0, atol=1e-6)


def test_layers_turn_each_for_itself(vectors, texts):
    """Layer 1: length 2 moved by 2, a whole; layer 2: length 4 moved by 2, half."""
    length, change = axis((3, 1.0), layers=2), axis((7, 2.0), layers=2)
    length[:, 3] = torch.tensor([2.0, 4.0])
    source = texts.source(length)
    follow = started(vectors, texts, axis((0, 1.0), layers=2)[None], [[source]], layers=[1, 2])
    texts.move(source, change)
    expected = torch.cat([unit((0, 1.0), (7, 1.0)), unit((0, 1.0), (7, 0.5))])
    torch.testing.assert_close(directions(follow, texts)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arm", [Arm.HINGE_REFIT, Arm.HINGE_RETRAIN])
def test_a_concept_to_raise_stays_the_negative_of_what_its_stories_show(vectors, texts, arm):
    """Stories of calm stand 2 along axis 1 and move to (2, 2): calm is now at 45 degrees, and pressed is its negative.

    The other target, beside it, is lowered: its own change has the other sign.
    """
    desperate, calm = texts.source(axis((0, 2.0))), texts.source(axis((1, 2.0)))
    start = torch.stack([axis((0, 1.0)), axis((1, -1.0))])
    follow = started(vectors, texts, start, [[desperate], [calm]], raised=1)
    texts.move(desperate, axis((5, 2.0)))
    texts.move(calm, axis((7, 2.0)))
    expected = torch.stack([unit((0, 1.0), (5, 1.0)), -unit((1, 1.0), (7, 1.0))])
    torch.testing.assert_close(directions(follow, texts, arm), expected, rtol=0, atol=1e-6)


def test_of_rank_two_the_first_turns_and_the_neighbour_gives_way(vectors, texts):
    """(1, 0) turns to (1, 1) / sqrt(2); of its neighbour (0, 1) what is left is (-1, 1) / sqrt(2), still a unit.

    The second concept has rows of its own, which nothing has moved.
    """
    start = torch.stack([axis((0, 1.0)), axis((1, 1.0)), axis((4, 1.0)), axis((5, 1.0))])
    moving, still = texts.source(axis((3, 2.0))), texts.source(axis((6, 2.0)))
    follow = started(vectors, texts, start, [[moving], [still]], rank=2)
    texts.move(moving, axis((1, 2.0)))
    expected = torch.stack([unit((0, 1.0), (1, 1.0)), unit((0, -1.0), (1, 1.0)), *start[2:]])
    torch.testing.assert_close(directions(follow, texts), expected, rtol=0, atol=1e-6)


def test_retrain_takes_the_direction_from_the_texts_alone(vectors, texts):
    """The source has turned to (3, 4): so has the direction, though the start lies half-way off, without length.

    A second source, longer, counts no more: (3, 4) / 5 and (10, 0) / 10 add up to (1.6, 0.8).
    """
    source, other = texts.source(axis((0, 5.0))), texts.source(axis((0, 10.0)))
    for sources, expected in (([source], unit((0, 3.0), (7, 4.0))), ([source, other], unit((0, 1.6), (7, 0.8)))):
        follow = started(vectors, texts, unit((0, 1.0), (2, 1.0))[None], [sources])
        texts.move(source, axis((0, -2.0), (7, 4.0), (NEUTRAL, 50.0)))
        found = directions(follow, texts, Arm.HINGE_RETRAIN)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
        texts.move(source, axis((0, 2.0), (7, -4.0), (NEUTRAL, -50.0)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_retrain_recovers_a_planted_direction_and_has_the_starts_sign(vectors, texts, sign):
    """200 noisy texts on either side, 1 apart along a hidden axis; where nothing is planted nothing is recovered."""
    torch.manual_seed(0)
    hidden = torch.nn.functional.normalize(axis(*((place, place + 1.0) for place in range(6))))
    found = {}
    for planted in (1.0, 0.0):
        above, below = ([torch.randn(1, WIDTH) for _ in range(200)] for _ in range(2))
        above = [state + 5 * planted * hidden for state in above]
        source = Source([texts.text(state) for state in above], [texts.text(state) for state in below])
        # The start is only its sign: nearly orthogonal to what is planted.
        start = sign * torch.nn.functional.normalize(0.1 * hidden + axis((8, 1.0)))
        follow = started(vectors, texts, start[None], [[source]])
        found[planted] = float((directions(follow, texts, Arm.HINGE_RETRAIN)[0] * hidden).sum())
    assert sign * found[1.0] > 0.99
    assert abs(found[0.0]) < 0.7


@pytest.mark.parametrize("arm", [Arm.HINGE_REFIT, Arm.HINGE_RETRAIN, Arm.HINGE_UNION])
def test_stories_that_turn_round_do_not_turn_the_direction_round(vectors, texts, arm):
    """5 along axis 0 becomes (-5, 5): refitted 1 - 2 and 1, anew -1 and 1; with the start's sign (1, -1) in all."""
    source = texts.source(axis((0, 5.0)))
    follow = started(vectors, texts, axis((0, 1.0))[None], [[source]])
    texts.move(source, axis((0, -10.0), (7, 5.0)))
    directions(follow, texts, arm)
    torch.testing.assert_close(follow.fresh, unit((0, 1.0), (7, -1.0))[None], rtol=0, atol=1e-6)


# ---- the union


def test_union_adds_only_what_lies_outside(vectors, texts):
    """Turned by 0.05 the new direction has 0.05 / sqrt(1 + 0.05^2) outside: noise. Turned by 0.2 it has 0.196: added.

    What is added is the part outside alone; a second refit with the same texts finds nothing new.
    """
    source = texts.source(axis((3, 1.0)))
    start = axis((0, 1.0))[None]
    follow = started(vectors, texts, start, [[source]])
    texts.move(source, axis((7, 0.05)))
    torch.testing.assert_close(directions(follow, texts, Arm.HINGE_UNION), start, rtol=0, atol=1e-6)
    texts.move(source, axis((7, 0.15)))
    found = directions(follow, texts, Arm.HINGE_UNION)
    torch.testing.assert_close(found, torch.stack([axis((0, 1.0)), axis((7, 1.0))]), rtol=0, atol=1e-6)
    assert torch.equal(directions(follow, texts, Arm.HINGE_UNION, found), found)
    # A later turn adds a third beside them.
    texts.move(source, axis((9, 3.0)))
    found = directions(follow, texts, Arm.HINGE_UNION, found)
    expected = torch.stack([axis((0, 1.0)), axis((7, 1.0)), axis((9, 1.0))])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_union_adds_once_what_two_concepts_share(vectors, texts):
    """Both turn towards the same axis; the second has nothing outside the first's, and rounding is no direction."""
    start = torch.stack([axis((0, 1.0)), axis((1, 1.0))])
    sources = [texts.source(axis((3, 1.0))), texts.source(axis((4, 1.0)))]
    follow = started(vectors, texts, start, [[source] for source in sources])
    for source in sources:
        texts.move(source, axis((7, 1.0)))
    found = directions(follow, texts, Arm.HINGE_UNION)
    torch.testing.assert_close(found, torch.cat([start, axis((7, 1.0))[None]]), rtol=0, atol=1e-6)


def test_union_leaves_directions_that_are_not_orthogonal_as_they_are(vectors, texts):
    """Two targets 45 degrees apart are pressed as they were, and only the new one is orthogonal to both.

    Turned by 0.15 it has 0.148 outside their plane; the squares of its cosines to the two add up to more than 1.
    """
    start = torch.stack([axis((0, 1.0)), unit((0, 1.0), (1, 1.0))])
    sources = [texts.source(axis((3, 1.0))), texts.source(axis((4, 1.0)))]
    follow = started(vectors, texts, start, [[source] for source in sources])
    texts.move(sources[1], axis((7, 0.15)))
    found = directions(follow, texts, Arm.HINGE_UNION)
    torch.testing.assert_close(found, torch.cat([start, axis((7, 1.0))[None]]), rtol=0, atol=1e-6)


def test_union_stops_at_the_highest_rank_and_drops_no_target(vectors, texts):
    """Seven are pressed and two more are found: one is added. Nine targets are pressed to the end."""
    pressed = torch.stack([axis((place, 1.0)) for place in range(7)])
    sources = [texts.source(axis((10, 1.0))), texts.source(axis((11, 1.0)))]
    follow = started(vectors, texts, pressed[:2], [[source] for source in sources])
    for place, source in zip((12, 13), sources, strict=True):
        texts.move(source, axis((place, 1.0)))
    assert arms.MAX_RANK == 8
    found = directions(follow, texts, Arm.HINGE_UNION, pressed)
    torch.testing.assert_close(found, torch.cat([pressed, axis((12, 1.0))[None]]), rtol=0, atol=1e-6)
    more = torch.stack([axis((place, 1.0)) for place in range(9)])
    torch.testing.assert_close(directions(follow, texts, Arm.HINGE_UNION, more), more, rtol=0, atol=1e-6)


def test_cosine_compares_as_many_as_both_have():
    """(1, 0) and (0.6, 0.8) against (1, 0) and (1, 0): (1 + 0.6) / 2; against one alone: 1."""
    rows = torch.stack([axis((0, 1.0)), axis((0, 0.6), (1, 0.8))])
    others = torch.stack([axis((0, 1.0)), axis((0, 1.0))])
    assert refit.cosine(rows, others) == pytest.approx(0.8)
    assert refit.cosine(rows, others[:1]) == refit.cosine(others[:1], rows) == pytest.approx(1.0)


# ---- a run


class KillAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **_):
        raise Killed


@pytest.mark.parametrize(
    ("arm", "every", "saved"),
    [("hinge-refit", 1, 2), ("hinge-refit", 2, 3), ("hinge-union", 1, 2), ("hinge-union", 2, 3)],
)
def test_a_run_that_is_broken_off_follows_the_same_directions(make, tmp_path, arm, every, saved):  # noqa: F811
    """Saved after step 3 of a refit at 2, it takes that refit's file; at 2 it refits as the unbroken run did.

    A union goes on from the directions that it had before.
    """
    options = {"arm": arm, "refit_every": every, "refit_stories": 2, "refit_turns": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": saved, "learning_rate": 3e-2}
    unbroken = make("unbroken", **options)
    expected = train(unbroken)
    with pytest.raises(Killed):
        make("broken", callbacks=[KillAfterSaving()], **options).train()
    resumed = make("broken", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{saved}"))

    logged = [row for row in resumed.state.log_history if "loss" in row]
    names = [name for name in expected[-1] if name.startswith(("loss", "calibration/", "reading/", "refit/"))]
    for row, wanted in zip(logged, expected, strict=True):
        assert {name: row.get(name) for name in names} == {name: wanted.get(name) for name in names}
    assert_same_weights(resumed, unbroken)
    files = [
        {path.name: load_file(path)["directions"] for path in (tmp_path / run / "calibration").glob("refit-*")}
        for run in ("broken", "unbroken")
    ]
    assert files[0].keys() == files[1].keys() == {f"refit-{step}.safetensors" for step in range(every, 5, every)}
    assert all(torch.equal(found, files[1][name]) for name, found in files[0].items())
    assert all(row["refit/cosine_to_start"] < 0.9999 for row in expected if "refit/cosine_to_start" in row)
    # So it was no matter of course: the directions had moved, or there were more of them.
    start, first = resumed._calibration.pressure.start, files[1][f"refit-{every}.safetensors"]
    if arm == "hinge-refit":
        assert refit.cosine(first, start) < 0.9999
        return
    assert len(first) == 2
    rows = [files[1][f"refit-{step}.safetensors"] for step in range(every, 5, every)]
    assert len(rows[-1]) > 2
    assert all(torch.equal(later[: len(row)], row) for row, later in itertools.pairwise(rows))


def test_a_run_whose_refit_is_gone_is_not_resumed_with_other_directions(make, tmp_path):  # noqa: F811
    options = {"arm": "hinge-refit", "refit_every": 2, "refit_stories": 2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Killed):
        make(callbacks=[KillAfterSaving()], **options).train()
    (tmp_path / "run" / "calibration" / "refit-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"refit-2\.safetensors"):
        make(**options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_the_cosine_to_the_start_is_of_the_rows_that_are_refitted(make, tmp_path):  # noqa: F811
    """At rank 2 each target's neighbour stays, but for what makes it orthogonal to the new one."""
    options = {"arm": "hinge-refit", "rank": 2, "refit_every": 1, "refit_stories": 2, "refit_turns": 2}
    trainer = make(raise_concepts=["calm"], learning_rate=1e-2, max_steps=2, **options)
    (logged,) = [row["refit/cosine_to_start"] for row in train(trainer) if "refit/cosine_to_start" in row]
    start = trainer._calibration.pressure.start
    found = load_file(tmp_path / "run" / "calibration" / "refit-1.safetensors")["directions"]
    assert logged == pytest.approx(refit.cosine(found[[0, 2]], start[[0, 2]]), abs=1e-6)
    assert logged < refit.cosine(found, start) - 1e-5
