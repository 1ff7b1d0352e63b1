"""Every supported architecture, tiny and random, against `output_hidden_states`, on both padding sides."""

import pytest
import torch
import transformers

from calibrate import activations, models

DEPTH, WIDTH = 4, 32
COMMON = {
    "vocab_size": 120, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OWN_HEADS = {"head_dim": 8}
GPT2 = {"vocab_size": 120, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = COMMON | OWN_HEADS | {"sliding_window": 8}
ARCHITECTURES = {
    "Llama": COMMON, "Qwen2": COMMON, "Qwen3": COMMON | OWN_HEADS, "Gemma2": SLIDING, "Gemma3Text": SLIDING,
    "Mistral": COMMON, "Phi": COMMON, "Phi3": COMMON, "GPT2": GPT2,
    "GPTNeoX": {key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    "Olmo": COMMON, "Olmo2": COMMON, "Qwen3Moe": COMMON | OWN_HEADS | EXPERTS,
}  # fmt: skip
LENGTHS = (9, 14, 3, 6)


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    torch.manual_seed(0)
    name = request.param
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    head = "GPT2LMHeadModel" if name == "GPT2" else name.removesuffix("Text") + "ForCausalLM"
    return getattr(transformers, head)(config).eval()


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 120, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_hidden_states_without_padding(model, side):
    """Batched and padded against one by one; the last entry of `hidden_states` has passed the final norm."""
    assert len(models.blocks(model)) == DEPTH
    read = dict(activations.states(model, texts(), list(range(DEPTH)), token_budget=60, side=side))
    for row, ids in enumerate(texts()):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in range(DEPTH - 1):
            torch.testing.assert_close(read[row][layer], hidden[layer + 1][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scored", [4, 2, 0])
def test_continuations_of_one_beginning_are_those_of_separate_passes(model, scored):
    """Shared: 17 tokens, more than the sliding window of 8. Own: 5, 12, 1 and none, one beginning being a part.

    States of the whole sequences at every layer, and the scores from that of the first own token on, or of those that
    are not scored what would follow them.
    """
    generator = torch.Generator().manual_seed(2)
    beginning, *own = (torch.randint(1, 60, (n,), generator=generator).tolist() for n in (18, 5, 12, 1))
    sequences = [*([*beginning, 60 + row, *rest] for row, rest in enumerate(own)), beginning]
    branches = activations.branched(model, sequences[:scored], list(range(DEPTH)), sequences[scored:])
    assert not any(module._forward_hooks for module in model.modules())
    for row, (ids, found) in enumerate(zip(sequences, branches, strict=True)):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        assert found.shared == 17, row  # of the last sequence a token is left that is its own
        scores = output.logits[0].float().log_softmax(-1)
        wanted = scores[found.shared - 1 :] if row < scored else scores[-1:]
        torch.testing.assert_close(found.log_probabilities, wanted, atol=1e-4, rtol=1e-4)
        for layer in range(DEPTH - 1):
            expected = output.hidden_states[layer + 1][0]
            torch.testing.assert_close(found.states[layer], expected, atol=1e-4, rtol=1e-4)


RECURRENT = {"vocab_size": 120, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
MIXED = COMMON | {"layer_types": ["conv", "full_attention"] * 2}


@pytest.mark.parametrize(("name", "config"), [("Mamba", RECURRENT), ("Lfm2", MIXED)])
def test_a_state_that_continuations_cannot_share_is_refused(name, config):
    """Without attention, and with a convolution in every other layer."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()
    with pytest.raises(ValueError, match=f"^{name}ForCausalLM keeps a state .*; audits need a model whose layers all"):
        activations.branched(model, [[5, 6, 7], [5, 6, 8, 9]], [0])
    assert not any(module._forward_hooks for module in model.modules())


def test_the_body_stops_after_the_last_layer(model):
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(models.blocks(model))
    ]
    list(activations.states(model, texts()[:1], [1]))
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
