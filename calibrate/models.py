"""Loads checkpoints (Hub id, folder, PEFT adapter folder, the embedded default), and finds and cuts their blocks."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from calibrate.default_model import DEFAULT_REPOSITORY, default_folder, resolve_default


class Checkpoint(NamedTuple):
    """A model in evaluation mode with its tokenizer."""

    model: Any  # a transformers or PEFT model
    tokenizer: Any
    name: str  # what the user asked for
    source: str  # the Hub id or folder it came from
    weight_hash: str  # of the base weights; an adapter does not change it
    adapter_hash: str | None = None  # of base, adapter and its strength
    revision: str | None = None  # the Hub's commit, where the base came from there


def load(
    name: str = "default",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
    block_list: str | None = None,
) -> Checkpoint:
    """Loads a Hub id, a local folder, a PEFT adapter folder, or `default` through one call, onto a GPU if any.

    float32 on a CPU without bf16 units, where bf16 is several times slower; else the checkpoint's own dtype.

    Args:
        block_list: dotted name, from the body, of the list of its blocks, for an architecture `blocks` cannot find.

    Raises:
        ValueError: nothing is found under `name`, or the tokenizer has no chat template, or the model no such blocks.
    """
    source, adapter = _resolve(name)
    if adapter and revision is None:
        from peft import PeftConfig

        revision = PeftConfig.from_pretrained(adapter).revision  # of the base that it was trained on
    model, tokenizer = _open(name, source, revision=revision, trust_remote_code=trust_remote_code)
    _set_template(tokenizer, name, chat_template)
    if source == str(default_folder()):
        # An adapter that is trained on it names its base by this, on any machine.
        model.name_or_path = model.config._name_or_path = DEFAULT_REPOSITORY
    weight_hash = hash_weights(model)
    adapter_hash = None
    if adapter:
        from peft import PeftModel
        from safetensors import SafetensorError

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, SafetensorError) as error:  # tensors of another size, or a file that is cut off
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"adapter {name!r} does not fit its base {source} ({reason}); give the base it names"
            ) from error
        _check_adapter(model, adapter, name, source)
        adapter_hash = _adapter_hash(model)
    if block_list is not None:
        decoder(model).calibrate_blocks = block_list
    blocks(model)  # raises where it finds none
    revision = getattr(model.config, "_commit_hash", None)
    return Checkpoint(_to_device(model.eval()), tokenizer, name, source, weight_hash, adapter_hash, revision)


def _adapter_hash(model: Any) -> str:
    """A short hash of base and adapter: of their values, and of how much an adapter's count."""
    config = model.peft_config["default"].to_dict()
    counts = {key: config.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")}
    counts |= {"alpha": config["alpha"]} if "alpha" in config else {}  # of LoHa and LoKr
    return hashlib.sha256(f"{hash_weights(model)}{json.dumps(counts, sort_keys=True)}".encode()).hexdigest()[:16]


def _check_adapter(model: Any, folder: str, name: str, source: str) -> None:
    """Raises ValueError where file and model do not hold the same tensors: PEFT warns of some and drops the others."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        kept = {key for key in file.keys() if not re.search(r"embed|lm_head", key)}  # noqa: SIM118
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if wrong := sorted(kept ^ {key for key in own if not re.search(r"embed|lm_head", key)}):
        raise ValueError(
            f"adapter {name!r} does not fit its base {source} ({len(wrong)} tensors are in one of them alone, such as "
            f"{wrong[0]}); give the base it was trained on"
        )


def load_tokenizer(name: str, chat_template: Path | None = None, **options) -> Any:
    """The tokenizer alone of what `load` takes; OSError where its files are not to be had."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_resolve(name)[0], **options)
    _set_template(tokenizer, name, chat_template)
    return tokenizer


def load_shape(name: str, **options) -> tuple[str, int, int]:
    """Kind, width and depth of what `load` takes, from its configuration alone; OSError where there is none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_resolve(name)[0], **options).get_text_config()
    return config.model_type, config.hidden_size, config.num_hidden_layers


def _set_template(tokenizer: Any, name: str, chat_template: Path | None) -> None:
    if chat_template is not None:
        if not chat_template.is_file():
            raise ValueError(f"{chat_template}: no such file; give the path of a Jinja chat template")
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template; give one with `--chat-template FILE.jinja`, or set "
            "`tokenizer.chat_template` and save it"
        )


def _to_device(model: Any) -> Any:
    """On the GPU of this process where there is one: under `accelerate launch` each process has its own."""
    return model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}") if torch.cuda.is_available() else model


def _open(name: str, source: str, **options) -> tuple[Any, Any]:
    """Model and tokenizer of a Hub id or a folder; never from pickled weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
        options |= {"dtype": _dtype(), "use_safetensors": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} cannot be loaded ({reason}); give a Hub id, a folder with config.json and "
            "model.safetensors, a PEFT adapter folder, or `default`"
        ) from error
    model, told = loaded
    if missing := sorted(told["missing_keys"]):  # transformers fills them at random, and only says so
        raise ValueError(
            f"model {name!r}: {len(missing)} weights are not in {source}, such as {missing[0]!r}; save it again with "
            "`save_pretrained`"
        )
    # Where the tokenizer's files are missing transformers builds one with an empty vocabulary.
    if set(tokenizer.tokenize("a")) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"model {name!r}: no usable tokenizer in {source}; save the model's tokenizer there")
    return model, tokenizer


def _resolve(name: str) -> tuple[str, str | None]:
    """The base model's source, and the adapter folder if `name` is one."""
    if name == "default":
        return resolve_default(), None
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        from peft import PeftConfig

        # PEFT would unpickle `adapter_model.bin`, even when told to use safetensors.
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"adapter {name!r}: no adapter_model.safetensors there, and `.bin` files are pickles, which are not "
                "read; save it again with `save_pretrained`"
            )
        try:
            config = PeftConfig.from_pretrained(name)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"adapter {name!r}: adapter_config.json cannot be read ({type(error).__name__}: {error}); it is "
                "damaged, or of a newer PEFT: save it again, or update `peft`"
            ) from error
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"adapter {name!r} is of kind {config.peft_type.value}, which does not work within the blocks that "
                "are read; give a LoRA"
            )
        base = config.base_model_name_or_path
        if base is None:
            raise ValueError(
                f"adapter {name!r}: adapter_config.json names no base; write its `base_model_name_or_path` there"
            )
        if base == DEFAULT_REPOSITORY:
            base = resolve_default()
        return base, name
    looks_local = folder.is_absolute() or name.startswith(".") or name.count("/") != 1
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(
            f"model {name!r}: no folder with config.json or adapter_config.json there; give a Hub id, such a folder, "
            "or `default`"
        )
    return name, None


def _dtype() -> torch.dtype | str:
    # The units, not the instruction set: AVX-512 BF16 or AMX. Without them bf16 is emulated and several times slower.
    units = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends.cpu, "get_cpu_capability") else ""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    native = "AVX512" in units and ("avx512_bf16" in flags or "amx_bf16" in flags)
    return "auto" if torch.cuda.is_available() or native else torch.float32


@contextlib.contextmanager
def as_reference(model: Any) -> Generator[None]:
    """Inside, the model is the reference: in evaluation mode, without gradients, with any adapter disabled."""
    training = model.training
    model.eval()
    adapter = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    try:
        with torch.no_grad(), adapter:
            yield
    finally:
        model.train(training)


def decoder(model: Any) -> Any:
    """The body without the vocabulary projection, below any PEFT wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


def text_config(model: Any) -> Any:
    """The configuration of the text model: `hidden_size`, `num_hidden_layers` and the rest."""
    return decoder(model).config.get_text_config()


def window(model: Any) -> int | None:
    """The longest text in tokens that the model takes; None where its configuration does not say."""
    return getattr(text_config(model), "max_position_embeddings", None)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks in order; `blocks(model)[i]` gives what this project calls layer i.

    Raises:
        ValueError: no list of as many modules as the configuration has layers, nor one under the name that was given.
    """
    body = decoder(model)
    depth = text_config(model).num_hidden_layers
    named = getattr(body, "calibrate_blocks", None)
    if named is not None:
        found = dict(body.named_modules()).get(named)
        lists = [found] if isinstance(found, nn.ModuleList) and len(found) == depth else []
    else:
        lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    if not lists:
        others = [name for name, child in body.named_modules() if isinstance(child, nn.ModuleList)]
        raise ValueError(
            f"{type(body).__name__} has no list of {depth} blocks {f'named {named!r}' if named else 'right below it'}"
            f"; name them with `--blocks NAME`, in a recipe `blocks: NAME` (its lists: {', '.join(others) or 'none'})"
        )
    return max(lists, key=lambda child: sum(p.numel() for p in child.parameters()))


@contextlib.contextmanager
def cut_after(model: nn.Module, layer: int) -> Generator[None]:
    """Inside, a forward pass stops after block `layer` where the architecture slices its list by the configuration.

    Where it does not (GPT-2 and NeoX), it runs to full depth with the same states; `activations.states` stops it.
    Nothing is moved or copied, so it is safe inside a training step.

    Raises:
        ValueError: the model has no such layer.
    """
    config = text_config(model)
    depth = config.num_hidden_layers
    check_layers([layer], depth)
    config.num_hidden_layers = layer + 1
    try:
        yield
    finally:
        config.num_hidden_layers = depth


def check_layers(layers: list[int], depth: int) -> None:
    """Raises ValueError unless every layer is one of a model with `depth` blocks."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"layer {layer} is out of range; this model has layers 0 to {depth - 1}")


def hash_weights(model: nn.Module) -> str:
    """A short hash of the base weights: names, shapes and 64 evenly spread values of every parameter.

    Not of every byte, so that it takes a second on any size; fine-tuning moves all of a parameter's values.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        positions = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long().to(flat.device)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[positions].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
