"""Unit states, readings, the cached reference, and the ceilings made of it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from calibrate import activations, corpora
from calibrate.training import ceilings, readings
from calibrate.training.readings import Probe, Reference, Units
from calibrate.vectors import load_vectors

CONTEXTS = [context for twin in corpora.load_twins()[:2] for context in twin]
WEIGHTS = {"header": 1.0, "reply": 1.0, "tool": 0.0}


def with_neutral(vectors, **centre_and_sigma):
    """Gives poolings a mean and deviation along the first axis; of (m - s, m, m + s) they are m and s exactly."""
    for pooling, (centre, sigma) in centre_and_sigma.items():
        states = torch.zeros(3, len(vectors.layers), vectors.hidden_size)
        states[:, :, 0] = torch.tensor([centre - sigma, centre, centre + sigma])[:, None]
        vectors.register_buffer(f"neutral_{pooling}", states)
    return vectors


@pytest.mark.parametrize(
    ("mixed", "kind", "inside"),
    [
        ("bf16", DistributedType.FSDP, torch.bfloat16),
        ("bf16", DistributedType.DEEPSPEED, torch.bfloat16),
        ("fp16", DistributedType.DEEPSPEED, torch.float16),
        ("no", DistributedType.FSDP, torch.float32),
        ("bf16", DistributedType.MULTI_GPU, torch.float32),  # autocast alone
    ],
)
def test_the_reference_has_the_precision_of_training(tiny, mixed, kind, inside):
    accelerator = SimpleNamespace(mixed_precision=mixed, distributed_type=kind, autocast=contextlib.nullcontext)
    before = {name: part.clone() for name, part in tiny.model.state_dict().items()}
    with readings.as_trained(accelerator, tiny.model):
        assert {part.dtype for part in tiny.model.parameters()} == {inside}
        assert {part.dtype for part in tiny.model.buffers()} == {torch.float32}
    assert all(torch.equal(part, before[name]) for name, part in tiny.model.state_dict().items())


def test_reader_by_hand(planted):
    """Header mu 1, sigma 2: tokens 4 and 8 read (6 - 1) / 2 = 2.5. Token mu 3, sigma 4: 7 and -1 read 1 and -1.

    Row 2 is padded on the left by three columns: header (2 - 1) / 2 = 0.5, one reply token (11 - 3) / 4 = 2, and one
    token of the tool result, before the header, (7 - 3) / 4 = 1. The header weighs 0.7, all reply tokens together 0.4,
    however many, the tool result 0.2.
    """
    vectors = with_neutral(planted, header=(1.0, 2.0), token=(3.0, 4.0))
    reader = readings.Reader(vectors, vectors.directions[:1, vectors.positions([2])], [2])
    states = torch.full((2, 6, 8), 50.0)  # whatever is not along the direction, or not in a span, must not count
    states[0, 1:5, 0] = torch.tensor([4.0, 8.0, 7.0, -1.0])
    states[1, 3:6, 0] = torch.tensor([7.0, 2.0, 11.0])
    probes = [Probe([0] * 5, slice(1, 3), slice(3, 5)), Probe([0] * 3, slice(1, 2), slice(2, 3), slice(0, 1))]
    weights = {"header": 0.7, "reply": 0.4, "tool": 0.2}
    units = readings.gather({2: states}, torch.tensor([0, 3]), probes, weights)
    assert reader(units)[:, :, 0, 0].tolist() == [[2.5, 1.0, -1.0], [0.5, 2.0, 1.0]]
    torch.testing.assert_close(units.weights, torch.tensor([[0.7, 0.2, 0.2], [0.7, 0.4, 0.2]]))
    assert units.roles.tolist() == [[0, 1, 1], [0, 1, 2]]


def test_prepare_keeps_the_header_and_the_first_reply_tokens(tokenizer):
    for tool in (False, True):
        for context, probe in zip(CONTEXTS, readings.prepare(tokenizer, CONTEXTS, 5, tool), strict=True):
            assert tokenizer.decode(probe.ids[probe.header]) == "<|im_start|>assistant\n"
            assert probe.header.stop == probe.reply.start
            assert probe.reply.stop == len(probe.ids) == probe.reply.start + 5
            assert context.reply.startswith(tokenizer.decode(probe.ids[probe.reply]))
            shown = tokenizer.decode(probe.ids[probe.tool])
            assert shown == (context.messages[-1]["content"] if tool else "")


def test_reference_readings_agree_with_the_vectors_own(tiny, tiny_vectors):
    """The same header means and reply tokens, read through `EmotionVectors.readings` in float64."""
    vectors = load_vectors(str(tiny_vectors))
    probes = readings.prepare(tiny.tokenizer, CONTEXTS, 3)
    reader = readings.Reader(vectors, vectors.directions[:, vectors.positions([2])], [2])
    reference = readings.reference(tiny.model, probes, [2], WEIGHTS, tiny.weight_hash)
    values = reader(reference.rows(list(range(len(probes)))))
    for pooling, of_unit in (
        ("header", lambda p: p.header),
        ("token", lambda p: slice(p.reply.start, p.reply.start + 1)),
    ):
        pools = [[of_unit(probe)] for probe in probes]
        states = activations.pooled(tiny.model, [probe.ids for probe in probes], pools, vectors.layers)[:, 0]
        expected = vectors.readings(states, pooling)[..., vectors.positions([2])[0]]
        found = values[:, 0 if pooling == "header" else 1, 0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_the_cached_reference_is_used_until_something_changes(tiny, tiny_vectors):
    probes = readings.prepare(tiny.tokenizer, CONTEXTS, 4)
    forwards = []
    tiny.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))

    def read(layers=(2,), of=probes, weight_hash="a", weights=WEIGHTS):
        forwards.clear()
        return readings.reference(tiny.model, of, list(layers), weights, weight_hash), len(forwards)

    first, ran = read()
    assert ran > 0
    again, ran = read()
    assert ran == 0
    for one, other in zip(first.rows([0, 1]), again.rows([0, 1]), strict=True):
        assert torch.equal(one, other)
    shorter = [*probes[:-1], probes[-1]._replace(header=slice(probes[-1].header.start, probes[-1].header.stop - 1))]
    for change in (
        {"of": shorter},
        {"of": probes[::-1]},
        {"layers": (3,)},
        {"weight_hash": "b"},
        {"weights": WEIGHTS | {"header": 2.0}},
    ):
        assert read(**change)[1] > 0, f"the states of other {list(change)} came from the cache"


def planted_reference(path, rows: list[list[list[float]]]) -> Reference:
    """A reference of these unit states along the first axis: for each probe header, reply and tool units."""
    tensors = {}
    for row, by_role in enumerate(rows):
        roles = torch.arange(3).repeat_interleave(torch.tensor([len(part) for part in by_role]))
        states = torch.zeros(len(roles), 1, 8)
        states[:, 0, 0] = torch.tensor([value for part in by_role for value in part])
        tensors |= {f"states.{row}": states, f"roles.{row}": roles, f"weights.{row}": torch.ones(len(roles))}
    save_file(tensors, path)
    return Reference(path)


def plain_reader(planted):
    """Readings are the first coordinate itself."""
    vectors = with_neutral(planted, header=(0.0, 1.0), token=(0.0, 1.0))
    return readings.Reader(vectors, vectors.directions[:1, vectors.positions([2])], [2])


def test_ceilings_are_quantiles_of_the_twins_by_role(planted, tmp_path):
    """Headers 1, 2, 3, 4: the 0.25 quantile is 1.75. Reply tokens 10 and 20: 12.5. No tool result: 0, never used."""
    rows = [[[1.0], [10.0], []], [[2.0], [20.0], []], [[3.0], [], []], [[4.0], [], []]]
    reference = planted_reference(tmp_path / "r.safetensors", rows)
    found = ceilings.quantiles(reference, [0, 1, 2, 3], plain_reader(planted), 0.25)
    assert found.flatten().tolist() == [1.75, 12.5, 0.0]


def test_limits_of_every_mode():
    """Ceilings 1 (header) and 2 (reply); the reference reads 0.5 and 3: plus a margin of 0.25 these are 0.75, 3.25."""
    level, roles = torch.tensor([1.0, 2.0, 9.0])[:, None, None], torch.tensor([[0, 1]])
    before = torch.tensor([0.5, 3.0])[None, :, None, None]
    found = {mode: ceilings.limits(mode, level, 0.25, roles, before).flatten().tolist() for mode in ceilings.MODES}
    assert found == {"reduce": [1.0, 2.0], "prevent": [0.75, 3.25], "both": [0.75, 2.0]}


def test_matched_ceilings_shift_all_by_one_constant(planted, tmp_path):
    """Readings 3 and 4 against ceilings 0 and 1 are 3 above; to pay 0.5 (delta 1) they must be 1 above: shift by 2."""
    reference = planted_reference(tmp_path / "r.safetensors", [[[3.0], [4.0], []]])
    reader, low = plain_reader(planted), torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    assert ceilings.initial_hinge(reference, [0], reader, low, 1.0) == pytest.approx(2.5)
    found = ceilings.matched(reference, [0], reader, low, 1.0, 0.5)
    torch.testing.assert_close(found, low + 2, atol=1e-5, rtol=0)
    # Downwards as well: to pay 5.5 they must be 6 above.
    torch.testing.assert_close(ceilings.matched(reference, [0], reader, low, 1.0, 5.5), low - 3, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="initial hinge is 0: its readings are at or below the ceiling"):
        ceilings.matched(reference, [0], reader, low, 1.0, 0.0)


def test_units_of_other_lengths_are_padded_with_weight_zero(planted, tmp_path):
    reference = planted_reference(tmp_path / "r.safetensors", [[[1.0], [2.0, 3.0], []], [[4.0], [5.0], []]])
    units = reference.rows([1, 0])
    assert units.weights.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert plain_reader(planted)(units)[:, :, 0, 0].tolist() == [[4, 5, 0], [1, 2, 3]]
    assert isinstance(units, Units)
