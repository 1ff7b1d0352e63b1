"""Every arm trains for two steps, does what it says, and a control gets the real arm's dose."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainers import NO_ANCHORS, PAIRS, make, shuffled_vectors, train, weights  # noqa: F401  (two are fixtures)

from calibrate import steering
from calibrate.corpora import Pair
from calibrate.training import arms
from calibrate.training.arms import ARMS, Arm
from calibrate.vectors import load_vectors

MOVING = set(Arm) - arms.PLAIN - arms.STEERED


def test_every_arm_is_described():
    assert set(ARMS) == set(Arm)


@pytest.mark.parametrize("arm", sorted(Arm))
def test_two_steps_of_every_arm(make, arm, shuffled_vectors):  # noqa: F811
    options = {"shuffled_vectors": shuffled_vectors} if arm == Arm.SHUFFLED else {}
    options |= {"other_concept": "guilty"} if arm == Arm.OTHER else {}
    trainer = make(
        arm=str(arm), refit_every=1, refit_stories=2, refit_turns=2, text_anchor_every=1, max_steps=2, **options
    )
    before = {name: part.clone() for name, part in weights(trainer).items()}
    logged = train(trainer)
    assert len(logged) == 2
    assert any(not torch.equal(part, before[name]) for name, part in weights(trainer).items())
    assert ("calibration/kl" in logged[0]) == (arm in MOVING)
    assert ("calibration/penalty" in logged[0]) == (arm in MOVING - {Arm.OUTPUT_KL})
    assert ("refit/cosine_to_start" in logged[1]) == (arm in arms.REFITTED)


@pytest.mark.parametrize("ceiling", ["reduce", "both"])
def test_a_control_starts_with_the_real_arms_hinge_and_share(make, tmp_path, shuffled_vectors, ceiling):  # noqa: F811
    found = {}
    for arm in (Arm.HINGE_FROZEN, Arm.RANDOM, Arm.SHUFFLED, Arm.OTHER):
        options = {"shuffled_vectors": shuffled_vectors, "other_concept": "guilty", "ceiling": ceiling}
        first = train(make(str(arm), arm=str(arm), contexts_per_step=4, max_steps=1, **options))[0]
        state = json.loads((tmp_path / arm / "calibration" / "state.json").read_text())
        directions = load_file(tmp_path / arm / "calibration" / "tensors.safetensors")["directions"]
        assert first["calibration/penalty"] == pytest.approx(state["initial_hinge"], abs=1e-4)
        found[arm] = (state["initial_hinge"], directions)
    hinges = [hinge for hinge, _ in found.values()]
    assert max(hinges) == min(hinges) > 0
    real = found[Arm.HINGE_FROZEN][1]
    for arm in (Arm.RANDOM, Arm.SHUFFLED, Arm.OTHER):
        assert (found[arm][1] * real).sum(-1).abs().max() < 0.99


def test_only_shuffled_vectors_of_this_model_are_that_control(make, shuffled_vectors, tmp_path, tiny_vectors):  # noqa: F811
    other = load_vectors(shuffled_vectors)
    other.weight_hash = "another"
    other.save(tmp_path / "other")
    for folder, found in ((tiny_vectors, "None"), (tmp_path / "other", r"'shuffled' and .*weights another")):
        with pytest.raises(
            ValueError, match=rf"`shuffled_vectors` .* are of recipe {found}.*`calibrate extract --rec"
        ):
            make(arm="shuffled", shuffled_vectors=str(folder))


def test_draws_of_the_random_arm_differ(make, tmp_path):  # noqa: F811
    rows = []
    for seed in (0, 1):
        make(f"draw-{seed}", arm="random", random_seed=seed)
        rows.append(load_file(tmp_path / f"draw-{seed}" / "calibration" / "tensors.safetensors")["directions"])
    assert (rows[0] * rows[1]).sum(-1).abs().max() < 0.9


def pair(kind: str, system: bool) -> Pair:
    prompt = [{"role": "system", "content": "Help."}] if system else []
    prompt.append({"role": "user", "content": "Mend it."})
    reply = [{"role": "assistant", "content": "Yes."}]
    return Pair("a/1", "a", "train", prompt, reply, reply, kind=kind)


def test_arms_that_change_the_data():
    """The line ends the system message, or becomes one; calm-dpo takes the other kind of pairs."""
    pairs = [pair("honest", True), pair("honest", False), pair("composed", True)]
    assert arms.prompts_of("none", pairs) == pairs[:2]
    assert arms.prompts_of("calm-dpo", pairs) == pairs[2:]
    for arm, words in (("exit-option", "say so and stop"), ("inoculation", "You are desperate")):
        changed = arms.prompts_of(arm, pairs)
        assert changed[0].prompt[0]["content"].startswith("Help. ")
        assert words in changed[0].prompt[0]["content"]
        assert [message["role"] for message in changed[1].prompt] == ["system", "user"]
        assert words in changed[1].prompt[0]["content"]


def test_steered_arms_change_the_training_pass_alone(make):  # noqa: F811
    """The first loss differs from plain TRL's: the policy and its reference are both steered; evaluation is not."""
    plain = train(make("plain", arm="none", max_steps=2))
    for arm in (Arm.STEER, Arm.ABLATE):
        steered = train(make(str(arm), arm=str(arm), max_steps=2, steer_dose=0.5))
        assert steered[0]["logps/chosen"] != plain[0]["logps/chosen"]
        assert steered[0]["loss"] == pytest.approx(plain[0]["loss"])  # at the reference DPO cannot tell replies apart
    one, *others = (
        make(f"{arm}-read", arm=str(arm), steer_dose=0.5, eval_dataset=Dataset.from_list(PAIRS)).evaluate()
        for arm in (Arm.NONE, Arm.STEER, Arm.ABLATE)
    )
    for other in others:
        assert other["eval_logps/chosen"] == one["eval_logps/chosen"]


def test_steering_at_fewer_layers_than_there_are_is_said(tiny, tiny_vectors, caplog):
    vectors = load_vectors(str(tiny_vectors))
    args = SimpleNamespace(arm=Arm.STEER, concepts=["desperate"], raise_concepts=[], steer_dose=0.05)
    for depth, said in ((len(vectors.layers), False), (5, True)):
        vectors.depth = depth
        arms.steering_of(args, tiny.model, vectors, None, [2])
        wanted = f"`arm: preventative-steering` adds the target at the {len(vectors.layers)} stored layers of 5"
        assert (wanted in caplog.text) is said


def test_consistency_draws_failing_states_to_those_of_the_passing_twins(make):  # noqa: F811
    options = NO_ANCHORS | {"max_steps": 12, "optim": "sgd", "learning_rate": 1e-2, "penalty_weight": 50.0}
    logged = train(make(arm="consistency", contexts_per_step=4, per_device_train_batch_size=1, **options))
    assert logged[-1]["calibration/penalty"] < 0.97 * logged[0]["calibration/penalty"]


# ---- directions


def test_targets_to_raise_are_pressed_by_their_negatives(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    found = arms.target_directions(vectors, ["desperate"], ["calm"], 1, [2])
    at = vectors.positions([2])
    torch.testing.assert_close(found[0], vectors.directions[vectors.index("desperate")][at])
    torch.testing.assert_close(found[1], -vectors.directions[vectors.index("calm")][at])


def test_a_rank_adds_the_nearest_concepts_without_what_they_share(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    at = vectors.positions([2])
    found = arms.target_directions(vectors, ["desperate"], [], 3, [2])
    assert found.shape[0] == 3
    rows = vectors.directions[:, at[0]]
    own = vectors.index("desperate")
    nearest = (rows @ rows[own]).argsort(descending=True)[1:3]
    gram = found[:, 0] @ found[:, 0].T
    torch.testing.assert_close(gram, torch.eye(3), atol=1e-5, rtol=0)
    for place, concept in enumerate(nearest, 1):
        assert (found[place, 0] * rows[concept]).sum() > 0.1  # what is left of it still points its way
    with pytest.raises(ValueError, match="`rank` is 11; these vectors have 10 concepts"):
        arms.target_directions(vectors, ["desperate"], [], 11, [2])


def test_random_directions_are_units_outside_all_concepts(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    draws = arms.random_directions(vectors, 3, [2], seed=1)
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(3, 1))
    rows = vectors.directions[:, vectors.positions([2])]
    assert torch.einsum("rlh,clh->rcl", draws, rows).abs().max() < 1e-4


def test_side_directions_are_the_other_concepts_without_the_targets_share(tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    pressed = ["desperate", "afraid"]
    targets = arms.target_directions(vectors, pressed, [], 1, [2])
    side = arms.side_directions(vectors, targets, pressed, [2])
    assert len(side) == len(vectors.concepts) - 2
    torch.testing.assert_close(side.norm(dim=-1), torch.ones(side.shape[:2]))
    assert torch.einsum("slh,tlh->stl", side, targets).abs().max() < 1e-5


# ---- steering


def test_steering_adds_the_stated_dose_and_is_undone(tiny, tiny_vectors):
    """0.1 of the median neutral norm at layer 2 along calm; nothing before the layer, nothing afterwards."""
    vectors = load_vectors(str(tiny_vectors))
    ids = torch.arange(5, 15)[None]
    norm = vectors.neutral("token")[:, vectors.positions([2])[0]].norm(dim=-1).median()
    with torch.no_grad():
        plain = tiny.model(ids, output_hidden_states=True).hidden_states
        with steering.steer(tiny.model, vectors, {"calm": 0.1}):
            steered = tiny.model(ids, output_hidden_states=True).hidden_states
        again = tiny.model(ids, output_hidden_states=True).hidden_states
    direction = vectors.directions[vectors.index("calm"), vectors.positions([2])[0]]
    torch.testing.assert_close(steered[3] - plain[3], (0.1 * norm * direction).expand_as(plain[3]), atol=1e-5, rtol=0)
    assert torch.equal(steered[2], plain[2])
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_increments_add_up_to_the_dose_at_every_layer():
    added = {1: torch.tensor([1.0]), 2: torch.tensor([3.0]), 4: torch.tensor([2.0])}
    assert steering.increments(added) == {1: torch.tensor([1.0]), 2: torch.tensor([2.0]), 4: torch.tensor([-1.0])}


def test_ablation_leaves_nothing_along_the_direction(tiny, tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    row = vectors.directions[[vectors.index("calm")], vectors.positions([2])[0]]
    cut = steering.Steering(tiny.model, remove={2: row})
    with torch.no_grad(), cut.active():
        states = tiny.model(torch.arange(5, 15)[None], output_hidden_states=True).hidden_states[3]
    assert (states @ row.T).abs().max() < 1e-5


def test_hooks_that_never_fire_are_an_error(tiny, tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    with (
        pytest.raises(RuntimeError, match=r"hooks at layers \[2\] never fired"),
        steering.steer(tiny.model, vectors, {"calm": 1.0}),
    ):
        pass
    with pytest.raises(ValueError, match="no layer to steer at"):
        steering.Steering(tiny.model)


def test_side_directions_leave_out_what_lies_within_the_targets(tiny_vectors):
    """Of rank 2 the pressed neighbour is one of the others: what is left of it is rounding, and no direction."""
    vectors = load_vectors(str(tiny_vectors))
    layers = vectors.layers
    one = arms.target_directions(vectors, ["desperate"], [], 1, layers)
    two = arms.target_directions(vectors, ["desperate"], [], 2, layers)
    others = len(vectors.concepts) - 1
    assert len(arms.side_directions(vectors, one, ["desperate"], layers)) == others
    found = arms.side_directions(vectors, two, ["desperate"], layers)
    assert len(found) == others - 1
    assert torch.einsum("slh,tlh->stl", found, two).abs().max() < 1e-3
