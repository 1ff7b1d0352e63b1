import pytest
import torch
from conftest import DEPTH

from calibrate import activations, models
from calibrate.activations import Tap, collate, pooled, states, token_budget_batches


def sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_hidden_states_and_the_cut_body_agree_on_every_layer(tiny):
    text = sequences(11)[0]
    ids = torch.tensor([text])
    tap = Tap(tiny.model, range(DEPTH))
    with torch.no_grad(), tap.recording() as recorded:
        hidden = tiny.model(input_ids=ids, output_hidden_states=True).hidden_states
    final_norm = models.decoder(tiny.model).norm
    for layer in range(DEPTH):
        raw = recorded[layer]
        last = layer == DEPTH - 1
        assert torch.equal(final_norm(raw) if last else raw, hidden[layer + 1])
        assert torch.equal(raw, hidden[layer + 1]) is not last  # the last entry is not the raw stream
        [(row, cut)] = states(tiny.model, [text], [layer])
        assert (row, cut.shape) == (0, (1, 11, 32))
        assert torch.equal(cut[0], raw[0])


def test_blocks_above_the_last_layer_do_not_run(tiny):
    ran = []
    for layer, block in enumerate(models.blocks(tiny.model)):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    list(states(tiny.model, sequences(4), [0, 2]))
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_one_by_one(tiny, side):
    texts, layers = sequences(5, 14, 3, 9), list(range(DEPTH))
    batched = dict(states(tiny.model, texts, layers, token_budget=1000, side=side))
    assert sorted(batched) == [0, 1, 2, 3]
    for row, text in enumerate(texts):
        [(_, alone)] = states(tiny.model, [text], layers)
        torch.testing.assert_close(batched[row], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions", "first"),
    [
        ("right", [[4, 0, 0], [7, 8, 9]], [[1, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 2]], [0, 0]),
        ("left", [[0, 0, 4], [7, 8, 9]], [[0, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 2]], [2, 0]),
    ],
)
def test_collate_pads_and_counts_positions_from_the_first_real_token(side, ids, mask, positions, first):
    batch = collate([2, 0], [[7, 8, 9], [5, 5, 5, 5], [4]], torch.device("cpu"), side)
    inputs = {name: tensor.tolist() for name, tensor in batch.inputs.items()}
    assert inputs == {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    assert (batch.rows, batch.first.tolist()) == ([2, 0], first)


def test_pooled_is_the_mean_of_each_pool_without_the_sink_token(tiny):
    """Pools 0:3 and : lose token 0: the means of tokens 1, 2 and of tokens 1, 2, ... to the end; -2: keeps both."""
    texts, layers = sequences(6, 10, 4), [1, 3]
    means = pooled(tiny.model, texts, [[slice(0, 3), slice(None), slice(-2, None)]] * 3, layers)
    assert (means.shape, means.dtype) == ((3, 3, 2, 32), torch.float64)
    for row, text in enumerate(texts):
        [(_, hidden)] = states(tiny.model, [text], layers)
        for pool, tokens in enumerate([[1, 2], range(1, len(text)), [len(text) - 2, len(text) - 1]]):
            by_hand = sum(hidden[:, token].double() for token in tokens) / len(tokens)
            torch.testing.assert_close(means[row, pool], by_hand, atol=1e-5, rtol=0)


def test_pools_that_are_empty_or_missing_are_refused(tiny):
    with pytest.raises(ValueError, match=r"text 1 has no tokens left in the pool 0:1; it is too short"):
        pooled(tiny.model, sequences(4, 4), [[slice(0, 4)], [slice(0, 1)]], [0])
    with pytest.raises(ValueError, match="2 sequences but 1 lists of pools; give one list for each sequence"):
        pooled(tiny.model, sequences(4, 4), [[slice(0, 4)]], [0])
    assert hooks(tiny.model) == 0


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([3, 10, 4, 4], [[1], [2, 3, 0]]),  # 10 x 2 > 12, then 4 x 3 = 12
        ([4, 4, 4, 4], [[0, 1, 2], [3]]),  # 4 x 4 > 12
        ([20, 1], [[0], [1]]),  # a text over the budget stands alone
        ([], []),
    ],
)
def test_batches_of_a_budget_of_12_tokens(lengths, batches):
    assert token_budget_batches(lengths, 12) == batches


@pytest.mark.parametrize("budget", [1, 50, 333, 10**6])
def test_every_row_is_in_one_batch_within_the_budget(budget):
    lengths = torch.randint(1, 120, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = token_budget_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= budget for batch in batches)


def test_a_tap_records_only_inside_recording(tiny):
    first, second = (torch.tensor([text]) for text in sequences(4, 7))
    tap = Tap(tiny.model, [1, 3])
    tiny.model(input_ids=second)
    with tap.recording() as recorded:
        assert recorded == {}
        tiny.model(input_ids=first)
    tiny.model(input_ids=second)
    assert {layer: state.shape[1] for layer, state in recorded.items()} == {1: 4, 3: 4}
    with pytest.raises(IndexError), tap.recording():
        tiny.model(input_ids=first + 10**6)  # no such token ids
    for _ in range(2):  # the error has left the tap off, or the second pass would be refused ...
        tiny.model(input_ids=second)
    with tap.recording() as again:  # ... and empty
        tiny.model(input_ids=second)
    assert again[1].shape[1] == 7


def test_a_recorded_pass_runs_every_layer_once(tiny):
    ids = torch.tensor(sequences(4))
    tap = Tap(tiny.model, [1, 3])
    missed = pytest.raises(AssertionError, match=r"hooks fired for \[1\], expected \[1, 3\]")
    with missed, tap.recording(), models.cut_after(tiny.model, 2):
        tiny.model(input_ids=ids)
    with tap.recording():
        tiny.model(input_ids=ids)
        with pytest.raises(AssertionError, match="layer 1 ran twice"):
            tiny.model(input_ids=ids)


@pytest.mark.parametrize("layer", [-1, DEPTH])
def test_a_layer_out_of_range_is_refused_before_any_hook(tiny, layer):
    message = f"layer {layer} is out of range; this model has layers 0 to {DEPTH - 1}"
    with pytest.raises(ValueError, match=message):
        Tap(tiny.model, [0, layer])
    with pytest.raises(ValueError, match=message):
        list(states(tiny.model, sequences(3), [layer]))
    assert hooks(tiny.model) == 0


def test_states_removes_its_hooks_however_it_ends(tiny):
    texts, during = sequences(5, 4, 3), []
    for _ in states(tiny.model, texts, [1, 2]):
        during.append(hooks(tiny.model))
    assert (during, hooks(tiny.model)) == ([2, 2, 2], 0)
    for _ in states(tiny.model, texts, [1, 2]):
        break
    assert hooks(tiny.model) == 0
    with pytest.raises(IndexError):
        list(states(tiny.model, [[10**6]], [1, 2]))  # no such token id
    assert hooks(tiny.model) == 0
    assert models.text_config(tiny.model).num_hidden_layers == DEPTH


def test_gradients_flow_through_a_tap(tiny):
    """They equal those through `hidden_states` and reach the blocks up to the layer only."""
    ids = torch.tensor(sequences(6))
    weights = {layer: block.mlp.up_proj.weight for layer, block in enumerate(models.blocks(tiny.model))}
    hidden = tiny.model(input_ids=ids, output_hidden_states=True).hidden_states[2 + 1]
    expected = torch.autograd.grad(hidden.pow(2).sum(), [weights[0], weights[2]])
    tap = Tap(tiny.model, [2])
    with tap.recording() as recorded:
        tiny.model(input_ids=ids)
    recorded[2].pow(2).sum().backward()
    assert [layer for layer, weight in weights.items() if weight.grad is not None] == [0, 1, 2]
    torch.testing.assert_close((weights[0].grad, weights[2].grad), expected)
    assert weights[0].grad.abs().max() > 0
    assert not next(iter(activations.states(tiny.model, sequences(3), [2])))[1].requires_grad
